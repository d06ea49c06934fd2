"""Attention in products that the TPU compiler fuses."""

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
    """Attention of normalised heads, whose weights never go to memory.

    A softmax subtracts the largest logit, for which the compiler materialises
    all logits and reads them again. A bound of the logits is subtracted here
    instead, because it keeps `exp` in range as well, and the sum of the weights
    comes from a column of ones beside the values. So the compiler fuses the
    product that gives the weights with the one that takes them.

    The gradient computes the weights twice. For the gradients of queries and
    keys they are materialised, because these take a third product, which is not
    fused with the others. For the gradient of the values they are computed
    again, fused into its product. The sums in the gradients of the
    normalisations are fused into the products that they are taken of.

    It is exact while the largest logit of each query is less than 115 below the
    bound, so for any input if the bound is at most 57. Farther below, the
    weights vanish in float32.

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
    """A bound on the size of every logit of normalised queries and keys.

    Args:
        query_scale: What the queries are multiplied by then, `(channels,)`.

    Returns:
        Scalar, float32.
    """
    # The product of two normalised vectors is at most the number of channels,
    # because the length of each is the root of that number. One root is left,
    # because logits are divided by the other.
    scale = jnp.asarray(query_scale, "float32")
    return jnp.max(jnp.abs(scale)) * scale.size**0.5


def _product(indices: str, *factors: Any) -> Any:
    """A matrix product that adds up in float32."""
    return jnp.einsum(indices, *factors, preferred_element_type="float32")


def _normalized(x: Any, epsilon: float) -> tuple[Any, Any]:
    """`x` with a root mean square of 1, and the factor that made it so."""
    exact = x.astype("float32")
    square = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(square + epsilon)
    return (exact * inverse).astype(x.dtype), inverse


def _lengthening(gradient: Any, x: Any) -> Any:
    """The component of the gradient along the normalised `x`."""
    return jnp.mean(gradient.astype("float32") * x, axis=-1, keepdims=True)


def _of_raw(gradient: Any, lengthening: Any, x: Any, inverse: Any) -> Any:
    """The gradient at the input of `_normalized`, whose output is `x`."""
    return (inverse * (gradient - lengthening * x)).astype(x.dtype)


def _weights(query: Any, key: Any, scale: Any, mask: Any) -> Any:
    """Weights before their division by the sum, `(batch, heads, ...)`."""
    logits = _product("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    # The largest weight may be exp(45), because float32 and bfloat16 hold up to
    # exp(88): half of that is for small weights, half for sums of large ones.
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
    # The barriers are there because the compiler would otherwise eliminate the
    # second computation of the weights as a common subexpression, and keep them
    # in memory from the forward pass on.
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
