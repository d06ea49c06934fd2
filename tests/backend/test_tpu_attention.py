"""Attention as it is computed on TPUs, which JAX can do anywhere."""

import types

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import backend
from keras_mscm.networks.layers import TransformerBlock

if backend.NAME == "jax":
    from keras_mscm.backend.tpu_attention import attention, largest_logit

pytestmark = pytest.mark.skipif(
    backend.NAME != "jax", reason="Keras runs on TPUs by JAX alone"
)

EPSILONS = 1e-6, 1e-7


def random_inputs(seed=0, size=(2, 5, 3, 8), length=1024):
    rng = np.random.default_rng(seed)
    batch, _, heads, channels = size
    other = batch, length, heads, channels
    return [
        ops.convert_to_tensor(rng.standard_normal(shape), "float32")
        for shape in (size, other, other)
    ]


def masks():
    mask = np.random.default_rng(1).random((2, 1, 1, 1024)) < 0.6
    mask[..., 0] = True
    return [None, ops.convert_to_tensor(mask)]


def keras_own(query, key, value, *, query_scale, epsilons, mask=None):
    query = ops.rms_normalization(query, query_scale, epsilon=epsilons[0])
    key = ops.rms_normalization(key, epsilon=epsilons[1])
    return ops.dot_product_attention(query, key, value, mask=mask)


@pytest.mark.parametrize("epsilons", [(1e-6, 1e-7), (0.3, 2.0)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("mask", masks(), ids=["whole", "masked"])
def test_is_keras_own_with_its_gradient(mask, size, epsilons):
    import jax

    query, key, value = random_inputs()
    rng = np.random.default_rng(2)
    scale = ops.convert_to_tensor(rng.uniform(-3, 3, 8), "float32")
    # As small as the gradients of a mean over many images.
    weights = 1e-9 * rng.standard_normal((2, 5, 3, 8))

    def run(attention):
        def loss(query, key, value, scale):
            attended = attention(
                size * query,
                key,
                value,
                query_scale=scale,
                epsilons=epsilons,
                mask=mask,
            )
            return ops.sum(weights * attended)

        gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
        inputs = query, key, value, scale
        return [1e9 * x for x in (loss(*inputs), *gradient(*inputs))]

    for a, b in zip(run(attention), run(keras_own)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_normalised_queries_may_be_scaled_by_7():
    """The worst keys: all opposite."""
    query, key = ops.ones((1, 1, 1, 64)), -ops.ones((1, 3, 1, 64))
    _, _, value = random_inputs(size=(1, 1, 1, 64), length=3)
    scale = ops.full((64,), 7.0)
    got = attention(query, key, value, query_scale=scale, epsilons=EPSILONS)
    np.testing.assert_allclose(got[0, 0], ops.mean(value[0], 0), rtol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_no_logit_exceeds_the_bound(sign):
    """Of keys along a scaled query, whichever way its scale is."""
    rng = np.random.default_rng(6)
    norm = keras.layers.RMSNormalization()
    norm.build((None, 64))
    norm.scale.assign(sign * rng.uniform(1, 3, 64))
    # Along the axis of the greatest scale, where the bound is reached.
    query = 100 * np.eye(64, dtype="float32")
    key = ops.rms_normalization(ops.convert_to_tensor(query))
    logits = ops.matmul(norm(query), ops.transpose(key)) / 8
    bound = largest_logit(norm.scale)
    np.testing.assert_allclose(ops.max(ops.abs(logits)), bound, rtol=1e-4)


def test_beyond_all_range_it_is_finite():
    import jax

    query, key, value = random_inputs(3)

    def loss(query, scale):
        attended = attention(
            query, key, value, query_scale=scale, epsilons=EPSILONS
        )
        return ops.sum(attended)

    output, gradients = jax.value_and_grad(loss, (0, 1))(
        query, ops.full((8,), 1e3)
    )
    assert np.isfinite(output)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    inputs = random_inputs(4)
    kwargs = {"query_scale": np.full(8, 2.0, "float32"), "epsilons": EPSILONS}
    expected = keras_own(*inputs, **kwargs)
    with backend.compiling_for("tpu"):
        got = backend.normalized_attention(
            *(ops.cast(x, dtype) for x in inputs), **kwargs
        )
    assert keras.backend.standardize_dtype(got.dtype) == dtype
    np.testing.assert_allclose(ops.cast(got, "float32"), expected, atol=3e-2)


def block_and_inputs():
    block = TransformerBlock(head_width=16)
    block.build(((None, 2, 4, 32), (None, 32)))
    rng = np.random.default_rng(5)
    for weight in block.trainable_variables:
        weight.assign(rng.standard_normal(weight.shape) / 6)
    inputs = [
        ops.convert_to_tensor(rng.standard_normal(shape), "float32")
        for shape in ((3, 2, 4, 32), (3, 32))
    ]
    return block, inputs


def test_a_block_is_the_same_on_tpus():
    block, inputs = block_and_inputs()
    expected = block(inputs)
    with backend.compiling_for("tpu"):
        got = block(inputs)
    assert np.any(np.asarray(got) != np.asarray(expected)), "the same code ran"
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_on_tpus_keras_kernel_is_not_taken(monkeypatch):
    """Keras 3.15.1 makes it causal, and leaves out the scale."""
    import jax

    block, inputs = block_and_inputs()
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda *args: [tpu])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    program = str(jax.make_jaxpr(lambda *x: block(x))(*inputs))
    assert "pallas_call" not in program
    assert program.count("dot_general") > 2
