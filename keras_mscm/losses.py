"""Losses over clean images, one value per example.

What an error weighs at each time is said by `keras_mscm.weightings`, whose
names stand here too because they once lived here.
"""

from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor, mean_per_example
from keras_mscm.weightings import SigmoidWeighting as SigmoidWeighting
from keras_mscm.weightings import snr_plus_one as snr_plus_one
from keras_mscm.weightings import sqrt_snr_plus_one as sqrt_snr_plus_one
from keras_mscm.weightings import truncated_snr as truncated_snr
from keras_mscm.weightings import uniform as uniform

__all__ = ["L2", "Multiscale", "PseudoHuber", "SquaredL2"]

_REDUCTIONS = (
    "sum_over_batch_size",
    "sum",
    "none",
    "mean",
    "mean_with_sample_weight",
)


def _mean_square(y_true: Tensor, y_pred: Tensor) -> Tensor:
    # The mean and not the sum, so that `huber_epsilon` means the same at every
    # image size.
    return mean_per_example(ops.square(y_pred - y_true))


class _Loss(keras.losses.Loss):
    """Keras' loss, whose arguments are checked by name."""

    def __init__(self, reduction: str | None, name: str, **kwargs: Any):
        # None is let through because Keras takes it for "none".
        if reduction is not None:
            checks.check_choice("reduction", reduction, _REDUCTIONS)
        name = checks.check_string("name", name)
        super().__init__(reduction=reduction, name=name, **kwargs)


@keras.saving.register_keras_serializable(package="keras_mscm")
class SquaredL2(_Loss):
    """The loss to train a diffusion model with: the mean squared difference.

    It takes arrays `(batch, ...)` of any rank from 2 on and gives one value per
    example, which is reduced as any Keras loss is, with `sample_weight` of
    shape `(batch,)`.

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
    """For a distillation in which large errors shall not outweigh small ones.

    It is the root mean square difference of each example: the Euclidean
    distance per element, which `PseudoHuber` is for a small `huber_epsilon`.
    Its gradient has one length wherever the two differ, and is 0 where they
    don't.

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
        # The root is taken of 1 where the square is 0, because the slope of a
        # root is infinite at 0, and a `where` around it would multiply that
        # with 0. The bound is the least normal number because backends flush
        # smaller ones to 0.
        differ = square > float(np.finfo("float32").tiny)
        root = ops.sqrt(ops.where(differ, square, 1.0))
        return ops.where(differ, root, 0.0)


@keras.saving.register_keras_serializable(package="keras_mscm")
class PseudoHuber(_Loss):
    """The loss to train a consistency model with: the paper's choice.

    It is `sqrt(m + huber_epsilon^2) - huber_epsilon` of the mean square m, the
    smoothed Euclidean distance of Song & Dhariwal (2023): an l2 norm far above
    `huber_epsilon`, a squared one far below. The paper takes 1e-4 on ImageNet
    and 1 on text to image.

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
        # The bounds are there because its square must be a float32 that is
        # neither 0 nor infinite.
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
    """For images of 128 pixels and more, where fine detail drowns the rest.

    It is a loss at full resolution, and at halves of it with doubled weights
    (the multiscale loss of simple diffusion): the images are average pooled
    2x2, once and again, and the loss at a resolution s has weight 1/s, here
    relative to the full one, so that large structures count. The paper pools
    once on ImageNet128.

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
        # A side may be None, because in a graph it can be unknown.
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
