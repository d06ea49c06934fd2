"""Functions of images that give feature vectors, and what they are called."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.functional.process import Tensor

# Larger means are refused, because float32 would then lose the images.
LARGEST = 2**24
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos3", "lanczos5", "nearest")


class FeatureExtractor:
    """For metrics in features of your own: a function of images, and its name.

    The name stays beside the metrics' numbers. The features of the last batch
    are kept, so several metrics on the same samples cost one evaluation.

    Args:
        function: Function of images, float32 arrays `(batch, height, width,
            channels)` in [-1, 1], that returns `(batch, features)`, an array
            or a tensor. Each image's features must not depend on the others.
        name: What it is called in results.
        resize: How it resizes images, as results are to say it.
        batch_size: Images per call of `function`, at most.

    Call arguments:
        images: `(num, height, width, channels)`, floats in [-1, 1].

    Call returns:
        NumPy array, `(num, features)`, float32 or float64.

    Raises:
        ValueError: If an argument is out of its range; when called, if the
            images are, or the features are not finite vectors.

    Example:

    >>> def means(images):
    ...     return images.mean(axis=(1, 2))
    >>> extractor = FeatureExtractor(means, name="mean colour")
    >>> extractor(np.zeros((4, 8, 8, 3), "float32")).shape
    (4, 3)
    >>> extractor.description
    {'extractor': 'mean colour', 'resize': 'none'}
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        name: str,
        resize: str = "none",
        batch_size: int = 128,
    ):
        self.function = checks.check_function(
            "function",
            function,
            "a function of images that returns (batch, features)",
        )
        self.batch_size = checks.check_positive_integer(
            "batch_size", batch_size
        )
        self.description = {
            "extractor": checks.check_string("name", name),
            "resize": checks.check_string("resize", resize),
        }
        self._last: tuple[str, np.ndarray] | None = None

    def __call__(self, images: Any) -> np.ndarray:
        images = as_images("images", images)
        digest = hashlib.sha256(images.data)
        digest.update(str(images.shape).encode())
        key = digest.hexdigest()
        if self._last is None or self._last[0] != key:
            self._last = key, self._extract(images)
        return self._last[1]

    def _extract(self, images: np.ndarray) -> np.ndarray:
        num = len(images)
        size = min(self.batch_size, num)
        batches = []
        for begin in range(0, num, size):
            # Indices wrap around, so that all batches have one compiled shape.
            places = np.arange(begin, begin + size) % num
            output = self.function(images[places])
            features = as_numbers(output)
            if features is None or features.ndim != 2 or len(features) != size:
                raise ValueError(
                    f"`function` of the `extractor` {self._name!r} must return "
                    "numbers of shape (batch, features). Received: "
                    f"{checks.describe(output)} for a batch of {size}"
                )
            wide = features.dtype == "float64"
            features = np.array(features, "float64" if wide else "float32")
            batches.append(features)
        features = np.concatenate(batches)[:num]
        bad = features.size - int(np.isfinite(features).sum())
        if bad:
            raise ValueError(
                f"`function` of the `extractor` {self._name!r} must return "
                f"finite features. Received: {bad} of {features.size} that "
                "are not"
            )
        # It is read-only, because metrics keep it without a copy.
        features.flags.writeable = False
        return features

    @property
    def _name(self) -> str:
        return self.description["extractor"]


def as_images(name: str, images: Any) -> np.ndarray:
    """A batch of images as a float32 array, checked."""
    array = as_numbers(images) if hasattr(images, "shape") else None
    if array is None or array.ndim != 4:
        allowed = "an array of shape (batch, height, width, channels)"
        raise checks.invalid(name, allowed, images)
    checks.check_images(name, array, array.shape[1:])
    return np.ascontiguousarray(array, "<f4")


def as_numbers(values: Any) -> np.ndarray | None:
    """An array of real numbers, or None where there is none."""
    try:
        plain = type(values) is np.ndarray
        array = values if plain else ops.convert_to_numpy(values)
    except Exception:  # because each backend raises what it likes
        return None
    # The name is asked for too, because NumPy has no kind for bfloat16.
    known = array.dtype.kind in "biuf" or "float" in array.dtype.name
    return array if known else None


def keras_features(
    model: keras.Layer,
    *,
    name: str | None = None,
    size: tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    antialias: bool = True,
    mean: float | Sequence[float] = 0.5,
    std: float | Sequence[float] = 0.5,
    pool: Callable[[Any], Tensor] | None = None,
    batch_size: int = 128,
) -> FeatureExtractor:
    """A Keras model, or a KerasHub backbone, as a feature extractor.

    Grey images are repeated to three channels for a model that takes colour,
    then resized, then normalised as the model wants them:
    `((images + 1) / 2 - mean) / std`. KerasHub's DINOv2 and CLIP, for example::

        keras_features(
            keras_hub.models.DINOV2Backbone.from_preset("dinov2_base"),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            pool=lambda tokens: tokens[:, 0],
        )
        keras_features(
            keras_hub.models.CLIPBackbone.from_preset(
                "clip_vit_base_patch32"
            ).vision_encoder,
            mean=(0.4815, 0.4578, 0.4082),
            std=(0.2686, 0.2613, 0.2758),
            pool=lambda tokens: tokens[:, 0],
        )

    Args:
        model: Built model of images, or of a dictionary with one entry for
            them. Its weights' hash becomes part of the name, so it must not be
            trained on afterwards.
        name: What it is called in results; `model.name` by default.
        size: Height and width that the images are resized to; by default those
            of the model's input, where they are fixed, else none.
        interpolation: Method of `keras.ops.image.resize`.
        antialias: Whether to filter where that makes images smaller.
        mean: Mean to subtract from images in [0, 1], one or one per channel.
        std: What to divide them by then. 0.5 and 0.5 leave [-1, 1], 0 and 1
            give [0, 1], 0 and 1/255 give [0, 255].
        pool: Function of the model's output that returns `(batch, features)`.
            By default that is the output itself, or its mean over height and
            width.
        batch_size: Images per call of the model, at most.

    Returns:
        A `FeatureExtractor`.

    Raises:
        ValueError: If an argument is out of its range; when called, if the
            model takes no such images or returns no such features.

    Example:

    >>> layers = [keras.Input((16, 16, 3)), keras.layers.Conv2D(5, 3)]
    >>> extractor = keras_features(keras.Sequential(layers), name="conv")
    >>> extractor(np.zeros((2, 8, 8, 1), "float32")).shape
    (2, 5)
    >>> extractor.description["resize"]
    'bilinear, antialias, to 16x16 (keras.ops.image.resize)'
    """
    if not isinstance(model, keras.Layer) or not model.built:
        raise checks.invalid("model", "a built Keras model or layer", model)
    name = model.name if name is None else checks.check_string("name", name)
    checks.check_choice("interpolation", interpolation, INTERPOLATIONS)
    checks.check_boolean("antialias", antialias)
    checks.check_positive_integer("batch_size", batch_size)
    if pool is not None:
        allowed = "a function of the model's output, or None"
        checks.check_function("pool", pool, allowed)
    inputs = getattr(model, "inputs", None) or []
    if len(inputs) > 1:
        raise ValueError(
            "`model` must take images and nothing else. Received: a model of "
            f"{len(inputs)} inputs, {[x.name for x in inputs]}"
        )
    shape = tuple(inputs[0].shape) if inputs else (None,) * 4
    # Images go into a dictionary if the model takes one, as KerasHub's do.
    structure = getattr(model, "input", None) if inputs else None
    keys = [*structure] if isinstance(structure, dict) else []
    if len(shape) != 4:
        raise ValueError(
            "`model` must take images (batch, height, width, channels). "
            f"Received: a model of inputs of shape {shape}"
        )
    if size is None and None not in shape[1:3]:
        size = shape[1:3]
    if size is not None:
        height, width = checks.check_shape("size", size, ("height", "width"))
        size = height, width
    least = float(np.finfo("float32").tiny)
    shift = _per_channel("mean", mean, -LARGEST, "a finite number", shape[3])
    scale = _per_channel("std", std, least, "a positive number", shape[3])

    def network(images: Tensor) -> Tensor:
        output = model({keys[0]: images} if keys else images, training=False)
        if pool is not None:
            output = pool(output)
        elif len(getattr(output, "shape", ())) == 4:
            output = ops.mean(output, axis=(1, 2))
        if len(getattr(output, "shape", ())) != 2:
            came = getattr(output, "shape", type(output).__name__)
            raise ValueError(
                "`pool` must be given for a model that doesn't return (batch, "
                "features) or (batch, height, width, features), such as "
                "`lambda tokens: tokens[:, 0]`; and return (batch, features). "
                f"Received: {came}"
            )
        return ops.cast(output, "float32")

    run = backend.compile_inference(network, model.variables)

    def extract(images: np.ndarray) -> Tensor:
        images = ops.convert_to_tensor(images, "float32")
        channels = shape[3] or images.shape[3]
        if images.shape[3] == 1 and channels == 3:
            images = ops.repeat(images, 3, axis=3)
        if images.shape[3] != channels:
            raise ValueError(
                f"`images` must have 1 channel or the {channels} that the "
                f"extractor takes. Received: {images.shape[3]} channels"
            )
        for numbers in (shift, scale):
            if numbers.size not in (1, channels):
                raise ValueError(
                    f"`images` must have the {numbers.size} channels of `mean` "
                    f"and `std`. Received: {channels} channels"
                )
        if size is not None and tuple(images.shape[1:3]) != size:
            images = ops.image.resize(
                images,
                size,
                interpolation=interpolation,
                antialias=antialias,
                data_format="channels_last",
            )
        return run(((images + 1.0) / 2.0 - shift) / scale)

    filtered = ", antialias" if antialias else ""
    resize = (
        "none"
        if size is None
        else (
            f"{interpolation}{filtered}, to {size[0]}x{size[1]} "
            "(keras.ops.image.resize)"
        )
    )
    return FeatureExtractor(
        extract,
        name=f"{name}, weights {_hash_of_weights(model)}",
        resize=resize,
        batch_size=batch_size,
    )


def _per_channel(
    name: str, value: Any, low: float, allowed: str, channels: int | None
) -> np.ndarray:
    """A number, or one per channel, as float32."""
    allowed = f"{allowed} of at most 2**24, or one per channel"
    if channels is not None:
        allowed += f" of {channels}"
    numbers = as_numbers(value) if hasattr(value, "shape") else value
    if isinstance(numbers, np.ndarray):
        numbers = numbers.tolist()
    single = not isinstance(numbers, (list, tuple))
    entries = [numbers] if single else numbers
    if not entries or len(entries) not in (1, channels or len(entries)):
        raise checks.invalid(name, allowed, value)
    try:
        for entry in entries:
            checks.check_number(name, entry, low, allowed, high=LARGEST)
    except ValueError:
        raise checks.invalid(name, allowed, value) from None
    return np.asarray(numbers, "float32")


def _hash_of_weights(model: keras.Layer) -> str:
    digest = hashlib.sha256()
    for weight in model.weights:
        value = ops.convert_to_numpy(weight.value)
        digest.update(str(value.shape).encode())
        digest.update(np.asarray(value, "<f4").tobytes())
    return digest.hexdigest()[:12]


def _weights_file(weights: Any) -> str:
    allowed = "'imagenet', the path of a weights file, or None"
    try:
        path = checks.check_path("weights", weights)
    except (TypeError, ValueError):
        raise checks.invalid("weights", allowed, weights) from None
    # Addresses such as gs:// are left to Keras, because it can open them.
    if "://" not in os.fspath(weights) and not path.is_file():
        raise checks.invalid("weights", allowed, weights)
    return os.fspath(weights)


def inception_v3(
    weights: str | os.PathLike | None = "imagenet",
    *,
    size: tuple[int, int] = (299, 299),
    batch_size: int = 128,
) -> FeatureExtractor:
    """The 2048 pooled features of `keras.applications.InceptionV3`.

    **Numbers with these features are not comparable with published FIDs.** The
    Inception of TF-GAN, torch-fidelity and clean-fid is another network: it was
    trained in 2015 for 1008 classes, its pooling differs, and each library
    resizes in its own way. Compare only with numbers by this extractor.

    Args:
        weights: `"imagenet"`, which Keras downloads; the path of a weights
            file; or None for random weights, for trying out.
        size: Height and width that images are resized to, at least 75.
        batch_size: Images per call of the network, at most.

    Returns:
        A `FeatureExtractor`.

    Raises:
        ValueError: If an argument is out of its range, or there is no such
            weights file.

    Example:

    >>> # extractor = inception_v3()
    >>> # reference = Reference(images, extractor, name="train")
    """
    height, width = checks.check_shape("size", size, ("height", "width"))
    size = height, width
    if min(size) < 75:
        allowed = "(height, width) of at least 75 each"
        raise checks.invalid("size", allowed, size)
    checks.check_positive_integer("batch_size", batch_size)
    known = isinstance(weights, str) and weights == "imagenet"
    if weights is not None and not known:
        weights = _weights_file(weights)
    model = keras.applications.InceptionV3(
        include_top=False,
        weights=weights,
        pooling="avg",
        input_shape=(*size, 3),
    )
    return keras_features(
        model,
        name=f"InceptionV3 (keras.applications, {weights or 'random'}; not "
        "comparable with TF-GAN's or torch-fidelity's)",
        batch_size=batch_size,
    )
