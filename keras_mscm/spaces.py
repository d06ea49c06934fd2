"""Spaces: what `x` is, how it is checked, and how samples come out.

A model works on arrays of one shape: pixels, the latents of an autoencoder, or
anything else that has numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

#: Between which an encoder's log-variance is taken, as in Stable Diffusion.
LOG_VARIANCE = (-30.0, 20.0)


class Space:
    """What every space knows; make a `Pixels`, a `Box` or a `Latents`.

    Attributes:
        shape: Of one example, as the network sees it.
        variance: Of the data per dimension, roughly; what aDDIM's analytic
            posterior variance begins with.
        image_shape: Height, width and channels of the pictures that samples
            come out as; None if they are no pictures.
        picture_shape: Of the pictures that an encoder takes; None without.
        encoder: Layer that makes `x` of pictures, or None.
        decoder: Layer that makes pictures of `x`, or None.
    """

    shape: tuple[int, ...]
    variance: float
    image_shape: tuple[int, ...] | None = None
    picture_shape: tuple[int, ...] | None = None
    encoder: keras.Layer | None = None
    decoder: keras.Layer | None = None

    def check(self, name: str, x: Any, values: bool = True) -> None:
        """Raises unless `x` is a batch of this space, as `fit` takes it.

        Args:
            name: What to call it in a message.
            x: What came.
            values: Whether to look at the values, and not at the shape alone.
        """
        raise NotImplementedError

    def looks_unsigned(self, x: Any) -> bool:
        """Whether a batch looks like [0, 1] where [-1, 1] is meant."""
        return False

    def encode(
        self, x: Tensor, draw: Callable[[Sequence], Tensor] | None = None
    ) -> Tensor:
        """What the network works on, of a batch as `fit` takes it.

        Args:
            x: Batch, float32.
            draw: Function of a shape that draws standard normal noise, for an
                encoder that gives moments; without, their mean is taken.
        """
        return x

    def decode(self, x: Tensor) -> Tensor:
        """What `generate` returns, of samples of the network's shape."""
        return x

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        return {"shape": self.shape}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`."""
        deserialize = keras.saving.deserialize_keras_object
        return cls(
            **{
                name: deserialize(value) if isinstance(value, dict) else value
                for name, value in config.items()
            }
        )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and ({**vars(self)} == {**vars(other)})

    def __hash__(self) -> int:
        return hash((type(self), self.shape))


@keras.saving.register_keras_serializable(package="keras_mscm")
class Pixels(Space):
    """Images in [-1, 1]; samples are clipped to that. The default.

    Args:
        shape: Height, width and channels.

    Raises:
        ValueError: If `shape` is none.
    """

    variance = 0.5

    def __init__(self, shape: Sequence[int]):
        axes = "height", "width", "channels"
        self.shape = checks.check_shape("shape", shape, axes)
        self.image_shape = self.shape

    def check(self, name: str, x: Any, values: bool = True) -> None:
        check = checks.check_images if values else checks.check_image_shape
        check(name, x, self.shape)

    def looks_unsigned(self, x: Any) -> bool:
        return checks.lies_in_0_1(x)

    def decode(self, x: Tensor) -> Tensor:
        return ops.clip(x, -1.0, 1.0)


@keras.saving.register_keras_serializable(package="keras_mscm")
class Box(Space):
    """Arrays of any shape: points, signals, volumes, stored latents.

    You want it when the data are no pictures, or latents whose autoencoder is
    none of the model's business.

    Args:
        shape: Of one example: `(1,)` for numbers, `(length, channels)`,
            `(time, height, width, channels)`.
        low: Least value of the data, to which samples are clipped; None for
            any.
        high: Largest value, likewise.
        variance: Of the data per dimension, positive. A network learns best
            from data of a variance near 1.

    Raises:
        ValueError: If an argument is none of these, or `low` not below `high`.

    Example:

    >>> Box((16, 2), low=-3.0).shape
    (16, 2)
    """

    def __init__(
        self,
        shape: Sequence[int],
        low: float | None = None,
        high: float | None = None,
        variance: float = 1.0,
    ):
        self.shape = _any_shape("shape", shape)
        low, high = (
            None if value is None else checks.check_float32(name, value)
            for name, value in (("low", low), ("high", high))
        )
        if low is not None and high is not None and not low < high:
            raise ValueError(
                f"`low` must be below `high`. Received: low={low}, high={high}"
            )
        self.low, self.high = low, high
        self.variance = checks.check_positive_number("variance", variance)

    def check(self, name: str, x: Any, values: bool = True) -> None:
        _check_shape(name, x, self.shape)
        if not values:
            return
        host = _finite(name, x)
        least, largest = float(host.min()), float(host.max())
        low = -np.inf if self.low is None else self.low
        high = np.inf if self.high is None else self.high
        if least < low or largest > high:
            raise ValueError(
                f"`{name}` must be in [{low:g}, {high:g}], as its space says. "
                f"Received: from {least:g} to {largest:g}"
            )

    def decode(self, x: Tensor) -> Tensor:
        if self.low is not None:
            x = ops.maximum(x, self.low)
        return x if self.high is None else ops.minimum(x, self.high)

    def get_config(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "low": self.low,
            "high": self.high,
            "variance": self.variance,
        }


@keras.saving.register_keras_serializable(package="keras_mscm")
class Latents(Space):
    """The latents of an autoencoder; data and samples may be its pictures.

    You want it for large pictures: the network works on few numbers, and
    `generate` decodes. `fit` takes latents, and with an encoder pictures too,
    which each step then encodes; `datasets.cache_latents` encodes them once.

        latent = (encoder(picture) - shift) scale
        picture = decoder(latent / scale + shift)

    Args:
        shape: Of a latent, as the network sees it, channels last.
        encoder: Keras layer of pictures in [-1, 1]; it returns latents before
            shift and scale, or of twice their channels, which are mean and
            log-variance, from which they are drawn. It isn't trained.
        decoder: Keras layer of latents that returns pictures in [-1, 1]. It
            isn't trained. Both are saved with the model.
        scale: Which makes the latents' variance 1: a positive number, or one
            per channel. (Stable Diffusion: 0.18215; 3: 1.5305.)
        shift: Their mean before: a number, or one per channel.
        image_shape: Height, width and channels of the pictures; to be given
            with an encoder or decoder.

    Raises:
        ValueError: If an argument is none of these, or they disagree.

    Example:

    >>> half = keras.layers.AveragePooling2D(2)
    >>> double = keras.layers.UpSampling2D(2)
    >>> space = Latents((4, 4, 3), half, double, image_shape=(8, 8, 3))
    >>> images = space.decode(space.encode(ops.ones((2, 8, 8, 3))))
    >>> tuple(images.shape)
    (2, 8, 8, 3)
    """

    variance = 1.0

    def __init__(
        self,
        shape: Sequence[int],
        encoder: keras.Layer | None = None,
        decoder: keras.Layer | None = None,
        scale: float | Sequence[float] = 1.0,
        shift: float | Sequence[float] = 0.0,
        image_shape: Sequence[int] | None = None,
    ):
        self.shape = _any_shape("shape", shape)
        self.scale = checks.per_channel("scale", scale, self.shape[-1])
        self.shift = checks.per_channel("shift", shift, self.shape[-1])
        if np.min(self.scale) < 1 / checks.LARGEST:
            raise checks.invalid(
                "scale", f"at least {1 / checks.LARGEST:g}", scale
            )
        for name, layer in (("encoder", encoder), ("decoder", decoder)):
            if layer is not None and not isinstance(layer, keras.Layer):
                raise checks.invalid(name, "a Keras layer, or None", layer)
        if image_shape is not None:
            axes = "height", "width", "channels"
            image_shape = checks.check_shape("image_shape", image_shape, axes)
        if (image_shape is None) != (encoder is None and decoder is None):
            raise ValueError(
                "`image_shape` must be given with an encoder or a decoder, and "
                f"only then. Received: image_shape={image_shape}"
            )
        if encoder is not None and image_shape == self.shape:
            raise ValueError(
                "`image_shape` must differ from the latents' `shape` with an "
                "encoder, because a batch's shape says what it is made of. "
                f"Received: both {image_shape}"
            )
        self.encoder, self.decoder = encoder, decoder
        self.picture_shape = image_shape
        self.image_shape = None if decoder is None else image_shape

    def takes_pictures(self, x: Any) -> bool:
        """Whether a batch is one of pictures, which are to be encoded."""
        shape = tuple(x.shape[1:]) if hasattr(x, "shape") else ()
        return self.encoder is not None and shape not in (self.shape, ())

    def check(self, name: str, x: Any, values: bool = True) -> None:
        if self.takes_pictures(x):
            check = checks.check_images if values else checks.check_image_shape
            check(name, x, self.picture_shape or ())
            return
        _check_shape(name, x, self.shape)
        if values:
            _finite(name, x)

    def looks_unsigned(self, x: Any) -> bool:
        return self.takes_pictures(x) and checks.lies_in_0_1(x)

    def encode(
        self, x: Tensor, draw: Callable[[Sequence], Tensor] | None = None
    ) -> Tensor:
        if self.encoder is None or not self.takes_pictures(x):
            return x
        return self.of_encoded(self.encoder(x, training=False), draw)

    def of_encoded(
        self,
        encoded: Tensor,
        draw: Callable[[Sequence], Tensor] | None = None,
    ) -> Tensor:
        """Latents of what the encoder said, shifted and scaled, in float32.

        Args:
            encoded: Latents, or their moments.
            draw: As for `encode`.
        """
        encoded = ops.cast(encoded, "float32")
        if encoded.shape[-1] == 2 * self.shape[-1]:
            encoded, log_variance = ops.split(encoded, 2, axis=-1)
            if draw is not None:
                log_variance = ops.clip(log_variance, *LOG_VARIANCE)
                noise = draw(ops.shape(encoded))
                encoded = encoded + ops.exp(log_variance / 2) * noise
        if not _may_be(encoded, self.shape):
            raise ValueError(
                "`encoder` must return latents of the space's shape, "
                f"{self.shape}, or of twice its channels. Received: "
                f"{tuple(encoded.shape[1:])}"
            )
        encoded = ops.reshape(encoded, (-1, *self.shape))
        return (encoded - self._constant(self.shift)) * self._constant(
            self.scale
        )

    def decode(self, x: Tensor) -> Tensor:
        if self.decoder is None:
            return x
        x = x / self._constant(self.scale) + self._constant(self.shift)
        pictures = ops.cast(self.decoder(x, training=False), "float32")
        if not _may_be(pictures, self.image_shape):
            raise ValueError(
                "`decoder` must return pictures of image_shape="
                f"{self.image_shape}. Received: {tuple(pictures.shape[1:])}"
            )
        return ops.clip(pictures, -1.0, 1.0)

    @staticmethod
    def _constant(value: Any) -> Tensor:
        return ops.convert_to_tensor(value, "float32")

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "shape": self.shape,
            "encoder": serialize(self.encoder),
            "decoder": serialize(self.decoder),
            "scale": self.scale,
            "shift": self.shift,
            "image_shape": self.picture_shape,
        }


def _may_be(x: Tensor, shape: tuple[int, ...] | None) -> bool:
    """Whether a batch is of a shape, as far as a graph knows its sizes."""
    sizes = tuple(x.shape[1:])
    return len(sizes) == len(shape or ()) and all(
        size in (None, ours) for size, ours in zip(sizes, shape or ())
    )


def _any_shape(name: str, shape: Any) -> tuple[int, ...]:
    allowed = "a tuple of one size of at least 1 or more"
    sizes = checks.check_sequence(name, shape, allowed)
    return checks.check_shape(name, shape, ["size"] * len(sizes))


def _check_shape(name: str, x: Any, shape: tuple[int, ...]) -> None:
    if not checks.is_array(x):
        raise checks.invalid(name, "an array", x)
    if tuple(x.shape[1:]) != shape or not x.shape[0]:
        raise ValueError(
            f"`{name}` must be of shape (batch, "
            f"{', '.join(map(str, shape))}), a batch of one example or more. "
            f"Received: shape {tuple(x.shape)}"
        )


def _finite(name: str, x: Any) -> np.ndarray:
    """The values on the host; raises unless they are finite floats."""
    kind = keras.backend.standardize_dtype(x.dtype)
    host = ops.convert_to_numpy(x)
    if "float" not in kind or not np.all(np.isfinite(host)):
        raise ValueError(
            f"`{name}` must be finite floats. Received: dtype {kind}, "
            f"{int((~np.isfinite(host.astype('float64'))).sum())} NaN or "
            "infinite"
        )
    return host
