"""Weights of the loss over time, one per example.

A loss compares clean images, so a weighting says what an error of `x` weighs
at a log-SNR. For squared losses, epsilon's error then weighs that over the SNR,
and v's that over SNR + 1.
"""

import math
from typing import Any, Self

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

__all__ = [
    "SigmoidWeighting",
    "flow_velocity",
    "snr_plus_one",
    "sqrt_snr_plus_one",
    "truncated_snr",
    "uniform",
]


@keras.saving.register_keras_serializable(package="keras_mscm")
def snr_plus_one(logsnr: Tensor) -> Tensor:
    """`w_t = SNR(t) + 1` (algorithm 1): the v-loss of a *squared* norm."""
    return ops.exp(logsnr) + 1.0


@keras.saving.register_keras_serializable(package="keras_mscm")
def sqrt_snr_plus_one(logsnr: Tensor) -> Tensor:
    """`w_t = sqrt(SNR(t) + 1)`: the v-loss of a norm that is not squared."""
    return ops.sqrt(ops.exp(logsnr) + 1.0)


@keras.saving.register_keras_serializable(package="keras_mscm")
def truncated_snr(logsnr: Tensor) -> Tensor:
    """`w_t = max(SNR(t), 1)`: the larger of the x- and the epsilon-loss.

    Of squared norms, as used for distillation by Salimans & Ho (2022).
    """
    return ops.maximum(ops.exp(logsnr), 1.0)


@keras.saving.register_keras_serializable(package="keras_mscm")
def flow_velocity(logsnr: Tensor) -> Tensor:
    """`w_t = (sqrt(SNR(t)) + 1)^2`: rectified flow's loss, squared.

    That is `1 / t^2` in its time t, because an error of `x` is t times one of
    the velocity `epsilon - x`.
    """
    return (ops.exp(logsnr / 2) + 1.0) ** 2


@keras.saving.register_keras_serializable(package="keras_mscm")
def uniform(logsnr: Tensor) -> Tensor:
    """`w_t = 1`: the x-loss, the same weight at every time."""
    return ops.ones_like(logsnr)


@keras.saving.register_keras_serializable(package="keras_mscm")
class SigmoidWeighting:
    """For training in which fine detail shall count less, the less the `bias`.

    It is `sigmoid(bias - logsnr)` on the squared epsilon-loss (Kingma & Gao,
    2023), so `w_t = SNR(t) sigmoid(bias - logsnr)`: about SNR up to a log-SNR
    of `bias`, from where it stays at `exp(bias)`.

    Theirs is a weight per log-SNR. Times are drawn evenly here, and the slope
    of the schedule, by which the two differ, is not included.

    Args:
        bias: Log-SNR of the bend, from -80 to 80, where `exp(bias)` is a
            float32.

    Call arguments:
        logsnr: `(batch,)`.

    Call returns:
        The weights, `(batch,)`.

    Raises:
        ValueError: If `bias` is out of its range.

    Example:

    >>> weight = SigmoidWeighting(bias=-1.0)(ops.convert_to_tensor([-9.0, 9.0]))
    >>> [round(float(w), 4) for w in weight]
    [0.0001, 0.3679]
    """

    def __init__(self, bias: float):
        bias = checks.check_number(
            "bias", bias, -80, "a number in [-80, 80]", 80
        )
        self.bias = float(bias)

    def __call__(self, logsnr: Tensor) -> Tensor:
        # exp(logsnr) sigmoid(bias - logsnr), without inf times 0.
        return math.exp(self.bias) * ops.sigmoid(logsnr - self.bias)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.bias))

    def get_config(self) -> dict[str, Any]:
        return {"bias": self.bias}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`."""
        return cls(**config)
