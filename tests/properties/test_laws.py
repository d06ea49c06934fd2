"""Laws that hold for all legal numbers, not for those of an example."""

import contextlib
import math

import keras
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import ops

from keras_mscm import functional as F
from keras_mscm import schedules

EPS = float(np.finfo("float32").eps)
LEVELS = st.floats(-30, 30, width=32)
# Without subnormal numbers, which XLA and TensorFlow take for 0.
PIXELS = st.floats(-3, 3, width=32, allow_subnormal=False)
IMAGES = st.lists(PIXELS, min_size=8, max_size=8).map(
    lambda values: np.array(values, "float32").reshape(2, 4)
)


def array(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def both(level):
    return ops.full((2,), level, "float32")


@given(IMAGES, IMAGES, LEVELS, LEVELS)
def test_inverse_ddim_takes_back_what_ddim_did(x, z, level_t, level_s):
    assume(abs(level_t - level_s) > 1e-3)
    levels = both(level_t), both(level_s)
    z_s = F.ddim(x, z, *levels)
    # What the inverse divides by, and what float32 leaves of the numerator.
    alpha_s = 1 / math.sqrt(1 + math.exp(-level_s))
    c = alpha_s * abs(math.expm1((level_t - level_s) / 2))
    sigmas = [
        1 / math.sqrt(1 + math.exp(level)) for level in (level_t, level_s)
    ]
    size = sigmas[1] / sigmas[0] * np.abs(z).max() + np.abs(array(z_s)).max()
    error = np.abs(array(F.inverse_ddim(z_s, z, *levels)) - x).max()
    assert error <= 32 * EPS * (size / c + np.abs(x).max()) + 1e-30
    # And the other way, where nothing is lost.
    back = F.ddim(F.inverse_ddim(z_s, z, *levels), z, *levels)
    assert np.abs(array(back) - array(z_s)).max() <= 64 * EPS * size + 1e-30


@given(IMAGES, LEVELS)
def test_a_step_to_where_it_begins_stays(z, level):
    same = F.ddim(0 * z + 1, z, both(level), both(level))
    np.testing.assert_array_equal(array(same), z)


@given(IMAGES, IMAGES, LEVELS, st.sampled_from(["v", "x", "epsilon"]))
def test_every_kind_of_prediction_gives_the_image(x, epsilon, level, kind):
    logsnr = both(level)
    z = F.add_noise(x, epsilon, logsnr)
    alpha = 1 / math.sqrt(1 + math.exp(-level))
    sigma = 1 / math.sqrt(1 + math.exp(level))
    output = {"v": alpha * epsilon - sigma * x, "x": x, "epsilon": epsilon}
    found = array(F.predict_x(output[kind].astype("float32"), z, logsnr, kind))
    # Epsilon's error is blown up where there is next to no signal.
    scale = 1 / alpha if kind == "epsilon" else 1
    size = np.abs(x).max() + np.abs(epsilon).max()
    assert np.abs(found - x).max() <= 32 * EPS * scale * size + 1e-30
    noise = array(F.predict_epsilon(x, z, logsnr))
    assert np.abs(noise - epsilon).max() <= 32 * EPS / sigma * size + 1e-30


# Schedules of whatever legal arguments, also NumPy's.


def numbers(low, high):
    floats = st.floats(low, high)
    return st.one_of(
        floats,
        floats.map(np.float64),
        st.floats(low, high, width=32).map(np.float32),
        st.integers(math.ceil(low), math.floor(high)),
        st.integers(math.ceil(low), math.floor(high)).map(np.int64),
    )


BOUNDS = {"logsnr_min": numbers(-80, 80), "logsnr_max": numbers(-80, 80)}
SIDES = numbers(0.0625, 4096)
ARGUMENTS = {
    schedules.CosineSchedule: BOUNDS,
    schedules.ShiftedCosineSchedule: {
        **BOUNDS,
        "image_resolution": SIDES,
        "noise_resolution": SIDES,
    },
    schedules.InterpolatedCosineSchedule: {
        **BOUNDS,
        "image_resolution": SIDES,
        "noise_resolution_low": SIDES,
        "noise_resolution_high": SIDES,
    },
    schedules.KarrasSchedule: {
        "sigma_min": st.floats(-8, 8).map(lambda power: 10**power),
        "sigma_max": st.floats(-8, 8).map(lambda power: 10**power),
        "rho": numbers(0.5, 50),
    },
}
SCHEDULES = st.one_of(
    st.tuples(st.just(kind), st.fixed_dictionaries(arguments))
    for kind, arguments in ARGUMENTS.items()
)
TIMES = np.linspace(0, 1, 129, dtype="float32")


def made(kind, arguments):
    """A schedule, if the arguments are legal."""
    with contextlib.suppress(ValueError):
        return kind(**arguments)
    assume(False)


@given(SCHEDULES)
def test_every_legal_schedule_falls_and_is_finite(chosen):
    logsnr = array(made(*chosen)(TIMES))
    assert np.all(np.isfinite(logsnr))
    assert np.all(np.diff(logsnr) < 0)


@given(SCHEDULES)
def test_every_legal_schedule_comes_back_from_its_configuration(chosen):
    schedule = made(*chosen)
    config = keras.saving.serialize_keras_object(schedule)
    assert keras.saving.deserialize_keras_object(config) == schedule
    assert type(schedule).from_config(schedule.get_config()) == schedule


# Targets, whatever the number of steps.


@st.composite
def segments(draw):
    student_steps = draw(st.integers(1, 64))
    total = draw(st.one_of(st.integers(student_steps, 10**6), st.just(10**6)))
    per_segment = max(total // student_steps, 1)
    step = draw(st.integers(0, student_steps - 1))
    ends = st.sampled_from([1, per_segment])
    n_rel = draw(st.one_of(ends, st.integers(1, per_segment)))
    return student_steps, per_segment, step, n_rel


PAPER = schedules.InterpolatedCosineSchedule(
    image_resolution=64, noise_resolution_low=32, noise_resolution_high=64
)


@given(
    segments(),
    IMAGES,
    IMAGES,
    st.sampled_from([schedules.CosineSchedule(), PAPER]),
)
def test_targets_lie_between_the_two_up_to_a_million_steps(
    segment, x_teacher, x_ref, schedule
):
    student_steps, per_segment, step, n_rel = segment
    times = F.segment_times(
        both(step), both(n_rel), student_steps, np.float32(per_segment)
    )
    for time in times:
        assert np.all((array(time) >= 0) & (array(time) <= 1))
    images = map(ops.convert_to_tensor, (x_teacher, x_ref))
    levels = map(schedule, times)
    target = array(F.consistency_target(*images, *levels))
    assert np.all(np.isfinite(target))
    low = np.minimum(x_teacher, x_ref) - 8 * EPS * 3
    high = np.maximum(x_teacher, x_ref) + 8 * EPS * 3
    assert np.all((target >= low) & (target <= high))
    if n_rel == 1:  # the teacher's word alone
        np.testing.assert_array_equal(target, x_teacher)


@given(
    st.floats(1, 2**20),
    st.floats(1, 2**20),
    st.integers(1, 10**7),
    st.integers(0, 2 * 10**7),
)
def test_annealed_steps_stay_between_start_and_end(
    start, end, iterations, iteration
):
    steps = float(
        F.teacher_steps(
            iteration, np.float32(start), np.float32(end), iterations
        )
    )
    low, high = sorted((start, end))
    assert low * (1 - 1e-5) <= steps <= high * (1 + 1e-5)
