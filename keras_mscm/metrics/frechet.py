"""The Fréchet distance between Gaussians fitted to features."""

from typing import Any

import numpy as np

from keras_mscm import checks
from keras_mscm.metrics.base import FeatureMetric
from keras_mscm.metrics.extractors import as_numbers
from keras_mscm.metrics.moments import Moments
from keras_mscm.metrics.reference import Reference

# The relative error that float32 may leave in eigenvalues, even in those of
# thousands of features.
ROUNDING = 1e-5


class FrechetDistance(FeatureMetric):
    """The measure to report for tens of thousands of samples, as FID is.

    It is the Fréchet distance of samples to a reference, which is an FID with
    Inception features, from mean and covariance of the features in float64. It
    falls with the number of samples (Chong & Forsyth, 2020), so compare only
    numbers of equally many. With fewer samples than features the covariance is
    singular, which is no problem here, but the bias is large.

    Args:
        reference: The real images.
        name: What it is called in logs.

    Raises:
        ValueError: If `reference` is not a `Reference`; when asked for the
            result, if there are fewer than 2 samples.
        ImportError: When asked for the result, without SciPy.

    Example:

    >>> images = np.linspace(-1, 1, 80, dtype="float32").reshape(5, 4, 4, 1)
    >>> reference = Reference(images, lambda x: x[:, 0, :2, 0], name="ramps")
    >>> metric = FrechetDistance(reference)
    >>> for batch in np.split(images - images.min(), [2]):
    ...     metric.update_state(batch / 2)
    >>> result = metric.result()
    >>> result["num_samples"], result["reference"]
    (5, 'ramps')

    Reference:
        Heusel et al., GANs Trained by a Two Time-Scale Update Rule (2017),
        eq. 6.
    """

    def __init__(self, reference: Reference, name: str = "frechet_distance"):
        super().__init__(reference, name)

    def reset_state(self) -> None:
        super().reset_state()
        self._moments = Moments()

    def keep(self, features: np.ndarray) -> None:
        self._moments.add(features)

    def compute(self) -> dict[str, Any]:
        return {
            "value": frechet_distance(
                self._moments.mean,
                self._moments.covariance,
                self.reference.mean,
                self.reference.covariance,
            )
        }


def frechet_distance(
    mean_1: Any, covariance_1: Any, mean_2: Any, covariance_2: Any
) -> float:
    """`|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))`.

    With `C = R R^T` the trace of the root is the sum of the singular values of
    `R_1^T R_2`. That is exact to rounding also where covariances are singular;
    a root of their product, or of its eigenvalues, turns an error of 1e-16
    there into one of 1e-8 for each dimension.

    Args:
        mean_1: `(features,)`.
        covariance_1: `(features, features)`, positive semi-definite.
        mean_2: `(features,)`.
        covariance_2: `(features, features)`, positive semi-definite.

    Returns:
        The (squared) distance, at least 0.

    Raises:
        ValueError: If the shapes don't agree, a number is not finite, or a
            covariance is not symmetric and positive semi-definite: by more
            than 1e-5 of its largest eigenvalue, which rounding to float32
            explains.
        ImportError: Without SciPy.

    Example:

    >>> frechet_distance([0.0], [[1.0]], [3.0], [[4.0]])  # 3^2 + (2 - 1)^2
    10.0

    Reference:
        Dowson & Landau, The Fréchet Distance between Multivariate Normal
        Distributions (1982), eq. 4.
    """
    scipy_linalg = _scipy_linalg()
    means = [_floats("mean_1", mean_1), _floats("mean_2", mean_2)]
    covariances = [
        _floats("covariance_1", covariance_1),
        _floats("covariance_2", covariance_2),
    ]
    width = means[0].size
    if not width:
        raise checks.invalid("mean_1", "of at least one feature", mean_1)
    for i in range(2):
        for name, array, shape in (
            (f"mean_{i + 1}", means[i], (width,)),
            (f"covariance_{i + 1}", covariances[i], (width, width)),
        ):
            if array.shape != shape or not np.all(np.isfinite(array)):
                finite = bool(np.all(np.isfinite(array)))
                raise ValueError(
                    f"`{name}` must be finite and of shape {shape}, as "
                    f"`mean_1` is of {width} features. Received: shape "
                    f"{array.shape}, finite={finite}"
                )
    root_1, root_2 = (
        _root(scipy_linalg, f"covariance_{i + 1}", covariances[i])
        for i in range(2)
    )
    cross = scipy_linalg.svdvals(root_1.T @ root_2).sum()
    step = means[0] - means[1]
    distance = step @ step + sum(np.trace(c) for c in covariances) - 2 * cross
    # The bound is there because rounding may leave it below 0.
    return max(float(distance), 0.0)


def _floats(name: str, value: Any) -> np.ndarray:
    array = as_numbers(value)
    if array is None:
        raise checks.invalid(name, "an array of numbers", value)
    return np.asarray(array, "float64")


def _root(scipy_linalg: Any, name: str, covariance: np.ndarray) -> np.ndarray:
    """R with `R R^T = covariance`, `(features, rank)`; of rank 1 at least."""
    values, vectors = scipy_linalg.eigh(covariance / 2 + covariance.T / 2)
    rounding = ROUNDING * np.abs(values).max()
    asymmetry = np.abs(covariance - covariance.T).max()
    if values[0] < -rounding or asymmetry > rounding:
        raise ValueError(
            f"`{name}` must be symmetric and positive semi-definite, but for "
            f"rounding. Received: least eigenvalue {values[0]:g}, largest "
            f"{values[-1]:g}; the transposed matrix differs by up to "
            f"{asymmetry:g}"
        )
    # Smaller ones are dropped, because rounding makes them of zeros.
    smallest = values[-1] * len(values) * np.finfo("float64").eps
    kept = values > max(smallest, 0.0)
    kept[-1] = True
    return vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0.0))


def _scipy_linalg() -> Any:
    try:
        import scipy.linalg
    except ImportError as error:
        raise ImportError(
            "The Fréchet distance needs SciPy: pip install "
            "'keras-mscm[metrics]'"
        ) from error
    return scipy.linalg
