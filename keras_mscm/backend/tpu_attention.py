"""Attention in products that the TPU compiler makes one pass of."""

import functools
from typing import Any

import jax
from jax import numpy as jnp

from keras_mscm.backend.tpu_layouts import heads_first


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    query_scale: Any,
    epsilons: tuple[float, float],
    mask: Any = None,
) -> Any:
    """Attention of normalised heads, with nothing to wait for in between.

    A softmax begins with the largest logit, for which all of them are written
    to memory and read again. A bound keeps `exp` in range as well; and the sum
    that divides comes from a column of ones beside the values. So the weights
    go from one product into the other, and never to memory. The gradient
    computes them again, once for memory (for the queries and keys, whose
    gradients take a third product), once on the way into the values'. What the
    normalisations' gradients sum over is summed as those products come out.

    It is exact while a query's largest logit is less than 115 below the bound
    (beyond, it finds nothing): for any input if the bound is at most 57.

    Args:
        query: `(batch, places, heads, channels)`, not yet normalised.
        key: `(batch, length, heads, channels)`, not yet normalised.
        value: `(batch, length, heads, channels)`.
        query_scale: What the normalised queries are multiplied by,
            `(channels,)`.
        epsilons: What the mean squares of queries, and of keys, are increased
            by in their normalisations.
        mask: True where a key counts, of a shape that broadcasts to `(batch,
            heads, places, length)`. None if all do.

    Returns:
        `(batch, places, heads, channels)`, of the queries' dtype.
    """
    query, key, value = map(heads_first, (query, key, value))
    query_scale = jnp.asarray(query_scale, "float32")
    run = functools.partial(_attend, epsilons)
    attend = jax.custom_vjp(lambda *inputs: run(*inputs)[0])
    attend.defvjp(run, _gradient)
    return attend(query, key, value, query_scale, mask)


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


def _product(indices: str, *factors: Any) -> Any:
    """A matrix product that adds up in float32."""
    return jnp.einsum(indices, *factors, preferred_element_type="float32")


def _normalized(x: Any, epsilon: float) -> tuple[Any, Any]:
    """With a root mean square of 1, and what made it so."""
    exact = x.astype("float32")
    square = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(square + epsilon)
    return (exact * inverse).astype(x.dtype), inverse


def _lengthening(gradient: Any, x: Any) -> Any:
    """How far the gradient only makes the normalised `x` longer."""
    return jnp.mean(gradient.astype("float32") * x, axis=-1, keepdims=True)


def _of_raw(gradient: Any, lengthening: Any, x: Any, inverse: Any) -> Any:
    """The gradient of what `_normalized` made `x` of."""
    return (inverse * (gradient - lengthening * x)).astype(x.dtype)


def _weights(query: Any, key: Any, scale: Any, mask: Any) -> Any:
    """Not yet divided by their sum; `(batch, heads, places, length)`."""
    logits = _product("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    # 45 is in the middle of what float32 and bfloat16 hold.
    weights = jnp.exp(logits + (45.0 - largest_logit(scale)))
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return weights.astype(key.dtype)


def _attend(
    epsilons: tuple[float, float],
    query: Any,
    key: Any,
    value: Any,
    scale: Any,
    mask: Any,
) -> tuple:
    query, of_query = _normalized(query, epsilons[0])
    key, of_key = _normalized(key, epsilons[1])
    scaled = (query * scale).astype(query.dtype)
    weights = _weights(scaled, key, scale, mask)
    ones = jnp.ones_like(value[..., :1])
    sums = _product(
        "bhqk,bkhd->bqhd", weights, jnp.concatenate([value, ones], axis=-1)
    )
    inverse = 1.0 / jnp.maximum(sums[..., -1:], 1e-36)
    attended = (sums[..., :-1] * inverse).astype(query.dtype)
    inverses = of_query, of_key, inverse
    return attended, (query, key, value, scale, mask, attended, inverses)


def _gradient(kept: tuple, gradient: Any) -> tuple:
    # Barriers: else the compiler would find the same weights where they were
    # computed before, and put them into memory from there to here.
    barrier = jax.lax.optimization_barrier
    gradient, kept = barrier((heads_first(gradient), kept))
    query, key, value, scale, mask, attended, inverses = kept
    scaled = (query * scale).astype(query.dtype)
    of_sums = gradient.astype("float32") * inverses[2]
    of_ones = -jnp.sum(of_sums * attended, axis=-1)
    of_ones = jnp.swapaxes(of_ones, 1, 2)[..., None]
    of_sums = of_sums.astype(value.dtype)
    weights = barrier(_weights(scaled, key, scale, mask))
    root = query.shape[-1] ** -0.5

    def of_logits(of_sums, value):
        of_weights = _product("bqhd,bkhd->bhqk", of_sums, value) + of_ones
        return (weights * of_weights).astype(query.dtype)

    of_scaled = _product("bhqk,bkhd->bqhd", of_logits(of_sums, value), key)
    of_scaled = (of_scaled * root).astype(query.dtype)
    of_scale = jnp.sum(of_scaled.astype("float32") * query, axis=(0, 1, 2))
    longer = _lengthening(of_scaled, scaled)
    of_scaled, of_scale, longer, of_sums, value = barrier(
        (of_scaled, of_scale, longer, of_sums, value)
    )
    of_query = _of_raw(of_scaled * scale, longer, query, inverses[0])
    of_key = _product("bhqk,bqhd->bkhd", of_logits(of_sums, value), scaled)
    of_key = (of_key * root).astype(key.dtype)
    of_key, longer, key = barrier((of_key, _lengthening(of_key, key), key))
    of_key = _of_raw(of_key, longer, key, inverses[1])
    weights = _weights(scaled, key, scale, mask)
    of_value = _product("bhqk,bqhd->bkhd", weights, of_sums)
    return of_query, of_key, of_value.astype(value.dtype), of_scale, None
