"""Checks of the adapters' arguments."""

from collections.abc import Mapping, Sequence
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


def check_nulls(nulls: Any, names: Sequence[str]) -> dict[str, Any]:
    """Raises unless `nulls` is a dictionary of all these names, or None."""
    if nulls is None:
        return {}
    if not isinstance(nulls, Mapping) or {*nulls} != {*names}:
        raise checks.invalid(
            "null_conditioning", f"a dictionary of {(*names,)}, or None", nulls
        )
    return dict(nulls)


def missing(what: str, extra: str) -> ImportError:
    """The error for a library that an adapter needs and that isn't there."""
    return ImportError(
        f"{what} must be installed: `pip install 'keras-mscm[{extra}]'`."
    )
