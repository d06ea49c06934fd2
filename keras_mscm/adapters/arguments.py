"""Checks of the adapters' arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.adapters.embeddings import layers_called
from keras_mscm.functional import parameterizations as P
from keras_mscm.preset_files import untrusted


def check_sizes(name: str, value: Any) -> tuple[int, ...]:
    """Raises unless `value` is a shape of any rank but 0."""
    allowed = "a tuple of one size of at least 1 or more"
    sizes = checks.check_sequence(name, value, allowed)
    return checks.check_shape(name, value, ["size"] * len(sizes))


def check_mapping(name: str, value: Any) -> dict[str, Any]:
    """Raises unless `value` is a dictionary by name, or None for an empty."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) for key in value
    ):
        raise checks.invalid(name, "a dictionary by name, or None", value)
    return dict(value)


def check_distinct(name: str, names: Sequence[Any]) -> None:
    """Raises unless all of what a network is to be given has its own name."""
    if not all(isinstance(each, str) and each for each in names) or len(
        {*names}
    ) < len(names):
        raise checks.invalid(name, "of distinct names, strings", names)


def check_names(names: Any, ours: list[str]) -> dict[str, str] | list[str]:
    """What a network calls its inputs, or our names in its order.

    Args:
        names: As for `AdaptedNetwork`.
        ours: What there is.

    Raises:
        ValueError: If they don't fit.
    """
    if names is None:
        names = {}
    if isinstance(names, Mapping):
        if not {*names} <= {*ours}:
            raise checks.invalid("names", f"a dictionary of {ours}", names)
        theirs = {name: names.get(name, name) for name in ours}
        check_distinct("names", [*theirs.values()])
        return theirs
    if not isinstance(names, (list, tuple)) or sorted(names) != sorted(ours):
        raise checks.invalid("names", f"a list of {ours}", names)
    return list(names)


def check_call(network: keras.Layer, inputs: Mapping[str, Any]) -> None:
    """Raises unless a network takes its inputs, which builds it."""
    try:
        network(inputs)
    except Exception as error:  # because it is anybody's network
        raise ValueError(
            "`network` must take what `process`, `time`, `names` and "
            "`conditioning` say. Received: a network that raises "
            f"{type(error).__name__}: {untrusted.summary(error)}"
        ) from error


def check_scale(name: str, value: Any) -> float:
    """Raises unless `value` is positive, and far from a float32's ends."""
    allowed = "a positive number in [1e-12, 1e12]"
    return float(checks.check_number(name, value, 1e-12, allowed, 1e12))


def check_constant(name: str, value: Any) -> tuple[np.ndarray, str]:
    """An array of float32 or int32, and which; raises unless it is one."""
    array = checks.check_numbers(name, value, "float32")
    whole = np.asarray(ops.convert_to_numpy(value))
    if whole.dtype.kind not in "iub":
        return array, "float32"
    return checks.check_numbers(name, value, "int32"), "int32"


def run_in_float32(network: keras.Layer, names: Any) -> tuple[str, ...]:
    """Sets the precision of a network's layers; raises unless it has them."""
    allowed = "a list of names of the network's layers"
    if not isinstance(names, (list, tuple)):
        raise checks.invalid("float32_layers", allowed, names)
    for name in names:
        if not isinstance(name, str) or not layers_called(network, name):
            raise checks.invalid("float32_layers", allowed, names)
        for layer in layers_called(network, name):
            for part in layer._flatten_layers():
                part.dtype_policy = "float32"
    return tuple(names)


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
