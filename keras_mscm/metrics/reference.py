"""The real images, in features, that samples are compared with."""

import hashlib
import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from keras_mscm import checks
from keras_mscm.metrics.extractors import FeatureExtractor, as_images
from keras_mscm.metrics.moments import Moments

ARRAYS = "mean", "covariance", "features", "image_shape"


class Reference:
    """The real images that metrics compare samples with; make it once for all.

    It holds the images' features and their statistics.

    Args:
        images: `(num, height, width, channels)`, floats in [-1, 1], at least
            2; or an iterable of such batches, or of `(batch, labels)`, that
            ends.
        extractor: `FeatureExtractor`, or any function of images that returns
            `(batch, features)`.
        name: What the data set is called in results.
        keep_features: Whether to keep every image's features, which all but
            `FrechetDistance` need: 4 bytes for each.
        nonnegative: Whether it is meant that no image goes below 0. Else an
            array of such images is refused, as they look like [0, 1], and of
            an iterable the first batch is warned of.

    Attributes:
        hash: SHA-256 of the images as float32 bytes and of their shape.
        num_images: How many they are.
        mean, covariance: Those of the features, float64.
        features: `(num_images, features)`, or None.
        image_shape: Height, width and channels of the images; None of a file
            by an older version.

    Raises:
        ValueError: If an argument is out of its range, or the images are not
            such, or too few.

    Example:

    >>> images = np.linspace(-1, 1, 80, dtype="float32").reshape(5, 4, 4, 1)
    >>> reference = Reference(images, lambda x: x[:, 0, :2, 0], name="ramps")
    >>> reference.num_images, reference.features.shape
    (5, (5, 2))
    """

    def __init__(
        self,
        images: Any,
        extractor: Callable[[Any], Any],
        *,
        name: str,
        keep_features: bool = True,
        nonnegative: bool = False,
    ):
        self.extractor = _as_extractor(extractor)
        self.name = checks.check_string("name", name)
        checks.check_boolean("keep_features", keep_features)
        checks.check_boolean("nonnegative", nonnegative)
        moments, kept, digest = Moments(), [], hashlib.sha256()
        shape: tuple[int, ...] | None = None
        for batch in _batches(images):
            if shape is not None and batch.shape[1:] != shape:
                raise ValueError(
                    "`images` must be batches of one image shape. Received: "
                    f"{shape}, then {batch.shape[1:]}"
                )
            if shape is None and not nonnegative:
                whole = hasattr(images, "shape")
                check = checks.check_signed if whole else checks.warn_unsigned
                check("images", batch)
            shape = batch.shape[1:]
            digest.update(batch.data)
            # Batches are cut, because a whole array's features may not fit.
            step = self.extractor.batch_size
            for begin in range(0, len(batch), step):
                features = self.extractor(batch[begin : begin + step])
                moments.add(features)
                kept += [features] if keep_features else []
        if moments.count < 2:
            raise ValueError(
                f"`images` must be at least 2. Received: {moments.count}"
            )
        digest.update(str((moments.count, *(shape or ()))).encode())
        self.hash = digest.hexdigest()
        self.num_images = moments.count
        self.image_shape = shape
        self.mean, self.covariance = moments.mean, moments.covariance
        self.features: np.ndarray | None = None
        if keep_features:
            self.features = np.concatenate(kept)

    @property
    def description(self) -> dict[str, Any]:
        """What stands beside each number: reference set, extractor, resize."""
        return {
            "reference": self.name,
            "reference_hash": self.hash,
            "num_reference": self.num_images,
            **self.extractor.description,
        }

    def require_features(self, metric: str) -> np.ndarray:
        """The features, for a metric that can't do without.

        Raises:
            ValueError: If they were not kept.
        """
        if self.features is None:
            raise ValueError(
                f"`reference` must keep its features for {metric}. Received: "
                f"{self.name!r}, made with keep_features=False"
            )
        return self.features

    def save(self, path: str | os.PathLike) -> None:
        """Writes the statistics and features to an .npz file.

        Args:
            path: Where to; a file that `save` wrote is replaced at once, or
                not at all, and nothing else is.

        Raises:
            ValueError: If something else is there. It is left as it is.
        """
        path = _check_target(path)
        arrays: dict[str, Any] = {
            "mean": self.mean,
            "covariance": self.covariance,
        }
        if self.image_shape is not None:
            arrays["image_shape"] = np.array(self.image_shape)
        if self.features is not None:
            arrays["features"] = self.features
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}."
        ) as folder:
            new = Path(folder, "new.npz")
            about = np.array(json.dumps(self.description))
            np.savez(new, about=about, **arrays)
            os.replace(new, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, extractor: Callable[[Any], Any]
    ) -> Self:
        """Reads what `save` wrote.

        Args:
            path: The file.
            extractor: The extractor that it was made with.

        Returns:
            The reference.

        Raises:
            ValueError: If it was made with another extractor, or the file is
                none that `save` wrote. Nothing in it is run.
        """
        path = checks.check_path("path", path)
        reference = cls.__new__(cls)
        reference.extractor = _as_extractor(extractor)
        about, arrays = _read(path)
        reference.name = about["reference"]
        reference.hash = about["reference_hash"]
        reference.num_images = about["num_reference"]
        reference.mean = arrays["mean"]
        reference.covariance = arrays["covariance"]
        reference.features = arrays.get("features")
        shape = arrays.get("image_shape")
        reference.image_shape = None if shape is None else tuple(shape.tolist())
        if reference.description != about:
            made = {k: about.get(k) for k in reference.extractor.description}
            raise ValueError(
                "`extractor` must be the one that the reference was made "
                f"with, {made}. Received: {reference.extractor.description}"
            )
        return reference


def _read(
    path: Path, names: Sequence[str] = ARRAYS
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and arrays in a file, or why it is none of ours."""
    try:
        _check_archive(path)
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            arrays = {name: file[name] for name in names if name in file}
        _check_contents(about, arrays, names)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            "`path` must be a file that `Reference.save` wrote. Received: "
            f"{path}: {error}"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError) as error:
        raise ValueError(
            "`path` must be a whole file that `Reference.save` wrote. "
            f"Received: {path}: {error}"
        ) from error
    return about, arrays


def _check_archive(path: Path) -> None:
    """Raises if an array isn't stored as it is, before memory is taken."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"{info.filename} is of another format")
                header = np.lib.format.read_array_header_1_0(member)
                shape, _, dtype = header
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(
                    f"{info.filename} of shape {shape} is more than is stored"
                )


def _check_contents(
    about: Any, arrays: dict[str, np.ndarray], names: Sequence[str]
) -> None:
    keys = {"reference", "reference_hash", "num_reference"}
    if not isinstance(about, dict) or not keys <= {*about}:
        raise ValueError("its description is not a reference's")
    if not names:
        return
    width, num = arrays["mean"].size, about["num_reference"]
    shapes = {
        "mean": (width,),
        "covariance": (width, width),
        "features": (num, width),
        "image_shape": (3,),
    }
    for name, array in arrays.items():
        kind = "integers" if name == "image_shape" else "floats"
        if array.shape != shapes[name] or array.dtype.kind != kind[0]:
            raise ValueError(
                f"its {name} must be {kind} of shape {shapes[name]}, and is "
                f"{checks.describe(array)}"
            )
        if not np.all(np.isfinite(array)):
            raise ValueError(f"its {name} is not finite")


def _check_target(path: Any) -> Path:
    """Where to save; a link leads to it and stays one."""
    path = Path(os.path.realpath(checks.check_path("path", path)))
    if path.is_file():
        _read(path, ())  # because it raises if that is no reference
    elif path.exists():
        raise ValueError(f"`path` must be a file, or new. Received: {path}")
    return path


def _as_extractor(extractor: Callable[[Any], Any]) -> FeatureExtractor:
    if isinstance(extractor, FeatureExtractor):
        return extractor
    checks.check_function(
        "extractor",
        extractor,
        "a `FeatureExtractor`, or a function of images that returns (batch, "
        "features)",
    )
    name = getattr(extractor, "__qualname__", type(extractor).__name__)
    return FeatureExtractor(extractor, name=name)


def _batches(images: Any) -> Iterator[np.ndarray]:
    if hasattr(images, "shape"):
        yield as_images("images", images)
        return
    if not isinstance(images, Iterable):
        allowed = "an array or an iterable of batches"
        raise checks.invalid("images", allowed, images)
    for batch in images:
        pair = isinstance(batch, (list, tuple)) and len(batch) > 0
        first = batch[0] if pair else batch
        yield as_images("images", first)
