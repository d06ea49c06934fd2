"""Checks of the adapters' arguments."""

from typing import Any

from keras_mscm import checks
from keras_mscm.functional import parameterizations as P


def check_sizes(name: str, value: Any) -> tuple[int, ...]:
    """Raises unless `value` is a shape of any rank but 0."""
    axes = ["size"] * (len(value) if isinstance(value, (list, tuple)) else 1)
    return checks.check_shape(name, value, axes)


def check_width(value: Any) -> int | None:
    """Raises unless `value` is an even width, or None."""
    if value is None:
        return None
    width = checks.check_positive_integer("time_width", value)
    if width % 2:
        raise checks.invalid("time_width", "even", value)
    return width


def check_table(time: str, alphas_cumprod: Any) -> tuple[float, ...] | None:
    """The table as numbers; raises unless it falls, or isn't asked for."""
    if time != "discrete_step":
        if alphas_cumprod is not None:
            raise checks.invalid(
                "alphas_cumprod",
                'None unless time is "discrete_step"',
                alphas_cumprod,
            )
        return None
    return P.check_alphas_cumprod(alphas_cumprod)
