"""The schedule of rectified flow, with its shift."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor
from keras_mscm.schedules.base import (
    LOGSNR_BOUND,
    NoiseSchedule,
    check_bounds,
)


@keras.saving.register_keras_serializable(package="keras_mscm")
class RectifiedFlowSchedule(NoiseSchedule):
    """The noise levels of `(1 - t) x + t epsilon`, shifted for large images.

    You want it with networks of rectified flow, such as Stable Diffusion 3 and
    Flux. Log-SNR is `2 log((1 - t) / t) - 2 log(shift)`, which is flow time
    `shift t / (1 + (shift - 1) t)` (Esser et al., 2024, section 5.3.2). The
    ends, plus and minus infinity, are left out: `t` runs over a slightly
    shorter interval than [0, 1], so that log-SNR runs from exactly
    `logsnr_max` to `logsnr_min`.

    Args:
        shift: 1e-6 to 1e6. Above 1 there is more noise.
        logsnr_min: Log-SNR at t = 1, from -80 to 80.
        logsnr_max: Log-SNR at t = 0, from -80 to 80; above `logsnr_min` by
            0.1.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> schedule = RectifiedFlowSchedule(shift=3.0)
    >>> [round(float(logsnr), 2) for logsnr in schedule([0.0, 0.5, 1.0])]
    [20.0, -2.2, -20.0]
    """

    def __init__(
        self,
        *,
        shift: float = 1.0,
        logsnr_min: float = -20.0,
        logsnr_max: float = 20.0,
    ):
        self.shift = checks.check_number(
            "shift", shift, 1e-6, "a positive number in [1e-6, 1e6]", 1e6
        )
        self.logsnr_min, self.logsnr_max = check_bounds(logsnr_min, logsnr_max)
        self._offset = 2 * math.log(self.shift)
        for name in ("logsnr_min", "logsnr_max"):
            value = getattr(self, name)
            if abs(value + self._offset) > LOGSNR_BOUND:
                raise ValueError(
                    f"`{name}` must be in [-{LOGSNR_BOUND}, {LOGSNR_BOUND}] "
                    f"before the shift, {-self._offset:g}, too. Received: "
                    f"{name}={value}"
                )
        # Flow time before the shift, and what is left of it, at either end.
        low, high = (self.logsnr_max, self.logsnr_min)
        self._time_0 = _sigmoid(-(low + self._offset) / 2)
        self._left_1 = _sigmoid((high + self._offset) / 2)
        self._span = _sigmoid_difference(
            -(low + self._offset) / 2, -(high + self._offset) / 2
        )

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        # 1 - time would lose its digits near 1; each is measured from its end.
        time = self._time_0 + t * self._span
        left = self._left_1 + (1.0 - t) * self._span
        return 2 * (ops.log(left) - ops.log(time)) - self._offset

    def get_config(self) -> dict[str, Any]:
        return {
            "shift": self.shift,
            "logsnr_min": self.logsnr_min,
            "logsnr_max": self.logsnr_max,
        }


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _sigmoid_difference(low: float, high: float) -> float:
    """`sigmoid(high) - sigmoid(low)`, with its digits where both are close."""
    return _sigmoid(high) * _sigmoid(-low) * -math.expm1(low - high)
