"""Checks of data and arguments; each raises a `ValueError` that says it all."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {allowed}. Received: {name}={value!r}"
        )


def check_positive_integer(name: str, value: Any) -> None:
    """Raises unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(
            f"`{name}` must be an integer. Received: {name}={value!r} of type "
            f"{type(value).__name__}"
        )
    if value < 1:
        raise ValueError(
            f"`{name}` must be at least 1. Received: {name}={value}"
        )


def check_images(name: str, images: Any, image_shape: tuple[int, ...]) -> None:
    """Raises unless `images` is a batch of float images in [-1, 1]."""
    shape = tuple(images.shape)
    if shape[1:] != tuple(image_shape):
        raise ValueError(
            f"`{name}` must be images of shape (batch, height, width, "
            f"channels) = (batch, {', '.join(map(str, image_shape))}). "
            f"Received: shape {shape}"
        )
    if 0 in shape:
        raise ValueError(f"`{name}` has no images. Received: shape {shape}")
    dtype = keras.backend.standardize_dtype(images.dtype)
    images = ops.convert_to_numpy(images)
    low, high = float(images.min()), float(images.max())
    if np.isnan(low) or np.isnan(high):
        bad = int(np.isnan(images).sum())
        raise ValueError(
            f"`{name}` must be finite. Received: {bad} NaN of {images.size}"
        )
    if "float" not in dtype or low < -1 or high > 1:
        hint = (
            " Integers 0..255 become that by `images / 127.5 - 1`."
            if high > 1 and low >= 0
            else ""
        )
        raise ValueError(
            f"`{name}` must be floats in [-1, 1].{hint} Received: dtype "
            f"{dtype} from {low:g} to {high:g}"
        )


def check_labels(name: str, labels: Any, num_classes: int | None) -> None:
    """Raises unless `labels` is a vector of classes, or None without any."""
    if num_classes is None:
        if labels is not None:
            raise ValueError(
                f"`{name}` must not be given: the network has no classes "
                f"(num_classes=None). Received: {_describe(labels)}"
            )
        return
    if labels is None:
        raise ValueError(
            f"`{name}` must be given: the network has num_classes="
            f"{num_classes}. Received: None. Give batches as (images, labels), "
            f"labels integers 0..{num_classes - 1}"
        )
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if len(labels.shape) != 1 or "int" not in dtype:
        raise ValueError(
            f"`{name}` must be integers of shape (batch,). Received: "
            f"{_describe(labels)}"
        )
    labels = ops.convert_to_numpy(labels)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"`{name}` must be in 0..{num_classes - 1} (num_classes="
            f"{num_classes}). Received: labels from {low} to {high}"
        )


def _describe(array: Any) -> str:
    if hasattr(array, "shape"):
        return f"shape {tuple(array.shape)}, dtype {array.dtype}"
    return repr(array)


def check_batch(
    name: str, batch: Any, image_shape: tuple[int, ...], num_classes: int | None
) -> None:
    """Raises unless a batch is `images` or `(images, labels)`, both good."""
    images, labels, _ = keras.utils.unpack_x_y_sample_weight(batch)
    if not hasattr(images, "shape"):
        raise ValueError(
            f"`{name}` must yield `images` or `(images, labels)`. Received: "
            f"{type(images).__name__}"
        )
    check_images(f"{name} (images)", images, image_shape)
    check_labels(f"{name} (labels)", labels, num_classes)
    if labels is not None and labels.shape[0] != images.shape[0]:
        raise ValueError(
            f"`{name}` must have one label per image. Received: "
            f"{images.shape[0]} images, {labels.shape[0]} labels"
        )


def _prepend(first: Any, rest: Iterator) -> Iterator:
    yield first
    yield from rest


def check_data(
    name: str,
    x: Any,
    y: Any,
    image_shape: tuple[int, ...],
    num_classes: int | None,
) -> Any:
    """Checks arrays in full, and of a stream the first batch.

    Args:
        name: What to call the data in a message.
        x: Arrays, or a `tf.data.Dataset`, `keras.utils.PyDataset`, PyTorch
            `DataLoader`, or generator of batches.
        y: Labels, with arrays.
        image_shape: Height, width and channels.
        num_classes: Number of classes, or None.

    Returns:
        `x`; for a generator, one that still begins with its first batch.
    """
    if x is None:
        raise ValueError(f"`{name}` must be given. Received: {name}=None")
    if isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    elif isinstance(x, Iterator):
        batch = next(x, None)
        if batch is not None:
            x = _prepend(batch, x)
    elif hasattr(x, "shape"):
        batch = (x, y)
    elif hasattr(x, "__iter__"):
        batch = next(iter(x), None)
    else:
        raise ValueError(
            f"`{name}` must be arrays, a tf.data.Dataset, a PyDataset, a "
            f"DataLoader or a generator. Received: {type(x).__name__}"
        )
    if batch is None:
        raise ValueError(f"`{name}` is empty. Received: no batch")
    batch = tuple(batch) if isinstance(batch, list) else batch
    check_batch(name, batch, image_shape, num_classes)
    return x
