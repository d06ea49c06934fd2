import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, losses, weightings

SHAPE = (5, 4, 8, 2)


def images():
    return np.random.default_rng(0).standard_normal((2, *SHAPE), "float32")


def mean_square(y_true, y_pred):
    difference = y_pred.astype("float64") - y_true.astype("float64")
    return np.mean(difference**2, axis=(1, 2, 3))


def pseudo_huber(y_true, y_pred, huber_epsilon=1e-4):
    """Song & Dhariwal (2023), of the root mean square per element."""
    square = mean_square(y_true, y_pred)
    return np.sqrt(square + huber_epsilon**2) - huber_epsilon


def pooled(images):
    """2x2 average pooling."""
    quarters = [images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return np.mean(quarters, axis=0)


def multiscale(each, num_poolings):
    """Hoogeboom et al. (2023): weights 1 / s, here relative to the first."""

    def reference(y_true, y_pred):
        side, total = y_true.shape[1], each(y_true, y_pred)
        y_true, y_pred = y_true.astype("float64"), y_pred.astype("float64")
        for _ in range(num_poolings):
            y_true, y_pred = pooled(y_true), pooled(y_pred)
            total += side / y_true.shape[1] * each(y_true, y_pred)
        return total

    return reference


LOSSES = {
    "squared_l2": (losses.SquaredL2, {}, mean_square),
    "l2": (
        losses.L2,
        {},
        lambda y_true, y_pred: np.sqrt(mean_square(y_true, y_pred)),
    ),
    "pseudo_huber": (losses.PseudoHuber, {}, pseudo_huber),
    "pseudo_huber_1": (
        losses.PseudoHuber,
        {"huber_epsilon": 1.0},
        lambda y_true, y_pred: pseudo_huber(y_true, y_pred, 1.0),
    ),
    "multiscale": (
        losses.Multiscale,
        {"loss": losses.SquaredL2()},
        multiscale(mean_square, 1),
    ),
    "multiscale_2": (
        losses.Multiscale,
        {"loss": losses.PseudoHuber(0.1), "num_poolings": 2},
        multiscale(lambda a, b: pseudo_huber(a, b, 0.1), 2),
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


@pytest.mark.parametrize("shape", [(3, 1), (3, 7, 2), (3, 2, 4, 4, 2)])
@pytest.mark.parametrize("name", ["squared_l2", "l2", "pseudo_huber"])
def test_loss_of_arrays_of_any_rank(name, shape):
    cls, config, reference = LOSSES[name]
    y_true, y_pred = np.random.default_rng(1).normal(size=(2, *shape))
    got = cls(reduction=None, **config)(y_true, y_pred)
    assert tuple(got.shape) == (3,)
    expected = reference(
        y_true.reshape(3, -1, 1, 1), y_pred.reshape(3, -1, 1, 1)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


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


def gradient(function, at):
    """The gradient of a scalar function of a tensor, on any backend."""
    variable = keras.Variable(at)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.at = variable

        def call(self, inputs):
            return function(self.at)[None] + 0.0 * inputs

    class Mean(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return y_pred

    model = Model()
    model.compile(keras.optimizers.SGD(1.0), Mean())
    zero = np.zeros(1, "float32")
    model.fit(zero, zero, verbose=0)
    return at - ops.convert_to_numpy(variable)


# A difference so small that its square is no normal float32, too.
@pytest.mark.parametrize("difference", [0.0, 1e-20, 1e-4, 2.0])
@every_loss
def test_gradient(cls, config, reference, difference):
    zeros, loss = np.zeros((1, 4, 4, 1), "float32"), cls(**config)
    at = zeros + np.float32(difference)
    got = gradient(lambda y_pred: loss(zeros, y_pred), at)
    assert np.all(np.isfinite(got))
    step = 1e-4 * difference
    slope = 0.0
    if difference > 1e-10:
        ends = at.astype("float64") + step, at.astype("float64") - step
        above, below = (reference(zeros, end)[0] for end in ends)
        slope = (above - below) / (2 * step)
    # The slope along (1, ..., 1); SGD has subtracted it, in float32.
    np.testing.assert_allclose(got.sum(), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["squared_l2", "pseudo_huber", "l2"])
def test_multiscale_does_not_see_what_pooling_takes_away(name):
    # A checkerboard is gone after one pooling, an even shift never is.
    cls, config, reference = LOSSES[name]
    loss = losses.Multiscale(cls(**config), num_poolings=3, reduction=None)
    zeros = np.zeros((1, 8, 16, 1), "float32")
    board = np.where(np.indices((8, 16)).sum(0) % 2, 0.7, -0.7)
    board = np.float32(board)[None, ..., None]
    once = reference(zeros, board)
    np.testing.assert_allclose(loss(zeros, board), once, rtol=5e-6)
    even = np.full_like(board, 0.7)
    np.testing.assert_allclose(loss(zeros, even), 15 * once, rtol=5e-6)


@pytest.mark.parametrize("shape", [(2, 6, 8, 1), (2, 8, 6, 1), (2, 8, 8)])
def test_multiscale_of_sides_it_cannot_halve(shape):
    loss = losses.Multiscale(losses.L2(), num_poolings=2)
    images = np.zeros(shape, "float32")
    with pytest.raises(ValueError, match="multiples of 4") as error:
        loss(images, images)
    assert str(shape) in str(error.value)


CLASSES = [losses.SquaredL2, losses.L2, losses.PseudoHuber]
CLASSES += [lambda **kwargs: losses.Multiscale(losses.L2(), **kwargs)]


@pytest.mark.parametrize("cls", CLASSES)
def test_reductions_and_names_are_checked(cls):
    for name, values in {
        "reduction": ["max", "", 3, True, [], {}, np.ones(2)],
        "name": [None, "", 3, True, [], {}, b"l2", np.ones(2)],
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}` must be .*Receiv"):
                cls(**{name: value})
    for reduction in (None, "none", "sum", "mean", "mean_with_sample_weight"):
        assert cls(reduction=reduction).reduction == reduction


def test_an_epsilon_of_numpy_is_stored_as_a_plain_number():
    config = losses.PseudoHuber(np.float32(1e-3)).get_config()
    assert type(config["huber_epsilon"]) is float
    config = losses.Multiscale(losses.L2(), np.int64(2)).get_config()
    assert type(config["num_poolings"]) is int


def test_bad_multiscale_arguments():
    for num_poolings in (0, -1, 1.5, True, None, 17, 10**30):
        with pytest.raises(ValueError, match=f"num_poolings={num_poolings}"):
            losses.Multiscale(losses.L2(), num_poolings)
    with pytest.raises(ValueError, match="loss='mse'"):
        losses.Multiscale("mse")
    per_pixel = losses.Multiscale(keras.losses.MeanSquaredError())
    images = np.zeros((2, 4, 4, 1), "float32")
    with pytest.raises(ValueError, match="one value per example"):
        per_pixel(images, images)


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


@pytest.mark.parametrize(
    "huber_epsilon", [0, -1.0, float("nan"), float("inf"), 1e-30, True, "1"]
)
def test_pseudo_huber_of_a_bad_epsilon(huber_epsilon):
    with pytest.raises(ValueError, match="`huber_epsilon` must be positive"):
        losses.PseudoHuber(huber_epsilon)


def test_weighted_losses_are_the_v_loss():
    # x - x_hat = sigma (v_hat - v), and SNR + 1 = 1 / sigma^2.
    logsnr = np.linspace(-6, 6, 5).astype("float32")
    v, v_hat = images()
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))[:, None, None, None]
    x, x_hat = -sigma * v, -sigma * v_hat
    weight = weightings.snr_plus_one(ops.convert_to_tensor(logsnr))
    got = weight * losses.SquaredL2(reduction=None)(x, x_hat)
    np.testing.assert_allclose(got, mean_square(v, v_hat), rtol=2e-6)

    weight = weightings.sqrt_snr_plus_one(ops.convert_to_tensor(logsnr))
    got = weight * losses.PseudoHuber(1e-7, reduction=None)(x, x_hat)
    np.testing.assert_allclose(got, np.sqrt(mean_square(v, v_hat)), rtol=1e-5)


def channel_network():
    """The smallest network that one can train: a dense layer over channels."""
    z = keras.Input((4, 4, 1), name="z")
    logsnr = keras.Input((), name="logsnr")
    return keras.Model(
        {"z": z, "logsnr": logsnr}, keras.layers.Dense(1)(z), name="channel"
    )


COMBINATIONS = [
    *itertools.product(
        ["squared_l2", "l2", "pseudo_huber", "multiscale_2"],
        [
            weightings.snr_plus_one,
            weightings.sqrt_snr_plus_one,
            weightings.truncated_snr,
            weightings.uniform,
        ],
    ),
    *itertools.product(
        ["squared_l2", "multiscale"], [weightings.SigmoidWeighting(-3)]
    ),
]


@pytest.mark.parametrize("prediction_type", ["v", "x", "epsilon"])
@pytest.mark.parametrize(("loss", "weighting"), COMBINATIONS)
def test_training_stays_finite(loss, weighting, prediction_type):
    cls, config, _ = LOSSES[loss]
    model = DiffusionModel(
        channel_network(),
        image_shape=(4, 4, 1),
        prediction_type=prediction_type,
        weighting=weighting,
        seed=0,
    )
    # Compiling 54 steps would take half a minute.
    model.compile(keras.optimizers.Adam(1e-3), cls(**config), run_eagerly=True)
    images = np.random.default_rng(0).uniform(-1, 1, (16, 4, 4, 1))
    before = model.network.get_weights()
    history = model.fit(images, batch_size=8, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    for old, new in zip(before, model.network.get_weights()):
        assert np.all(np.isfinite(new))
        assert np.all(old != new)


def test_multiscale_is_compiled_into_the_model_s_file(tmp_path):
    model = DiffusionModel(channel_network(), image_shape=(4, 4, 1))
    model.compile("adam", losses.Multiscale(losses.PseudoHuber(0.3), 2))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.loss.loss.huber_epsilon == 0.3
    # What the images don't allow is known before training.
    with pytest.raises(ValueError, match="num_poolings=3"):
        model.compile("adam", losses.Multiscale(losses.L2(), 3))
