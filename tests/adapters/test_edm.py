import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import MultistepConsistencyModel, backend, samplers
from keras_mscm.adapters.edm import edm_grid, from_edm
from keras_mscm.conditioning import Condition
from tests.adapters.tiny import (
    check_several_steps,
    check_student,
    difference,
    inputs_of,
    perturb,
    sampled,
)

SHAPE = (8, 8, 3)
SIGMA_DATA = 0.5
NOISE = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype("float32")
LABELS = np.array([0, 2], "int32")


def foreign(dtype="float32"):
    """A network `F(c_in z, c_noise, label)`."""
    keras.config.set_dtype_policy(dtype)
    try:
        z, time = keras.Input(SHAPE), keras.Input(())
        label = keras.Input((), dtype="int32")
        embedded = keras.layers.Reshape((1,))(time)
        embedded = keras.layers.Dense(8, activation="tanh", name="time")(
            embedded
        )
        embedded += keras.layers.Embedding(4, 8)(label)
        maps = keras.layers.Conv2D(8, 3, padding="same")(z)
        maps += keras.layers.Reshape((1, 1, 8))(embedded)
        maps = keras.layers.Activation("silu")(maps)
        maps = keras.layers.Conv2D(3, 3, padding="same")(maps)
        network = keras.Model([z, time, label], maps)
    finally:
        keras.config.set_dtype_policy("float32")
    perturb(network)
    return network


@pytest.fixture(scope="module")
def network():
    return foreign()


@pytest.fixture(scope="module")
def model(network):
    return from_edm(
        network,
        SHAPE,
        sigma_data=SIGMA_DATA,
        conditioning={"labels": Condition((), "int32", null=3, num_classes=3)},
        time_embedding="time",
    )


def theirs(network, num_steps, second_order):
    """Algorithm 1 of Karras et al. (2022), in float64 but for the network."""
    said = backend.compile_inference(
        lambda *inputs: network([*inputs]), network.variables
    )

    def derivative(z, sigma):
        total = np.sqrt(sigma**2 + SIGMA_DATA**2)
        inputs = [
            ops.convert_to_tensor(z / total, "float32"),
            ops.full((2,), np.log(sigma) / 4, "float32"),
            ops.convert_to_tensor(LABELS),
        ]
        output = ops.convert_to_numpy(said(*inputs)).astype("float64")
        skip = SIGMA_DATA**2 / total**2
        x = skip * z + sigma * SIGMA_DATA / total * output
        return (z - x) / sigma

    i = np.arange(num_steps)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigmas = (high + i / (num_steps - 1) * (low - high)) ** 7
    sigmas = [*sigmas, 0.0]
    z = NOISE.astype("float64") * np.sqrt(1 + sigmas[0] ** 2)
    for now, then in itertools.pairwise(sigmas):
        slope = derivative(z, now)
        ahead = z + (then - now) * slope
        if second_order and then > 0:
            slope = (slope + derivative(ahead, then)) / 2
        z = z + (then - now) * slope
    return z


@pytest.mark.parametrize("num_steps", [4, 50])
def test_eulers_steps_are_edms(network, model, num_steps):
    # Our noise is z at the first level; theirs is divided by alpha there.
    ours = sampled(model, NOISE, num_steps, edm_grid(num_steps), labels=LABELS)
    expected = theirs(network, num_steps, second_order=False)
    assert difference(ours, expected) < 1e-4


def test_a_schedule_of_its_own_has_edms_levels():
    sigma = np.exp(
        -ops.convert_to_numpy(edm_grid(18)(np.arange(1, 19) / 18)) / 2
    )
    i = np.arange(18)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    expected = (low + i / 17 * (high - low)) ** 7
    np.testing.assert_allclose(sigma, expected, rtol=1e-5)


def test_heuns_steps_are_edms_but_for_the_last(network, model):
    num_steps = 20
    drawn = model.generate(
        2,
        noise=NOISE,
        num_steps=num_steps,
        sampler=samplers.Heun(),
        schedule=edm_grid(num_steps),
        labels=LABELS,
    )
    # Theirs ends in a step of Euler's, from 0.002 to nothing.
    expected = np.clip(theirs(network, num_steps, second_order=True), -1, 1)
    assert difference(drawn, expected) < 1e-2


def test_a_student_begins_with_its_weights_and_learns(model):
    student = MultistepConsistencyModel.from_teacher(
        model, student_steps=2, guidance_scale=2.0
    )
    inputs = {
        "z": ops.convert_to_tensor(NOISE),
        "logsnr": ops.convert_to_tensor([-3.0, 2.0]),
        "labels": ops.convert_to_tensor(LABELS),
    }
    assert difference(student.network(inputs), model.network(inputs)) == 0
    check_student(student, np.clip(NOISE, -1, 1), LABELS)


@pytest.mark.parametrize("holds", [{}, {"lora_rank": 1}])
def test_a_student_of_several_numbers_of_steps(model, tmp_path, holds):
    x, y = np.clip(NOISE, -1, 1), {"labels": LABELS}
    student = check_several_steps(model, x, y, tmp_path, **holds)
    if holds:
        times = {"logsnr": [-4, -4], "logsnr_end": [3, 3]}
        end = inputs_of(model, y, **times)
        expected = student.ema_network(end)
        assert difference(student.merged_network()(end), expected) < 1e-5
        student.save_lora(tmp_path / "lora.npz")
        student.load_lora(tmp_path / "lora.npz")
        assert difference(student.network(end), expected) < 1e-5


def test_saved_and_loaded_it_samples_the_same(model, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    drawn = [sampled(m, NOISE, 4, labels=LABELS) for m in (model, loaded)]
    np.testing.assert_allclose(*drawn, rtol=1e-5, atol=1e-5)


def test_it_runs_in_half_precision():
    full, half = foreign(), foreign("mixed_bfloat16")
    half.set_weights(full.get_weights())
    drawn = [
        sampled(
            from_edm(
                network,
                SHAPE,
                conditioning={"labels": Condition((), "int32", num_classes=4)},
            ),
            NOISE,
            8,
            labels=LABELS,
        )
        for network in (full, half)
    ]
    assert 0 < difference(*drawn) < 0.1


def test_bad_arguments(network):
    with pytest.raises(ValueError, match="`sigma_data` must be a positive"):
        from_edm(network, SHAPE, sigma_data=0)
    with pytest.raises(ValueError, match="`num_steps` must be an integer of"):
        edm_grid(1)
