"""The posterior variance of images that aDDIM takes (algorithm 3), measured.

Any function of log-SNR that gives a variance per dimension will do. Analytic is
`functional.analytic_x_var`; here is what `DiffusionModel.measure_x_var` found.
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

#: Noise levels at which a variance is measured.
LEVELS = 64


def level_logsnr() -> np.ndarray:
    """Log-SNR of the levels, even in the angle of `_angle`, `(64,)`."""
    angle = (np.arange(LEVELS) + 0.5) / LEVELS
    return (-2 * np.log(np.tan(angle * math.pi / 2))).astype("float32")


def _angle(logsnr: Tensor) -> Tensor:
    """The time in (0, 1) at which the plain cosine schedule has a log-SNR."""
    return ops.arctan(ops.exp(-logsnr / 2)) * (2 / math.pi)


@keras.saving.register_keras_serializable(package="keras_mscm")
class MeasuredVariance:
    """The posterior variance as it was measured, linear between the levels.

    What `DiffusionModel.x_var` is: give it to `samplers.ADDIM(x_var=...)`, or
    to a student as `x_var=`, whose file then holds it.

    Args:
        table: Of each level the variance times `1 + SNR`, which varies little
            where the variance goes to 0; 64 finite numbers of at least 0.

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
            float(checks.check_number("table", value, 0, "numbers from 0"))
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

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.table))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        return {"table": list(self.table)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`."""
        return cls(**config)
