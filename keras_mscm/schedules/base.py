"""What every noise schedule shares, and the range of log-SNR."""

from typing import Any

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

# A float32's exponential is finite and not 0 up to here.
LOGSNR_BOUND = 80
# Below this, times of a fine grid would share a log-SNR in float32.
LEAST_FALL = 0.1


def check_bounds(logsnr_min: Any, logsnr_max: Any) -> tuple[float, float]:
    """The two as numbers; raises unless the one is below the other."""
    allowed = f"a number in [-{LOGSNR_BOUND}, {LOGSNR_BOUND}]"
    low, high = (
        checks.check_number(name, value, -LOGSNR_BOUND, allowed, LOGSNR_BOUND)
        for name, value in (
            ("logsnr_min", logsnr_min),
            ("logsnr_max", logsnr_max),
        )
    )
    if not high - low >= LEAST_FALL:
        raise ValueError(
            f"`logsnr_min` must be below `logsnr_max` by {LEAST_FALL} or "
            f"more. Received: logsnr_min={logsnr_min}, logsnr_max={logsnr_max}"
        )
    return low, high


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
