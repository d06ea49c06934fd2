"""Layouts for TPUs, which change nothing that is computed."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import backend
from keras_mscm.networks import UViT
from keras_mscm.networks.layers import ResNetBlock

if backend.NAME == "jax":
    from keras_mscm.backend import tpu_layouts

pytestmark = pytest.mark.skipif(
    backend.NAME != "jax", reason="Keras runs on TPUs by JAX alone"
)


def random(*shape, dtype="float32"):
    numbers = np.random.default_rng(0).standard_normal(shape)
    return ops.convert_to_tensor(numbers, dtype)


def with_gradient(function, x):
    """Compiled, of a sum with a weight for each number that comes out."""
    import jax

    def loss(x):
        y = function(x)
        weights = np.arange(y.size).reshape(y.shape) % 7 + 1
        return ops.sum(ops.cast(y, "float32") * weights), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    return [np.asarray(ops.cast(t, "float32")) for t in (y, gradient)]


@pytest.mark.parametrize("layout", ["heads_first", "places_first"])
def test_a_layout_changes_nothing(layout):
    x = random(2, 3, 4, 5)
    got, gradient = with_gradient(getattr(tpu_layouts, layout), x)
    np.testing.assert_array_equal(got, x)
    np.testing.assert_array_equal(
        gradient, np.arange(x.size).reshape(x.shape) % 7 + 1
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unpooled_is_keras_own_with_its_gradient(dtype):
    x = random(2, 3, 4, 5, dtype=dtype)
    layer = keras.layers.UpSampling2D(data_format="channels_last", dtype=dtype)
    expected = with_gradient(layer, x)
    got = with_gradient(tpu_layouts.unpooled, x)
    for a, b in zip(got, expected):
        np.testing.assert_array_equal(a, b)


def test_convolutions_are_given_their_layout():
    import jax

    block = ResNetBlock()
    block.build(((None, 4, 4, 8), (None, 8)))
    inputs = random(2, 4, 4, 8), random(2, 8)

    def program():
        return str(jax.make_jaxpr(lambda *x: block(x))(*inputs))

    assert "layout_constraint" not in program()
    with backend.compiling_for("tpu"):
        assert "layout_constraint" in program()


def test_a_network_is_the_same_on_tpus():
    network = UViT(
        (8, 8, 3),
        widths=[16, 32],
        depths=[1, 1],
        attention=[False, True],
        embedding_width=16,
        head_width=16,
        seed=0,
    )
    rng = np.random.default_rng(1)
    for weight in network.trainable_variables:
        weight.assign(rng.standard_normal(weight.shape) / 8)
    inputs = {"z": random(2, 8, 8, 3), "logsnr": random(2)}
    expected = network(inputs)
    with backend.compiling_for("tpu"):
        got = network(inputs)
    assert np.any(np.asarray(got) != np.asarray(expected)), "the same code ran"
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
