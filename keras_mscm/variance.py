"""The posterior variance of `x` that aDDIM takes (algorithm 3).

Any function of log-SNR that gives a variance per dimension will do: analytic,
from the data's variance, or as `DiffusionModel.measure_x_var` found it. In
training it can be a share of the teacher's own error, because there the data
are known.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor, mean_per_example

#: Noise levels at which a variance is measured.
LEVELS = 64


def level_logsnr() -> np.ndarray:
    """Log-SNR of the levels, even in the angle of `_angle`, `(64,)`."""
    angle = (np.arange(LEVELS) + 0.5) / LEVELS
    return (-2 * np.log(np.tan(angle * math.pi / 2))).astype("float32")


def _angle(logsnr: Tensor) -> Tensor:
    """The time in (0, 1) at which the plain cosine schedule has a log-SNR."""
    return ops.arctan(ops.exp(-logsnr / 2)) * (2 / math.pi)


class _Variance:
    """Equal where the arguments are, and serialised by them."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))


@keras.saving.register_keras_serializable(package="keras_mscm")
class AnalyticVariance(_Variance):
    """A tenth of the posterior variance for data of a normal distribution.

    You want it for aDDIM on data that are no pixels in [-1, 1]. With variance
    V of the data the posterior's is `1 / (1 / V + SNR)`; of V = 0.5 a tenth is
    the paper's `0.1 / (2 + SNR)` (section 3.2).

    Args:
        data_variance: Of the data per dimension, positive: a space's
            `variance`.

    Call arguments:
        logsnr: Log-SNR, of any shape.

    Call returns:
        The variance per dimension, of the same shape.

    Raises:
        ValueError: If `data_variance` isn't positive.

    Example:

    >>> round(float(AnalyticVariance(1.0)(ops.convert_to_tensor(0.0))), 3)
    0.05
    """

    def __init__(self, data_variance: float = 0.5):
        self.data_variance = float(
            checks.check_positive_number("data_variance", data_variance)
        )

    def __call__(self, logsnr: Tensor) -> Tensor:
        return 0.1 / (1.0 / self.data_variance + ops.exp(logsnr))


@keras.saving.register_keras_serializable(package="keras_mscm")
class ErrorShare(_Variance):
    """A share of the teacher's squared error, which training knows.

    What a student's `eta` makes (appendix A.1: xvar_frac 0.75). Not for
    sampling, where the data aren't known.

    Args:
        eta: The share, in [0, 1]; 0 makes aDDIM of it DDIM.

    Call arguments:
        x_conditional: The teacher's prediction without guidance, `(batch,
            ...)`.
        x: The data, of the same shape.

    Call returns:
        The variance per dimension, `(batch,)`.

    Raises:
        ValueError: If `eta` is out of its range.
    """

    def __init__(self, eta: float = 0.75):
        self.eta = checks.check_number("eta", eta, 0, "in [0, 1]", high=1)

    def __call__(self, x_conditional: Tensor, x: Tensor) -> Tensor:
        return self.eta * mean_per_example(ops.square(x_conditional - x))


@keras.saving.register_keras_serializable(package="keras_mscm")
class MeasuredVariance(_Variance):
    """The posterior variance as it was measured, linear between the levels.

    What `DiffusionModel.x_var` is: give it to `samplers.ADDIM(x_var=...)`, or
    to a student as `x_var=`, whose file then holds it.

    Args:
        table: The variance at each level, multiplied by `1 + SNR` because the
            product varies little where the variance goes to 0; 64 finite
            numbers of at least 0.

    Call arguments:
        logsnr: Log-SNR, of any shape.

    Call returns:
        The variance per dimension, of the same shape.

    Raises:
        ValueError: If `table` is something else.

    Example:

    >>> variance = MeasuredVariance([0.5] * 64)
    >>> float(variance(ops.convert_to_tensor(0.0)))
    0.25
    """

    def __init__(self, table: Sequence[float]):
        table = checks.check_sequence("table", table, "a list of numbers")
        if len(table) != LEVELS:
            raise checks.invalid("table", f"a list of {LEVELS} numbers", table)
        self.table = tuple(
            float(
                checks.check_number(
                    "table", value, 0, "numbers from 0 to 1e30", 1e30
                )
            )
            for value in table
        )

    def __call__(self, logsnr: Tensor) -> Tensor:
        # The ends hold beyond them.
        place = ops.clip(_angle(logsnr) * LEVELS - 0.5, 0, LEVELS - 1)
        below = ops.floor(place)
        index = ops.cast(below, "int32")
        after = ops.minimum(index + 1, LEVELS - 1)
        table = ops.convert_to_tensor(self.table, "float32")
        low, high = (ops.take(table, i) for i in (index, after))
        scaled = low + (place - below) * (high - low)
        return scaled / (1.0 + ops.exp(logsnr))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        return {"table": list(self.table)}
