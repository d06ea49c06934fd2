"""Losses over images, one value per example, and their weights over time.

A loss compares clean images, so a weighting says what an error of `x` weighs
at a log-SNR. For squared losses, epsilon's error then weighs that over the SNR,
and v's that over SNR + 1.
"""

import math
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

_REDUCTIONS = (
    "sum_over_batch_size",
    "sum",
    "none",
    "mean",
    "mean_with_sample_weight",
)


def _mean_square(y_true: Tensor, y_pred: Tensor) -> Tensor:
    # Per element, so that `huber_epsilon` means the same at every image size.
    axes = tuple(range(1, len(y_pred.shape)))
    return ops.mean(ops.square(y_pred - y_true), axis=axes)


class _Loss(keras.losses.Loss):
    """Keras' loss, whose arguments are checked by name."""

    def __init__(self, reduction: str | None, name: str, **kwargs: Any):
        # Keras says "none" by None too.
        if reduction is not None:
            checks.check_choice("reduction", reduction, _REDUCTIONS)
        name = checks.check_string("name", name)
        super().__init__(reduction=reduction, name=name, **kwargs)


@keras.saving.register_keras_serializable(package="keras_mscm")
class SquaredL2(_Loss):
    """Mean squared difference of each example.

    The loss of standard diffusion. Called on images `(batch, ...)`; reduced as
    any Keras loss, with `sample_weight` of shape `(batch,)`.

    Args:
        reduction: As in `keras.losses.Loss`: `"sum_over_batch_size"`, `"sum"`,
            `"mean"`, `"mean_with_sample_weight"`, or `"none"` or None.
        name: What it is called.
        **kwargs: As for any Keras loss.

    Raises:
        ValueError: If an argument is none of these.
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "squared_l2",
        **kwargs: Any,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Returns one value per example, `(batch,)`."""
        return _mean_square(y_true, y_pred)


@keras.saving.register_keras_serializable(package="keras_mscm")
class L2(_Loss):
    """Root mean square difference of each example.

    The Euclidean distance, per element: what `PseudoHuber` is for a small
    `huber_epsilon`. Its gradient has one length wherever the two differ, and
    is 0 where they don't.

    Args:
        reduction, name, **kwargs: As in `SquaredL2`.

    Raises:
        ValueError: If an argument is none of these.

    Example:

    >>> images = ops.zeros((1, 8, 8, 1))
    >>> round(float(L2()(images, images + 0.5)), 4)
    0.5
    """

    def __init__(
        self,
        reduction: str | None = "sum_over_batch_size",
        name: str = "l2",
        **kwargs: Any,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Returns one value per example, `(batch,)`."""
        square = _mean_square(y_true, y_pred)
        # The slope of a root is infinite at 0, and `where` alone would
        # multiply it with 0. Below the least normal number a root may be 0.
        differ = square > float(np.finfo("float32").tiny)
        root = ops.sqrt(ops.where(differ, square, 1.0))
        return ops.where(differ, root, 0.0)


@keras.saving.register_keras_serializable(package="keras_mscm")
class PseudoHuber(_Loss):
    """`sqrt(m + huber_epsilon^2) - huber_epsilon`, m the mean square.

    The smoothed Euclidean distance of Song & Dhariwal (2023) that the paper
    trains with: an l2 norm far above `huber_epsilon`, a squared one far
    below. The paper takes 1e-4 on ImageNet and 1 on text to image.

    Args:
        huber_epsilon: Where the norm turns into its square, in units of the
            root mean square difference per element, 1e-18 to 1e18.
        reduction, name, **kwargs: As in `SquaredL2`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> images = ops.zeros((1, 8, 8, 1))
    >>> round(float(PseudoHuber()(images, images + 1)), 4)
    0.9999
    """

    def __init__(
        self,
        huber_epsilon: float = 1e-4,
        reduction: str | None = "sum_over_batch_size",
        name: str = "pseudo_huber",
        **kwargs: Any,
    ):
        # Squared it must be a float32 that is neither 0 nor infinite.
        huber_epsilon = checks.check_number(
            "huber_epsilon",
            huber_epsilon,
            1e-18,
            "positive, a number in [1e-18, 1e18]",
            1e18,
        )
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.huber_epsilon = huber_epsilon

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Returns one value per example, `(batch,)`."""
        square = _mean_square(y_true, y_pred)
        return ops.sqrt(square + self.huber_epsilon**2) - self.huber_epsilon

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "huber_epsilon": self.huber_epsilon}


@keras.saving.register_keras_serializable(package="keras_mscm")
class Multiscale(_Loss):
    """A loss at full resolution, and at halves of it with doubled weights.

    The multiscale loss of simple diffusion: the images are average pooled
    2x2, once and again, and the loss at a resolution s has weight 1/s, here
    relative to the full one. So large structures count where fine detail
    would drown them. The paper pools once on ImageNet128.

    Args:
        loss: Loss that gives one value per example, as those of this module.
            Its own reduction is not used.
        num_poolings: How often the images are halved, from 1 to 16.
        reduction, name, **kwargs: As in `SquaredL2`.

    Raises:
        ValueError: If an argument is out of its range; when called, if the
            images' sides can't be halved so often, or `loss` doesn't give one
            value per example.

    Example:

    >>> images = ops.zeros((1, 8, 8, 1))
    >>> float(Multiscale(SquaredL2())(images, images + 1))  # 1 + 2
    3.0

    Reference:
        Hoogeboom et al., simple diffusion (2023), section 3.2.
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        num_poolings: int = 1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "multiscale",
        **kwargs: Any,
    ):
        if not isinstance(loss, keras.losses.Loss):
            raise checks.invalid(
                "loss",
                "a loss of `keras_mscm.losses` or another `keras.losses.Loss`",
                loss,
            )
        num_poolings = checks.check_positive_integer(
            "num_poolings", num_poolings, 16
        )
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.loss, self.num_poolings = loss, num_poolings

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Returns one value per example, `(batch,)`."""
        factor, shape = 2**self.num_poolings, tuple(y_pred.shape)
        # In a graph a side can be unknown, None.
        odd = [side for side in shape[1:3] if side and side % factor]
        if len(shape) != 4 or odd:
            raise ValueError(
                "`y_pred` must be images (batch, height, width, channels) "
                f"whose height and width are multiples of {factor}, to be "
                f"halved num_poolings={self.num_poolings} times. Received: "
                f"shape {shape}"
            )
        total = self.loss.call(y_true, y_pred)
        if len(total.shape) != 1:
            raise ValueError(
                "`loss` must give one value per example, shape (batch,). "
                f"Received: {self.loss}, which gives {tuple(total.shape)}"
            )
        for i in range(1, self.num_poolings + 1):
            y_true, y_pred = (
                ops.average_pool(images, 2, 2, data_format="channels_last")
                for images in (y_true, y_pred)
            )
            total = total + 2**i * self.loss.call(y_true, y_pred)
        return total

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "loss": keras.saving.serialize_keras_object(self.loss),
            "num_poolings": self.num_poolings,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`."""
        loss = keras.saving.deserialize_keras_object(config["loss"])
        return cls(**{**config, "loss": loss})


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
def uniform(logsnr: Tensor) -> Tensor:
    """`w_t = 1`: the x-loss, the same weight at every time."""
    return ops.ones_like(logsnr)


@keras.saving.register_keras_serializable(package="keras_mscm")
class SigmoidWeighting:
    """`sigmoid(bias - logsnr)` on the squared epsilon-loss.

    So `w_t = SNR(t) sigmoid(bias - logsnr)`: about SNR up to a log-SNR of
    `bias`, from where it stays at `exp(bias)`; fine detail counts less the
    smaller `bias` is (Kingma & Gao, 2023).

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
