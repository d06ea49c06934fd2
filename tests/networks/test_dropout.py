"""Dropout: its hash against one in NumPy, and what a mask must be."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm.networks.dropout import Dropout


def hashed(bits):
    """The finaliser, in unsigned NumPy as it is published."""
    bits = np.asarray(bits, "uint32")
    with np.errstate(over="ignore"):
        bits = (bits ^ (bits >> 16)) * np.uint32(0x21F0AAAD)
        bits = (bits ^ (bits >> 15)) * np.uint32(0x735A2D97)
    return bits ^ (bits >> 15)


def expected_mask(seed, count, shape, rate):
    with np.errstate(over="ignore"):
        key = hashed(np.uint32(seed) + hashed(np.uint32(count)))
        key = hashed(np.arange(shape[0], dtype="uint32") + key)
    place = np.arange(np.prod(shape[1:]), dtype="uint32")
    bits = hashed(place ^ key[:, None])
    # The order of signed integers, shifted to that of unsigned ones.
    signed = bits.view("int32").astype("int64")
    return (signed + 2**31 >= round(rate * 2**32)).reshape(shape)


def dropped(layer, shape):
    output = ops.convert_to_numpy(layer(ops.ones(shape), training=True))
    return output == 0


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_equals_the_reference_on_every_backend(rate):
    layer, shape = Dropout(rate, seed=12345), (3, 2, 5, 7)
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    for count in range(3):
        output = ops.convert_to_numpy(layer(x, training=True))
        mask = expected_mask(12345, count, shape, rate)
        np.testing.assert_allclose(
            output, np.where(mask, x / (1 - rate), 0), rtol=1e-6
        )


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_does_nothing_in_inference_or_at_rate_0(rate):
    x = np.ones((4, 100), "float32")
    layer = Dropout(rate, seed=1)
    for output in (layer(x), layer(x, training=rate == 0)):
        np.testing.assert_array_equal(ops.convert_to_numpy(output), x)


def test_rate_and_independence():
    """Five standard errors: of the rate, and of correlations between masks."""
    rate, shape = 0.2, (64, 8, 8, 64)
    layer, other = Dropout(rate, seed=1), Dropout(rate, seed=2)
    first, second = dropped(layer, shape), dropped(layer, shape)
    masks = {
        "next call": (first, second),
        "next seed": (first, dropped(other, shape)),
        "next example": (first[1:], first[:-1]),
        "next channel": (first[..., 1:], first[..., :-1]),
        "next row": (first[:, 1:], first[:, :-1]),
    }
    error = np.sqrt(rate * (1 - rate) / first.size)
    assert abs(first.mean() - rate) < 5 * error
    for what, (a, b) in masks.items():
        correlation = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(a.size), what


def test_bits_are_uniform():
    """Chi-squared of the leading byte, over one layer's drop rates."""
    shape = (32, 4096)
    shares = []
    for rate in np.arange(1, 16) / 16:
        shares.append(dropped(Dropout(float(rate), seed=3), shape).mean())
    counts = np.diff([0, *shares, 1]) * np.prod(shape)
    expected = np.prod(shape) / 16
    # 15 degrees of freedom: 37.7 is exceeded one time in a thousand.
    assert np.sum((counts - expected) ** 2) / expected < 37.7


def test_an_example_keeps_its_mask_in_a_larger_batch():
    small = dropped(Dropout(0.5, seed=5), (2, 50))
    large = dropped(Dropout(0.5, seed=5), (6, 50))
    np.testing.assert_array_equal(small, large[:2])


def test_the_same_draw_drops_the_same():
    layer, x = Dropout(0.5, seed=7), ops.ones((2, 50))
    state = layer.draw()
    np.testing.assert_array_equal(ops.convert_to_numpy(state), [7, 0])
    for _ in range(2):
        output = layer(x, training=True, state=state)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(output) != 0, expected_mask(7, 0, (2, 50), 0.5)
        )
    # And counts once.
    second = expected_mask(7, 1, (2, 50), 0.5)
    np.testing.assert_array_equal(dropped(layer, (2, 50)), ~second)
    assert Dropout(0.0).draw() is None


def test_gradient_is_the_mask():
    """In a compiled step with a batch of unknown size."""
    model = keras.Sequential([keras.Input((50,)), Dropout(0.5, seed=7)])
    model.add(keras.layers.Dense(1, use_bias=False, kernel_initializer="ones"))
    model.compile(keras.optimizers.SGD(1.0), loss=lambda y, p: ops.sum(p))
    model.fit(np.ones((1, 50), "float32"), np.ones((1, 1)), verbose=0)
    step = 1 - ops.convert_to_numpy(model.layers[-1].kernel)[:, 0]
    mask = expected_mask(7, 0, (1, 50), 0.5)[0]
    np.testing.assert_allclose(step, np.where(mask, 2.0, 0.0), rtol=1e-6)


def test_round_trip():
    layer = Dropout(0.3, seed=9)
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert isinstance(copy, Dropout)
    np.testing.assert_array_equal(
        dropped(layer, (4, 40)), dropped(copy, (4, 40))
    )
