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
