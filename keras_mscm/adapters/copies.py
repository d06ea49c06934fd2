"""Foreign networks and their conditioning, made anew."""

from typing import Any

import keras
import numpy as np

from keras_mscm.conditioning import Condition


def described(condition: Condition) -> dict[str, Any]:
    """A condition's configuration; of a null that is a weight, the shape."""
    if not isinstance(condition.null, keras.Variable):
        return {**condition.get_config(), "null_shape": None}
    null = condition.null
    plain = Condition(
        condition.shape,
        condition.dtype,
        num_classes=condition.num_classes,
        mask=condition.mask,
    )
    return {**plain.get_config(), "null_shape": list(null.shape)}


def from_description(description: dict[str, Any]) -> Condition:
    """The inverse of `described`; a null that is a weight is 0."""
    config = dict(description)
    shape = config.pop("null_shape")
    if shape is not None:
        config["null"] = np.zeros(shape, "float32")
    return Condition.from_config(config)


def clone_of(network: keras.Layer) -> keras.Layer:
    """A second foreign network, by its own `clone()` or configuration."""
    if callable(getattr(network, "clone", None)):
        return network.clone()
    try:
        clone = type(network).from_config(network.get_config())
        if not clone.built:
            clone.build_from_config(network.get_build_config())
        pairs = zip(clone._flatten_layers(), network._flatten_layers())
        for ours, theirs in pairs:
            # Of some of KerasHub's layers only the parts are ever called.
            ours.built = ours.built or theirs.built
    except Exception as error:  # because it is anybody's class
        raise ValueError(
            "`network` must be one that can be made anew, by `get_config` and "
            f"`from_config` or by a method `clone()`. Received: {network!r}, "
            f"which raised {type(error).__name__}: {error}"
        ) from error
    return clone
