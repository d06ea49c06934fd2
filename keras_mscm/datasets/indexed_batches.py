"""The order of examples by seed and epoch, which all batches have."""

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_mscm import backend
from keras_mscm.checks import (
    SEED_END,
    check_boolean,
    check_integer,
    check_positive_integer,
    check_seed,
    check_sequence,
    check_string,
    describe,
    invalid,
)


class IndexedBatches(keras.utils.PyDataset):
    """The base for batches of examples that can be read by their index.

    A subclass says how to read some of them. Arguments and attributes are those
    of `ImageBatches`.
    """

    def __init__(
        self,
        num_images: int,
        labels: Any,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int | None,
        repeat: bool,
        drop_remainder: bool,
        class_names: list[str] | None,
        shard: tuple[int, int] | None,
    ):
        # Keras' own workers are not offered, because what they have read before
        # `fit` begins is handed out again in the first epoch.
        super().__init__()
        self.num_images = check_positive_integer("num_images", num_images)
        self.batch_size = check_positive_integer("batch_size", batch_size)
        self.shuffle = check_boolean("shuffle", shuffle)
        seed = check_seed("seed", seed)
        if seed is None:
            seed = random.randrange(2**31) % SEED_END
        self.seed = seed
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
        """Batch `index`: examples or `(examples, labels)`."""
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
        part, parts = self.shard
        # Numbers start at 1, because NumPy pads seeds with zeros: one that ends
        # in 0 would be the seed of the epoch's order.
        number = 1 + part + parts * index
        x = self._load(chosen, [self.seed, self.epoch, number])
        return x if self.labels is None else (x, self.labels[chosen])

    def _load(self, chosen: np.ndarray, seed: list[int]) -> np.ndarray:
        """The examples of a batch, float32.

        Args:
            chosen: Their indices.
            seed: Seed for NumPy, which no other batch of the process and no
                other process has.
        """
        raise NotImplementedError

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
