import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import losses

SHAPE = (5, 4, 3, 2)


def images():
    return np.random.default_rng(0).standard_normal((2, *SHAPE), "float32")


def mean_square(y_true, y_pred):
    difference = y_pred.astype("float64") - y_true.astype("float64")
    return np.mean(difference**2, axis=(1, 2, 3))


def pseudo_huber(y_true, y_pred, huber_epsilon=1e-4):
    """Song & Dhariwal (2023), of the root mean square per element."""
    square = mean_square(y_true, y_pred)
    return np.sqrt(square + huber_epsilon**2) - huber_epsilon


LOSSES = {
    "squared_l2": (losses.SquaredL2, {}, mean_square),
    "pseudo_huber": (losses.PseudoHuber, {}, pseudo_huber),
    "pseudo_huber_1": (
        losses.PseudoHuber,
        {"huber_epsilon": 1.0},
        lambda y_true, y_pred: pseudo_huber(y_true, y_pred, 1.0),
    ),
}
every_loss = pytest.mark.parametrize(
    ("cls", "config", "reference"), LOSSES.values(), ids=LOSSES
)


@every_loss
def test_loss_per_example(cls, config, reference):
    y_true, y_pred = images()
    got = cls(reduction=None, **config)(y_true, y_pred)
    assert tuple(got.shape) == SHAPE[:1]
    np.testing.assert_allclose(got, reference(y_true, y_pred), rtol=1e-6)


@every_loss
def test_loss_reduction_is_kerass(cls, config, reference):
    y_true, y_pred = images()
    weight = np.float32([0, 1, 2, 3, 0.5])
    each = reference(y_true, y_pred)
    for reduction, expected, weighted in (
        ("sum_over_batch_size", each.mean(), (weight * each).mean()),
        ("sum", each.sum(), (weight * each).sum()),
    ):
        loss = cls(reduction=reduction, **config)
        got = loss(y_true, y_pred)
        assert tuple(got.shape) == ()
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        got = loss(y_true, y_pred, sample_weight=weight)
        np.testing.assert_allclose(got, weighted, rtol=1e-6)
    default = cls(**config)(y_true, y_pred)
    np.testing.assert_allclose(default, each.mean(), rtol=1e-6)


@every_loss
def test_loss_is_zero_only_at_the_target(cls, config, reference):
    y_true, y_pred = images()
    loss = cls(reduction=None, **config)
    # sqrt(huber_epsilon^2) rounds, in the last place of huber_epsilon.
    np.testing.assert_allclose(loss(y_true, y_true), 0, atol=1e-10)
    assert np.all(ops.convert_to_numpy(loss(y_true, y_pred)) > 0)


@every_loss
def test_loss_means_the_same_at_every_image_size(cls, config, reference):
    loss = cls(**config)
    small = loss(np.zeros((2, 4, 4, 1), "f4"), np.full((2, 4, 4, 1), 0.3, "f4"))
    shape = 2, 16, 16, 3
    large = loss(np.zeros(shape, "f4"), np.full(shape, 0.3, "f4"))
    # A sum of 768 equal numbers, one by one in float32.
    np.testing.assert_allclose(small, large, rtol=5e-6)


@every_loss
def test_loss_is_float32_for_half_precision_predictions(cls, config, reference):
    y_true, y_pred = images()
    half = ops.cast(y_pred, "bfloat16")
    got = cls(**config)(y_true, half)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    y_pred = ops.convert_to_numpy(ops.cast(half, "float32"))
    expected = reference(y_true, y_pred).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@every_loss
def test_loss_serialisation(cls, config, reference):
    loss = cls(reduction="sum", name="mine", **config)
    stored = keras.saving.serialize_keras_object(loss)
    loaded = keras.saving.deserialize_keras_object(stored)
    assert type(loaded) is cls
    assert loaded.get_config() == loss.get_config()
    assert (loaded.name, loaded.reduction) == ("mine", "sum")
    y_true, y_pred = images()
    np.testing.assert_array_equal(loaded(y_true, y_pred), loss(y_true, y_pred))


def test_pseudo_huber_between_l2_and_its_square():
    zeros = np.zeros((3, 8, 8, 1), "float32")
    root = np.float32([0.5, 1.0, 2.0])
    y_pred = zeros + root[:, None, None, None]
    # Far above huber_epsilon: the norm, less huber_epsilon.
    got = losses.PseudoHuber(1e-4, reduction=None)(zeros, y_pred)
    np.testing.assert_allclose(got, root - 1e-4, rtol=1e-6)
    # Far below: half the square over huber_epsilon.
    got = losses.PseudoHuber(100.0, reduction=None)(zeros, y_pred)
    # In float32, sqrt(m + 1e4) - 100 keeps half of its digits.
    np.testing.assert_allclose(got, root**2 / 200, atol=1e-5)


@pytest.mark.parametrize("huber_epsilon", [0, -1.0, float("nan")])
def test_pseudo_huber_of_a_bad_epsilon(huber_epsilon):
    with pytest.raises(ValueError, match="`huber_epsilon` must be positive"):
        losses.PseudoHuber(huber_epsilon)


def test_weightings():
    logsnr = np.linspace(-20, 20, 41).astype("float32")
    snr = np.exp(logsnr.astype("float64"))
    tensor = ops.convert_to_tensor(logsnr)
    got = losses.snr_plus_one(tensor)
    np.testing.assert_allclose(got, snr + 1, rtol=1e-6)
    got = losses.sqrt_snr_plus_one(tensor)
    np.testing.assert_allclose(got, np.sqrt(snr + 1), rtol=1e-6)


def test_weighted_losses_are_the_v_loss():
    # x - x_hat = sigma (v_hat - v), and SNR + 1 = 1 / sigma^2.
    logsnr = np.linspace(-6, 6, 5).astype("float32")
    v, v_hat = images()
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))[:, None, None, None]
    x, x_hat = -sigma * v, -sigma * v_hat
    weight = losses.snr_plus_one(ops.convert_to_tensor(logsnr))
    got = weight * losses.SquaredL2(reduction=None)(x, x_hat)
    np.testing.assert_allclose(got, mean_square(v, v_hat), rtol=2e-6)

    weight = losses.sqrt_snr_plus_one(ops.convert_to_tensor(logsnr))
    got = weight * losses.PseudoHuber(1e-7, reduction=None)(x, x_hat)
    np.testing.assert_allclose(got, np.sqrt(mean_square(v, v_hat)), rtol=1e-5)


@pytest.mark.parametrize(
    "weighting", [losses.snr_plus_one, losses.sqrt_snr_plus_one]
)
def test_weightings_are_serialisable(weighting):
    stored = keras.saving.serialize_keras_object(weighting)
    assert keras.saving.deserialize_keras_object(stored) is weighting
