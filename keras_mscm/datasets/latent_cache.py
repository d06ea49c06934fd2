"""Encodes images once, and keeps their latents on disk."""

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend
from keras_mscm.checks import (
    check_boolean,
    check_path,
    check_positive_integer,
    invalid,
)
from keras_mscm.datasets.arrays import from_arrays
from keras_mscm.datasets.image_batches import ImageBatches, as_floats
from keras_mscm.datasets.indexed_batches import check_options
from keras_mscm.datasets.latent_batches import (
    FORMAT,
    LABELS,
    MANIFEST,
    LatentBatches,
    file_name,
    missing_files,
    num_files,
    open_file,
    read_manifest,
)
from keras_mscm.spaces import LOG_VARIANCE, Latents

#: Images that are looked at to recognise a data set.
SAMPLED = 64
TEMPORARY = r"\.latents-\w+\.tmp"


def cache_latents(
    images: Any,
    space: Latents,
    path: str | os.PathLike,
    *,
    labels: Any = None,
    batch_size: int | None = None,
    moments: bool = False,
    nonnegative: bool = False,
    encode_batch_size: int = 16,
    images_per_file: int = 1024,
    verbose: bool = False,
    **kwargs: Any,
) -> LatentBatches:
    """Encodes images once, so that `fit` needn't in every epoch.

    The latents go to a folder of their own, as float16: half of what they take
    in memory. If the folder is there already and belongs to these images,
    labels and encoder, nothing is encoded again. If the run that filled it was
    interrupted, this one goes on at the file where that was. A folder of
    anything else is refused, and never written to.

    Images are recognised by their number, shape, type and 64 of them; an
    encoder by its weights, and by the latent of the first image.

    Args:
        images: What `from_arrays` takes; or an `ImageBatches` that doesn't
            `flip`, such as `from_folder` returns, with its labels.
        space: `keras_mscm.spaces.Latents` with an encoder that is
            deterministic.
        path: Folder of the cache.
        labels: As for `from_arrays`; None with an `ImageBatches`.
        batch_size: Latents per batch of what is returned. By default that of
            the `ImageBatches`, or 128.
        moments: Whether to store mean and variance of each latent, and draw
            another latent in each epoch, for an encoder that returns both. Else
            the mean alone is stored.
        nonnegative: As for `from_arrays`.
        encode_batch_size: Images that are encoded at a time.
        images_per_file: Images per file of a new folder. An interrupted run
            loses at most one file.
        verbose: Whether to show how far it is.
        **kwargs: `shuffle`, `seed`, `repeat`, `drop_remainder` and `shard`, as
            for `ImageBatches`. By default those of `images`.

    Returns:
        A `PyDataset` of float32 latents, and int32 labels if there are any.

    Raises:
        ValueError: If an argument is out of its range, the folder is of
            something else, or the encoder's latents are not of the space's
            shape, or don't fit into float16.
        OSError: If nothing can be written there, or the disk is full. What
            was written stays, and another call goes on.

    Example:

    >>> # photos = from_folder("photos", image_size=512, batch_size=64)
    >>> # latents = cache_latents(photos, model.space, "photos-latents")
    >>> # model.fit(latents, epochs=10)
    """
    if not isinstance(space, Latents) or space.encoder is None:
        allowed = "a `keras_mscm.spaces.Latents` with an encoder"
        raise invalid("space", allowed, space)
    folder = check_path("path", path)
    moments = check_boolean("moments", moments)
    size = check_positive_integer("encode_batch_size", encode_batch_size)
    per_file = check_positive_integer("images_per_file", images_per_file)
    verbose = check_boolean("verbose", verbose)
    dataset = _as_dataset(images, labels, batch_size, nonnegative, kwargs)
    encode = _encoder(dataset, space, moments, size)
    # One image is encoded before anything is written, because it shows whether
    # the encoder is as the space says, and the one of the cache.
    first = encode(np.arange(1))[0]
    about = {
        "format": FORMAT,
        "num_images": dataset.num_images,
        "shape": [*space.shape],
        "moments": moments,
        "images_per_file": per_file,
        "class_names": dataset.class_names,
        **_fingerprint(dataset, space),
    }
    found = _own_manifest(folder, about)
    if found is not None:
        about["images_per_file"] = found["images_per_file"]
        _check_latent(folder, about, first)
    if found is None or any(missing_files(folder, about)):
        _fill(folder, about, dataset, encode, found is None, verbose)
    options = ("shuffle", "seed", "repeat", "drop_remainder", "shard")
    return LatentBatches(
        folder,
        batch_size=dataset.batch_size if batch_size is None else batch_size,
        **{name: getattr(dataset, name) for name in options} | kwargs,
    )


def _as_dataset(
    images: Any,
    labels: Any,
    batch_size: int | None,
    nonnegative: bool,
    kwargs: dict[str, Any],
) -> ImageBatches:
    batch = {} if batch_size is None else {"batch_size": batch_size}
    check_options("cache_latents", {**batch, **kwargs})
    if "flip" in kwargs:
        raise ValueError(
            "`flip` must not be given, because the mirrored latent of an image "
            "isn't the latent of the mirrored image. Received: "
            f"flip={kwargs['flip']!r}"
        )
    if not isinstance(images, ImageBatches):
        return from_arrays(
            images,
            labels,
            batch_size=128 if batch_size is None else batch_size,
            nonnegative=nonnegative,
            **kwargs,
        )
    if labels is not None:
        raise invalid("labels", "None with an `ImageBatches`", labels)
    if check_boolean("nonnegative", nonnegative):
        raise invalid("nonnegative", "False with an `ImageBatches`", True)
    if images.flip:
        raise ValueError(
            "`images` must not be flipped, because each is encoded once. "
            "Received: an `ImageBatches` with flip=True"
        )
    return images


def _encoder(
    dataset: ImageBatches, space: Latents, moments: bool, size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of indices that returns what is stored of these images.

    Raises:
        ValueError: If images or encoder are not as the space says.
    """
    size = min(size, dataset.num_images)
    first = as_floats(dataset.read_images(np.arange(1)))
    space.check("images", first)
    encoder: Any = space.encoder
    if not encoder.built:  # only then it has all of its weights
        encoder(ops.convert_to_tensor(first), training=False)
    shift = 2 * np.log(np.asarray(space.scale, "float32"))

    def stored(batch):
        encoded = ops.cast(encoder(batch, training=False), "float32")
        mean = space.of_encoded(encoded)
        if not moments:
            return mean
        channels = 2 * space.shape[-1]
        if encoded.shape[-1] != channels:
            raise ValueError(
                "`moments` must be False, because the encoder doesn't return "
                f"mean and log-variance, of {channels} channels. Received: "
                f"moments=True, {encoded.shape[-1]} channels"
            )
        _, log_variance = ops.split(encoded, 2, axis=-1)
        log_variance = ops.clip(log_variance, *LOG_VARIANCE)
        # Scaled latents have a variance that is larger by the scale squared.
        log_variance = log_variance + ops.convert_to_tensor(shift, "float32")
        return ops.concatenate([mean, log_variance], axis=-1)

    run = backend.compile_inference(stored, encoder.variables)

    def encode(indices):
        # Indices wrap around, so that all batches have one compiled shape.
        num = len(indices)
        indices = indices[np.arange(-(-num // size) * size) % num]
        batches = [
            ops.convert_to_numpy(run(as_floats(dataset.read_images(part))))
            for part in np.split(indices, len(indices) // size)
        ]
        values = np.concatenate(batches)[:num]
        with np.errstate(over="ignore"):
            half = values.astype("float16")
        if not np.all(np.isfinite(half)):
            raise ValueError(
                "`space` must give latents that fit into float16, up to 65504. "
                f"Received: up to {np.abs(values).max():g}"
            )
        return half

    return encode


# What a cache belongs to.


def _fingerprint(dataset: ImageBatches, space: Latents) -> dict[str, Any]:
    """What tells images, labels and encoder from others, as JSON holds it."""
    last = dataset.num_images - 1
    chosen = np.unique(np.linspace(0, last, SAMPLED).round().astype("int64"))
    digest, shape, dtype = hashlib.sha256(), None, None
    for index in chosen:  # one by one, because 64 may be large
        image = dataset.read_images(np.array([index]))
        digest.update(np.ascontiguousarray(image).tobytes())
        shape, dtype = [*image.shape[1:]], image.dtype.name
    labels, encoder = dataset.labels, space.encoder
    weights = hashlib.sha256()
    for weight in encoder.weights:  # type: ignore[union-attr]
        value = ops.convert_to_numpy(weight.value)
        weights.update(str(value.shape).encode())
        weights.update(np.asarray(value, "<f4").tobytes())
    config = {
        "class": type(encoder).__name__,
        "weights": weights.hexdigest(),
        "scale": space.scale,
        "shift": space.shift,
    }
    found = {
        "images": {
            "shape": shape,
            "dtype": dtype,
            "sampled": digest.hexdigest(),
        },
        "labels": None
        if labels is None
        else hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest(),
        "encoder": config,
    }
    return json.loads(json.dumps(found))


def _own_manifest(folder: Path, about: dict[str, Any]) -> dict | None:
    """The manifest of a cache of the same; None if it is to be begun.

    Raises:
        ValueError: If the folder is of something else.
    """
    if not folder.exists() and not folder.is_symlink():
        return None
    if not folder.is_dir():
        raise invalid("path", "a folder, or new", folder)
    found = read_manifest(folder)
    if found is None:
        others = [
            entry.name
            for entry in sorted(folder.iterdir())
            if not re.fullmatch(TEMPORARY, entry.name)
        ]
        if others:
            raise ValueError(
                "`path` must be a folder of its own, new or empty. Received: "
                f"{str(folder)!r}, in which there is {others[0]!r}"
            )
        return None
    names = [k for k in about if k not in ("images_per_file", "class_names")]
    differ = [name for name in names if found.get(name) != about[name]]
    if differ:
        raise ValueError(
            "`path` must be a new folder, or the cache of these images by this "
            f"encoder. Received: {str(folder)!r}, which is of another "
            f"{', '.join(differ)}"
        )
    return found


def _check_latent(
    folder: Path, about: dict[str, Any], first: np.ndarray
) -> None:
    """Raises unless the first image's latent is what the cache says."""
    if not (folder / file_name(0)).is_file():
        return
    stored = open_file(folder, about, 0)[0].astype("float32")
    # They may differ a little, because devices and formats round differently.
    allowed = 0.05 * np.abs(stored).mean() + 1e-3
    if np.abs(stored - first).mean() > allowed:
        raise ValueError(
            "`path` must be a new folder, or the cache of these images by this "
            f"encoder. Received: {str(folder)!r}, whose encoder has the same "
            "weights, but made another latent of the first image"
        )


# Files.


def _fill(
    folder: Path,
    about: dict[str, Any],
    dataset: ImageBatches,
    encode: Callable,
    begins: bool,
    verbose: bool,
) -> None:
    """Writes all that a cache lacks."""
    if backend.process()[1] > 1:
        raise ValueError(
            "`path` must be a finished cache where several processes train, "
            f"because only one may write it. Received: {str(folder)!r}. Call "
            "`cache_latents` in a process of its own before"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():  # which a killed run has left
        if re.fullmatch(TEMPORARY, entry.name) and entry.is_file():
            entry.unlink(missing_ok=True)
    if begins:
        # The manifest is written first, because it says whose the files are.
        text = json.dumps(about, indent=2) + "\n"
        _write(folder / MANIFEST, lambda file: file.write(text.encode()))
    missing = {*missing_files(folder, about)}
    if LABELS in missing:
        _write_array(folder / LABELS, dataset.labels)
    progress = None
    if verbose:
        progress = keras.utils.Progbar(dataset.num_images, unit_name="image")
    for number in range(num_files(about)):
        first = number * about["images_per_file"]
        end = min(first + about["images_per_file"], dataset.num_images)
        name = file_name(number)
        if name in missing:
            _write_array(folder / name, encode(np.arange(first, end)))
        if progress is not None:
            progress.update(end)


def _write_array(path: Path, array: Any) -> None:
    _write(path, lambda file: np.save(file, array))


def _write(path: Path, fill: Callable) -> None:
    """Writes a file as a whole or not at all, even if the process is killed."""
    new = path.parent / f".latents-{uuid.uuid4().hex}.tmp"
    try:
        with new.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
