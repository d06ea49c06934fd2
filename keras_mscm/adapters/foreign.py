"""What layers around another framework's modules have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks


def check_backend(what: str, name: str) -> None:
    """Raises unless Keras runs on the framework that is asked for.

    Args:
        what: What needs it.
        name: The backend's name.

    Raises:
        ValueError: If it is another.
    """
    if name != backend.NAME:
        raise ValueError(
            f"{what} must run on KERAS_BACKEND={name}, because the other "
            f"framework's modules do. Received: KERAS_BACKEND={backend.NAME}"
        )


def check_builder(
    builder: Callable[..., Any] | None, arguments: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Raises unless a builder is a function that a file may name, or None.

    Args:
        builder: Function that makes a module.
        arguments: Its keyword arguments, or None.

    Returns:
        The arguments.
    """
    if builder is None:
        if arguments is not None:
            raise checks.invalid(
                "arguments", "None without a `builder`", arguments
            )
        return {}
    checks.check_function("builder", builder)
    name = keras.saving.get_registered_name(builder)
    if keras.saving.get_registered_object(name) is None:
        raise checks.invalid(
            "builder",
            "a function that is known to Keras, by a line above it: "
            "@keras.saving.register_keras_serializable()",
            builder,
        )
    if arguments is not None and not isinstance(arguments, Mapping):
        raise checks.invalid("arguments", "a dictionary", arguments)
    return dict(arguments or {})


def builder_config(layer: Any) -> dict[str, Any]:
    """What a layer's configuration says of the module within.

    Args:
        layer: Layer with `builder` and `arguments`.

    Raises:
        ValueError: If it has no builder.
    """
    if layer.builder is None:
        raise ValueError(
            f"`builder` must be given to {type(layer).__name__} where a whole "
            "model or a preset is saved, because a module can only be written "
            "down as the function that makes it: `builder=make_module`. "
            "Weights alone need none: `save_weights`. Received: builder=None"
        )
    return {
        "builder": keras.saving.serialize_keras_object(layer.builder),
        "arguments": layer.arguments,
    }


def with_builder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose builder is a function again, and is checked."""
    config = dict(config)
    builder = config.get("builder")
    if isinstance(builder, dict):
        builder = keras.saving.deserialize_keras_object(builder)
    checks.check_function("builder", builder)
    arguments = check_builder(builder, config.get("arguments"))
    return {**config, "builder": builder, "arguments": arguments}


def save_arrays(variables: Mapping[str, keras.Variable], store: Any) -> None:
    """Stores variables under the module's own names.

    Args:
        variables: By name.
        store: What Keras hands to `save_own_variables`.
    """
    for name, variable in variables.items():
        store[name] = ops.convert_to_numpy(variable)


def load_arrays(variables: Mapping[str, keras.Variable], store: Any) -> None:
    """Restores what `save_arrays` stored.

    Args:
        variables: By name.
        store: What Keras hands to `load_own_variables`.

    Raises:
        ValueError: If it holds others.
    """
    ours, theirs = {*variables}, {*store.keys()}
    if ours != theirs:
        raise ValueError(
            "A file must hold the weights of the module that is to have them. "
            f"Received: without {sorted(ours - theirs)[:5]}, with "
            f"{sorted(theirs - ours)[:5]} besides"
        )
    for name, variable in variables.items():
        variable.assign(np.asarray(store[name]))
