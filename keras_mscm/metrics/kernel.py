"""The kernel distance: a maximum mean discrepancy of features."""

from typing import Any

import numpy as np

from keras_mscm import checks
from keras_mscm.metrics.base import StoredFeatureMetric
from keras_mscm.metrics.reference import Reference


class KernelDistance(StoredFeatureMetric):
    """The measure for few samples, because it has no bias; as KID is.

    It is the kernel distance of samples to a reference, which is a KID with
    Inception features: the unbiased estimate of the squared maximum mean
    discrepancy with the kernel `(x . y / d + 1)^3`, over random subsets, of
    which mean and standard deviation are given. It may be a little below 0, and
    its expectation does not depend on the number of samples.

    Args:
        reference: The real images, with their features kept.
        num_subsets: How many subsets.
        subset_size: Samples, and reference images, in each; at least 2.
        seed: Seed of the subsets, an integer in 0..2**31 - 3.
        name: What it is called in logs.

    Raises:
        ValueError: If an argument is out of its range, or the reference has
            fewer than `subset_size` images; when asked for the result, if
            there are fewer samples.

    Example:

    >>> images = np.linspace(-1, 1, 80, dtype="float32").reshape(5, 4, 4, 1)
    >>> reference = Reference(images, lambda x: x[:, 0, :2, 0], name="ramps")
    >>> metric = KernelDistance(reference, num_subsets=10, subset_size=4)
    >>> result = metric(images)
    >>> result["num_subsets"], result["subset_size"]
    (10, 4)

    Reference:
        Binkowski et al., Demystifying MMD GANs (2018), section 4 and eq. 4.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        num_subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
        name: str = "kernel_distance",
    ):
        super().__init__(reference, name)
        self.num_subsets = checks.check_positive_integer(
            "num_subsets", num_subsets
        )
        self.subset_size = checks.check_integer("subset_size", subset_size, 2)
        self.seed = checks.check_integer("seed", seed, 0, checks.SEED_END - 1)
        if self.subset_size > reference.num_images:
            raise ValueError(
                "`subset_size` must be at most the number of the reference's "
                f"images, {reference.num_images}. Received: "
                f"subset_size={subset_size}"
            )
        self.min_samples = self.subset_size

    def compute(self) -> dict[str, Any]:
        estimates = subset_estimates(
            self.features(),
            self.reference.require_features(self.name),
            num_subsets=self.num_subsets,
            subset_size=self.subset_size,
            rng=np.random.default_rng(self.seed),
        )
        return {
            "value": float(estimates.mean()),
            "std": float(estimates.std()),
            "num_subsets": self.num_subsets,
            "subset_size": self.subset_size,
        }


def subset_estimates(
    x: np.ndarray,
    y: np.ndarray,
    *,
    num_subsets: int,
    subset_size: int,
    rng: Any,
) -> np.ndarray:
    """Unbiased MMD^2 of random subsets of x and y, `(num_subsets,)`."""
    estimates = np.empty(num_subsets)
    for i in range(num_subsets):
        a, b = (
            np.asarray(
                z[rng.choice(len(z), subset_size, replace=False)], "float64"
            )
            for z in (x, y)
        )
        estimates[i] = _within(a) + _within(b) - 2 * _kernel(a, b).mean()
    return estimates


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _within(x: np.ndarray) -> float:
    """The mean kernel of different vectors."""
    kernel, num = _kernel(x, x), len(x)
    return (kernel.sum() - np.trace(kernel)) / (num * (num - 1))
