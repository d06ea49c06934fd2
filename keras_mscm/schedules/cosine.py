"""The cosine schedule, and its shifts for larger images."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor
from keras_mscm.schedules.base import (
    LEAST_FALL,
    LOGSNR_BOUND,
    NoiseSchedule,
    check_bounds,
)


def _resolution(name: str, value: Any) -> float:
    return checks.check_number(
        name, value, 1e-3, "a positive number in [0.001, 2**20]", 2**20
    )


def _shift(image_resolution: float, noise_resolution: float) -> float:
    """How much higher log-SNR is for the noise level of a resolution."""
    return 2 * math.log(noise_resolution / image_resolution)


def _check_end(name: str, value: float, shift: float) -> None:
    """Raises unless log-SNR stays within its bounds, shifted too."""
    if abs(value + shift) > LOGSNR_BOUND:
        raise ValueError(
            f"`{name}` must be in [-{LOGSNR_BOUND}, {LOGSNR_BOUND}] after "
            f"the shift by the resolutions, {shift:g}, too. Received: "
            f"{name}={value}"
        )


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
            `logsnr_max` by 0.1.

    Example:

    >>> [round(float(logsnr)) for logsnr in CosineSchedule()([0.0, 0.5, 1.0])]
    [15, 0, -15]
    """

    def __init__(self, *, logsnr_min: float = -15.0, logsnr_max: float = 15.0):
        self.logsnr_min, self.logsnr_max = check_bounds(logsnr_min, logsnr_max)
        tan_0 = math.exp(-self.logsnr_max / 2)
        self._angle_0 = math.atan(tan_0)
        self._angle_1 = math.atan(math.exp(self.logsnr_min / 2))
        # The angle between both; where it is small, a difference of angles
        # would have no digits.
        more = tan_0 * math.expm1((self.logsnr_max - self.logsnr_min) / 2)
        self._span = math.atan(more / (1 + tan_0 * (tan_0 + more)))

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        # tan loses its digits near pi / 2; each end is measured from itself.
        from_data = self._angle_0 + t * self._span
        from_noise = self._angle_1 + (1.0 - t) * self._span
        return 2 * (ops.log(ops.sin(from_noise)) - ops.log(ops.sin(from_data)))

    def _least_slope(self) -> float:
        """How steeply log-SNR falls where it does so least."""
        # It falls by 4 / sin(2 angle) per angle.
        angle = min(max(math.pi / 4, self._angle_0), self._angle_0 + self._span)
        return 4 * self._span / math.sin(2 * angle)

    def get_config(self) -> dict[str, Any]:
        return {"logsnr_min": self.logsnr_min, "logsnr_max": self.logsnr_max}


@keras.saving.register_keras_serializable(package="keras_mscm")
class ShiftedCosineSchedule(CosineSchedule):
    """The cosine schedule of a lower resolution, for larger images.

    Adds `2 log(noise_resolution / image_resolution)` to the cosine schedule's
    log-SNR (Hoogeboom et al., 2023, section 3.1).

    Args:
        image_resolution: Height of the images in pixels, 0.001 to 2**20.
        noise_resolution: Resolution whose noise level is wanted, 0.001 to
            2**20.
        logsnr_min: Log-SNR at t = 1, before the shift; from -80 to 80, as
            after it.
        logsnr_max: Log-SNR at t = 0, likewise; above `logsnr_min` by 0.1.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        image_resolution: float,
        noise_resolution: float,
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
        self._shift = _shift(self.image_resolution, self.noise_resolution)
        _check_end("logsnr_min", self.logsnr_min, self._shift)
        _check_end("logsnr_max", self.logsnr_max, self._shift)

    def __call__(self, t: Tensor) -> Tensor:
        return super().__call__(t) + self._shift

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
        image_resolution: Height of the images in pixels, 0.001 to 2**20.
        noise_resolution_low: Resolution whose noise level holds at t = 1,
            0.001 to 2**20.
        noise_resolution_high: Resolution whose noise level holds at t = 0,
            likewise.
        logsnr_min: Log-SNR at t = 1, before the shift; from -80 to 80, as
            after it.
        logsnr_max: Log-SNR at t = 0, likewise; above `logsnr_min` by 0.1.

    Raises:
        ValueError: If an argument is out of its range, or log-SNR would not
            fall, as where `noise_resolution_low` is far the larger one.
    """

    def __init__(
        self,
        *,
        image_resolution: float,
        noise_resolution_low: float,
        noise_resolution_high: float,
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
        self._low, self._high = (
            _shift(self.image_resolution, resolution)
            for resolution in (
                self.noise_resolution_low,
                self.noise_resolution_high,
            )
        )
        _check_end("logsnr_min", self.logsnr_min, self._low)
        _check_end("logsnr_max", self.logsnr_max, self._high)
        most = self._least_slope() - LEAST_FALL
        if self._low - self._high > most:
            raise ValueError(
                "`noise_resolution_low` must be at most "
                f"{math.exp(most / 2):.4g} times `noise_resolution_high`, as "
                "log-SNR would not fall everywhere. Received: "
                f"noise_resolution_low={noise_resolution_low}, "
                f"noise_resolution_high={noise_resolution_high}"
            )

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        return super().__call__(t) + t * self._low + (1.0 - t) * self._high

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "image_resolution": self.image_resolution,
            "noise_resolution_low": self.noise_resolution_low,
            "noise_resolution_high": self.noise_resolution_high,
        }
