"""The teacher's steps as the compiled step really takes them."""

import math
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import MultistepConsistencyModel
from keras_mscm import functional as F
from keras_mscm.callbacks import ResumeTraining, TeacherStepAnneal

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
            teacher_steps=max(4, student_steps),
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


# What it chooses where it isn't given all the numbers.


def annealing_of(model):
    return tuple(ops.convert_to_numpy(model.annealing).tolist())


def begin(anneal, model, steps, epochs, epoch=0, verbose=0):
    """What `fit` tells a callback before it compiles anything."""
    anneal.set_model(model)
    anneal.set_params({"verbose": verbose, "epochs": epochs, "steps": steps})
    anneal.on_train_begin()
    anneal.on_epoch_begin(epoch)
    return annealing_of(model)


def fit(model, steps, epochs, *callbacks, **kw):
    model.fit(
        np.tile(IMAGES, (steps, 1, 1, 1)),
        batch_size=96,
        epochs=epochs,
        callbacks=[*callbacks],
        **{"verbose": 0, **kw},
    )
    return annealing_of(model)


@pytest.mark.parametrize(
    ("steps", "epochs", "accumulation", "run"),
    [(6, 1, None, 6), (4, 5, None, 20), (4, 5, 2, 10), (3, 3, 2, 4)],
)
def test_half_of_the_run(steps, epochs, accumulation, run, make_model):
    model = make_model(accumulation=accumulation)
    chosen = fit(model, steps, epochs, TeacherStepAnneal())
    assert int(model.iteration) == run
    assert chosen == F.suggested_annealing(run, 2)
    assert chosen[2] == run // 2


@pytest.mark.parametrize("student_steps", [1, 8, 16])
def test_the_paper_s_numbers_at_the_paper_s_budget(student_steps, make_model):
    model = make_model(student_steps)
    chosen = begin(TeacherStepAnneal(), model, steps=10_000, epochs=20)
    assert chosen == (64, 1280, 100_000)


def test_a_loss_that_is_scaled(make_model):
    model = make_model()
    inner = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    scaled = keras.optimizers.LossScaleOptimizer(inner)
    model.compile(scaled, WeightOnly())
    chosen = begin(TeacherStepAnneal(), model, steps=3000, epochs=2)
    assert chosen == F.suggested_annealing(3000, 2)


def test_what_was_chosen_is_printed_once(make_model, capsys):
    model, anneal = make_model(), TeacherStepAnneal()
    fit(model, 2, 3, anneal, verbose=2)
    start, end, iterations = F.suggested_annealing(6, 2)
    line = (
        f"Teacher steps go from {start} to {end} over {iterations} iterations, "
        "chosen for a run of 6.\n"
    )
    assert capsys.readouterr().out.count(line) == 1
    # What is kept is said, too; nothing is where `fit` is to be silent, and
    # nothing of numbers that were given.
    begin(anneal, model, 2, 4, epoch=3, verbose=1)
    assert "as chosen before for a run of 6.\n" in capsys.readouterr().out
    begin(anneal, model, 2, 4, epoch=3)
    begin(TeacherStepAnneal(2, 4, 1), model, 2, 4, epoch=3, verbose=1)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"iterations": 1000}, F.suggested_annealing(2000, 2)),
        ({"end": 2}, (2, 2, 150)),
        ({"end": 900}, (F.suggested_annealing(300, 2)[0], 900, 150)),
        ({"start": 2}, (2, *F.suggested_annealing(300, 2)[1:])),
        ({"start": 900}, (900, 900, 150)),
        ({"start": 900, "end": 30}, (900, 30, 150)),
        (
            {"start": 3, "iterations": 7},
            (3, F.suggested_annealing(14, 2)[1], 7),
        ),
        ({"start": 3.5, "end": 30.5, "iterations": 7}, (3.5, 30.5, 7)),
    ],
)
def test_what_is_given_stays(given, expected, make_model):
    anneal = TeacherStepAnneal(**given)
    assert begin(anneal, make_model(), steps=100, epochs=3) == expected


def test_a_run_of_unknown_length(make_model):
    model = make_model()
    with pytest.raises(ValueError, match=r"`iterations`.*steps_per_epoch"):
        begin(TeacherStepAnneal(), model, steps=None, epochs=3)
    given = TeacherStepAnneal(iterations=1000)
    chosen = begin(given, model, steps=None, epochs=3)
    assert chosen == F.suggested_annealing(2000, 2)
    assert begin(TeacherStepAnneal(2, 8, 9), model, None, 3) == (2, 8, 9)

    def batches():
        yield from np.split(IMAGES, 2)

    calls = CountingModel.traces
    with pytest.raises(ValueError, match="iterations=None"):
        model.fit(batches(), callbacks=[TeacherStepAnneal()], verbose=0)
    assert CountingModel.traces == calls


# A training that goes on.


def test_a_resumed_training_keeps_what_was_chosen(make_model, tmp_path):
    model = make_model()
    chosen = fit(model, 4, 10, TeacherStepAnneal(), LastEpoch(3))
    assert chosen == F.suggested_annealing(40, 2)
    model.save(tmp_path / "model.keras")
    for name, arguments in {
        "the same plan": {"epochs": 10, "epoch": 3},
        "of more epochs": {"epochs": 90, "epoch": 3},
        "what is left": {"epochs": 7},
        "of unknown length": {"epochs": 7, "steps": None},
    }.items():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        kept = begin(TeacherStepAnneal(), loaded, **{"steps": 4, **arguments})
        assert kept == chosen, name


def test_a_run_beyond_the_one_that_was_chosen_for(make_model):
    model = make_model()
    fit(model, 4, 10, TeacherStepAnneal())
    # Another of 60 updates, after 40.
    longer = begin(TeacherStepAnneal(), model, steps=4, epochs=15)
    assert longer == F.suggested_annealing(100, 2)


def test_an_annealing_that_was_given_is_not_one_that_was_chosen(make_model):
    model = make_model()
    fit(model, 4, 1, TeacherStepAnneal(2, 9, 50))
    chosen = begin(TeacherStepAnneal(), model, steps=4, epochs=4)
    assert chosen == F.suggested_annealing(20, 2)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("given", [{}, {"end": 64}])
def test_a_training_that_resumes_within_an_epoch(
    given, first, make_model, tmp_path
):
    def callbacks(*more):
        both = [
            TeacherStepAnneal(**given),
            ResumeTraining(tmp_path, save_freq=3),
        ]
        return [*(both if first else both[::-1]), *more]

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), 8, 2, *callbacks(Interrupt(after=13)))
    model = make_model()
    resumed = fit(model, 8, 2, *callbacks())
    assert int(model.iteration) == 16
    suggested = F.suggested_annealing(16, 2)
    assert resumed == (suggested[0], given.get("end", suggested[1]), 8)


class LastEpoch(keras.callbacks.Callback):
    """Stops a training after so many epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 == self.epochs


class Interrupt(keras.callbacks.Callback):
    """Interrupts a training after so many batches."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


# What is wrong, or can't be reached.


def test_a_run_that_is_over_too_soon_warns_once(make_model):
    model, anneal = make_model(), TeacherStepAnneal(64, 1280, 100_000)
    suggested = ", ".join(map(str, F.suggested_annealing(6, 2)))
    with pytest.warns(UserWarning, match=r"run of 6 .*=100000") as caught:
        assert fit(model, 3, 2, anneal) == (64, 1280, 100_000)
    (warning,) = [w for w in caught if "annealing" in str(w.message)]
    assert f"TeacherStepAnneal({suggested})" in str(warning.message)
    assert "64 teacher steps, not end=1280" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        begin(anneal, model, steps=3, epochs=2)


def test_iterations_alone_can_be_too_many(make_model):
    with pytest.warns(UserWarning, match=r"run of 6 .*iterations=1000"):
        begin(TeacherStepAnneal(iterations=1000), make_model(), 3, epochs=2)


@pytest.mark.parametrize(
    ("numbers", "steps"),
    [((2, 8, 6), 3), ((2, 8, 6), None), ((8, 8, 100), 3), ((), 3)],
)
def test_a_run_that_reaches_the_end_does_not_warn(numbers, steps, make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        anneal = TeacherStepAnneal(*numbers or (2, 8, 5))
        begin(anneal, make_model(), steps, epochs=2)


@pytest.mark.parametrize("name", ["start", "end", "iterations"])
@pytest.mark.parametrize(
    "value", [0, -1, True, "64", math.nan, math.inf, [64], 0.5]
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*at least 1.*Received: "):
        TeacherStepAnneal(**{name: value})


def test_iterations_are_an_integer():
    with pytest.raises(ValueError, match=r"`iterations`.*integer.*1000\.0"):
        TeacherStepAnneal(iterations=1000.0)


@pytest.mark.parametrize("name", ["start", "end"])
def test_fewer_steps_than_the_student_s(name, make_model):
    model, anneal = make_model(student_steps=4), TeacherStepAnneal(**{name: 3})
    expected = rf"`{name}` .*student_steps=4.*{name}=3"
    with pytest.raises(ValueError, match=expected):
        fit(model, 1, 1, anneal)
    assert not CountingModel.traces
    assert int(model.iteration) == 0
