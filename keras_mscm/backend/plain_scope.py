"""Code traced as plain operations, which any transformation understands."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_mscm.backend.framework import NAME

_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Traces what is within without custom gradients or nested compilation.

    For forward-mode derivatives, which custom gradients don't have (`jvp`
    enters this scope itself), and for exporters, whose formats hold a graph of
    plain operations. Results and gradients are equal but for rounding; it may
    take more time and memory.

    The frameworks' own functions stay what they are, because their exporters
    and derivatives know them: `jax.nn.silu` is a call of a compiled function,
    `tf.nn.silu` has a custom gradient.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether this is within `plain()`."""
    return _plain.get()


def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.remat(function)`; in a `plain()` scope what is as plain.

    On TensorFlow rematerialisation is a custom gradient, and on PyTorch a pair
    of hooks that forward mode refuses, so there the function's intermediate
    values are kept. On JAX any transformation knows it.

    Args:
        function: Function of tensors.

    Returns:
        A function of the same arguments.
    """
    if is_plain() and NAME != "jax":
        return function
    return keras.remat(function)
