"""Operations for which a device or dtype needs a kernel of its own."""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mscm.backend.compiling import fused, platform
from keras_mscm.backend.framework import NAME
from keras_mscm.backend.plain_scope import is_plain

if NAME == "jax":
    from keras_mscm.backend import tpu_attention, tpu_layouts


def normalized_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    query_scale: Any,
    epsilons: tuple[float, float],
    mask: Any = None,
) -> Any:
    """Attention of queries and keys, each divided by its root mean square.

    It is `keras.ops.dot_product_attention` that works everywhere.

    On TPUs it is `tpu_attention.attention`, because Keras 3.15.1 there calls
    JAX's Splash attention with a causal mask and without the scale. On
    TensorFlow it is written out in products.

    In float16 on a CPU or TPU it is computed in float32, because JAX asks for a
    product that accumulates in float32, which XLA has for GPUs only. That fails
    when the step is compiled, too late for JAX and Keras to fall back.

    Args:
        query: `(batch, places, heads, channels)`.
        key: `(batch, length, heads, channels)`.
        value: `(batch, length, heads, channels)`.
        query_scale: What the normalised queries are multiplied by,
            `(channels,)`. The keys need no scale, because the logits see only
            the product of both.
        epsilons: What the mean squares of queries, and of keys, are increased
            by.
        mask: True where a key counts, of a shape that broadcasts to `(batch,
            heads, places, length)`. None if all do.

    Returns:
        `(batch, places, heads, channels)`.
    """
    attention = functools.partial(
        _attention(),
        query_scale=ops.convert_to_tensor(query_scale),
        epsilons=epsilons,
        mask=mask,
    )
    if NAME != "jax" or query.dtype != "float16" or platform() == "gpu":
        return attention(query, key, value)
    exact = [ops.cast(x, "float32") for x in (query, key, value)]
    return ops.cast(attention(*exact), "float16")


def _attention() -> Callable:
    """The kernel of attention for this backend and device."""
    if is_plain():  # because fused kernels have gradients of their own
        return _by_products
    if _on_tpu():
        return tpu_attention.attention
    return _by_products if NAME == "tensorflow" else _by_keras


def _by_keras(query, key, value, *, query_scale, epsilons, mask):
    query = ops.rms_normalization(query, query_scale, epsilon=epsilons[0])
    key = ops.rms_normalization(key, epsilon=epsilons[1])
    return ops.dot_product_attention(query, key, value, mask=mask)


def _by_products(query, key, value, *, query_scale, epsilons, mask):
    """For TensorFlow, where Keras has no kernel for attention, and `plain`.

    Axes are transposed once, fused with the normalisation, and not in each of
    Keras' products and of their gradients.
    """
    scale = query_scale * query.shape[-1] ** -0.5
    query = _heads(query, scale, epsilon=epsilons[0], axes=(0, 2, 1, 3))
    key = _heads(key, epsilon=epsilons[1], axes=(0, 2, 3, 1))
    value = ops.transpose(value, (0, 2, 1, 3))
    logits = ops.cast(ops.matmul(query, key), "float32")
    if mask is not None:
        logits = ops.where(mask, logits, -1e30)
    softmax = _softmax if is_plain() else ops.softmax
    weights = ops.cast(softmax(logits), value.dtype)
    return ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))


def _softmax(logits):
    """Written out, because PyTorch has no gradient of its forward derivative.

    In PyTorch 2.13 that fails as `logsumexp`, which it contains, overwrites
    what the gradient needs.
    """
    largest = ops.max(logits, axis=-1, keepdims=True)
    weights = ops.exp(logits - ops.stop_gradient(largest))
    return weights / ops.sum(weights, axis=-1, keepdims=True)


@fused
def _heads(x, *scale, epsilon, axes):
    """Normalises heads and transposes them."""
    x = ops.rms_normalization(x, *scale, epsilon=epsilon)
    return ops.transpose(x, axes)


def projected(tokens: Any, kernel: Any, bias: Any) -> Any:
    """A dense layer's output for tokens, split into several heads.

    On TensorFlow it is one product of two matrices, because Keras' `einsum`
    would take a product for each image, and add up as many kernels in its
    gradient. Elsewhere it is an `einsum`, because on TPUs that leaves axes in
    the layout that attention takes.

    Args:
        tokens: `(batch, length, channels)`.
        kernel: `(channels, heads, channels of a head)`.
        bias: `(heads, channels of a head)`.

    Returns:
        `(batch, length, heads, channels of a head)`.
    """
    if NAME != "tensorflow":
        return ops.einsum("blc,chd->blhd", tokens, kernel) + bias
    rows = ops.matmul(tokens, ops.reshape(kernel, (kernel.shape[0], -1)))
    shape = (-1, ops.shape(tokens)[1], *bias.shape)
    return ops.reshape(rows, shape) + bias


def laid_out(maps: Any) -> Any:
    """Lays feature maps out as convolutions on TPUs take and leave them.

    Args:
        maps: `(batch, height, width, channels)`.

    Returns:
        The same values.
    """
    return tpu_layouts.places_first(maps) if _on_tpu() else maps


def unpooled(maps: Any, unpool: keras.layers.UpSampling2D) -> Any:
    """`unpool(maps)`, by a kernel of its own on TPUs.

    Args:
        maps: `(batch, height, width, channels)`.
        unpool: Nearest-neighbour upsampling by two.

    Returns:
        `(batch, 2 height, 2 width, channels)`.
    """
    return tpu_layouts.unpooled(maps) if _on_tpu() else unpool(maps)


def _on_tpu() -> bool:
    return NAME == "jax" and platform() == "tpu"
