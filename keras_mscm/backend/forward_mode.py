"""Forward-mode derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_mscm.backend.framework import NAME
from keras_mscm.backend.plain_scope import plain

if NAME == "jax":
    import jax
elif NAME == "tensorflow":
    import tensorflow as tf
elif NAME == "torch":
    import torch


def jvp(
    function: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> tuple[Any, Any]:
    """A function's value, and its derivative in one direction.

    As `jax.jvp`: for the rate at which a network's output changes along a
    path, in one evaluation that costs about two. It works in compiled steps,
    and gradients flow through both results. What the function reads besides
    its arguments, such as labels and weights, is constant.

    Where PyTorch has no forward derivative of an operation, the function is
    evaluated once more, and its derivative taken twice in reverse mode. And
    PyTorch 2.13 has no gradient of the derivative of its own softmax (our
    networks write it out): behind one, stop the gradient of the tangents.

    Args:
        function: Function of tensors; it may contain Keras layers. It is traced
            within `plain()`.
        primals: Its arguments, tensors of a floating-point dtype or structures
            of them.
        tangents: The direction, of the same structure and shapes. Numbers are
            cast to the primals' dtypes.

    Returns:
        What the function returns, and the derivative of that, of the same
        structure.

    Example:

    >>> x, direction = ops.ones((2,)), 2 * ops.ones((2,))
    >>> y, rate = jvp(lambda x: x**3, (x,), (direction,))
    >>> [float(value) for value in rate]
    [6.0, 6.0]
    """
    arguments = keras.tree.map_structure(ops.convert_to_tensor, tuple(primals))
    directions = keras.tree.map_structure(
        lambda primal, tangent: ops.cast(tangent, primal.dtype),
        arguments,
        tuple(tangents),
    )
    with plain():
        return _jvp(function, arguments, directions)


def _jvp(
    function: Callable[..., Any], primals: tuple, tangents: tuple
) -> tuple[Any, Any]:
    if NAME == "jax":
        return jax.jvp(function, primals, tangents)
    if NAME == "tensorflow":
        # Copies, because a tensor is watched at most once.
        primals = keras.tree.map_structure(tf.identity, primals)
        with tf.autodiff.ForwardAccumulator(primals, tangents) as accumulator:
            outputs = function(*primals)
        return outputs, accumulator.jvp(
            outputs, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
    if torch.is_inference_mode_enabled():  # where every derivative is 0
        with torch.inference_mode(False), torch.no_grad():
            copies = keras.tree.map_structure(torch.clone, (primals, tangents))
            return _jvp(function, *copies)
    # The other kernels for attention have no forward derivative.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        try:
            return _by_dual_numbers(function, primals, tangents)
        except (NotImplementedError, RuntimeError) as error:
            lacking = "forward AD", "forward mode AD"
            if not any(words in str(error) for words in lacking):
                raise
            return _twice_backwards(function, primals, tangents)


def _by_dual_numbers(
    function: Callable[..., Any], primals: tuple, tangents: tuple
) -> tuple[Any, Any]:
    """On PyTorch, where `torch.func.jvp` would let no seed be assigned."""
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        duals = keras.tree.map_structure(forward.make_dual, primals, tangents)
        results = function(*duals)
        pairs = [
            forward.unpack_dual(result)
            for result in keras.tree.flatten(results)
        ]
    outputs = [pair.primal for pair in pairs]
    rates = [
        torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent
        for pair in pairs
    ]
    pack = keras.tree.pack_sequence_as
    return pack(results, outputs), pack(results, rates)


def _twice_backwards(
    function: Callable[..., Any], primals: tuple, tangents: tuple
) -> tuple[Any, Any]:
    """A derivative in forward mode by two in reverse mode, on PyTorch.

    The gradient `J^T u` is linear in `u`, so the gradient of that, in the
    direction of the tangents, is `J` times these.
    """
    options = dict(create_graph=True, allow_unused=True, materialize_grads=True)
    with torch.enable_grad():
        flat = [
            x if x.requires_grad else x.detach().requires_grad_()
            for x in keras.tree.flatten(primals)
        ]
        outputs = function(*keras.tree.pack_sequence_as(primals, flat))
        leaves = keras.tree.flatten(outputs)
        reached = [y for y in leaves if y.requires_grad]
        along = [torch.zeros_like(y, requires_grad=True) for y in reached]
        transposed = torch.autograd.grad(reached, flat, along, **options)
        directions = keras.tree.flatten(tangents)
        found = torch.autograd.grad(transposed, along, directions, **options)
    rates = iter(found)
    rates_of_all = [
        next(rates) if y.requires_grad else torch.zeros_like(y) for y in leaves
    ]
    return outputs, keras.tree.pack_sequence_as(outputs, rates_of_all)
