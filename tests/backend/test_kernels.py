"""What one device or number format computes in another way."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import backend


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_in_every_precision(dtype):
    """Against NumPy, and compiled: that is where JAX fails."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 5, 3, 4), "float32")
    mask = rng.random((2, 1, 1, 5)) < 0.7
    scale, epsilons = rng.uniform(1, 2, 4).astype("float32"), (0.1, 0.2)
    roots = [
        np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon)
        for x, epsilon in zip((query, key), epsilons)
    ]
    normed = query / roots[0] * scale, key / roots[1]
    logits = np.einsum("bqhd,bkhd->bhqk", *normed) / 2
    weights = np.exp(np.where(mask, logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)

    def attend(query, key, value, mask):
        halves = (ops.cast(x, dtype) for x in (query, key, value))
        attended = backend.normalized_attention(
            *halves, query_scale=scale, epsilons=epsilons, mask=mask
        )
        assert keras.backend.standardize_dtype(attended.dtype) == dtype
        return ops.cast(attended, "float32")

    got = backend.compile_inference(attend, [])(query, key, value, mask)
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    np.testing.assert_allclose(
        ops.convert_to_numpy(got), expected, atol=tolerance
    )


def test_gradient_of_attention(gradients):
    """Against differences of NumPy's, in float64."""
    rng = np.random.default_rng(1)
    query, key, value = rng.standard_normal((3, 1, 3, 2, 4))
    scale, weights = rng.uniform(1, 2, 4), rng.standard_normal((1, 3, 2, 4))
    mask = np.array([True, False, True])[None, None, None]

    def total(query, key, value, scale):
        query = query / np.sqrt(np.mean(query**2, -1, keepdims=True) + 0.1)
        key = key / np.sqrt(np.mean(key**2, -1, keepdims=True) + 0.2)
        logits = np.einsum("bqhd,bkhd->bhqk", query * scale, key) / 2
        shares = np.exp(np.where(mask, logits, -np.inf))
        shares /= shares.sum(-1, keepdims=True)
        return np.sum(np.einsum("bhqk,bkhd->bqhd", shares, value) * weights)

    def attend(query, key, value, scale):
        attended = backend.normalized_attention(
            query,
            key,
            value,
            query_scale=scale,
            epsilons=(0.1, 0.2),
            mask=ops.convert_to_tensor(mask),
        )
        return attended * ops.convert_to_tensor(weights, "float32")

    arrays = [query, key, value, scale]
    found = gradients(attend, *(x.astype("float32") for x in arrays))
    for i, gradient in enumerate(found):
        assert gradient.shape == arrays[i].shape
        for place in np.ndindex(gradient.shape):
            difference = 0
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in arrays]
                moved[i][place] += step
                difference += total(*moved) / (2 * step)
            np.testing.assert_allclose(gradient[place], difference, atol=1e-5)


def test_projected():
    rng = np.random.default_rng(2)
    tokens, kernel, bias = (
        rng.standard_normal(shape, "float32")
        for shape in ((2, 5, 4), (4, 3, 2), (3, 2))
    )
    got = backend.projected(*map(ops.convert_to_tensor, (tokens, kernel, bias)))
    expected = np.einsum("blc,chd->blhd", tokens, kernel) + bias
    np.testing.assert_allclose(ops.convert_to_numpy(got), expected, atol=1e-5)
