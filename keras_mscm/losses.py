"""Losses over images, one value per example, and their weights over time."""

from typing import Any

import keras
from keras import ops

from keras_mscm.functional.process import Tensor


def _mean_square(y_true: Tensor, y_pred: Tensor) -> Tensor:
    # Per element, so that `huber_epsilon` means the same at every image size.
    axes = tuple(range(1, len(y_pred.shape)))
    return ops.mean(ops.square(y_pred - y_true), axis=axes)


@keras.saving.register_keras_serializable(package="keras_mscm")
class SquaredL2(keras.losses.Loss):
    """Mean squared difference of each example.

    The loss of standard diffusion. Called on images `(batch, ...)`; reduced as
    any Keras loss, with `sample_weight` of shape `(batch,)`.
    """

    def __init__(
        self,
        reduction: str = "sum_over_batch_size",
        name: str = "squared_l2",
        **kwargs: Any,
    ):
        super().__init__(reduction=reduction, name=name, **kwargs)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Returns one value per example, `(batch,)`."""
        return _mean_square(y_true, y_pred)


@keras.saving.register_keras_serializable(package="keras_mscm")
class PseudoHuber(keras.losses.Loss):
    """`sqrt(m + huber_epsilon^2) - huber_epsilon`, m the mean square.

    The smoothed Euclidean distance of Song & Dhariwal (2023) that the paper
    trains with: an l2 norm far above `huber_epsilon`, a squared one far
    below. The paper takes 1e-4 on ImageNet and 1 on text to image.

    Args:
        huber_epsilon: Where the norm turns into its square, in units of the
            root mean square difference per element, above 0.

    Raises:
        ValueError: If `huber_epsilon` is not positive.

    Example:

    >>> images = ops.zeros((1, 8, 8, 1))
    >>> round(float(PseudoHuber()(images, images + 1)), 4)
    0.9999
    """

    def __init__(
        self,
        huber_epsilon: float = 1e-4,
        reduction: str = "sum_over_batch_size",
        name: str = "pseudo_huber",
        **kwargs: Any,
    ):
        if not huber_epsilon > 0:
            raise ValueError(
                "`huber_epsilon` must be positive. Received: "
                f"huber_epsilon={huber_epsilon}"
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
def snr_plus_one(logsnr: Tensor) -> Tensor:
    """`w_t = SNR(t) + 1` (algorithm 1): the v-loss of a *squared* norm."""
    return ops.exp(logsnr) + 1.0


@keras.saving.register_keras_serializable(package="keras_mscm")
def sqrt_snr_plus_one(logsnr: Tensor) -> Tensor:
    """`w_t = sqrt(SNR(t) + 1)`: the v-loss of a norm that is not squared."""
    return ops.sqrt(ops.exp(logsnr) + 1.0)
