"""The real images, in features, that samples are compared with."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from keras_mscm.metrics.extractors import FeatureExtractor, as_images
from keras_mscm.metrics.moments import Moments


class Reference:
    """Features of a data set and their statistics, made once for all metrics.

    Args:
        images: `(num, height, width, channels)`, floats in [-1, 1], at least
            2; or an iterable of such batches, or of `(batch, labels)`, that
            ends.
        extractor: `FeatureExtractor`, or any function of images that returns
            `(batch, features)`.
        name: What the data set is called in results.
        keep_features: Whether to keep every image's features, which all but
            `FrechetDistance` need: 4 bytes for each.

    Attributes:
        hash: SHA-256 of the images as float32 bytes and of their shape.
        num_images: How many they are.
        mean, covariance: Those of the features, float64.
        features: `(num_images, features)`, or None.

    Raises:
        ValueError: If the images are not such, or too few.

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
    ):
        self.extractor = _as_extractor(extractor)
        self.name = str(name)
        moments, kept, digest = Moments(), [], hashlib.sha256()
        shape: tuple[int, ...] | None = None
        for batch in _batches(images):
            if shape is not None and batch.shape[1:] != shape:
                raise ValueError(
                    "`images` must be batches of one image shape. Received: "
                    f"{shape}, then {batch.shape[1:]}"
                )
            shape = batch.shape[1:]
            digest.update(batch.data)
            # In pieces, as the features of a whole data set needn't fit.
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
            path: Where to; what was there is replaced at once, or not at all.
        """
        path = Path(path)
        arrays: dict[str, Any] = {
            "mean": self.mean,
            "covariance": self.covariance,
        }
        if self.features is not None:
            arrays["features"] = self.features
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
        try:
            with os.fdopen(handle, "wb") as file:
                about = np.array(json.dumps(self.description))
                np.savez(file, about=about, **arrays)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

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
            ValueError: If it was made with another extractor.
        """
        reference = cls.__new__(cls)
        reference.extractor = _as_extractor(extractor)
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            reference.name = about["reference"]
            reference.hash = about["reference_hash"]
            reference.num_images = about["num_reference"]
            reference.mean = file["mean"]
            reference.covariance = file["covariance"]
            reference.features = file.get("features")
        if reference.description != about:
            made = {key: about[key] for key in reference.extractor.description}
            raise ValueError(
                "`extractor` must be the one that the reference was made "
                f"with, {made}. Received: {reference.extractor.description}"
            )
        return reference


def _as_extractor(extractor: Callable[[Any], Any]) -> FeatureExtractor:
    if isinstance(extractor, FeatureExtractor):
        return extractor
    name = getattr(extractor, "__qualname__", type(extractor).__name__)
    return FeatureExtractor(extractor, name=name)


def _batches(images: Any) -> Iterator[np.ndarray]:
    if hasattr(images, "shape"):
        yield as_images("images", images)
        return
    if not isinstance(images, Iterable):
        raise ValueError(
            "`images` must be an array or an iterable of batches. Received: "
            f"{type(images).__name__}"
        )
    for batch in images:
        first = batch[0] if isinstance(batch, (list, tuple)) else batch
        yield as_images("images", first)
