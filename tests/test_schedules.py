import inspect
import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import schedules

TIMES = np.linspace(0, 1, 1281).astype("float32")


def cosine(t, logsnr_min=-15.0, logsnr_max=15.0):
    """Simple diffusion's listing, in float64."""
    limit_max = np.arctan(np.exp(-0.5 * logsnr_max))
    limit_min = np.arctan(np.exp(-0.5 * logsnr_min)) - limit_max
    return -2 * np.log(np.tan(limit_min * t + limit_max))


def shifted(t, image, noise, **bounds):
    return cosine(t, **bounds) + 2 * np.log(noise / image)


def interpolated(t, image, low, high):
    return t * shifted(t, image, low) + (1 - t) * shifted(t, image, high)


def karras(t, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Eq. 5 of Karras et al. (2022), from its last step (t = 0) to its first.

    Their data has no scale, so sigma is noise over signal.
    """
    i = 1 - t
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return -2 * np.log((high + i * (low - high)) ** rho)


def rectified_flow(t, shift=1.0, low=-20.0, high=20.0):
    """Flow time t' = s t / (1 + (s - 1) t), of bounded log-SNR."""
    t_0, t_1 = (1 / (1 + shift * np.exp(end / 2)) for end in (high, low))
    # 1 - t, without the cancellation of a difference near t = 1.
    left_1 = 1 / (1 + np.exp(-low / 2) / shift)
    left = left_1 + (1 - t) * (t_1 - t_0)
    t = t_0 + t * (t_1 - t_0)
    return 2 * np.log(left / (shift * t))


# Stable Diffusion's (CONVENTIONS.md), then a prediction without noise.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.cumprod(1 - BETAS)


def discrete(t):
    table = np.concatenate([[30], np.log(ALPHAS / (1 - ALPHAS))])
    return np.interp(1000 * t, np.arange(1001), table)


# Each schedule, its reference, and log-SNR at t = 0 and at t = 1.
SCHEDULES = {
    "cosine": (schedules.CosineSchedule(), cosine, (15, -15)),
    "narrow": (
        schedules.CosineSchedule(logsnr_min=-9.0, logsnr_max=12.5),
        lambda t: cosine(t, -9.0, 12.5),
        (12.5, -9),
    ),
    "shifted": (
        schedules.ShiftedCosineSchedule(
            image_resolution=128, noise_resolution=32
        ),
        lambda t: shifted(t, 128, 32),
        (15 - 2 * np.log(4), -15 - 2 * np.log(4)),
    ),
    "shifted up": (
        schedules.ShiftedCosineSchedule(
            image_resolution=28,
            noise_resolution=64,
            logsnr_min=-12.0,
            logsnr_max=10.0,
        ),
        lambda t: shifted(t, 28, 64, logsnr_min=-12.0, logsnr_max=10.0),
        (10 + 2 * np.log(64 / 28), -12 + 2 * np.log(64 / 28)),
    ),
    # Of the paper's ImageNet128 and text to image (appendix A.1).
    "interpolated": (
        schedules.InterpolatedCosineSchedule(
            image_resolution=128,
            noise_resolution_low=32,
            noise_resolution_high=128,
        ),
        lambda t: interpolated(t, 128, 32, 128),
        (15, -15 - 2 * np.log(4)),
    ),
    "interpolated far": (
        schedules.InterpolatedCosineSchedule(
            image_resolution=512,
            noise_resolution_low=32,
            noise_resolution_high=512,
        ),
        lambda t: interpolated(t, 512, 32, 512),
        (15, -15 - 2 * np.log(16)),
    ),
    "karras": (
        schedules.KarrasSchedule(),
        karras,
        (-2 * np.log(0.002), -2 * np.log(80)),
    ),
    "karras linear": (
        schedules.KarrasSchedule(sigma_min=0.01, sigma_max=50.0, rho=1.0),
        lambda t: karras(t, 0.01, 50.0, 1.0),
        (-2 * np.log(0.01), -2 * np.log(50)),
    ),
    "rectified flow": (
        schedules.RectifiedFlowSchedule(),
        rectified_flow,
        (20, -20),
    ),
    "rectified flow shifted": (
        schedules.RectifiedFlowSchedule(
            shift=3.0, logsnr_min=-25, logsnr_max=16
        ),
        lambda t: rectified_flow(t, 3.0, -25, 16),
        (16, -25),
    ),
    "discrete": (
        schedules.DiscreteSchedule.of_steps(ALPHAS),
        discrete,
        (30, np.log(ALPHAS[-1] / (1 - ALPHAS[-1]))),
    ),
}
every_schedule = pytest.mark.parametrize(
    ("schedule", "reference", "ends"), SCHEDULES.values(), ids=SCHEDULES
)


@every_schedule
def test_schedule_is_its_reference(schedule, reference, ends):
    got = ops.convert_to_numpy(schedule(TIMES))
    assert got.dtype == "float32"
    expected = reference(TIMES.astype("float64"))
    # One part in a million of an angle, or of sigma, is 2e-6 in log-SNR; and
    # where a table falls by 23 within a thousandth, time itself has few digits.
    slope = np.abs(np.gradient(expected, TIMES))
    assert np.all(np.abs(got - expected) <= 3e-6 + 1.2e-7 * TIMES * slope)


@every_schedule
def test_schedule_ends_exactly(schedule, reference, ends):
    got = ops.convert_to_numpy(schedule(np.float32([0, 1])))
    np.testing.assert_allclose(got, ends, rtol=2e-7)


@every_schedule
def test_schedule_falls_strictly_between_a_teachers_steps(
    schedule, reference, ends
):
    assert np.all(np.diff(ops.convert_to_numpy(schedule(TIMES))) < 0)


@every_schedule
def test_schedule_takes_times_of_any_shape_and_kind(schedule, reference, ends):
    for t in (0.25, np.float32(0.25), ops.full((), 0.25)):
        got = schedule(t)
        assert tuple(got.shape) == ()
        np.testing.assert_allclose(got, reference(0.25), atol=3e-6)
    grid = ops.reshape(ops.convert_to_tensor(TIMES[:12]), (3, 4))
    got = schedule(grid)
    assert tuple(got.shape) == (3, 4)
    np.testing.assert_allclose(
        ops.reshape(got, (-1,)), schedule(TIMES[:12]), rtol=1e-6
    )


@every_schedule
def test_schedule_config_round_trip(schedule, reference, ends):
    again = type(schedule).from_config(schedule.get_config())
    assert again.get_config() == schedule.get_config()
    stored = keras.saving.serialize_keras_object(schedule)
    loaded = keras.saving.deserialize_keras_object(stored)
    assert type(loaded) is type(schedule)
    assert loaded.get_config() == schedule.get_config()
    for other in (again, loaded):
        np.testing.assert_array_equal(other(TIMES), schedule(TIMES))


def test_a_schedule_stays_float32_under_half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        got = schedules.CosineSchedule()(ops.cast(TIMES[:640], "float32"))
    finally:
        keras.config.set_dtype_policy("float32")
    assert keras.backend.standardize_dtype(got.dtype) == "float32"


def test_interpolation_meets_the_shifted_schedules_at_the_ends():
    # By their names: low noise resolution at t = 1, high at t = 0.
    both = schedules.InterpolatedCosineSchedule(
        image_resolution=64, noise_resolution_low=16, noise_resolution_high=128
    )
    for t, resolution in ((0.0, 128), (1.0, 16)):
        one = schedules.ShiftedCosineSchedule(
            image_resolution=64, noise_resolution=resolution
        )
        np.testing.assert_allclose(both(t), one(t), rtol=2e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: schedules.CosineSchedule(logsnr_min=3.0, logsnr_max=3.0),
            "`logsnr_min` must be below",
        ),
        (
            lambda: schedules.CosineSchedule(logsnr_max=float("nan")),
            "`logsnr_max` must be a number",
        ),
        (
            lambda: schedules.ShiftedCosineSchedule(
                image_resolution=0, noise_resolution=32
            ),
            "`image_resolution` must be a positive number",
        ),
        (
            lambda: schedules.ShiftedCosineSchedule(
                image_resolution=64, noise_resolution=-1
            ),
            "`noise_resolution` must be a positive number",
        ),
        (
            lambda: schedules.ShiftedCosineSchedule(
                image_resolution=64,
                noise_resolution=32,
                logsnr_min=1.0,
                logsnr_max=0.0,
            ),
            "`logsnr_min` must be below",
        ),
        *[
            (
                lambda bad=bad: schedules.InterpolatedCosineSchedule(
                    **{
                        "image_resolution": 64,
                        "noise_resolution_low": 32,
                        "noise_resolution_high": 64,
                        bad: 0,
                    }
                ),
                f"`{bad}` must be a positive number",
            )
            for bad in (
                "image_resolution",
                "noise_resolution_low",
                "noise_resolution_high",
            )
        ],
        *[
            (
                lambda bad=bad: schedules.KarrasSchedule(**{bad: -0.1}),
                f"`{bad}` must be a positive number",
            )
            for bad in ("sigma_min", "sigma_max", "rho")
        ],
        (
            lambda: schedules.RectifiedFlowSchedule(shift=0),
            "`shift` must be a positive number",
        ),
        (
            lambda: schedules.RectifiedFlowSchedule(logsnr_min=20.0),
            "`logsnr_min` must be below",
        ),
        (
            lambda: schedules.RectifiedFlowSchedule(shift=2.0, logsnr_max=79),
            r"`logsnr_max` must be in \[-80, 80\] before the shift.*=79",
        ),
        *[
            (
                lambda bad=bad: schedules.DiscreteSchedule(bad),
                "`alphas_cumprod` must be 2 or more numbers in",
            )
            for bad in (None, 0.5, [0.5], [0.4, 0.5], [1.5, 0.5], ["a", "b"])
        ],
        (
            lambda: schedules.DiscreteSchedule.of_steps(ALPHAS, 1001),
            "`num_steps` must be an integer of at least 1 and at most 1000",
        ),
        (
            lambda: schedules.DiscreteSchedule.of_steps(ALPHAS, spacing="even"),
            "`spacing` must be one of",
        ),
        (
            lambda: schedules.DiscreteSchedule.of_steps(
                ALPHAS, 10, spacing="leading", offset=101
            ),
            "`offset` must be an integer of at least 0 and at most 100",
        ),
        (
            lambda: schedules.DiscreteSchedule.of_steps(ALPHAS, 4, final=2),
            r"`final` must be in \[0, 1\]",
        ),
        (
            lambda: schedules.KarrasSchedule(sigma_min=80.0),
            "`sigma_min` must be below",
        ),
        (
            lambda: schedules.KarrasSchedule(sigma_min=1e-9, rho=0.1),
            "`rho` must be larger.*Received: rho=0.1, sigma_min=1e-09",
        ),
        (
            lambda: schedules.CosineSchedule(logsnr_min=-1e4),
            r"`logsnr_min` must be a number in \[-80, 80\].*-10000",
        ),
        (
            lambda: schedules.ShiftedCosineSchedule(
                image_resolution=1, noise_resolution=64, logsnr_max=79
            ),
            r"`logsnr_max` must be in \[-80, 80\] after the shift.*=79",
        ),
        (
            lambda: schedules.InterpolatedCosineSchedule(
                image_resolution=64,
                noise_resolution_low=64,
                noise_resolution_high=2,
            ),
            "`noise_resolution_low` must be at most 21.96 times.*_high=2",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NO_NUMBERS = [None, True, "1", b"1", [1.0], 1j, float("nan"), float("inf")]
NO_NUMBERS += [10**400, -1e300, np.float32("nan"), np.ones(2)]
RESOLUTIONS = {"image_resolution": 64, "noise_resolution": 32}
NEEDED = {
    schedules.CosineSchedule: {},
    schedules.ShiftedCosineSchedule: RESOLUTIONS,
    schedules.InterpolatedCosineSchedule: {
        "image_resolution": 64,
        "noise_resolution_low": 32,
        "noise_resolution_high": 64,
    },
    schedules.KarrasSchedule: {},
    schedules.RectifiedFlowSchedule: {},
}


@pytest.mark.parametrize("schedule", NEEDED)
def test_what_is_no_number_is_refused_by_name(schedule):
    for name in inspect.signature(schedule).parameters:
        for value in NO_NUMBERS:
            with pytest.raises(ValueError, match=f"`{name}` must .*Received: "):
                schedule(**{**NEEDED[schedule], name: value})


def test_numbers_of_numpy_are_stored_as_plain_pythons():
    schedule = schedules.ShiftedCosineSchedule(
        image_resolution=np.int64(64),
        noise_resolution=np.int32(32),
        logsnr_min=np.float32(-12),
        logsnr_max=np.float64(10),
    )
    kinds = {type(value) for value in schedule.get_config().values()}
    assert kinds == {int, float}


def places(num_steps, **arguments):
    """The steps of training that a schedule of so many steps visits."""
    schedule = schedules.DiscreteSchedule.of_steps(
        ALPHAS, num_steps, **arguments
    )
    times = np.arange(1, num_steps + 1, dtype="float32") / num_steps
    got = ops.convert_to_numpy(schedule(times))
    table = np.log(ALPHAS / (1 - ALPHAS))
    steps = np.interp(got[::-1], table[::-1], np.arange(1000.0)[::-1])
    np.testing.assert_allclose(steps, steps.round(), atol=1e-3)
    return [int(step) for step in steps[::-1].round()]


def test_a_tables_steps_are_those_of_diffusers_and_keras_cv():
    assert places(4, spacing="trailing") == [249, 499, 749, 999]
    # np.round(np.arange(1000, 0, -1000 / 7)) - 1
    assert places(7) == [142, 285, 428, 570, 713, 856, 999]
    assert places(4, spacing="leading") == [0, 250, 500, 750]
    assert places(3, spacing="leading", offset=1) == [1, 334, 667]
    assert places(4, spacing="linspace") == [0, 333, 666, 999]
    assert places(1) == [999]
    # Of the whole table, every number that divides its length is trailing.
    whole = schedules.DiscreteSchedule.of_steps(ALPHAS)
    part = schedules.DiscreteSchedule.of_steps(ALPHAS, 50)
    times = np.linspace(0, 1, 51).astype("float32")
    np.testing.assert_allclose(whole(times), part(times), atol=1e-5)


def test_a_tables_last_step_ends_where_it_is_told_to():
    def last(**arguments):
        made = schedules.DiscreteSchedule.of_steps(ALPHAS, 4, **arguments)
        return float(made(0.0))

    assert last() == 30
    final = ALPHAS[0]
    expected = np.log(final / (1 - final))
    np.testing.assert_allclose(last(final=final), expected, rtol=1e-6)


def test_a_tables_levels_of_no_signal_are_finite():
    schedule = schedules.DiscreteSchedule([1.0, 0.5, 0.0])
    np.testing.assert_array_equal(schedule([0.0, 0.5, 1.0]), [30, 0, -30])


def test_rectified_flows_shift_is_a_shift_of_time():
    t = np.linspace(0.001, 0.999, 500).astype("float32")
    schedule = schedules.RectifiedFlowSchedule(
        shift=3.0, logsnr_min=-30, logsnr_max=30
    )
    time = 1 / (1 + np.exp(ops.convert_to_numpy(schedule(t)) / 2))
    np.testing.assert_allclose(time, 3 * t / (1 + 2 * t), atol=2e-6)


BOUNDS = [-80, -79.95, -40, -1, 0.0, 0.11, 1, 40, 79.8, 80]
SIDES = [1e-3, 1, 32, 2**20]
SIGMAS = [1e-15, 0.002, 1, 1.02, 80, 1e15]
EXTREMES = [
    *(
        (schedules.CosineSchedule, {"logsnr_min": low, "logsnr_max": high})
        for low, high in itertools.product(BOUNDS, BOUNDS)
    ),
    *(
        (
            schedules.InterpolatedCosineSchedule,
            {
                "image_resolution": image,
                "noise_resolution_low": low,
                "noise_resolution_high": high,
                "logsnr_min": logsnr_min,
                "logsnr_max": logsnr_max,
            },
        )
        for image, low, high, (logsnr_min, logsnr_max) in itertools.product(
            SIDES, SIDES, SIDES, [(-15, 15), (-80, 80), (-60, -50), (-0.1, 0.1)]
        )
    ),
    *(
        (
            schedules.RectifiedFlowSchedule,
            {"shift": shift, "logsnr_min": low, "logsnr_max": high},
        )
        for shift, (low, high) in itertools.product(
            [1e-6, 0.1, 1, 3, 1e6], [(-15, 15), (-80, 80), (-52, -50), (9, 20)]
        )
    ),
    *(
        (schedules.KarrasSchedule, {"sigma_min": x, "sigma_max": y, "rho": rho})
        for x, y, rho in itertools.product(SIGMAS, SIGMAS, [0.1, 1, 7, 100])
    ),
]


def test_what_is_not_refused_is_finite_and_falls():
    falls = 0
    for schedule, arguments in EXTREMES:
        try:
            made = schedule(**arguments)
        except ValueError:
            continue
        logsnr = ops.convert_to_numpy(made(TIMES))
        assert np.all(np.abs(logsnr) <= 80.001), arguments
        assert np.all(np.diff(logsnr) < 0), arguments
        falls += 1
    assert falls > 100


@pytest.mark.parametrize("bounds", [(-80, -79.5), (79.5, 80), (-3, -2.9)])
def test_a_span_that_is_small_keeps_its_digits(bounds):
    schedule = schedules.CosineSchedule(
        logsnr_min=bounds[0], logsnr_max=bounds[1]
    )
    logsnr = ops.convert_to_numpy(schedule(np.float32([0, 1])))
    np.testing.assert_allclose(logsnr, bounds[::-1], rtol=1e-6)


def test_the_base_class_is_abstract():
    with pytest.raises(NotImplementedError):
        schedules.NoiseSchedule()(0.5)
