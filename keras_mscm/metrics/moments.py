"""Mean and covariance of vectors that come in batches."""

import numpy as np


class Moments:
    """Mean and covariance, updated batch by batch in float64.

    Centred sums are combined (Chan et al., 1979, eq. 2.1), never sums of
    squares, which cancel where the mean is large against the spread.
    """

    def __init__(self):
        self.count = 0
        self.mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def add(self, features: np.ndarray) -> None:
        """Takes in a batch, `(num, features)`, of at least one vector."""
        features = np.asarray(features, "float64")
        num, mean = len(features), features.mean(axis=0)
        centred = features - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self.mean, self._scatter = num, mean, scatter
            return
        total, step = self.count + num, mean - self.mean
        between = np.outer(step, step) * (self.count * num / total)
        self._scatter = self._scatter + scatter + between
        self.mean = self.mean + step * (num / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance, `(features, features)`, as `np.cov`'s."""
        return self._scatter / (self.count - 1)
