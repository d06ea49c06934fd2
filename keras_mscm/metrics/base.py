"""What every metric of samples shares."""

from typing import Any

import keras
import numpy as np

from keras_mscm import checks
from keras_mscm.metrics.extractors import as_images, as_numbers
from keras_mscm.metrics.reference import Reference


class FeatureMetric(keras.metrics.Metric):
    """The base for a metric of your own that compares samples with real images.

    It streams over batches of samples. A subclass says what to keep of their
    features, and what number they come to.

    Args:
        reference: The real images.
        name: What it is called in logs.

    Attributes:
        num_samples: How many samples there have been.
        min_samples: How many it takes.

    Raises:
        ValueError: If `reference` is not a `Reference`, or `name` is empty.
    """

    def __init__(self, reference: Reference, name: str):
        super().__init__(name=checks.check_string("name", name))
        self.min_samples = 2
        if not isinstance(reference, Reference):
            allowed = "a `keras_mscm.metrics.Reference`"
            raise checks.invalid("reference", allowed, reference)
        self.reference = reference
        self.reset_state()

    def update_state(self, images: Any) -> None:
        """Takes in samples.

        Args:
            images: `(batch, height, width, channels)`, floats in [-1, 1],
                of the reference's image shape. Samples of another one are
                compared by `update_features(reference.extractor(images))`.

        Raises:
            ValueError: If they are not.
        """
        images = as_images("images", images)
        expected = self.reference.image_shape
        if expected is not None and images.shape[1:] != expected:
            raise ValueError(
                "`images` must have the image shape of the reference, "
                f"{expected}. Received: shape {images.shape}"
            )
        self.update_features(self.reference.extractor(images))

    def update_features(self, features: Any) -> None:
        """Takes in samples whose features are known already.

        Args:
            features: `(batch, features)`, by the reference's extractor.

        Raises:
            ValueError: If they are not of the reference's width, or not finite.
        """
        array = as_numbers(features)
        if array is None:
            allowed = "numbers of shape (batch, features)"
            raise checks.invalid("features", allowed, features)
        # An array that can be written to is copied, because its owner may.
        if getattr(getattr(features, "flags", None), "writeable", True):
            array = np.array(array)
        features = array
        width = len(self.reference.mean)
        if 0 in features.shape or features.shape[1:] != (width,):
            raise ValueError(
                f"`features` must be of shape (batch, {width}), as those of "
                f"the reference. Received: shape {features.shape}"
            )
        if not np.all(np.isfinite(features)):
            raise ValueError("`features` must be finite. Received: NaN or inf")
        self.keep(features)
        self.num_samples += len(features)

    def reset_state(self) -> None:
        """Forgets the samples."""
        self.num_samples = 0

    def keep(self, features: np.ndarray) -> None:
        """Keeps what is needed of a batch of features."""
        raise NotImplementedError

    def compute(self) -> dict[str, Any]:
        """The number, as `"value"`, and what else belongs to it."""
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        """The number, and what it was measured on.

        Returns:
            A dictionary for JSON: `value`, `num_samples`, `reference`,
            `reference_hash`, `num_reference`, `extractor`, `resize`, and the
            metric's own settings.

        Raises:
            ValueError: If there are too few samples.
        """
        if self.num_samples < self.min_samples:
            raise ValueError(
                f"`{self.name}` must have had at least {self.min_samples} "
                f"samples. Received: {self.num_samples}"
            )
        return {
            **self.compute(),
            "num_samples": self.num_samples,
            **self.reference.description,
        }


class StoredFeatureMetric(FeatureMetric):
    """The base for a metric that needs the features of every single image.

    The arguments are those of `FeatureMetric`.
    """

    def __init__(self, reference: Reference, name: str):
        super().__init__(reference, name)
        self.reference.require_features(type(self).__name__)

    def reset_state(self) -> None:
        super().reset_state()
        self._batches: list[np.ndarray] = []

    def keep(self, features: np.ndarray) -> None:
        self._batches.append(features)

    def features(self) -> np.ndarray:
        """Those of all samples, `(num_samples, features)`."""
        return np.concatenate(self._batches)
