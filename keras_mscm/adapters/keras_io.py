"""The network of keras.io's example on denoising diffusion implicit models."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import checks, spaces
from keras_mscm.adapters.network import AdaptedNetwork
from keras_mscm.functional.process import Tensor
from keras_mscm.models import DiffusionModel
from keras_mscm.schedules import DiscreteSchedule


def from_keras_io_ddim(
    network: keras.Model,
    image_shape: Sequence[int] | None = None,
    *,
    normalizer: keras.Layer | None = None,
    min_signal_rate: float = 0.02,
    max_signal_rate: float = 0.95,
    time_embedding: str | None = None,
    **kwargs: Any,
) -> DiffusionModel:
    """A diffusion model around the network of keras.io's DDIM example.

    You want it for what that example trains, `model.ema_network` with
    `model.normalizer`: it takes a list of noisy images and noise variances,
    `(batch, 1, 1, 1)`, and predicts the noise. Its cosine schedule ends at
    `max_signal_rate`, a log-SNR of 2.2; the last step leads from there to the
    prediction. Any function in a `Lambda` of the network must be registered
    (`keras.saving.register_keras_serializable`) for a student to be made of it.

    Args:
        network: The network.
        image_shape: Height, width and channels, where the network leaves them
            open.
        normalizer: The example's `Normalization` of images in [0, 1]. With it,
            `fit` takes images in [-1, 1] and `generate` returns such; without,
            both are of normalised images.
        min_signal_rate: As in the example.
        max_signal_rate: As in the example.
        time_embedding: For a student of several numbers of steps: the name of
            the layer that embeds time, as for `AdaptedNetwork`; by default the
            one that takes the noise variances, as in the example.
        **kwargs: As for `DiffusionModel`.

    Returns:
        The model. Its network is the very one that was given.

    Raises:
        ValueError: If an argument isn't as above, or is lacking.
    """
    if not isinstance(network, keras.Model):
        raise checks.invalid("network", "a Keras model", network)
    if image_shape is None:
        image_shape = tuple(network.inputs[0].shape[1:])
        if None in image_shape:
            raise ValueError(
                "`image_shape` must be given for a network without a fixed one."
                f" Received: None, and the network's is {image_shape}"
            )
    adapted = AdaptedNetwork(
        network,
        image_shape,
        time="noise_variance",
        output="epsilon",
        time_axes=3,
        names=["z", "logsnr"],
        time_embedding=time_embedding or _embeds_time(network),
    )
    kwargs = {
        "prediction_type": adapted.prediction_type,
        "ema": None,
        "schedule": offset_cosine(min_signal_rate, max_signal_rate),
        "space": _space(adapted.image_shape, normalizer),
        **kwargs,
    }
    return DiffusionModel(adapted, **kwargs)


def _embeds_time(network: keras.Model) -> str | None:
    """The name of the only layer that takes noise variances, if there is."""
    inputs: Any = getattr(network, "inputs", None) or ()
    if len(inputs) != 2:
        return None
    names = [
        layer.name
        for layer in network.layers
        if any(given is inputs[1] for given in _inputs_of(layer))
    ]
    return names[0] if len(names) == 1 else None


def _inputs_of(layer: keras.Layer) -> list:
    """What a layer of a functional model takes, without values."""
    return [x for node in layer._inbound_nodes for x in node.input_tensors]


def offset_cosine(
    min_signal_rate: float = 0.02,
    max_signal_rate: float = 0.95,
    num_steps: int = 1000,
) -> DiscreteSchedule:
    """The example's schedule, whose last step leads to the prediction.

    Args:
        min_signal_rate: `alpha` at t = 1, in (0, 1).
        max_signal_rate: `alpha` at t = 0, in (0, 1), but for the step to it.
        num_steps: Levels that it holds. It is exact for numbers of steps that
            divide it.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument isn't as above.
    """
    rates = [
        checks.check_number(name, value, 1e-6, "in (0, 1)", 1 - 1e-6)
        for name, value in (
            ("min_signal_rate", min_signal_rate),
            ("max_signal_rate", max_signal_rate),
        )
    ]
    n = checks.check_positive_integer("num_steps", num_steps, 2**20)
    high, low = map(math.acos, rates)
    angles = low + np.arange(1, n + 1) / n * (high - low)
    return DiscreteSchedule([1.0, *np.cos(angles) ** 2])


@keras.saving.register_keras_serializable(package="keras_mscm")
class NormalizedPixels(spaces.Pixels):
    """Images in [-1, 1] that the network sees normalised, channel by channel.

    Args:
        shape: Height, width and channels.
        mean: The mean that the network takes off images in [0, 1].
        variance_of_pixels: The variance that it divides by, likewise.
    """

    variance = 1.0

    def __init__(
        self,
        shape: Sequence[int],
        mean: Sequence[float],
        variance_of_pixels: Sequence[float],
    ):
        super().__init__(shape)
        self.mean = checks.per_channel("mean", mean, self.shape[-1])
        self.variance_of_pixels = checks.per_channel(
            "variance_of_pixels", variance_of_pixels, self.shape[-1]
        )
        if np.min(self.variance_of_pixels) <= 0:
            raise checks.invalid(
                "variance_of_pixels", "positive", variance_of_pixels
            )

    def encode(
        self, x: Tensor, draw: Callable[[Sequence], Tensor] | None = None
    ) -> Tensor:
        mean, deviation = self._moments()
        return ((x + 1) / 2 - mean) / deviation

    def decode(self, x: Tensor) -> Tensor:
        mean, deviation = self._moments()
        return super().decode(2 * (mean + deviation * x) - 1)

    def _moments(self) -> tuple[Tensor, Tensor]:
        mean = ops.convert_to_tensor(self.mean, "float32")
        variance = ops.convert_to_tensor(self.variance_of_pixels, "float32")
        return mean, ops.sqrt(variance)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "mean": self.mean,
            "variance_of_pixels": self.variance_of_pixels,
        }


def _space(shape: tuple[int, ...], normalizer: Any) -> spaces.Space:
    if normalizer is None:
        return spaces.Box(shape)
    if getattr(normalizer, "variance", None) is None or not isinstance(
        normalizer, keras.layers.Normalization
    ):
        raise checks.invalid(
            "normalizer",
            "a `keras.layers.Normalization` that has been adapted, or None",
            normalizer,
        )
    mean, variance = (
        np.broadcast_to(ops.convert_to_numpy(value).reshape(-1), shape[-1:])
        for value in (normalizer.mean, normalizer.variance)
    )
    return NormalizedPixels(shape, mean.tolist(), variance.tolist())
