"""Batches of latents that lie on disk, encoded before."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keras_mscm.checks import check_integer, check_path, check_sequence, invalid
from keras_mscm.datasets.indexed_batches import IndexedBatches

MANIFEST = "manifest.json"
LABELS = "labels.npy"
#: By which a manifest is recognised.
FORMAT = "keras_mscm latents, version 1"


class LatentBatches(IndexedBatches):
    """The data set of a finished cache of latents, for `fit` without images.

    `cache_latents` makes the cache, and returns this. It is a `PyDataset` of
    float32 latents, shifted and scaled as the model's space says, and labels if
    there are any. Its order, epochs and shards are those of `ImageBatches`.

    Args:
        path: The folder that `cache_latents` has filled.
        batch_size, shuffle, seed, repeat, drop_remainder, shard: As for
            `ImageBatches`.

    Attributes:
        latent_shape: Of one latent.
        moments: Whether latents are drawn anew in each epoch, by `seed`, from
            their mean and variance.

    Raises:
        ValueError: If an argument is out of its range, or `path` is no cache,
            or isn't finished.

    Example:

    >>> # latents = LatentBatches("latents", batch_size=64, repeat=True)
    >>> # model.fit(latents, epochs=10, steps_per_epoch=1000)
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        batch_size: int,
        shuffle: bool = True,
        seed: int | None = None,
        repeat: bool = False,
        drop_remainder: bool = False,
        shard: tuple[int, int] | None = None,
    ):
        folder = check_path("path", path)
        about = read_manifest(folder)
        if about is None:
            raise invalid("path", "a folder that `cache_latents` filled", path)
        missing = next(missing_files(folder, about), None)
        if missing is not None:
            raise ValueError(
                f"`path` must be a finished cache. Received: {str(folder)!r}, "
                f"which lacks {missing}: call `cache_latents` again, which "
                "goes on"
            )
        labels = None
        if about["labels"] is not None:
            labels = _array(folder / LABELS, "int32", (about["num_images"],))
        super().__init__(
            about["num_images"],
            labels,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            repeat=repeat,
            drop_remainder=drop_remainder,
            class_names=about["class_names"],
            shard=shard,
        )
        self.moments = about["moments"]
        self.latent_shape = tuple(about["shape"])
        self._about, self._folder = about, folder
        # The first file is opened here, because a bad shape is to be reported
        # before memory is taken for it.
        self._files = {0: open_file(folder, about, 0)}

    def _load(self, chosen: np.ndarray, seed: list[int]) -> np.ndarray:
        stored = np.empty((len(chosen), *stored_shape(self._about)), "float32")
        numbers, rows = np.divmod(chosen, self._about["images_per_file"])
        for number in np.unique(numbers):
            here = numbers == number
            stored[here] = self._file(int(number))[rows[here]]
        if not self.moments:
            return stored
        mean, log_variance = np.split(stored, 2, axis=-1)
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal(mean.shape, dtype="float32")
        return mean + np.exp(log_variance / 2) * noise

    def _file(self, number: int) -> np.ndarray:
        if number not in self._files:
            self._files[number] = open_file(self._folder, self._about, number)
        return self._files[number]


def stored_shape(about: dict[str, Any]) -> tuple[int, ...]:
    """Shape of what is stored of an image: the latent, or its moments."""
    *places, channels = about["shape"]
    return (*places, 2 * channels if about["moments"] else channels)


def file_name(number: int) -> str:
    """Name of the file of that number, from 0."""
    return f"{number:05d}.npy"


def num_files(about: dict[str, Any]) -> int:
    """Number of files of latents that a finished cache has."""
    return -(-about["num_images"] // about["images_per_file"])


def missing_files(folder: Path, about: dict[str, Any]) -> Iterator[str]:
    """Names of the files that a cache lacks."""
    if about["labels"] is not None and not (folder / LABELS).is_file():
        yield LABELS
    for name in map(file_name, range(num_files(about))):
        if not (folder / name).is_file():
            yield name


def open_file(folder: Path, about: dict[str, Any], number: int) -> np.ndarray:
    """The latents in a file, mapped into memory; raises for anything else."""
    first = number * about["images_per_file"]
    num = min(about["images_per_file"], about["num_images"] - first)
    return _array(
        folder / file_name(number), "float16", (num, *stored_shape(about))
    )


def _array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        good = array.dtype == dtype and array.shape == shape
        told = f"{array.dtype} of shape {array.shape}"
    except (OSError, ValueError, EOFError) as error:
        good, told = False, str(error)
    if not good:
        raise ValueError(
            f"`path` must have files as they were written. Received: {path}, "
            f"which is to be {dtype} of shape {shape}: {told}. Remove it, and "
            "call `cache_latents` again, which writes it anew"
        )
    return array


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder says of the latents in it; None if there is no manifest.

    Raises:
        ValueError: If there is one that `cache_latents` hasn't written.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text("utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        for name in ("num_images", "images_per_file"):
            check_integer(name, about[name], 1)
        for size in check_sequence("shape", about["shape"], "a shape"):
            check_integer("shape", size, 1)
        if not isinstance(about["moments"], bool):
            raise ValueError(f"moments={about['moments']!r}")
        for name in ("images", "labels", "encoder", "class_names"):
            about[name]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "`path` must be a folder of `cache_latents`, or a new one. "
            f"Received: {str(folder)!r}, whose {MANIFEST} is of something "
            f"else: {error}"
        ) from error
    return about
