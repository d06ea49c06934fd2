import functools

import numpy as np
import pytest
from keras import ops

from keras_mscm import backend
from keras_mscm import functional as F
from keras_mscm.schedules import (
    CosineSchedule,
    InterpolatedCosineSchedule,
    KarrasSchedule,
)

STUDENT_STEPS = [1, 2, 3, 4, 8, 16, 64]
STEPS_PER_SEGMENT = [1, 2, 3, 7, 20, 80, 160, 1280]

SCHEDULES = [
    CosineSchedule(),
    InterpolatedCosineSchedule(
        image_resolution=64, noise_resolution_low=32, noise_resolution_high=64
    ),
    KarrasSchedule(),
]


def tensors(*arrays):
    return [ops.convert_to_tensor(array, "float32") for array in arrays]


def all_draws(student_steps, steps_per_segment):
    """Every `step` and `n_rel` that algorithm 1 may draw, over and over.

    Always 1280 of them: one shape, so that a compiler has one thing to do.
    """
    step, n_rel = np.meshgrid(
        np.arange(student_steps), 1 + np.arange(steps_per_segment)
    )
    return tensors(np.resize(step, 1280), np.resize(n_rel, 1280))


@pytest.mark.parametrize("student_steps", STUDENT_STEPS)
def test_segment_times_are_algorithm_1(student_steps):
    for per_segment in (1, 3, 20):
        step, n_rel = all_draws(student_steps, per_segment)
        times = F.segment_times(
            step, n_rel, student_steps, *tensors(per_segment)
        )
        t, s, t_step = (
            ops.convert_to_numpy(x).astype("float64") for x in times
        )

        step, n_rel = (
            ops.convert_to_numpy(x).astype("float64") for x in (step, n_rel)
        )
        total = per_segment * student_steps
        # JAX divides by way of the reciprocal: one more rounding.
        np.testing.assert_allclose(t_step, step / student_steps, rtol=2e-7)
        expected = step / student_steps + n_rel / total
        np.testing.assert_allclose(t, expected, rtol=2e-7)
        np.testing.assert_allclose(s, expected - 1 / total, atol=2e-7)
        assert t.max() == 1
        assert s.min() == t_step.min() == 0
        assert np.all((t > s) & (s >= t_step))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_teacher_step_of_a_segment_ends_at_its_start(compiled):
    # Bit for bit, and through the schedules: else eq. 8 does not hold.
    def times(step, n_rel, student_steps, per_segment):
        found = F.segment_times(step, n_rel, student_steps, per_segment)
        logsnr = [schedule(t) for schedule in SCHEDULES for t in found]
        return ops.stack([*found, *logsnr])

    if compiled:
        times = backend.compile_inference(times, [])
    size = max(STUDENT_STEPS)
    for student_steps in STUDENT_STEPS:
        step, n_rel = tensors(np.arange(size) % student_steps, np.ones(size))
        for per_segment in STEPS_PER_SEGMENT:
            _, s, t_step, *logsnr = ops.convert_to_numpy(
                times(step, n_rel, *tensors(student_steps, per_segment))
            )
            np.testing.assert_array_equal(s, t_step)
            for i in range(len(SCHEDULES)):
                np.testing.assert_array_equal(
                    logsnr[3 * i + 1], logsnr[3 * i + 2]
                )


@pytest.mark.parametrize("student_steps", [1, 4, 16])
def test_a_segment_ends_where_the_next_begins(student_steps):
    for per_segment in STEPS_PER_SEGMENT:
        step = np.arange(student_steps)
        last = np.full(student_steps, per_segment)
        t, _, t_step = (
            ops.convert_to_numpy(x)
            for x in F.segment_times(
                *tensors(step, last), student_steps, *tensors(per_segment)
            )
        )
        np.testing.assert_array_equal(t[:-1], t_step[1:])


def rates(logsnr):
    """Signal and noise rates in float64, for images of rank 2."""
    snr = np.exp(np.asarray(logsnr, "float64"))[:, None]
    return np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))


def paper_step(x, z_t, logsnr_t, logsnr_s, x_var=0.0):
    """aDDIM (algorithm 3); DDIM where `x_var` is 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    epsilon = (z_t - alpha_t * x) / sigma_t
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    power = np.mean(epsilon**2, axis=1, keepdims=True)
    return alpha_s * x + np.sqrt(sigma_s**2 + z_var / power) * epsilon


def paper_target(x_teacher, x_ref, z_t, logsnr, x_var):
    """The target by algorithm 1: there through z, and back, in float64."""
    t, s, t_step = logsnr
    z_s = paper_step(x_teacher, z_t, t, s, x_var)
    z_ref = paper_step(x_ref, z_s, s, t_step)
    (alpha_t, sigma_t), (alpha_step, sigma_step) = rates(t), rates(t_step)
    kept = sigma_step / sigma_t
    return (z_ref - kept * z_t) / (alpha_step - alpha_t * kept)


@functools.cache
def compiled_target():
    def target(x_teacher, x_ref, z_t, t, s, t_step, x_var):
        x = F.addim_x(x_teacher, z_t, t, s, x_var)
        return F.consistency_target(x, x_ref, t, s, t_step)

    return backend.compile_inference(target, [])


@pytest.mark.parametrize("x_var", [0.0, 0.05])
@pytest.mark.parametrize(
    ("student_steps", "steps_per_segment"),
    [(1, 1280), (4, 320), (16, 80), (20, 64), (1280, 1)],
)
def test_target_is_algorithm_1(student_steps, steps_per_segment, x_var):
    # Every time that may be drawn, so with t_step = 0 and with t = 1.
    times = F.segment_times(
        *all_draws(student_steps, steps_per_segment),
        student_steps,
        *tensors(steps_per_segment),
    )
    logsnr = [CosineSchedule()(t) for t in times]
    exact = [ops.convert_to_numpy(x).astype("float64") for x in logsnr]
    rng = np.random.default_rng(0)
    shape = (3, len(exact[0]), 6)
    x_teacher, x_ref, epsilon = rng.standard_normal(shape).astype("float32")
    alpha, sigma = rates(exact[0])
    z_t = (alpha * x_teacher + sigma * epsilon).astype("float32")
    # Below the largest posterior variance there can be, sigma^2 / alpha^2.
    x_var = x_var / (1 + np.exp(exact[0]))

    got = compiled_target()(
        *tensors(x_teacher, x_ref, z_t), *logsnr, *tensors(x_var)
    )
    got = ops.convert_to_numpy(got)
    expected = paper_target(x_teacher, x_ref, z_t, exact, x_var[:, None])
    # A few roundings of images of size up to 5: no division makes them more.
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_target_where_s_is_t_step_is_the_teachers_word(compiled):
    target = F.consistency_target
    if compiled:
        target = backend.compile_inference(target, [])
    # Eq. 8 and 9: exact, whatever the reference says.
    rng = np.random.default_rng(0)
    x_teacher, x_ref = tensors(*rng.standard_normal((2, 64, 8, 8, 1)))
    for per_segment in (1, 20, 1280):
        times = F.segment_times(
            *tensors(np.arange(64), np.ones(64)), 64, *tensors(per_segment)
        )
        logsnr = map(CosineSchedule(), times)
        got = target(x_teacher, x_ref, *logsnr)
        np.testing.assert_array_equal(got, x_teacher)


def test_target_of_a_consistent_student_is_its_own_prediction():
    # A student right about the teacher's path says the same x at t and s.
    x = tensors(np.random.default_rng(0).standard_normal((5, 6)))[0]
    logsnr = tensors(*np.linspace([-9, -8, 1], [0, 3, 15], 5).T)
    got = F.consistency_target(x, x, *logsnr)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "4", np.ones(2)])
def test_a_number_of_segments_that_is_none_is_refused(bad):
    step, n_rel, per_segment = tensors(np.zeros(2), np.ones(2), 3)
    with pytest.raises(ValueError, match="`student_steps` must be an integer"):
        F.segment_times(step, n_rel, bad, per_segment)
