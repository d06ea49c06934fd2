"""Where a foreign network embeds time, to which a segment's end is added."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor
from keras_mscm.networks.arguments import check_even

Change = Callable[[Any], Any]


def layers_called(network: keras.Layer, name: str) -> list[keras.Layer]:
    """The layers of a network by an attribute's dotted path, or by name.

    A path comes first, because a copy's layers may have other names.
    """
    found: Any = network
    for attribute in name.split("."):
        found = getattr(found, attribute, None)
    if isinstance(found, keras.Layer):
        return [found]
    return [x for x in network._flatten_layers(False) if x.name == name]


@contextlib.contextmanager
def changed(network: Any, name: str, change: Change) -> Iterator[None]:
    """Changes what the parts of a network say that have a name.

    A layer around another framework's module does so by its own `changed`.

    Args:
        network: The network.
        name: The parts' name.
        change: Function of what such a part returns.

    Raises:
        ValueError: If there is no such part.
    """
    if hasattr(network, "changed"):
        with network.changed(name, change):
            yield
        return
    layers = layers_called(network, name)
    if not layers:
        raise unknown(name, [x.name for x in network._flatten_layers(False)])
    # Not by attributes, which Keras and its backends would track.
    before = [vars(layer).get("call") for layer in layers]
    for layer in layers:
        vars(layer)["call"] = then(layer.call, change)
    try:
        yield
    finally:
        for layer, call in zip(layers, before):
            vars(layer).pop("call")
            if call is not None:
                vars(layer)["call"] = call


def then(call: Callable[..., Any], change: Change) -> Callable[..., Any]:
    """A function of the same arguments, and then another of its output."""

    def wrapped(*args, **kwargs):
        return change(call(*args, **kwargs))

    return wrapped


def is_called(path: Any, name: str) -> bool:
    """Whether the path of a module's part is a name, or ends with it.

    Args:
        path: The path, a dotted one or a sequence of keys.
        name: The name.
    """
    if not isinstance(path, str):
        path = ".".join(map(str, path))
    return f".{path}".endswith(f".{name}")


def unknown(name: str, names: Any = None) -> ValueError:
    """The error for a name that no part of a network has.

    Args:
        name: The name.
        names: Those that there are, if they are known.
    """
    known = "" if names is None else f", and there are {[*names]!s:.300}"
    return ValueError(
        "`time_embedding` must name a layer within the network, whose output "
        f"is its embedding of time. Received: {name!r}{known}"
    )


def width_of(network: Any, name: str, call: Callable[[], Any]) -> int:
    """The width of a network's embedding of time, which a call shows.

    Args:
        network: The network.
        name: Its time embedding.
        call: Calls it, if only symbolically.

    Raises:
        ValueError: If what it names is no embedding of time.
    """
    shapes: list[tuple] = []

    def look(output):
        shapes.append(tuple(getattr(output, "shape", ())))
        return output

    with changed(network, name, look):
        call()
    if not shapes:
        raise unknown(name)
    for shape in shapes:
        if {*shape[1:-1]} - {1} or len(shape) < 2 or shape[-1] != shapes[0][-1]:
            raise ValueError(
                "`time_embedding` must name a layer whose output is a vector "
                "for each example, (batch, width), to which another can be "
                f"added. Received: {name!r}, whose output is of shape {shape}"
            )
    return check_width("time_embedding", shapes[0][-1])


def check(network: Any, name: Any) -> None:
    """Raises unless a network has a time embedding of a name, or it is None."""
    if name is None:
        return
    checks.check_string("time_embedding", name)
    with changed(network, name, lambda output: output):
        pass


def check_known(network: Any, name: str | None, time_width: Any) -> None:
    """Raises unless it is known where a network embeds time.

    Args:
        network: The network.
        name: Its time embedding.
        time_width: The width of one outside of it.
    """
    if name is None and time_width is None:
        raise ValueError(
            "`time_embedding` must be given, the name of the network's layer "
            "whose output is its embedding of time, for it to be told where "
            "its step ends, as several student_steps need it. Received: "
            f"time_embedding=None, and {checks.describe(network)}"
        )


def check_width(name: str, width: Any) -> int:
    """Raises unless a vector can be embedded in a width."""
    try:
        return check_even(name, width)
    except ValueError as error:
        if name != "time_embedding":
            raise
        raise ValueError(f"{error}, the width of the layer's output") from None


@contextlib.contextmanager
def told(network: Any, name: str | None, end: Tensor | None) -> Iterator[None]:
    """Adds a vector to what a network says of time, if there are both.

    Args:
        network: The network.
        name: Its time embedding.
        end: The vector, `(batch, width)`.
    """
    if name is None or end is None:
        yield
        return
    with changed(network, name, lambda output: _added(output, end)):
        yield


def _added(output: Tensor, embedding: Tensor) -> Tensor:
    """A vector for each example, added to an embedding of time.

    Args:
        output: What the network's time embedding says, `(batch, 1, ...,
            width)`.
        embedding: The vector, `(batch, width)`.
    """
    axes = (1,) * (len(output.shape) - 2)
    vector = ops.reshape(embedding, (-1, *axes, embedding.shape[-1]))
    return output + ops.cast(vector, output.dtype)
