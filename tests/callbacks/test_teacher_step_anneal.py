"""The teacher's steps as the compiled step really takes them."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import MultistepConsistencyModel
from keras_mscm.callbacks import TeacherStepAnneal

EAGER = keras.backend.backend() == "torch"
IMAGES = np.random.default_rng(0).uniform(-1, 1, (96, 2, 2, 1))


@keras.saving.register_keras_serializable(package="test_callbacks")
class WeightOnly(keras.losses.Loss):
    """1, so that the loss is the mean of what the examples weigh."""

    def call(self, target, predicted):
        return 1.0 + 0.0 * ops.mean(predicted, axis=(1, 2, 3))


@keras.saving.register_keras_serializable(package="test_callbacks")
class CountingModel(MultistepConsistencyModel):
    """Weighs each example by how many different times its batch has.

    With 96 images that are all the T times of a coarse grid.
    """

    traces = 0

    def training_example(self, images, labels, training):
        CountingModel.traces += 1
        inputs, target, _ = super().training_example(images, labels, training)
        angle = ops.arctan(ops.exp(-inputs["logsnr"] / 2))
        gaps = ops.sort(angle)[1:] - ops.sort(angle)[:-1]
        different = ops.sum(ops.cast(gaps > 1e-3, "float32")) + 1.0
        return inputs, target, different + 0.0 * angle


@pytest.fixture
def make_model():
    """A factory of compiled models whose loss is their number of times."""

    def make(student_steps=2, accumulation=None, **compile_with):
        z = keras.Input((2, 2, 1), name="z")
        logsnr = keras.Input((), name="logsnr")
        network = keras.Model(
            {"z": z, "logsnr": logsnr}, keras.layers.Dense(1)(z)
        )
        model = CountingModel(
            network,
            image_shape=(2, 2, 1),
            student_steps=student_steps,
            teacher_steps=4,
            method="training",
            seed=0,
        )
        optimizer = keras.optimizers.SGD(
            0.0, gradient_accumulation_steps=accumulation
        )
        model.compile(optimizer, WeightOnly(), **compile_with)
        CountingModel.traces = 0
        return model

    return make


def times_taken(model, epochs, **kw):
    history = model.fit(
        IMAGES, batch_size=96, epochs=epochs, verbose=0, **kw
    ).history
    return history["loss"]


def test_the_compiled_step_takes_the_annealed_steps(make_model):
    # N_teacher(i) is 2, 4, 8 and stays there.
    model = make_model()
    anneal = TeacherStepAnneal(start=2, end=8, iterations=2)
    taken = times_taken(model, 4, callbacks=[anneal])
    np.testing.assert_allclose(taken, [2, 4, 8, 8])
    assert CountingModel.traces == (4 if EAGER else 1)

    # A second training goes on at its iteration, and with another schedule;
    # what was compiled for the first serves it.
    taken = times_taken(model, 2, callbacks=[anneal])
    np.testing.assert_allclose(taken, [8, 8])
    slower = TeacherStepAnneal(start=2, end=8, iterations=12)
    np.testing.assert_allclose(times_taken(model, 1, callbacks=[slower]), [4])
    assert int(model.iteration) == 7
    # Without the callback the schedule stays what it was.
    np.testing.assert_allclose(times_taken(model, 6)[-1], 8)
    assert CountingModel.traces == (13 if EAGER else 1)


def test_the_steps_are_rounded_per_segment(make_model):
    # 4, 4 sqrt 2 = 5.66, 8: with 4 segments 1, 1 (of 1.41) and 2 steps each.
    model = make_model(student_steps=4)
    anneal = TeacherStepAnneal(4, 8, 2)
    np.testing.assert_allclose(
        times_taken(model, 3, callbacks=[anneal]), [4, 4, 8]
    )


def test_iterations_are_updates_not_batches(make_model):
    model = make_model(accumulation=2)
    anneal = TeacherStepAnneal(2, 8, 2)
    np.testing.assert_allclose(
        times_taken(model, 6, callbacks=[anneal]), [2, 2, 4, 4, 8, 8]
    )


def test_iterations_within_one_execution(make_model):
    # PyTorch takes but one step at a time.
    model = make_model(steps_per_execution=1 if EAGER else 2)
    history = model.fit(
        np.tile(IMAGES, (2, 1, 1, 1)),
        batch_size=96,
        epochs=3,
        callbacks=[TeacherStepAnneal(2, 16, 3)],
        verbose=0,
    ).history
    # 2 and 4, 8 and 16, 16 and 16.
    np.testing.assert_allclose(history["loss"], [3, 12, 16])


def test_a_loaded_model_goes_on(make_model, tmp_path):
    model = make_model()
    anneal = TeacherStepAnneal(start=2, end=8, iterations=2)
    np.testing.assert_allclose(times_taken(model, 1, callbacks=[anneal]), [2])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(times_taken(loaded, 3), [4, 8, 8])


def test_without_the_callback(make_model):
    model = make_model()
    np.testing.assert_allclose(times_taken(model, 2), [4, 4])
    np.testing.assert_allclose(
        model.evaluate(IMAGES, batch_size=96, verbose=0), 4
    )


def test_the_paper_s_schedule():
    anneal = TeacherStepAnneal()
    arguments = anneal.start, anneal.end, anneal.iterations
    assert arguments == (64, 1280, 100_000)
