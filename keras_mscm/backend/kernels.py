"""What one device or number format computes in another way."""

import functools
from typing import Any

import keras
from keras import ops

from keras_mscm.backend.compiling import platform
from keras_mscm.backend.framework import NAME

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

    `keras.ops.dot_product_attention`, on TPUs and in float16 too.

    On TPUs it is `tpu_attention.attention`: there Keras takes JAX's Splash
    attention as if places were in causal order, and leaves out the scale
    (3.15.1).

    In float16 JAX asks for a product that adds up in float32, which XLA has
    for GPUs only; on a CPU or TPU that fails when the step is compiled, too
    late for the other ways that JAX and Keras would try. There it is computed
    in float32.

    Args:
        query: `(batch, places, heads, channels)`.
        key: `(batch, length, heads, channels)`.
        value: `(batch, length, heads, channels)`.
        query_scale: What the normalised queries are multiplied by,
            `(channels,)`. The keys' need no scale, as what multiplies the one
            multiplies the other.
        epsilons: What the mean squares of queries, and of keys, are increased
            by.
        mask: True where a key counts, of a shape that broadcasts to `(batch,
            heads, places, length)`. None if all do.

    Returns:
        `(batch, places, heads, channels)`.
    """
    if _on_tpu():
        attention = functools.partial(
            tpu_attention.attention,
            query_scale=ops.cast(query_scale, "float32"),
            epsilons=epsilons,
        )
    else:
        attention = ops.dot_product_attention
        query = ops.rms_normalization(query, query_scale, epsilon=epsilons[0])
        key = ops.rms_normalization(key, epsilon=epsilons[1])
    if NAME != "jax" or query.dtype != "float16" or platform() == "gpu":
        return attention(query, key, value, mask=mask)
    exact = [ops.cast(x, "float32") for x in (query, key, value)]
    return ops.cast(attention(*exact, mask=mask), "float16")


def laid_out(maps: Any) -> Any:
    """Feature maps as convolutions on TPUs take and leave them.

    Args:
        maps: `(batch, height, width, channels)`.

    Returns:
        The same.
    """
    return tpu_layouts.places_first(maps) if _on_tpu() else maps


def unpooled(maps: Any, unpool: keras.layers.UpSampling2D) -> Any:
    """`unpool(maps)`, on TPUs too.

    Args:
        maps: `(batch, height, width, channels)`.
        unpool: Gives what is at each place to four.

    Returns:
        `(batch, 2 height, 2 width, channels)`.
    """
    return tpu_layouts.unpooled(maps) if _on_tpu() else unpool(maps)


def _on_tpu() -> bool:
    return NAME == "jax" and platform() == "tpu"
