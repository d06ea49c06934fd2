"""Checks of what `compile` and `fit` are given besides data."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm.checks import (
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_positive_integer,
    invalid,
)
from keras_mscm.models.streams import as_tuple


def as_loss(loss: Any) -> Any:
    """What Keras makes of a loss, its name or configuration; None of None."""
    allowed = "a loss of `keras_mscm.losses` or another `keras.losses.Loss`"
    if isinstance(loss, type) and not issubclass(loss, keras.losses.Loss):
        raise invalid("loss", allowed, loss)
    try:
        return keras.losses.get(loss)
    except Exception as error:  # because it may be anybody's object
        raise invalid("loss", allowed, loss) from error


def as_optimizer(optimizer: Any) -> Any:
    """What Keras makes of an optimizer, its name or configuration."""
    allowed = "a `keras.optimizers.Optimizer`, or the name of one"
    kinds = (str, dict, keras.optimizers.Optimizer)
    if not isinstance(optimizer, kinds):
        raise invalid("optimizer", allowed, optimizer)
    try:
        return keras.optimizers.get(optimizer)
    except (KeyError, TypeError, ValueError) as error:
        raise invalid("optimizer", allowed, optimizer) from error


def check_loss(loss: Any, shape: tuple[int, ...]) -> None:
    """Raises unless a loss gives one value per example, and sums them up."""
    if getattr(loss, "reduction", "sum") in (None, "none"):
        raise ValueError(
            "`loss` must have a reduction, such as 'sum_over_batch_size'. "
            f"Received: {loss} with reduction={loss.reduction!r}"
        )
    images = ops.zeros((2, *shape))
    per_example = getattr(loss, "call", loss)(images, images)
    if tuple(per_example.shape) != (2,):
        raise ValueError(
            "`loss` must give one value per example, shape (batch,), as the "
            "weights over time do; see `keras_mscm.losses`. Received: "
            f"{loss}, which gives {tuple(per_example.shape)} for a batch of 2"
        )


def check_compile(arguments: dict[str, Any]) -> None:
    """Raises unless what is given to `compile` is what Keras takes.

    Args:
        arguments: By name; what isn't there is not looked at.
    """
    for name in ("run_eagerly", "auto_scale_loss"):
        if name in arguments:
            check_boolean(name, arguments[name])
    jit_compile = arguments.get("jit_compile", "auto")
    if not isinstance(jit_compile, (bool, str)) or jit_compile == "":
        raise invalid("jit_compile", "True, False or 'auto'", jit_compile)
    if isinstance(jit_compile, str):
        check_choice("jit_compile", jit_compile, ("auto",))
    steps = arguments.get("steps_per_execution", 1)
    check_positive_integer("steps_per_execution", steps)


def check_fit(arguments: dict[str, Any]) -> None:
    """Raises unless numbers given to `fit` or `evaluate` are what Keras takes.

    Args:
        arguments: By name; what isn't there is not looked at, nor is None.
    """
    for name in (
        "batch_size",
        "steps",
        "steps_per_epoch",
        "validation_steps",
        "validation_batch_size",
        "validation_freq",
    ):
        value = arguments.get(name)
        if name == "validation_freq" and isinstance(value, (list, tuple, set)):
            continue  # epochs by number
        if value is not None:
            check_positive_integer(name, value)
    for name in ("epochs", "initial_epoch"):
        check_integer(name, arguments.get(name, 0), 0)
    check_boolean("shuffle", arguments.get("shuffle", True))
    below_1 = math.nextafter(1, 0)
    if "validation_split" in arguments:
        split = arguments["validation_split"]
        check_number("validation_split", split, 0, "in [0, 1)", below_1)
    callbacks = arguments.get("callbacks")
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        for callback in () if callbacks is None else as_tuple(callbacks):
            if not isinstance(callback, keras.callbacks.Callback):
                raise invalid("callbacks", "a list of callbacks", callback)
