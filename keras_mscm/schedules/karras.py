"""The noise levels of Karras et al. (2022)."""

from typing import Any

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor
from keras_mscm.schedules.base import NoiseSchedule


@keras.saving.register_keras_serializable(package="keras_mscm")
class KarrasSchedule(NoiseSchedule):
    """The noise levels of Karras et al. (2022, eq. 5), for evaluation.

    The noise-to-signal ratio `sigma / alpha` runs from `sigma_min` to
    `sigma_max` linearly in its `1 / rho`-th power; log-SNR is `-2 log` of it.

    Args:
        sigma_min: Noise-to-signal ratio at t = 0, 1e-15 to 1e15.
        sigma_max: Noise-to-signal ratio at t = 1, 1e-15 to 1e15.
        rho: The exponent, 0.1 to 100.

    Raises:
        ValueError: If an argument is out of its range, or `sigma_min` is not
            below `sigma_max` by 1 %, or `rho` too small for them.
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
        self._low = self.sigma_min ** (1 / self.rho)
        self._high = self.sigma_max ** (1 / self.rho)
        if not 1e-37 <= self._low < self._high <= 1e37:
            raise ValueError(
                "`rho` must be larger, as a float32 can't hold these sigma ** "
                f"(1 / rho). Received: rho={rho}, sigma_min={sigma_min}, "
                f"sigma_max={sigma_max}"
            )

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        noise = self._low + t * (self._high - self._low)
        return -2 * self.rho * ops.log(noise)

    def get_config(self) -> dict[str, Any]:
        return {
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
        }
