"""What every model does: one suite over a list of algorithms."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, functional, losses
from keras_mscm.models.saving import states_of_training

EAGER = keras.backend.backend() == "torch"


def fit(model, *data, **kw):
    return model.fit(*data, verbose=0, **kw).history


@pytest.mark.parametrize("prediction_type", ["v", "x", "epsilon"])
def test_prediction_types(prediction_type, make_student, toy_images):
    model = make_student(prediction_type=prediction_type)
    assert model.prediction_type == prediction_type
    history = fit(model, toy_images(8))
    assert np.isfinite(history["loss"][0])
    images = model.generate(2, num_steps=2, seed=0)
    assert images.shape == (2, 4, 4, 1)
    assert np.all(np.isfinite(images))


def test_sample_weight_weighs(make_teacher, toy_images, weights_of):
    # A weight of 0 leaves an example out, and weights multiply the loss.
    images, labels = toy_images(8), np.zeros(8, "int64")
    weight = np.array([0, 0, 0, 0, 2, 2, 2, 2], "float32")

    def evaluate(images, sample_weight):
        keras.utils.set_random_seed(0)
        model = make_teacher(num_classes=1)
        return model.evaluate(
            images, labels, sample_weight=sample_weight, verbose=0
        )

    whole = evaluate(images, weight)
    changed = np.concatenate([-images[:4], images[4:]])
    np.testing.assert_allclose(evaluate(changed, weight), whole, rtol=1e-5)
    assert abs(evaluate(changed, None) - evaluate(images, None)) > 1e-3
    double = evaluate(images, np.full(8, 2, "float32"))
    np.testing.assert_allclose(double, 2 * evaluate(images, None), rtol=1e-5)


def test_steps_per_execution(make_teacher, toy_images, weights_of):
    images = toy_images(20)
    if EAGER:
        with pytest.raises(ValueError, match="steps_per_execution"):
            make_teacher(compile_with={"steps_per_execution": 2}).fit(images)
        return
    ends = []
    for steps in (1, 2):
        keras.utils.set_random_seed(0)
        model = make_teacher(compile_with={"steps_per_execution": steps})
        fit(model, images, batch_size=4, shuffle=False)  # 5 steps
        assert int(model.iteration) == 5
        ends.append(weights_of(model))
    for one, two in zip(*ends):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", "mixed_float16"], indirect=True
)
def test_mixed_precision(policy, make_student, toy_images, weights_of):
    student = make_student()
    assert student.network.dtype_policy.name == policy
    scaled = isinstance(student.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    before = weights_of(student.ema_network)
    images = toy_images(8)
    history = fit(
        student, images, batch_size=4, epochs=8, validation_data=images
    )
    assert np.all(np.isfinite([*history.values()]))
    # (Loss scaling begins too high, and skips the updates until it isn't.)
    assert 1 <= int(student.iteration) <= 16
    assert all(
        np.any(a != b) for a, b in zip(before, weights_of(student.ema_network))
    )
    # Images, times and the schedule's numbers are not cast.
    x, y, weight = student.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    for tensor in (x["z"], x["logsnr"], y, weight):
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"
    assert student.generate(2).dtype == np.float32


def test_gradient_accumulation_accumulates(
    make_teacher, toy_images, weights_of, snapshots
):
    optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2)
    model = make_teacher(compile_with={"optimizer": optimizer})
    start = weights_of(model.network)
    fit(model, toy_images(8), batch_size=2, callbacks=[snapshots])
    states = [start, *snapshots.seen]
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        same = all(np.array_equal(a, b) for a, b in zip(before, after))
        assert same == (i % 2 == 0)


def test_generate_evaluate_and_predict_use_the_average(
    make_model, toy_images, weights_of
):
    model, images = make_model(), toy_images(4)
    inputs = {"z": images, "logsnr": np.zeros(4, "float32")}
    seeds = [ops.copy(v.value) for v in states_of_training(model)]

    def results():
        for state, value in zip(states_of_training(model), seeds):
            state.assign(ops.copy(value))
        return (
            model.generate(noise=images, num_steps=2),
            model.predict(inputs, verbose=0),
            np.float32(model.evaluate(images, verbose=0)),
        )

    before = results()
    for weight in model.network.weights:
        weight.assign(weight + 1.0)
    for a, b in zip(before, results()):
        np.testing.assert_array_equal(a, b)
    for weight in model.ema_network.weights:
        weight.assign(0.5 * weight)
    for a, b in zip(before, results()):
        assert np.max(np.abs(a - b)) > 1e-4
    # And it is no other function of it than the formulas.
    predicted = functional.predict_x(
        model.ema_network(inputs), images, inputs["logsnr"], "v"
    )
    np.testing.assert_allclose(
        results()[1], ops.convert_to_numpy(predicted), rtol=1e-5, atol=1e-6
    )


# Sampling.


def test_generate_does_not_depend_on_batches(make_model, toy_images):
    model, noise = make_model(num_classes=3), toy_images(7)
    labels = np.array([0, 2, 1, 1, 0, 2, 2])
    whole = model.generate(noise=noise, labels=labels, num_steps=2)
    parts = model.generate(
        noise=noise, labels=labels, num_steps=2, batch_size=3
    )
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    one = model.generate(noise=noise[3:4], labels=labels[3:4], num_steps=2)
    np.testing.assert_allclose(whole[3:4], one, atol=1e-5)
    assert np.max(np.abs(whole)) <= 1


def test_generate_arguments(make_model, toy_images):
    model, noise = make_model(num_classes=3), toy_images(4)

    def generate(*args, **kw):
        return model.generate(*args, num_steps=2, batch_size=4, **kw)

    assert generate().shape == (3, 4, 4, 1)  # one per class
    assert generate(5).shape == (5, 4, 4, 1)
    assert generate(labels=[1, 1]).shape == (2, 4, 4, 1)
    assert generate(noise=noise).shape == (4, 4, 4, 1)
    # Labels come in turn where they aren't given, and they matter.
    in_turn = generate(noise=noise)
    given = generate(noise=noise, labels=[0, 1, 2, 0])
    np.testing.assert_array_equal(in_turn, given)
    others = generate(noise=noise, labels=[0, 2, 2, 0])
    np.testing.assert_array_equal(others[[0, 2, 3]], given[[0, 2, 3]])
    assert np.max(np.abs(others[1] - given[1])) > 1e-4
    # The seed is the noise's.
    np.testing.assert_array_equal(generate(4, seed=3), generate(4, seed=3))
    assert np.max(np.abs(generate(4, seed=3) - generate(4, seed=4))) > 1e-2
    assert np.max(np.abs(generate(4) - generate(4))) > 1e-2


def test_generate_without_classes(make_teacher):
    model = make_teacher()
    assert model.generate(num_steps=2).shape == (1, 4, 4, 1)
    assert model.generate(num_steps=np.int64(2)).dtype == np.float32


def test_generate_compiles_once(make_teacher, toy_images, weights_of):
    model, noise = make_teacher(num_classes=3), toy_images(3)
    runs = []

    def sampler(denoise, noise, schedule, num_steps, seed):
        runs.append(num_steps)
        logsnr = ops.ones((noise.shape[0],)) * schedule(0.5)
        return denoise(noise, logsnr) / ops.cast(num_steps, "float32")

    def generate(**kw):
        arguments = {"noise": noise, "num_steps": 2, "labels": [0, 1, 2]}
        return model.generate(sampler=sampler, **{**arguments, **kw})

    first = generate()
    halved = generate(num_steps=4)
    np.testing.assert_allclose(halved, first / 2, rtol=1e-5, atol=1e-7)
    assert np.max(np.abs(generate(labels=[1, 1, 1]) - first)) > 1e-4
    assert np.max(np.abs(generate(noise=-noise) - first)) > 1e-4
    # Nor do new weights make it compile again, and they count.
    for weight in model.ema_network.weights:
        weight.assign(2.0 * weight)
    assert np.max(np.abs(generate() - first)) > 1e-4
    assert len(runs) == (5 if EAGER else 1)


def test_samples_follow_fit(make_teacher, toy_images):
    model, images = make_teacher(), toy_images(4)
    before = model.generate(noise=images, num_steps=2)
    fit(model, images, epochs=3)
    after = model.generate(noise=images, num_steps=2)
    assert np.max(np.abs(before - after)) > 1e-4


# Networks.


def test_a_uvit_trains_and_generates(tiny_uvit, toy_images):
    model = DiffusionModel(tiny_uvit(num_classes=2, dropout=0.1), seed=0)
    assert (model.image_shape, model.num_classes) == ((8, 8, 1), 2)
    model.compile()
    images, labels = toy_images(4, (8, 8, 1)), np.array([0, 1, 0, 1])
    assert np.isfinite(fit(model, images, labels)["loss"][0])
    assert model.generate(num_steps=2).shape == (2, 8, 8, 1)


@keras.saving.register_keras_serializable(package="test_base")
class LazyNetwork(keras.Model):
    """A subclassed network whose layers are only built when it is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(16, activation="swish")
        self.last = keras.layers.Dense(1)

    def call(self, inputs, training=None):
        level = ops.reshape(inputs["logsnr"], (-1, 1, 1, 1)) / 10
        z = inputs["z"]
        return self.last(self.dense(z + level))


def test_an_unbuilt_network_is_built(toy_images):
    model = DiffusionModel(LazyNetwork(), image_shape=(4, 4, 1), seed=0)
    assert model.built
    assert len(model.trainable_weights) == 4
    assert len(model.ema_network.weights) == 4
    model.compile()
    assert np.isfinite(fit(model, toy_images(4))["loss"][0])
    assert model.generate(2, num_steps=2).shape == (2, 4, 4, 1)


def test_an_algorithm_is_one_method(dense_network, toy_images):
    class Denoiser(DiffusionModel):
        def training_example(self, images, labels, training):
            logsnr = ops.zeros_like(images[:, 0, 0, 0])
            inputs = {"z": images, "logsnr": logsnr}
            return inputs, 0.25 * images, 3.0 + logsnr

    model = Denoiser(
        dense_network(), image_shape=(4, 4, 1), prediction_type="x"
    )
    model.compile(loss=losses.SquaredL2())
    images = toy_images(4)
    inputs = {"z": images, "logsnr": np.zeros(4, "float32")}
    error = model.predict(inputs, verbose=0) - 0.25 * images
    np.testing.assert_allclose(
        model.evaluate(images, verbose=0), 3 * np.mean(error**2), rtol=1e-5
    )
