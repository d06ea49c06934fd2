import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, losses, weightings


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


WEIGHTINGS = {
    "snr_plus_one": (weightings.snr_plus_one, lambda x: np.exp(x) + 1),
    "sqrt_snr_plus_one": (
        weightings.sqrt_snr_plus_one,
        lambda x: np.sqrt(np.exp(x) + 1),
    ),
    "truncated_snr": (
        weightings.truncated_snr,
        lambda x: np.maximum(np.exp(x), 1),
    ),
    "uniform": (weightings.uniform, np.ones_like),
    "flow_velocity": (
        weightings.flow_velocity,
        lambda x: 1 / sigmoid(-x / 2) ** 2,
    ),
    "sigmoid_-3": (
        weightings.SigmoidWeighting(-3),
        lambda x: np.exp(x) * sigmoid(-3 - x),
    ),
    "sigmoid_2.5": (
        weightings.SigmoidWeighting(bias=2.5),
        lambda x: np.exp(x) * sigmoid(2.5 - x),
    ),
}
every_weighting = pytest.mark.parametrize(
    ("weighting", "reference"), WEIGHTINGS.values(), ids=WEIGHTINGS
)


@every_weighting
def test_weighting(weighting, reference):
    logsnr = np.linspace(-20, 20, 41).astype("float32")
    got = weighting(ops.convert_to_tensor(logsnr))
    assert tuple(got.shape) == (41,)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    expected = reference(logsnr.astype("float64"))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_sigmoid_weighting_has_no_overflow():
    logsnr = ops.convert_to_tensor([-1e4, -200.0, 200.0, 1e4])
    got = weightings.SigmoidWeighting(3.0)(logsnr)
    np.testing.assert_allclose(got, [0, 0, np.e**3, np.e**3], rtol=1e-6)
    for bias in (-80, 80):
        weight = weightings.SigmoidWeighting(bias)(logsnr)
        assert np.all(np.isfinite(ops.convert_to_numpy(weight)))


@pytest.mark.parametrize("bias", [float("nan"), 81, -1e3, "1", None, True])
def test_sigmoid_weighting_of_a_bad_bias(bias):
    with pytest.raises(ValueError, match=r"`bias` must be a number in"):
        weightings.SigmoidWeighting(bias)


def test_sigmoid_weightings_are_equal_by_bias():
    one, two = weightings.SigmoidWeighting(1), weightings.SigmoidWeighting(1.0)
    assert one == two
    assert len({one, two, weightings.SigmoidWeighting(2)}) == 2
    assert one != weightings.uniform


@every_weighting
def test_a_weighting_is_its_model_s_again(weighting, reference):
    serialize = keras.saving.serialize_keras_object
    deserialize = keras.saving.deserialize_keras_object
    loaded = deserialize(serialize(weighting))
    assert loaded == weighting
    if weighting is not loaded:
        assert hash(loaded) == hash(weighting)

    model = DiffusionModel(
        channel_network(), image_shape=(4, 4, 1), weighting=weighting
    )
    loaded = deserialize(serialize(model))
    assert loaded.weighting == weighting
    assert serialize(loaded.weighting) == serialize(weighting)


@pytest.mark.parametrize(
    "name",
    sorted({*weightings.__all__} - {"flow_velocity"}),  # which is newer
)
def test_losses_has_the_same_names(name):
    assert getattr(losses, name) is getattr(weightings, name)


@pytest.mark.parametrize(
    ("stored", "weighting"),
    [
        (
            {
                "module": "builtins",
                "class_name": "function",
                "config": "keras_mscm>snr_plus_one",
                "registered_name": "function",
            },
            weightings.snr_plus_one,
        ),
        (
            {
                "module": "keras_mscm.losses",
                "class_name": "SigmoidWeighting",
                "config": {"bias": 1.0},
                "registered_name": "keras_mscm>SigmoidWeighting",
            },
            weightings.SigmoidWeighting(1),
        ),
    ],
)
def test_files_saved_before_still_load(stored, weighting):
    assert keras.saving.deserialize_keras_object(stored) == weighting


def channel_network():
    """The smallest network that one can train: a dense layer over channels."""
    z = keras.Input((4, 4, 1), name="z")
    logsnr = keras.Input((), name="logsnr")
    return keras.Model(
        {"z": z, "logsnr": logsnr}, keras.layers.Dense(1)(z), name="channel"
    )
