"""Checks of what comes to `fit`: data, their conditioning, devices, a loss."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, conditioning
from keras_mscm.checks import check_labels, describe, is_array, unit_range
from keras_mscm.conditioning import Declared
from keras_mscm.models import streams
from keras_mscm.models.streams import Watch, as_tuple
from keras_mscm.spaces import Space


def check_sample_weight(name: str, weight: Any, num: int) -> None:
    """Raises unless `weight`, if there is one, is a number per image."""
    if weight is None:
        return
    if tuple(getattr(weight, "shape", ())) != (num,):
        raise ValueError(
            f"`{name}` must be an array of one weight per image, shape "
            f"({num},). Received: {describe(weight)}"
        )
    if not np.all(np.isfinite(ops.convert_to_numpy(weight))):
        raise ValueError(
            f"`{name}` must be finite. Received: NaN or infinite weights"
        )


@dataclass(frozen=True)
class Expected:
    """What a model expects of its data.

    Attributes:
        space: What the data are.
        conditioning: What the network takes besides, by name.
        nonnegative: Whether it is meant that no image goes below 0.
        shares: Of which a batch's size must be a multiple, last or not.
    """

    space: Space
    conditioning: Declared
    nonnegative: bool = False
    shares: int = 1


def check_batch(name: str, batch: Any, expected: Expected) -> None:
    """Raises unless a batch is `images` or `(images, y)`, both good.

    The values of what lies on an accelerator are not looked at, because the
    step would have to wait for them.
    """
    batch = as_tuple(batch)
    images, y, sample_weight = (*batch, None, None, None)[:3]
    if not is_array(images) or len(batch) > 3:
        raise ValueError(
            f"`{name}` must be or yield `images`, `(images, labels)` or "
            f"`(images, labels, sample_weight)`, all arrays.{_as_map(batch)} "
            f"Received: ({', '.join(map(describe, batch))})"
        )
    num, parts = images.shape[0], keras.tree.flatten(batch)
    on_host = all(backend.lies_on_host(part) for part in parts)
    expected.space.check(f"{name} (images)", images, on_host)
    if on_host:
        conditioning.check(expected.conditioning, y, num, name)
        check_sample_weight(f"{name} (sample_weight)", sample_weight, num)
    if num % expected.shares:
        raise ValueError(
            f"`{name}` must be of a multiple of {expected.shares} images, the "
            "shares in which devices take a batch, also if it is the last; "
            f"`drop_remainder=True` leaves that out. Received: {num} images"
        )


def _as_map(batch: tuple) -> str:
    """How to make of a dictionary what `fit` takes."""
    if len(batch) != 1 or not isinstance(batch[0], dict):
        return ""
    keys = [*batch[0]]
    return (
        f" A dictionary of {keys} becomes that by `dataset.map(lambda batch: ("
        'batch["image"], batch["label"]))`, with the keys that it has.'
    )


def check_data(
    name: str, x: Any, y: Any, sample_weight: Any, expected: Expected
) -> tuple[Any, Watch | None]:
    """Checks arrays in full; of a stream the first batch, and each that passes.

    Args:
        name: What to call the data in a message.
        x: Arrays, or a `tf.data.Dataset`, `keras.utils.PyDataset`, PyTorch
            `DataLoader`, or generator of batches.
        y: Labels, with arrays.
        sample_weight: Weights, with arrays and labels.
        expected: What the model expects.

    Returns:
        What to train on, and what watches it if it is a stream.
    """
    if is_array(x):
        if y is None and sample_weight is not None:
            raise ValueError(
                f"`{name} (sample_weight)` must come with labels: without, "
                "Keras leaves it out. Received: labels None"
            )
        # How arrays divide into batches is not known here.
        check_batch(name, (x, y, sample_weight), replace(expected, shares=1))
        if not expected.nonnegative and expected.space.looks_unsigned(x):
            raise ValueError(unit_range(f"{name} (images)", x))
        return x, None
    kinds = (list, tuple, dict, str, bytes, set, np.ndarray, np.generic, type)
    if not hasattr(type(x), "__iter__") or isinstance(x, kinds):
        raise ValueError(
            f"`{name}` must be an array of images, a tf.data.Dataset, a "
            "PyDataset, a DataLoader or a generator. Received: "
            f"{describe(x)}"
        )
    batch, x = streams.first_batch(name, x)
    if hasattr(x, "collate_fn") and hasattr(batch, "shape"):
        raise ValueError(
            f"`{name}` must, as a DataLoader, yield [images] or [images, "
            "labels], as it does from a `torch.utils.data.TensorDataset`. "
            f"Received: a tensor, {describe(batch)}"
        )
    check_batch(name, batch, expected)
    images = as_tuple(batch)[0]
    look = backend.lies_on_host(images) and not expected.nonnegative
    if look and expected.space.looks_unsigned(images):
        warnings.warn(unit_range(f"{name} (images)", images), stacklevel=5)
    _check_beforehand(name, x, expected)

    def check(batch, number):
        check_batch(f"batch {number} of {name}", batch, expected)

    watch = Watch(check)
    return streams.watched(x, watch), watch


def _check_beforehand(name: str, x: Any, expected: Expected) -> None:
    """Checks what a stream lets know of its later batches."""
    labels = getattr(x, "labels", None)
    if isinstance(x, keras.utils.PyDataset) and isinstance(labels, np.ndarray):
        declared = expected.conditioning.get("labels")
        num_classes = declared.num_classes if declared else None
        check_labels(f"{name} (labels)", labels, num_classes)
    if expected.shares == 1:
        return
    last = None
    if isinstance(x, keras.utils.PyDataset) and x.num_batches:
        last = len(as_tuple(x[x.num_batches - 1])[0])
    elif hasattr(x, "collate_fn") and not getattr(x, "drop_last", True):
        last = len(x.dataset) % x.batch_size
    elif backend.is_tf_dataset(x):
        spec = keras.tree.flatten(x.element_spec)[0]
        if spec.shape[0] is None:
            warnings.warn(
                f"`{name}` may end with a batch that is no multiple of "
                f"{expected.shares} images, the shares in which devices take "
                "it. Training would stop there: give "
                "`batch(..., drop_remainder=True)`",
                stacklevel=6,
            )
    if last and last % expected.shares:
        raise ValueError(
            f"`{name}` must end with a batch that is a multiple of "
            f"{expected.shares} images, the shares in which devices take it; "
            f"`drop_remainder=True` leaves it out. Received: {last} images in "
            "the last batch"
        )


def check_distribution(model: keras.Model) -> None:
    """Raises if Keras would not distribute, or fail with another reason."""
    if backend.has_several_workers(model):
        raise ValueError(
            "`tf.distribute.MultiWorkerMirroredStrategy` must not be used: the "
            "`fit` of Keras 3 fails under it (keras-team/keras#20585). For "
            "several machines use JAX (`keras.distribution.initialize`); on "
            "one, `tf.distribute.MirroredStrategy`. Received: a model that was "
            "compiled within its scope"
        )
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    received = f"Received: {type(distribution).__name__}"
    if backend.NAME != "jax":
        instead = {
            "tensorflow": "make and compile the model within the scope of a "
            "`tf.distribute.MirroredStrategy`",
            "torch": "use JAX, or TensorFlow with `tf.distribute`",
        }
        raise ValueError(
            "`keras.distribution` must not be set on the backend "
            f"{backend.NAME!r}: Keras accepts it there and distributes "
            f"nothing. Instead, {instead[backend.NAME]}. {received}"
        )
    for variable in [*model.variables, *model.optimizer.variables]:
        if not backend.lies_on(variable, distribution):
            raise ValueError(
                "`keras.distribution.set_distribution` must be called before "
                "networks, models and optimizers are made. "
                f"{received}, and {variable.path!r} on other devices"
            )


def check_shares(
    name: str, x: Any, part: float, batch_size: int | None, shares: int
) -> None:
    """Raises unless arrays make batches that divide among devices.

    Args:
        name: What to call the data in a message.
        x: Data as for `fit`; of a stream nothing is known here.
        part: Part of the data that is used.
        batch_size: Batch size; None for Keras' default.
        shares: Number of shares of each batch.
    """
    if not is_array(x):
        return
    num, batch_size = math.floor(x.shape[0] * part), batch_size or 32
    first, last = min(num, batch_size), num % batch_size
    # TensorFlow divides a smaller last batch unevenly; JAX doesn't.
    if first % shares or (backend.NAME == "jax" and last % shares):
        raise ValueError(
            f"`batch_size` must be a multiple of {shares}, the shares in which "
            f"devices take a batch, as must be what `{name}` leaves for the "
            f"last batch. Received: batch_size={batch_size}, {num} images, "
            f"{last} in the last batch"
        )
