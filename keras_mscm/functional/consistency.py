"""Multistep consistency: the segments of time and the target (algorithm 1)."""

from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor, expand


def segment_times(
    step: Tensor,
    n_rel: Tensor,
    student_steps: int | Tensor,
    steps_per_segment: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The times `t`, `s` and `t_step` of algorithm 1.

    All three are whole numbers over the same `T = student_steps *
    steps_per_segment`, so that `s == t_step` holds exactly where `n_rel == 1`.

    Args:
        step: Segment, 0..student_steps - 1, `(batch,)`.
        n_rel: Teacher step within it, 1..steps_per_segment, `(batch,)`.
        student_steps: Number of segments, at least 1; or a tensor of it, a
            scalar or `(batch,)`.
        steps_per_segment: Teacher steps in each, at least 1, likewise.

    Returns:
        `t`, `s` and `t_step` in [0, 1], each `(batch,)`: a student step ends
        at `t_step`, the teacher's goes from `t` to `s = t - 1 / T`.

    Raises:
        ValueError: If `student_steps` is neither a positive integer nor a
            tensor.
    """
    # A traced tensor has no value yet that could be checked.
    if not ops.is_tensor(student_steps):
        student_steps = checks.check_positive_integer(
            "student_steps", student_steps
        )
    teacher_steps = student_steps * steps_per_segment
    first = step * steps_per_segment
    return (
        (first + n_rel) / teacher_steps,
        (first + n_rel - 1) / teacher_steps,
        first / teacher_steps,
    )


def consistency_target(
    x_teacher: Tensor,
    x_ref: Tensor,
    logsnr_t: Tensor,
    logsnr_s: Tensor,
    logsnr_step: Tensor,
) -> Tensor:
    """What the student should predict at `t` (algorithm 1, eq. 7).

    The paper goes there through z: the teacher's step, `z_s = DDIM_{t ->
    s}(x_teacher, z_t)`; the reference's, `z_ref = DDIM_{s -> t_step}(x_ref,
    z_s)`; and back, `invDDIM_{t -> t_step}(z_ref, z_t)`. Put together, `z_t`
    drops out, and what is left is an interpolation between the two
    predictions,

        w x_ref + (1 - w) x_teacher,
        w = expm1((l_s - l_step) / 2) / expm1((l_t - l_step) / 2),

    which needs no small denominator. With `s == t_step`, w is 0 and the
    target is the teacher's word alone (eq. 8).

    Args:
        x_teacher: The `x` for which DDIM takes the teacher's step from t to s
            (see `addim_x`), `(batch, ...)`.
        x_ref: The reference's prediction at s, of the same shape.
        logsnr_t: Log-SNR at t, `(batch,)`.
        logsnr_s: Log-SNR at s, `(batch,)`.
        logsnr_step: Log-SNR at t_step, `(batch,)`; t > s >= t_step.

    Returns:
        The target for x, `(batch, ...)`.
    """
    w = ops.expm1((logsnr_s - logsnr_step) / 2) / ops.expm1(
        (logsnr_t - logsnr_step) / 2
    )
    return x_teacher + expand(w, x_ref) * (x_ref - x_teacher)
