"""Improved precision and recall: how much of each set lies in the other."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from keras_mscm import checks
from keras_mscm.metrics.base import StoredFeatureMetric
from keras_mscm.metrics.reference import Reference

# Vectors per chunk, because 2048 x 50,000 distances take 0.8 GB already.
CHUNK = 2048


class _Coverage(StoredFeatureMetric):
    """What precision and recall share.

    The arguments are those of `ImprovedPrecision`.
    """

    default_name: ClassVar[str]

    def __init__(
        self,
        reference: Reference,
        *,
        neighbours: int = 3,
        name: str | None = None,
    ):
        super().__init__(reference, self.default_name if name is None else name)
        neighbours = checks.check_positive_integer("neighbours", neighbours)
        if neighbours >= reference.num_images:
            raise ValueError(
                "`neighbours` must be less than the number of the reference's "
                f"images, {reference.num_images}. Received: "
                f"neighbours={neighbours}"
            )
        self.neighbours, self.min_samples = neighbours, neighbours + 1

    def sets(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples and reference, centred on the reference.

        Distances don't change, but far from the origin they would cancel.
        """
        real = self.reference.require_features(self.name)
        mean = self.reference.mean
        return self.features() - mean, real - mean

    def entry(self, value: float) -> dict[str, Any]:
        return {"value": value, "neighbours": self.neighbours}


class ImprovedPrecision(_Coverage):
    """For how real samples look: the part of them among the reference.

    A sample is among it if it is no farther from some reference image, in
    features, than that one's k-th nearest neighbour in the reference.

    Args:
        reference: The real images, with their features kept.
        neighbours: k, at least 1.
        name: What it is called in logs, `"precision"` by default.

    Raises:
        ValueError: If an argument is out of its range, or the reference too
            small; when asked for the result, if there are too few samples.

    Example:

    >>> images = np.linspace(-1, 1, 80, dtype="float32").reshape(5, 4, 4, 1)
    >>> reference = Reference(images, lambda x: x[:, 0, :2, 0], name="ramps")
    >>> ImprovedPrecision(reference)(images)["value"]
    1.0

    Reference:
        Kynkäänniemi et al., Improved Precision and Recall Metric for Assessing
        Generative Models (2019), eq. 1 and 2.
    """

    default_name = "precision"

    def compute(self) -> dict[str, Any]:
        samples, real = self.sets()
        return self.entry(coverage(samples, real, self.neighbours))


class ImprovedRecall(_Coverage):
    """For how diverse samples are: the part of the reference among them.

    It is `ImprovedPrecision` with the sets exchanged, and of the same
    arguments. It grows with the number of samples: take as many as there are in
    the reference (the paper: 50,000 of each).

    Args:
        reference: The real images, with their features kept.
        neighbours: k, at least 1.
        name: What it is called in logs, `"recall"` by default.

    Raises:
        ValueError: As `ImprovedPrecision`.

    Example:

    >>> images = np.linspace(-1, 1, 80, dtype="float32").reshape(5, 4, 4, 1)
    >>> reference = Reference(images, lambda x: x[:, 0, :2, 0], name="ramps")
    >>> ImprovedRecall(reference)(images)["value"]
    1.0

    Reference:
        Kynkäänniemi et al. (2019), eq. 1 and 2.
    """

    default_name = "recall"

    def compute(self) -> dict[str, Any]:
        samples, real = self.sets()
        return self.entry(coverage(real, samples, self.neighbours))


def coverage(x: np.ndarray, y: np.ndarray, neighbours: int) -> float:
    """Part of x within a ball around some y, to its k-th neighbour in y."""
    # The k-th neighbour is at index k, because each vector is its own, at 0.
    radii = np.concatenate(
        [
            np.partition(distances, neighbours, axis=1)[:, neighbours]
            for distances in _squared_distances(y, y)
        ]
    )
    covered = sum(
        int(np.any(distances <= radii, axis=1).sum())
        for distances in _squared_distances(x, y)
    )
    return covered / len(x)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """`(chunk, len(y))`, by chunks of x; float64."""
    y_squares = np.square(y).sum(axis=1)
    for begin in range(0, len(x), CHUNK):
        part = x[begin : begin + CHUNK]
        squares = np.square(part).sum(axis=1)[:, None] + y_squares
        distances = squares - 2.0 * (part @ y.T)
        # Rounding errors become 0, because equal vectors must lie within a
        # radius of 0.
        distances[distances < 1e-12 * squares] = 0.0
        yield distances
