import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm.networks.normalization import GroupNormalization


def built(layer, channels, seed=0):
    layer.build((None, 4, 6, channels))
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        weight.assign(rng.standard_normal(weight.shape))
    return layer


def expected(layer, x):
    """In float64, group by group."""
    gamma, beta = map(ops.convert_to_numpy, (layer.gamma, layer.beta))
    groups = np.split(x.astype("float64"), layer.groups, axis=-1)
    normal = [
        (group - group.mean((1, 2, 3), keepdims=True))
        / np.sqrt(group.var((1, 2, 3), keepdims=True) + layer.epsilon)
        for group in groups
    ]
    return np.concatenate(normal, axis=-1) * gamma + beta


@pytest.mark.parametrize("groups", [1, 4, 24])
def test_is_the_textbook_s(groups):
    rng = np.random.default_rng(1)
    # Means ten times the deviation, different in each image and channel.
    x = rng.standard_normal((3, 4, 6, 24)) + 10 * rng.standard_normal(
        (3, 1, 1, 24)
    )
    x = x.astype("float32")
    layer = built(GroupNormalization(groups), 24)
    got = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(got, expected(layer, x), atol=2e-4)


def test_equal_values_are_no_nan():
    layer = built(GroupNormalization(2), 4)
    x = np.full((2, 4, 6, 4), 1234.567, "float32")
    got = ops.convert_to_numpy(layer(x))
    beta = ops.convert_to_numpy(layer.beta)
    assert np.isfinite(got).all()
    # What rounding leaves of the variance is small beside epsilon or cut off.
    np.testing.assert_allclose(got, np.broadcast_to(beta, got.shape), atol=0.3)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_statistics_of_half_precision_are_float32(dtype):
    x = 3 + np.random.default_rng(2).standard_normal((2, 4, 6, 8))
    layer = built(GroupNormalization(2, dtype=dtype), 8)
    x = ops.convert_to_numpy(
        ops.cast(ops.cast(x, layer.compute_dtype), "float32")
    )
    got = layer(x)
    assert keras.backend.standardize_dtype(got.dtype) == layer.compute_dtype
    got = ops.convert_to_numpy(ops.cast(got, "float32"))
    # Only the result is rounded.
    np.testing.assert_allclose(got, expected(layer, x), rtol=8e-3, atol=1e-4)


def test_weights_are_keras_own():
    ours, theirs = GroupNormalization(2), keras.layers.GroupNormalization(2)
    theirs.build((None, 4, 6, 8))
    built(ours, 8)
    assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
    theirs.set_weights(ours.get_weights())
    x = np.random.default_rng(3).standard_normal((2, 4, 6, 8), "float32")
    np.testing.assert_allclose(
        ops.convert_to_numpy(ours(x)),
        ops.convert_to_numpy(theirs(x)),
        atol=1e-5,
    )


def test_round_trip():
    layer = GroupNormalization(4, epsilon=1e-4, name="norm")
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert isinstance(copy, GroupNormalization)
    assert copy.get_config() == layer.get_config()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_without_center_or_scale_as_keras(center, scale):
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 8), "float32")
    ours, keras_own = (
        cls(4, center=center, scale=scale)
        for cls in (GroupNormalization, keras.layers.GroupNormalization)
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(ours(x)),
        ops.convert_to_numpy(keras_own(x)),
        atol=1e-5,
    )
