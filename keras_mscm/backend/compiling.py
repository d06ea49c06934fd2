"""Functions of tensors, compiled as each framework does it best."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_mscm.backend.devices import gathered
from keras_mscm.backend.framework import NAME
from keras_mscm.backend.plain_scope import is_plain

if NAME == "jax":
    import jax
elif NAME == "tensorflow":
    import tensorflow as tf
elif NAME == "torch":
    import torch


def compile_inference(
    function: Callable[..., Any], variables: Sequence[keras.Variable]
) -> Callable[..., Any]:
    """Compiles a function of tensors that reads `variables`.

    Args:
        function: Function of tensors, or dictionaries of them; it assigns
            nothing.
        variables: The variables that it reads. Their values at the time of a
            call count, without recompilation.

    Returns:
        A function of the same arguments (arrays, numbers or tensors).
    """
    if NAME == "jax":

        @jax.jit
        def compiled(values, *args):
            with keras.StatelessScope(state_mapping=zip(variables, values)):
                return gathered(function(*args))

        # `v._value` is the same as `v.value` outside of any scope. The latter
        # would take 1 us to find that out for each variable, of which a small
        # network has a hundred.
        return lambda *args: compiled([v._value for v in variables], *args)
    if NAME == "tensorflow":
        graph, traced = tf.function(function, jit_compile=True), {}

        def run(*args):
            tensors = _converted(args, tf.convert_to_tensor)
            # Traces are looked up here, because `graph` takes a fifth of a
            # small network's time to find its trace.
            flat = keras.tree.flatten(tensors)
            kinds = tuple((x.shape, x.dtype) for x in flat)
            if kinds not in traced:
                traced[kinds] = graph.get_concrete_function(*tensors)
            return traced[kinds](*tensors)

        return run

    def eager(*args):
        with torch.inference_mode():
            return function(*_converted(args, ops.convert_to_tensor))

    return eager


def _converted(args: Sequence[Any], convert: Callable[[Any], Any]) -> list:
    """Converts arrays, or dictionaries of them; `map_structure` is slower."""
    return [
        {name: convert(value) for name, value in arg.items()}
        if isinstance(arg, dict)
        else convert(arg)
        for arg in args
    ]


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fuses a function of tensors that runs within a step into one kernel.

    It does so on TensorFlow alone, which runs a step on the CPU operation by
    operation, each of which reads and writes memory. The gradient is a kernel
    too; it computes the function once more, instead of keeping intermediate
    results. JAX fuses without being asked, and PyTorch's compiler may not be
    installed. In a `plain()` scope nothing is fused.

    Args:
        function: Function of tensors, which are positional, and of settings,
            which are keywords; it reads no variable.

    Returns:
        A function of the same arguments.
    """
    if NAME != "tensorflow":
        return function

    @functools.cache
    def kernels(**settings):
        compiled = functools.partial(
            tf.function, jit_compile=True, autograph=False
        )
        forward = functools.partial(function, **settings)

        @compiled
        def gradient(upstream, *tensors):
            floats = [x for x in tensors if x.dtype.is_floating]
            with tf.GradientTape() as tape:
                tape.watch(floats)
                result = forward(*tensors)
            found = iter(tape.gradient(result, floats, upstream))
            return [
                next(found) if x.dtype.is_floating else None for x in tensors
            ]

        kernel = compiled(forward)
        return tf.custom_gradient(
            lambda *xs: (kernel(*xs), lambda upstream: gradient(upstream, *xs))
        )

    def run(*tensors, **settings):
        if is_plain():
            return function(*map(tf.convert_to_tensor, tensors), **settings)
        return kernels(**settings)(*map(tf.convert_to_tensor, tensors))

    return run


_compiled_for: str | None = None


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it JAX traces for another platform than this machine's.

    Args:
        platform: JAX's name of it, such as `"tpu"`.
    """
    global _compiled_for
    before, _compiled_for = _compiled_for, platform
    try:
        yield
    finally:
        _compiled_for = before


def platform() -> str:
    """JAX's name of the platform to compile for, such as `"tpu"`."""
    return _compiled_for or jax.default_backend()
