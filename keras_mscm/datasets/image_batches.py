"""Batches of images, shuffled by seed and epoch; needs no TensorFlow."""

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_mscm import backend
from keras_mscm.checks import check_positive_integer


class ImageBatches(keras.utils.PyDataset):
    """A `PyDataset` of images in [-1, 1], and labels if there are any.

    Batch i of an epoch depends on the seed, the epoch and i only, so it doesn't
    matter who asks for it, how often or in which order.

    Of an endless data set (`repeat`) `fit` takes batch 0, 1, 2, ... With a
    finite one Keras itself counts the epochs (it calls `on_epoch_end` once
    before a `fit`, so the first epoch is 1), and mixes the order of the batches
    with Python's `random`; `fit(..., shuffle=False)` keeps it.

    Args:
        read: Function of an array of indices that returns these images, uint8
            or floats in [-1, 1], `(batch, height, width, channels)`.
        num_images: Number of images.
        labels: An integer per image, or None for batches of `images` alone.
        batch_size: Images per batch.
        shuffle: Whether to draw a new order in each epoch.
        seed: Seed of the order and the flips, from 0. None draws one from
            Python's `random`, which `keras.utils.set_random_seed` seeds.
        flip: Whether to mirror each image, left to right, with probability 1/2.
        repeat: Whether to go on for ever; `fit` then needs `steps_per_epoch`.
            Every batch is full: it takes what is missing from the next epoch.
        drop_remainder: Whether to leave out a last, smaller batch. One that is
            kept costs `fit` one more trace. Of no effect with `repeat`.
        class_names: Names of the classes, for whoever asks; None if unknown.
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
        class_names: As given.

    Raises:
        ValueError: If an argument is out of its range, or there is no batch.

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
        # Keras' own workers are not offered: what they have read before `fit`
        # begins is handed out again in the first epoch.
        super().__init__()
        check_positive_integer("num_images", num_images)
        check_positive_integer("batch_size", batch_size)
        check_seed(seed)
        self.shard = as_shard(shard)
        self.shard_size = num_images // self.shard[1]
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
        self.read, self.num_images = read, num_images
        self.labels = None if labels is None else _as_labels(labels, num_images)
        self.batch_size, self.shuffle = batch_size, shuffle
        self.seed = random.randrange(2**31) if seed is None else seed
        self.flip, self.repeat = flip, repeat
        self.drop_remainder = drop_remainder
        self.class_names = class_names
        self.epoch = self.first_batch = 0
        self._last_order: tuple[int, np.ndarray] | None = None

    @property
    def num_batches(self) -> int | None:
        """Batches per epoch, or None if there is no end."""
        if self.repeat:
            return None
        whole, rest = divmod(self.shard_size, self.batch_size)
        return whole + bool(rest and not self.drop_remainder)

    def on_epoch_end(self) -> None:
        """Goes on to the next epoch, if there is an end to this one."""
        self.epoch += not self.repeat

    def __getitem__(self, index: int) -> Any:
        """Batch `index`: `images` or `(images, labels)`."""
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
        images = as_floats(self.read(chosen))
        if self.flip:
            # From 1: with a 0 at its end it would be the seed of the order.
            part, parts = self.shard
            number = 1 + part + parts * index
            rng = np.random.default_rng([self.seed, self.epoch, number])
            mirrored = rng.random((len(chosen), 1, 1, 1)) < 0.5
            images = np.where(mirrored, images[:, :, ::-1], images)
        return images if self.labels is None else (images, self.labels[chosen])

    def _order(self, epoch: int) -> np.ndarray:
        part, parts = self.shard
        if not self.shuffle:
            return np.arange(part, self.shard_size * parts, parts)
        # Kept, since a million images take longer to shuffle than a batch to
        # read; in one assignment, since threads may ask for batches.
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


def check_seed(seed: Any) -> None:
    """Raises unless `seed` is an integer from 0, or None."""
    integer = isinstance(seed, (int, np.integer)) and seed >= 0
    if seed is not None and not integer:
        raise ValueError(
            "`seed` must be an integer of at least 0, or None. Received: "
            f"seed={seed!r}"
        )


def as_shard(shard: Any) -> tuple[int, int]:
    """`shard`, by default this process' own; raises unless it is a part."""
    if shard is None:
        return backend.process()
    integers = isinstance(shard, (list, tuple)) and all(
        isinstance(number, (int, np.integer)) for number in shard
    )
    if not integers or len(shard) != 2 or not 0 <= shard[0] < shard[1]:
        raise ValueError(
            "`shard` must be (index, count), integers with 0 <= index < count, "
            f"or None. Received: shard={shard!r}"
        )
    return tuple(shard)


def _as_labels(labels: Any, num_images: int) -> np.ndarray:
    labels = np.asarray(labels)
    integers = np.issubdtype(labels.dtype, np.integer)
    if labels.shape != (num_images,) or not integers or labels.min() < 0:
        raise ValueError(
            "`labels` must be an integer of at least 0 per image, of shape "
            f"({num_images},). Received: shape {labels.shape}, dtype "
            f"{labels.dtype}"
            + (f", least {labels.min()}" if integers and labels.size else "")
        )
    return labels.astype("int32")
