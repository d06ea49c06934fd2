"""Schedules of a table of noise levels, as DDPM and its descendants have it."""

from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional import parameterizations as P
from keras_mscm.functional.process import Tensor
from keras_mscm.schedules.base import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace")


@keras.saving.register_keras_serializable(package="keras_mscm")
class DiscreteSchedule(NoiseSchedule):
    """The noise levels of a table, evenly spaced in time, linear between.

    You want it with networks that were trained on discrete steps (DDPM, Stable
    Diffusion 1 and 2), and to sample at exactly the levels that another
    library's sampler visits. `of_steps` makes one from a table of training.

    Args:
        alphas_cumprod: `alpha^2` at each level, from t = 0 to t = 1: at least
            2 numbers in [0, 1], falling. No noise and no signal, 1 and 0, are
            given a log-SNR of 30 and -30.

    Raises:
        ValueError: If it is none of these.

    Example:

    >>> schedule = DiscreteSchedule([0.9, 0.5, 0.0])
    >>> [round(float(logsnr), 2) for logsnr in schedule([0.0, 0.5, 1.0])]
    [2.2, 0.0, -30.0]
    """

    def __init__(self, alphas_cumprod: Any):
        self.alphas_cumprod = P.check_alphas_cumprod(alphas_cumprod)
        self._table = P.logsnr_table(self.alphas_cumprod)

    @classmethod
    def of_steps(
        cls,
        alphas_cumprod: Any,
        num_steps: int | None = None,
        *,
        spacing: str = "trailing",
        offset: int = 0,
        final: float = 1.0,
    ) -> Self:
        """The schedule on which sampling visits steps of a table of training.

        Without `num_steps` time runs through all of the table: every number of
        steps that divides the table's length visits what `"trailing"` does
        (the last entry first), and so students are to be trained on it. The
        other spacings depend on the number of steps, and suit only that one.

        Args:
            alphas_cumprod: `alpha^2` of each step of training, falling.
            num_steps: Number of steps of sampling; at most as many as there
                are in training.
            spacing: Which steps those are, as diffusers calls them.
                `"trailing"`: `round(k N / n) - 1`. `"leading"`: `(k - 1) (N //
                n) + offset`. `"linspace"`: evenly from 0 to N - 1, rounded;
                keras-cv's.
            offset: For `"leading"`: of the first step; Stable Diffusion has 1.
            final: `alpha^2` where the last step ends; 1 is the prediction.

        Returns:
            The schedule, whose `t = k / num_steps` is the k-th of the steps.

        Raises:
            ValueError: If an argument isn't as above.
        """
        table = P.check_alphas_cumprod(alphas_cumprod)
        final = checks.check_number("final", final, 0, "in [0, 1]", 1)
        checks.check_choice("spacing", spacing, SPACINGS)
        length = len(table)
        if num_steps is None:
            _check_final(final, table[0])
            return cls((final, *table))
        n = checks.check_integer("num_steps", num_steps, 1, length)
        offset = checks.check_integer("offset", offset, 0, length // n)
        if spacing == "trailing":
            places = np.arange(length, 0, -length / n).round()[::-1][-n:] - 1
        elif spacing == "leading":
            places = np.arange(n) * (length // n) + offset
        else:
            places = np.linspace(0, length - 1, n).round()
        places = np.clip(places, 0, length - 1).astype(int)
        _check_final(final, table[places[0]])
        return cls((final, *(table[place] for place in places)))

    def __call__(self, t: Tensor) -> Tensor:
        t = ops.convert_to_tensor(t, "float32")
        return P.level_of_step(t * (len(self._table) - 1), self._table)

    def get_config(self) -> dict[str, Any]:
        return {"alphas_cumprod": self.alphas_cumprod}


def _check_final(final: float, before: float) -> None:
    """Raises unless the last step leads to less noise."""
    if not final > before:
        raise ValueError(
            f"`final` must be above {before:g}, `alpha^2` where the last step "
            f"begins. Received: final={final}"
        )
