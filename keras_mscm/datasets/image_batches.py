"""Batches of images, shuffled by seed and epoch; needs no TensorFlow."""

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_mscm import backend
from keras_mscm.checks import (
    SEED_END,
    check_boolean,
    check_function,
    check_integer,
    check_positive_integer,
    check_seed,
    check_sequence,
    check_string,
    describe,
    invalid,
)


class ImageBatches(keras.utils.PyDataset):
    """The data set for images that a function of your own reads.

    It is a `PyDataset` of images in [-1, 1], and labels if there are any. Batch
    i of an epoch depends on the seed, the epoch and i only, so it doesn't
    matter who asks for it, how often or in which order.

    Of an endless data set (`repeat`) `fit` takes batch 0, 1, 2, ... With a
    finite one Keras itself counts the epochs (it calls `on_epoch_end` once
    before a `fit`, so the first epoch is 1), and mixes the order of the batches
    with Python's `random`; `fit(..., shuffle=False)` keeps it.

    Args:
        read: Function of an array of indices that returns these images, uint8
            or floats in [-1, 1], `(batch, height, width, channels)`. Each batch
            is checked when it is read, none before.
        num_images: Number of images.
        labels: An integer from 0 per image, or None for batches of `images`
            alone.
        batch_size: Images per batch.
        shuffle: Whether to draw a new order in each epoch.
        seed: Seed of the order and the flips, 0..2**31 - 3. None draws one from
            Python's `random`, which `keras.utils.set_random_seed` seeds.
        flip: Whether to mirror each image, left to right, with probability 1/2.
        repeat: Whether to go on for ever; `fit` then needs `steps_per_epoch`.
            Every batch is full: it takes what is missing from the next epoch.
        drop_remainder: Whether to leave out a last, smaller batch. One that is
            kept costs `fit` one more trace. With `repeat` there is none.
        class_names: Names of the classes, a list of strings, for whoever asks;
            none of the labels may be beyond it. None if unknown.
        shard: Which part of each epoch to give, and of how many parts: `(index,
            count)`, index from 0. Parts are of one size; up to `count - 1`
            images of an epoch are in none. With the same seed, no two parts
            share an image. None gives each of JAX's processes a part of its
            own, all of it where there is one process. (Where there are more,
            Keras asks for `distribution.auto_shard_dataset = False`.)

    Attributes:
        epoch: Epoch of batch 0. Set it to go on where a training stopped.
        first_batch: Of an endless data set, the batch that a `fit` takes first
            (0). Set it to go on where a training stopped.
        labels: All labels, int32, `(num_images,)`, in the order of the indices
            and of every shard; or None. Known before a batch is read.
        shard_size: Images per epoch.
        num_batches: Batches per epoch; None if there is no end.
        last_batch_size: Images in an epoch's last batch.
        num_images, batch_size, shuffle, seed, flip, repeat, drop_remainder,
            class_names, shard: As given, or as drawn where that was None.

    Raises:
        ValueError: If an argument is out of its range, or there is no batch;
            on asking for a batch, if `read` returns something else.
        IndexError: On asking for a batch that there isn't.

    Example:

    >>> import numpy as np
    >>> images = np.zeros((10, 8, 8, 3), "uint8")
    >>> batches = ImageBatches(lambda i: images[i], 10, batch_size=4)
    >>> [batch.shape for batch in batches]
    [(4, 8, 8, 3), (4, 8, 8, 3), (2, 8, 8, 3)]

    A batch is read when it's due. Grain (`pip install "keras-mscm[grain]"`)
    has threads read ahead, while the model trains:

    >>> import grain
    >>> batches = ImageBatches(
    ...     lambda i: images[i], 10, batch_size=4, repeat=True
    ... )
    >>> ahead = grain.MapDataset.range(1000).map(batches.__getitem__)
    >>> ahead = ahead.to_iter_dataset(
    ...     grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    ... )
    >>> # model.fit(ahead, epochs=10, steps_per_epoch=100)
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], np.ndarray],
        num_images: int,
        labels: Any = None,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int | None = None,
        flip: bool = False,
        repeat: bool = False,
        drop_remainder: bool = False,
        class_names: list[str] | None = None,
        shard: tuple[int, int] | None = None,
    ):
        # Keras' own workers are not offered, because what they have read before
        # `fit` begins is handed out again in the first epoch.
        super().__init__()
        self.read = check_function(
            "read", read, "a function of an array of indices"
        )
        self.num_images = check_positive_integer("num_images", num_images)
        self.batch_size = check_positive_integer("batch_size", batch_size)
        self.shuffle = check_boolean("shuffle", shuffle)
        seed = check_seed("seed", seed)
        if seed is None:
            seed = random.randrange(2**31) % SEED_END
        self.seed = seed
        self.flip = check_boolean("flip", flip)
        self.repeat = check_boolean("repeat", repeat)
        self.drop_remainder = check_boolean("drop_remainder", drop_remainder)
        self.shard = as_shard("shard", shard)
        self.shard_size = self.num_images // self.shard[1]
        if self.shard_size == 0:
            raise ValueError(
                "`shard` must be of at most as many parts as there are images, "
                f"{num_images}. Received: shard={self.shard}"
            )
        if drop_remainder and not repeat and self.shard_size < batch_size:
            raise ValueError(
                "`batch_size` must be at most the number of images, "
                f"{self.shard_size}, with drop_remainder=True: there is no "
                f"batch. Received: batch_size={batch_size}"
            )
        self.labels = None if labels is None else _as_labels(labels, num_images)
        self.class_names = _as_class_names(class_names, self.labels)
        self.epoch = self.first_batch = 0
        self._last_order: tuple[int, np.ndarray] | None = None
        self._image_shape: tuple[int, ...] | None = None  # that of batches read

    @property
    def num_batches(self) -> int | None:
        """Batches per epoch, or None if there is no end."""
        if self.repeat:
            return None
        whole, rest = divmod(self.shard_size, self.batch_size)
        return whole + bool(rest and not self.drop_remainder)

    @property
    def last_batch_size(self) -> int:
        """Images in an epoch's last batch, at most `batch_size`."""
        rest = self.shard_size % self.batch_size
        whole = self.repeat or self.drop_remainder or not rest
        return self.batch_size if whole else rest

    def on_epoch_end(self) -> None:
        """Goes on to the next epoch, if there is an end to this one."""
        self.epoch += not self.repeat

    def __getitem__(self, index: int) -> Any:
        """Batch `index`: `images` or `(images, labels)`."""
        end = self.num_batches
        if index < 0 or (end is not None and index >= end):
            batches = "a batch" if end is None else f"one of {end} batches"
            raise IndexError(
                f"`index` must be that of {batches}, from 0. Received: "
                f"index={index}"
            )
        index += self.first_batch
        begin = index * self.batch_size
        end = begin + self.batch_size
        if not self.repeat:
            end = min(end, self.shard_size)
        epochs, places = np.divmod(np.arange(begin, end), self.shard_size)
        chosen = np.concatenate(
            [
                self._order(self.epoch + int(epoch))[places[epochs == epoch]]
                for epoch in np.unique(epochs)
            ]
        )
        images = as_floats(self._checked(self.read(chosen), len(chosen)))
        if self.flip:
            # Numbers start at 1, because NumPy pads seeds with zeros: one that
            # ends in 0 would be the seed of the epoch's order.
            part, parts = self.shard
            number = 1 + part + parts * index
            rng = np.random.default_rng([self.seed, self.epoch, number])
            mirrored = rng.random((len(chosen), 1, 1, 1)) < 0.5
            images = np.where(mirrored, images[:, :, ::-1], images)
        return images if self.labels is None else (images, self.labels[chosen])

    def _checked(self, images: Any, num: int) -> np.ndarray:
        """What `read` returned, as an array; raises unless it is images."""
        allowed = (
            f"an array of {num} images for as many indices, (batch, height, "
            "width, channels), uint8 or floats in [-1, 1]"
        )
        images = as_array("read", images, f"a function that returns {allowed}")
        wrong = describe(images)
        good = images.ndim == 4 and len(images) == num and 0 not in images.shape
        good = good and (images.dtype == np.uint8 or is_float(images))
        if good and is_float(images):
            low, high = images.min(), images.max()
            good = low >= -1 and high <= 1  # which NaN fails too
            wrong += f", from {low:g} to {high:g}"
        if good and self._image_shape not in (None, images.shape[1:]):
            allowed += f", of shape {self._image_shape} as those before"
            good = False
        if not good:
            raise ValueError(f"`read` must return {allowed}. Received: {wrong}")
        self._image_shape = images.shape[1:]
        return images

    def _order(self, epoch: int) -> np.ndarray:
        part, parts = self.shard
        if not self.shuffle:
            return np.arange(part, self.shard_size * parts, parts)
        # The order is kept, because shuffling a million images takes longer
        # than reading a batch. It is one assignment, because several threads
        # may ask for batches.
        if self._last_order is None or self._last_order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(self.num_images)
            self._last_order = epoch, order[part::parts][: self.shard_size]
        return self._last_order[1]


def as_floats(images: np.ndarray) -> np.ndarray:
    """Images as float32: uint8 0..255 become [-1, 1], floats stay."""
    if images.dtype == np.uint8:
        return images.astype("float32") / np.float32(127.5) - np.float32(1)
    return images.astype("float32")


def is_float(array: np.ndarray) -> bool:
    """Whether an array is of one of the types of floats that are data."""
    return array.dtype.name in ("float16", "bfloat16", "float32", "float64")


def as_array(name: str, value: Any, allowed: str) -> np.ndarray:
    """A NumPy array of a value; raises for what can't be one."""
    try:
        return np.asarray(value)
    except Exception as error:  # because each kind of array has its own
        raise invalid(name, allowed, value) from error


def as_shard(name: str, shard: Any) -> tuple[int, int]:
    """`shard`, by default this process' own; raises unless it is a part."""
    if shard is None:
        return backend.process()
    allowed = "(index, count), integers with 0 <= index < count, or None"
    if not isinstance(shard, (list, tuple)) or len(shard) != 2:
        raise invalid(name, allowed, shard)
    try:
        count = check_positive_integer(name, shard[1])
        return check_integer(name, shard[0], 0, count - 1), count
    except ValueError:
        raise invalid(name, allowed, shard) from None


#: Arguments that loaders hand on to `ImageBatches`, and their checks.
OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "batch_size": check_positive_integer,
    "shuffle": check_boolean,
    "seed": check_seed,
    "flip": check_boolean,
    "repeat": check_boolean,
    "drop_remainder": check_boolean,
    "shard": as_shard,
}


def check_options(function: str, options: dict[str, Any], *others: str) -> None:
    """Checks what a loader hands on, before it reads or downloads anything.

    Args:
        function: The loader's name.
        options: Its keyword arguments.
        others: Names that are allowed besides `OPTIONS`.

    Raises:
        TypeError: If one has another name.
        ValueError: If one is out of its range.
    """
    allowed = (*OPTIONS, *others)
    for name in options:
        if name not in allowed:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}. "
                f"Besides its own it takes {', '.join(sorted(allowed))}"
            )
    for name, value in options.items():
        if name in OPTIONS:
            OPTIONS[name](name, value)
        elif name == "class_names":
            check_class_names(name, value)


def _as_labels(labels: Any, num_images: int) -> np.ndarray:
    allowed = f"an integer of at least 0 per image, of shape ({num_images},)"
    labels = as_array("labels", labels, allowed)
    received = describe(labels)
    good = np.issubdtype(labels.dtype, np.integer)
    good = good and labels.shape == (num_images,)
    if good:
        low, high = labels.min(), labels.max()
        good = low >= 0 and high < 2**31
        received += f", from {low} to {high}"
        if not good:
            bad = np.flatnonzero((labels < 0) | (labels >= 2**31))
            received += f", the first of {len(bad)} bad ones at {bad[0]}"
    if not good:
        raise ValueError(f"`labels` must be {allowed}. Received: {received}")
    return labels.astype("int32")


def check_class_names(name: str, names: Any) -> list[str] | None:
    """Raises unless `names` is a list of strings, or None."""
    if names is None:
        return None
    allowed = "a list of strings, the name of each class, or None"
    if isinstance(names, np.ndarray):
        names = names.tolist()
    try:
        return [
            check_string(name, each)
            for each in check_sequence(name, names, allowed)
        ]
    except ValueError:
        raise invalid(name, allowed, names) from None


def _as_class_names(names: Any, labels: np.ndarray | None) -> list[str] | None:
    names = check_class_names("class_names", names)
    if names is None:
        return None
    if labels is None:
        raise ValueError(
            "`class_names` must be None where there are no labels. Received: "
            f"class_names={describe(names)}"
        )
    bad = np.flatnonzero(labels >= len(names))
    if len(bad):
        raise ValueError(
            f"`labels` must be in 0..{len(names) - 1}, as there are "
            f"{len(names)} `class_names`. Received: labels from {labels.min()} "
            f"to {labels.max()}, the first of {len(bad)} bad ones at {bad[0]}"
        )
    return names
