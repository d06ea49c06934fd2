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
}
every_schedule = pytest.mark.parametrize(
    ("schedule", "reference", "ends"), SCHEDULES.values(), ids=SCHEDULES
)


@every_schedule
def test_schedule_is_its_reference(schedule, reference, ends):
    got = ops.convert_to_numpy(schedule(TIMES))
    assert got.dtype == "float32"
    expected = reference(TIMES.astype("float64"))
    # One part in a million of an angle, or of sigma, is 2e-6 in log-SNR.
    np.testing.assert_allclose(got, expected, atol=3e-6)


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
