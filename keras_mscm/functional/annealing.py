"""The teacher's step schedule (appendix A.1)."""

from keras import ops

from keras_mscm.functional.process import Tensor


def teacher_steps(
    iteration: Tensor, start: Tensor, end: Tensor, iterations: Tensor
) -> Tensor:
    """`N_teacher(i)`: log-linear from `start` to `end` (appendix A.1).

        exp(log start + clip(i / iterations, 0, 1) (log end - log start))

    Args:
        iteration: Training iteration i, from 0, a scalar.
        start: Teacher steps at the first iteration.
        end: Teacher steps from `iterations` on.
        iterations: Length of the annealing, at least 1.

    Returns:
        Teacher steps, a float scalar, not rounded.

    Example:

    >>> round(float(teacher_steps(50_000, 64.0, 1280.0, 100_000)), 1)
    286.2
    """
    done = ops.clip(ops.cast(iteration, "float32") / iterations, 0.0, 1.0)
    log_start, log_end = ops.log(start), ops.log(end)
    return ops.exp(log_start + done * (log_end - log_start))
