"""Attention in products that the TPU compiler makes one pass of."""

from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def attention(
    query: Any, key: Any, value: Any, *, bound: Any, mask: Any = None
) -> Any:
    """Attention with nothing to wait for between its two products.

    A softmax begins with the largest logit, for which all of them are written
    to memory and read again. A bound keeps `exp` in range as well; and the sum
    that divides comes from a column of ones beside the values. So the weights
    go from one product into the other, and never to memory. The gradient
    computes them again, once for memory (for the queries and keys, whose
    gradients take a third product), once on the way into the values'.

    It is exact while a query's largest logit is less than 115 below the bound
    (beyond, it finds nothing): for any input if the bound is at most 57.

    Args:
        query: `(batch, places, heads, channels)`.
        key: `(batch, length, heads, channels)`.
        value: `(batch, length, heads, channels)`.
        bound: What no logit exceeds in size, a scalar. Without gradient.
        mask: True where a key counts, of a shape that broadcasts to `(batch,
            heads, places, length)`. None if all do.

    Returns:
        `(batch, places, heads, channels)`, of the queries' dtype.
    """
    query, key, value = map(_heads_first, (query, key, value))
    attend = jax.custom_vjp(lambda *inputs: _attend(*inputs)[0])
    attend.defvjp(_attend, _gradient)
    return attend(query, key, value, bound, mask)


def largest_logit(query_scale: Any) -> Any:
    """What no logit exceeds in size, if queries and keys are normalised.

    Args:
        query_scale: What the queries are multiplied by then, `(channels,)`.

    Returns:
        Scalar, float32.
    """
    # A normalised vector's length is the root of its channels, and of two such
    # roots the logits' scale takes one back.
    scale = jnp.asarray(query_scale, "float32")
    return jnp.max(jnp.abs(scale)) * scale.size**0.5


def _heads_first(x: Any) -> Any:
    """The same, in memory image by image, head by head, places last.

    The compiler makes one pass of two products only with the batch outside.
    Left alone, it may take the heads outside.
    """
    x = jnp.swapaxes(x, 1, 2)
    x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 3, 2)))
    return jnp.swapaxes(x, 1, 2)


def _product(indices: str, *factors: Any) -> Any:
    """A matrix product that adds up in float32."""
    return jnp.einsum(indices, *factors, preferred_element_type="float32")


def _weights(query: Any, key: Any, bound: Any, mask: Any) -> Any:
    """Not yet divided by their sum; `(batch, heads, places, length)`."""
    logits = _product("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    # 45 is in the middle of what float32 and bfloat16 hold.
    weights = jnp.exp(logits + (45.0 - bound))
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return weights.astype(key.dtype)


def _attend(query: Any, key: Any, value: Any, bound: Any, mask: Any) -> tuple:
    weights = _weights(query, key, bound, mask)
    ones = jnp.ones_like(value[..., :1])
    sums = _product(
        "bhqk,bkhd->bqhd", weights, jnp.concatenate([value, ones], axis=-1)
    )
    inverse = 1.0 / jnp.maximum(sums[..., -1:], 1e-36)
    attended = (sums[..., :-1] * inverse).astype(query.dtype)
    return attended, (query, key, value, bound, mask, attended, inverse)


def _gradient(kept: tuple, gradient: Any) -> tuple:
    # Barriers: else the compiler would find the same weights where they were
    # computed before, and put them into memory from there to here.
    barrier = jax.lax.optimization_barrier
    query, key, value, bound, mask, attended, inverse = barrier(kept)
    of_sums = gradient.astype("float32") * inverse
    of_ones = -jnp.sum(of_sums * attended, axis=-1)
    of_ones = jnp.swapaxes(of_ones, 1, 2)[..., None]
    of_sums = of_sums.astype(value.dtype)
    weights = barrier(_weights(query, key, bound, mask))

    def of_logits(of_sums, value):
        of_weights = _product("bqhd,bkhd->bhqk", of_sums, value) + of_ones
        return (weights * of_weights).astype(query.dtype)

    scale = query.shape[-1] ** -0.5
    of_query = _product("bhqk,bkhd->bqhd", of_logits(of_sums, value), key)
    of_query, of_sums, value = barrier((of_query, of_sums, value))
    of_key = _product("bhqk,bqhd->bkhd", of_logits(of_sums, value), query)
    of_key, key = barrier((of_key, key))
    weights = _weights(query, key, bound, mask)
    of_value = _product("bhqk,bqhd->bkhd", weights, of_sums)
    return (
        (of_query * scale).astype(query.dtype),
        (of_key * scale).astype(query.dtype),
        of_value.astype(query.dtype),
        jnp.zeros_like(bound),
        None,
    )
