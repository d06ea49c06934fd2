"""Noise schedules: time t in [0, 1] to log-SNR, falling from data to noise."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

# A float32's exponential is finite and not 0 up to here.
_LOGSNR_BOUND = 80


def _bounds(logsnr_min: Any, logsnr_max: Any) -> tuple[float, float]:
    """The two as numbers; raises unless the one is below the other."""
    allowed = f"a number in [-{_LOGSNR_BOUND}, {_LOGSNR_BOUND}]"
    low, high = (
        checks.check_number(name, value, -_LOGSNR_BOUND, allowed, _LOGSNR_BOUND)
        for name, value in (
            ("logsnr_min", logsnr_min),
            ("logsnr_max", logsnr_max),
        )
    )
    # Nearer than this, times of a fine grid would share a log-SNR in float32.
    if not high - low >= 1e-2:
        raise ValueError(
            "`logsnr_min` must be below `logsnr_max` by 0.01 or more. "
            f"Received: logsnr_min={logsnr_min}, logsnr_max={logsnr_max}"
        )
    return low, high


def _resolution(name: str, value: Any) -> float:
    return checks.check_number(
        name, value, 1e-3, "a positive number in [0.001, 2**20]", 2**20
    )


class NoiseSchedule:
    """Maps time to log-SNR.

    A subclass says `logsnr = schedule(t)`, strictly falling in t and finite at
    both ends: at t = 0 there is next to no noise, at t = 1 next to no signal.
    Schedules of equal arguments are equal.

    Call arguments:
        t: Times in [0, 1], of any shape.

    Call returns:
        Log-SNR, float32, of the shape of `t`.
    """

    def __call__(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """The inverse of `get_config`."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and (
            self.get_config() == other.get_config()
        )

    def __hash__(self) -> int:
        return hash((type(self), *self.get_config().items()))


@keras.saving.register_keras_serializable(package="keras_mscm")
class CosineSchedule(NoiseSchedule):
    """`alpha = cos(pi t / 2)`, bounded: log-SNR is `-2 log tan(pi t / 2)`.

    The angle runs over a slightly shorter interval than [0, pi / 2], so that
    log-SNR runs from exactly `logsnr_max` to `logsnr_min` (Salimans & Ho,
    2022; Hoogeboom et al., 2023).

    Args:
        logsnr_min: Log-SNR at t = 1, from -80 to 80.
        logsnr_max: Log-SNR at t = 0, from -80 to 80.

    Raises:
        ValueError: If one is out of its range, or `logsnr_min` is not below
            `logsnr_max`.

    Example:

    >>> [round(float(logsnr)) for logsnr in CosineSchedule()([0.0, 0.5, 1.0])]
    [15, 0, -15]
    """

    def __init__(self, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0):
        self.logsnr_min, self.logsnr_max = _bounds(logsnr_min, logsnr_max)
        self._angle_0 = math.atan(math.exp(-self.logsnr_max / 2))
        self._angle_1 = math.atan(math.exp(self.logsnr_min / 2))

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        span = math.pi / 2 - self._angle_0 - self._angle_1
        # tan loses its digits near pi / 2; each end is measured from itself.
        from_data = self._angle_0 + t * span
        from_noise = self._angle_1 + (1.0 - t) * span
        return 2 * (ops.log(ops.sin(from_noise)) - ops.log(ops.sin(from_data)))

    def get_config(self) -> dict[str, Any]:
        return {"logsnr_min": self.logsnr_min, "logsnr_max": self.logsnr_max}


@keras.saving.register_keras_serializable(package="keras_mscm")
class ShiftedCosineSchedule(CosineSchedule):
    """The cosine schedule of a lower resolution, for larger images.

    Adds `2 log(noise_resolution / image_resolution)` to the cosine schedule's
    log-SNR (Hoogeboom et al., 2023, section 3.1).

    Args:
        image_resolution: Height of the images in pixels.
        noise_resolution: Resolution whose noise level is wanted.
        logsnr_min: Log-SNR at t = 1, before the shift.
        logsnr_max: Log-SNR at t = 0, before the shift.

    Raises:
        ValueError: If a resolution is not positive, or the bounds are crossed.
    """

    def __init__(
        self,
        *,
        image_resolution: int,
        noise_resolution: int,
        logsnr_min: float = -15.0,
        logsnr_max: float = 15.0,
    ):
        super().__init__(logsnr_min=logsnr_min, logsnr_max=logsnr_max)
        self.image_resolution = _resolution(
            "image_resolution", image_resolution
        )
        self.noise_resolution = _resolution(
            "noise_resolution", noise_resolution
        )

    def __call__(self, t: Tensor) -> Tensor:
        shift = 2 * math.log(self.noise_resolution / self.image_resolution)
        return super().__call__(t) + shift

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "image_resolution": self.image_resolution,
            "noise_resolution": self.noise_resolution,
        }


@keras.saving.register_keras_serializable(package="keras_mscm")
class InterpolatedCosineSchedule(CosineSchedule):
    """From one shifted cosine schedule at t = 1 to another at t = 0.

    `t shifted(noise_resolution_low) + (1 - t) shifted(noise_resolution_high)`
    (Hoogeboom et al., 2023, section 3.1). The paper's schedule: from 32 to
    the resolution of the images (appendix A.1).

    Args:
        image_resolution: Height of the images in pixels.
        noise_resolution_low: Resolution whose noise level holds at t = 1.
        noise_resolution_high: Resolution whose noise level holds at t = 0.
        logsnr_min: Log-SNR at t = 1, before the shift.
        logsnr_max: Log-SNR at t = 0, before the shift.

    Raises:
        ValueError: If a resolution is not positive, or the bounds are crossed.
    """

    def __init__(
        self,
        *,
        image_resolution: int,
        noise_resolution_low: int,
        noise_resolution_high: int,
        logsnr_min: float = -15.0,
        logsnr_max: float = 15.0,
    ):
        super().__init__(logsnr_min=logsnr_min, logsnr_max=logsnr_max)
        self.image_resolution = _resolution(
            "image_resolution", image_resolution
        )
        self.noise_resolution_low = _resolution(
            "noise_resolution_low", noise_resolution_low
        )
        self.noise_resolution_high = _resolution(
            "noise_resolution_high", noise_resolution_high
        )

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        low = 2 * math.log(self.noise_resolution_low / self.image_resolution)
        high = 2 * math.log(self.noise_resolution_high / self.image_resolution)
        return super().__call__(t) + t * low + (1.0 - t) * high

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "image_resolution": self.image_resolution,
            "noise_resolution_low": self.noise_resolution_low,
            "noise_resolution_high": self.noise_resolution_high,
        }


@keras.saving.register_keras_serializable(package="keras_mscm")
class KarrasSchedule(NoiseSchedule):
    """The noise levels of Karras et al. (2022, eq. 5), for evaluation.

    The noise-to-signal ratio `sigma / alpha` runs from `sigma_min` to
    `sigma_max` linearly in its `1 / rho`-th power; log-SNR is `-2 log` of it.

    Args:
        sigma_min: Noise-to-signal ratio at t = 0.
        sigma_max: Noise-to-signal ratio at t = 1.
        rho: The exponent.

    Raises:
        ValueError: If an argument is not positive, or `sigma_min` is not below
            `sigma_max`.
    """

    def __init__(
        self,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ):
        self.sigma_min, self.sigma_max = (
            checks.check_number(
                name, value, 1e-15, "a positive number in [1e-15, 1e15]", 1e15
            )
            for name, value in (
                ("sigma_min", sigma_min),
                ("sigma_max", sigma_max),
            )
        )
        self.rho = checks.check_number(
            "rho", rho, 0.1, "a positive number in [0.1, 100]", 100
        )
        if not self.sigma_min * 1.01 <= self.sigma_max:
            raise ValueError(
                "`sigma_min` must be below `sigma_max` by 1 % or more. "
                f"Received: sigma_min={sigma_min}, sigma_max={sigma_max}"
            )

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        low, high = (
            self.sigma_min ** (1 / self.rho),
            self.sigma_max ** (1 / self.rho),
        )
        return -2 * self.rho * ops.log(low + t * (high - low))

    def get_config(self) -> dict[str, Any]:
        return {
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
        }
