"""Where the moving average is kept: in bfloat16, or nowhere."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, MultistepConsistencyModel, spaces
from keras_mscm.models import moving_average
from tests.dense import array, dense_network, numbers

SHAPE = (3,)
X = numbers(16, SHAPE)


def make(ema, **kw):
    model = DiffusionModel(
        dense_network(SHAPE),
        space=spaces.Box(SHAPE),
        ema=ema,
        **{"seed": 0, **kw},
    )
    model.compile(keras.optimizers.Adam(1e-2))
    return model


def fit(model, x=X, **kw):
    return model.fit(x, verbose=0, shuffle=False, **kw).history["loss"]


def state(model):
    return [array(ops.cast(v, "float32")) for v in model.variables]


kept = pytest.mark.parametrize("ema", ["bfloat16", None])


@kept
def test_trains_and_samples(ema, tmp_path):
    model = make(ema)
    assert len(model.trainable_variables) == len(model.network.weights) == 4
    before = model.generate(noise=X, num_steps=2)
    history = fit(model, epochs=3, validation_data=X, batch_size=8)
    assert np.all(np.isfinite(history))
    assert int(model.iteration) == 6
    assert np.isfinite(model.evaluate(X, verbose=0))
    after = model.generate(noise=X, num_steps=2)
    assert np.abs(before - after).max() > 1e-4
    # A preset has what it samples with.
    model.save_to_preset(tmp_path / "preset")
    loaded = DiffusionModel.from_preset(tmp_path / "preset")
    assert loaded.ema == ema
    np.testing.assert_allclose(
        loaded.generate(noise=X, num_steps=2), after, atol=1e-5
    )
    loaded.compile()
    fit(loaded)


def test_none_is_the_network_itself():
    model = make(None)
    assert model.ema_network is model.network
    fit(model)
    inputs = {"z": X, "logsnr": np.zeros(16, "float32")}
    np.testing.assert_allclose(
        model.predict(inputs, verbose=0),
        array(model(inputs, training=True)),
        atol=1e-6,
    )
    fewer = len(make("auto").variables) - len(model.variables)
    assert fewer == len(model.network.weights)


@pytest.mark.parametrize(
    "kw", [{"ema_decay": 0.9}, {"ema_half_life": 1000}, {"ema": "float16"}]
)
def test_refused(kw):
    name = next(iter(kw))
    with pytest.raises(ValueError, match=f"`{name}`"):
        make(**{"ema": None, **kw})


def test_the_message_of_a_divergence_says_that_the_weights_are_lost():
    for ema, says in ((None, "lost"), ("bfloat16", "last finite ones")):
        model = make(ema)
        model.compile(keras.optimizers.SGD(1e30))
        with pytest.raises(FloatingPointError, match=says):
            fit(model, epochs=8)
    for weight in model.network.weights:
        assert np.all(np.isfinite(array(weight)))


@kept
def test_files_and_resumed_training(ema, tmp_path):
    model = make(ema)
    fit(model, epochs=2, batch_size=4)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.ema == ema
    weights = make(ema, seed=5)
    fit(weights, batch_size=4)
    weights.load_weights(tmp_path / "model.weights.h5")
    models, losses = [model, loaded, weights], []
    for one in models:
        for a, b in zip(state(one), state(model), strict=True):
            np.testing.assert_array_equal(a, b)
    for one in models:
        losses.append(fit(one, epochs=2, batch_size=4))
    for one, loss in zip(models[1:], losses[1:]):
        assert loss == losses[0]
        for a, b in zip(state(one), state(model), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            one.generate(noise=X, num_steps=2),
            model.generate(noise=X, num_steps=2),
        )


@pytest.mark.parametrize(
    ("ema", "copies"), [("bfloat16", [True, False]), (None, [True])]
)
def test_a_teacher_and_its_student(ema, copies):
    teacher = make(ema)
    fit(teacher, epochs=2)
    for copy in copies:
        student = MultistepConsistencyModel.from_teacher(
            teacher, student_steps=1, copy=copy, ema=ema, seed=0
        )
        inputs = {"z": X, "logsnr": np.zeros(16, "float32")}
        np.testing.assert_allclose(
            array(student(inputs)),
            array(teacher(inputs)),
            atol=1e-5 if ema is None else 2e-2,
        )
        before = state(teacher)
        student.compile()
        fit(student)
        for a, b in zip(before, state(teacher), strict=True):
            np.testing.assert_array_equal(a, b)


class Scale(keras.layers.Layer):
    """A network of one weight, of many numbers."""

    def build(self, shape=None):
        self.scale = self.add_weight(shape=(600,), name="scale")

    def call(self, inputs, training=None):
        return inputs["z"] * ops.mean(self.scale)


def to_the_nearest(values):
    """Numbers as bfloat16 has them, which is half of float32."""
    bits = np.asarray(values, "float32").view("uint32").astype("uint64")
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype("uint32").view("float32").astype("float64")


def test_an_average_in_bfloat16_follows_the_one_in_float32():
    # Of a weight that differs by 0.2 the average moves by 0.0002 per update
    # at first, where two numbers of 8 bits are 0.004 or more apart.
    model = DiffusionModel(
        Scale(),
        space=spaces.Box(SHAPE),
        ema="bfloat16",
        ema_decay=0.999,
        seed=0,
    )
    model.compile(keras.optimizers.SGD(0.0))
    model.iteration.assign(100_000)  # where the decay has its final value
    average, weight = next(
        moving_average.pairs(model.ema_network, model.network)
    )
    # They begin on both sides of 1, where the spacing changes, and end beyond
    # it; half of them are negative.
    rng = np.random.default_rng(0)
    start = to_the_nearest(rng.normal(1.0, 0.1, 600))
    sign = rng.choice([-1.0, 1.0], 600)
    average.assign((sign * start).astype("float32"))
    weight.assign(sign * (start + rng.normal(0.2, 0.05, 600)))
    target, exact, rounded = sign * array(weight), start, start
    for _ in range(2000):
        exact = exact + 1e-3 * (target - exact)
        rounded = to_the_nearest(rounded + 1e-3 * (target - rounded))
    fit(model, numbers(2000, SHAPE), batch_size=1)
    ours = sign * array(ops.cast(average, "float32"))
    # Rounded to the nearest it would stand still.
    assert np.abs(rounded - start).mean() < 0.02 * (exact - start).mean()
    apart = (ours - exact) / exact
    assert abs(apart.mean()) < 3e-3  # 0.0004 is its standard error
    assert np.abs(apart).mean() < 0.012
    below = exact[start < 1] / ours[start < 1] - 1
    assert abs(below.mean()) < 4e-3
