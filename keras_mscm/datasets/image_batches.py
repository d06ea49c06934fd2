"""Batches of images, shuffled by seed and epoch; needs no TensorFlow."""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_mscm.checks import check_boolean, check_function, describe
from keras_mscm.datasets.indexed_batches import IndexedBatches, as_array


class ImageBatches(IndexedBatches):
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
        super().__init__(
            num_images,
            labels,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            repeat=repeat,
            drop_remainder=drop_remainder,
            class_names=class_names,
            shard=shard,
        )
        self.read = check_function(
            "read", read, "a function of an array of indices"
        )
        self.flip = check_boolean("flip", flip)
        self._image_shape: tuple[int, ...] | None = None  # that of batches read

    def read_images(self, indices: np.ndarray) -> np.ndarray:
        """Images by their index, as `read` returns them; raises for others.

        Args:
            indices: Integers from 0, below `num_images`, one or more.
        """
        return self._checked(self.read(indices), len(indices))

    def _load(self, chosen: np.ndarray, seed: list[int]) -> np.ndarray:
        images = as_floats(self.read_images(chosen))
        if self.flip:
            rng = np.random.default_rng(seed)
            mirrored = rng.random((len(chosen), 1, 1, 1)) < 0.5
            images = np.where(mirrored, images[:, :, ::-1], images)
        return images

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


def as_floats(images: np.ndarray) -> np.ndarray:
    """Images as float32: uint8 0..255 become [-1, 1], floats stay."""
    if images.dtype == np.uint8:
        return images.astype("float32") / np.float32(127.5) - np.float32(1)
    return images.astype("float32")


def is_float(array: np.ndarray) -> bool:
    """Whether an array is of one of the types of floats that are data."""
    return array.dtype.name in ("float16", "bfloat16", "float32", "float64")
