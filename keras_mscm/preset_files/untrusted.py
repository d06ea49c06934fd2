"""Objects from a configuration that a stranger may have written.

Keras makes of a configuration only what is registered with it and what it
exports, and no lambda in safe mode. Two things are left to do: among what it
exports are functions that act on the process, the disk or the network, which a
model may call while it is loaded; and sizes are nobody's concern.
"""

import copy
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras

# Where Keras exports functions of tensors, without any other effect.
PURE = (
    "keras.activations",
    "keras.constraints",
    "keras.initializers",
    "keras.losses",
    "keras.metrics",
    "keras.ops",
    "keras.optimizers",
    "keras.regularizers",
)
BYTES = 4  # of a weight; what is smaller than float32 is no danger


def check_config(config: Any, custom_objects: Any = None) -> None:
    """Raises if a configuration names a function that is none of tensors.

    Args:
        config: What `get_config` gave, or Keras' serialisation: JSON.
        custom_objects: Classes and functions by name, besides those that are
            registered.

    Raises:
        ValueError: If it asks Keras for something else than a class, a
            registered function or a function of tensors.
    """
    parts = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, (list, tuple)):
            parts.extend(part)
        elif isinstance(part, dict):
            parts.extend(part.values())
            if not _is_harmless(part, custom_objects):
                raise ValueError(
                    "A configuration may name classes, registered functions "
                    f"and those of {', '.join(PURE)}. Received: "
                    f"{part.get('class_name')!r} of {part.get('module')!r}, "
                    f"config={str(part.get('config'))[:100]!r}"
                )


def _is_harmless(part: dict[str, Any], custom_objects: Any) -> bool:
    name, module = part.get("class_name"), part.get("module")
    if "config" not in part or not isinstance(module, str):
        return True  # plain, or nothing that Keras would look for
    registered = part.get("registered_name", name)
    if name == "function":
        name = registered = part["config"]
    if not isinstance(name, str):
        return True  # which Keras refuses
    if isinstance(registered, str) and keras.saving.get_registered_object(
        registered, custom_objects
    ):
        return True
    names = f"{module}.{name}".split(".")
    if names[0] != "keras" or names[1] == "src" or module.startswith(PURE):
        return True  # Keras makes saveable classes of these, or nothing
    found: Any = keras
    for attribute in names[1:]:
        found = getattr(found, attribute, None)
    return isinstance(found, type)


def deserialize(config: Any, custom_objects: Any = None) -> Any:
    """What Keras makes of a configuration that is `check_config`ed.

    Args:
        config: As for `keras.saving.deserialize_keras_object`.
        custom_objects: As there.

    Raises:
        ValueError: If it names what is unknown or not allowed.
    """
    check_config(config, custom_objects)
    try:
        return keras.saving.deserialize_keras_object(
            config, custom_objects=custom_objects
        )
    except TypeError as error:
        raise ValueError(summary(error)) from error


def summary(error: BaseException) -> str:
    """What an error says, in one line.

    From the middle of what Keras says, where it repeats the configuration,
    something is left out.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:300]} [...] {text[-300:]}"


def without_memory(make: Callable[[], Any]) -> Any:
    """Calls a function that makes a network, in which weights take no memory.

    Args:
        make: Makes it, and returns what is to be known of it.
    """

    def run():
        with keras.StatelessScope(initialize_variables=False):
            return make()

    # In a thread of its own: Keras keeps a list per thread of variables that
    # are yet to get values, and the next scope would give these theirs.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def check_size(make: Callable[[], Any], limit: float | None = None) -> None:
    """Raises if a network's weights are too many, before they are made.

    Args:
        make: Makes it.
        limit: How many bytes they may be; by default this machine's memory.

    Raises:
        ValueError: If they are more.
    """
    try:
        weights = without_memory(lambda: getattr(make(), "weights", ()))
    except Exception:  # because it then can't be made in earnest either, or
        return  # has layers that need values; who makes it, will see
    count = sum(math.prod(weight.shape) for weight in weights)
    limit = memory() if limit is None else limit
    if count * BYTES > limit:
        raise ValueError(
            f"A network's weights must fit, here into {limit / 1e9:.3g} GB. "
            f"Received: a configuration of {count:,} weights, "
            f"{count * BYTES / 1e9:.3g} GB"
        )


def check_network(config: Any, custom_objects: Any = None) -> None:
    """Raises if a configuration is of a network larger than the memory.

    Args:
        config: Keras' serialisation; of anything else nothing is known.
        custom_objects: As in `check_config`.

    Raises:
        ValueError: If it is, or names what is not allowed.
    """
    if isinstance(config, dict):
        # A copy, as Keras takes a functional model's configuration apart.
        check_size(lambda: deserialize(copy.deepcopy(config), custom_objects))


def memory() -> float:
    """Bytes of memory that this machine has; no end where it doesn't say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")
