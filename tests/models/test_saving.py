"""Files hold all that a model is; a resumed training is the same training."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    callbacks,
    losses,
    samplers,
    schedules,
)
from keras_mscm.models.saving import states_of_training


def all_state(model, weights_of):
    """Every number of a model: also random states and the optimizer's."""
    return weights_of(model) + weights_of(model.optimizer)


def config_of(model):
    """Its configuration, less the network's: Keras adds to that."""
    return {k: v for k, v in model.get_config().items() if k != "network"}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def pair(make_teacher, make_student):
    """A factory of one teacher and, from it, students as in a new process.

    The student has dropout, and its teacher steps are being annealed.
    """
    teacher = make_teacher(num_classes=3, dropout=0.3)

    def student(seed, accumulation=None):
        keras.utils.set_random_seed(seed)  # other draws, in a new process
        optimizer = keras.optimizers.Adam(
            1e-2, gradient_accumulation_steps=accumulation
        )
        return make_student(
            teacher=teacher, compile_with={"optimizer": optimizer}
        )

    return teacher, student


def fit(student, toy_images, epochs, initial_epoch=0, callback=()):
    anneal = callbacks.TeacherStepAnneal(4, 16, 6)
    return student.fit(
        toy_images(8),
        np.arange(8) % 3,
        batch_size=4,
        shuffle=False,
        epochs=epochs,
        initial_epoch=initial_epoch,
        callbacks=[anneal, *callback],
        verbose=0,
    ).history["loss"]


class Interrupt(keras.callbacks.Callback):
    """Stops a training hard, in its third epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


# Of three batches whose gradients are accumulated, the interruption comes
# after the first.
@pytest.mark.parametrize(
    "accumulation", [pytest.param(None, marks=pytest.mark.slow), 3]
)
def test_resumed_training_is_the_uninterrupted_one(
    accumulation, pair, toy_images, weights_of, tmp_path
):
    teacher, make = pair
    whole = make(0, accumulation)
    expected_losses = fit(whole, toy_images, 4)
    expected = all_state(whole, weights_of)
    noise = toy_images(3)
    images = whole.generate(noise=noise)

    # BackupAndRestore, at each epoch.
    backup = tmp_path / "backup"
    interrupted = make(0, accumulation)
    file = tmp_path / "student.keras"
    checkpoints = [
        keras.callbacks.BackupAndRestore(backup),
        keras.callbacks.ModelCheckpoint(file),
    ]
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, toy_images, 4, callback=[*checkpoints, Interrupt()])
    half = all_state(interrupted, weights_of)
    resumed = make(1, accumulation)
    resumed_losses = fit(
        resumed,
        toy_images,
        4,
        callback=[keras.callbacks.BackupAndRestore(backup)],
    )
    assert len(resumed_losses) == 2
    np.testing.assert_array_equal(resumed_losses, expected_losses[2:])
    assert_same(all_state(resumed, weights_of), expected)

    # The last .keras file of ModelCheckpoint, with its teacher attached.
    loaded = keras.saving.load_model(file)
    loaded.attach_teacher(teacher)
    assert_same(all_state(loaded, weights_of), half)
    losses_after = fit(loaded, toy_images, 4, initial_epoch=2)
    np.testing.assert_array_equal(losses_after, expected_losses[2:])
    assert_same(all_state(loaded, weights_of), expected)
    np.testing.assert_array_equal(loaded.generate(noise=noise), images)

    # Its weights alone, into a new model.
    interrupted.save_weights(tmp_path / "student.weights.h5")
    other = make(2, accumulation)
    other.load_weights(tmp_path / "student.weights.h5")
    losses_after = fit(other, toy_images, 4, initial_epoch=2)
    np.testing.assert_array_equal(losses_after, expected_losses[2:])
    assert_same(all_state(other, weights_of), expected)


RESUME = textwrap.dedent(
    """
    import sys
    import keras
    import numpy as np
    import keras_mscm

    folder = sys.argv[1]
    teacher = keras.saving.load_model(f"{folder}/teacher.keras")
    student = keras.saving.load_model(f"{folder}/student.keras")
    student.attach_teacher(teacher)
    data = np.load(f"{folder}/data.npz")
    student.fit(
        data["images"],
        data["labels"],
        batch_size=4,
        shuffle=False,
        epochs=4,
        initial_epoch=2,
        verbose=0,
    )
    state = [*student.variables, *student.optimizer.variables]
    np.savez(f"{folder}/end.npz", *map(keras.ops.convert_to_numpy, state))
    """
)


def test_resumed_in_a_new_process(pair, toy_images, weights_of, tmp_path):
    teacher, make = pair
    student = make(0)
    fit(student, toy_images, 2)
    teacher.save(tmp_path / "teacher.keras")
    student.save(tmp_path / "student.keras")
    np.savez(
        tmp_path / "data.npz", images=toy_images(8), labels=np.arange(8) % 3
    )
    run = subprocess.Popen(
        [sys.executable, "-c", RESUME, tmp_path],
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        stderr=subprocess.PIPE,
        text=True,
    )
    fit(student, toy_images, 4, initial_epoch=2)
    _, errors = run.communicate()
    assert run.returncode == 0, errors
    end = np.load(tmp_path / "end.npz")
    assert_same([end[name] for name in end], all_state(student, weights_of))


def test_a_loaded_model_is_the_saved_one(make_teacher, toy_images, tmp_path):
    teacher = make_teacher(
        num_classes=3,
        prediction_type="epsilon",
        model_with={
            "schedule": schedules.ShiftedCosineSchedule(
                image_resolution=4, noise_resolution=2, logsnr_min=-6
            ),
            "weighting": losses.sqrt_snr_plus_one,
            "ema_decay": 0.5,
        },
        compile_with={
            "optimizer": keras.optimizers.AdamW(3e-3),
            "loss": losses.PseudoHuber(0.03),
        },
    )
    labels = np.arange(8) % 3
    teacher.fit(toy_images(8), labels, verbose=0)
    teacher.save(tmp_path / "teacher.keras")
    loaded = keras.saving.load_model(tmp_path / "teacher.keras")
    assert type(loaded) is type(teacher)
    assert config_of(loaded) == config_of(teacher)
    assert loaded.optimizer.get_config() == teacher.optimizer.get_config()
    assert loaded.loss.get_config() == teacher.loss.get_config()
    assert loaded.weighting is losses.sqrt_snr_plus_one
    assert loaded.schedule.get_config() == teacher.schedule.get_config()
    arguments = dict(noise=toy_images(3), num_steps=3, sampler=samplers.ADDIM())
    np.testing.assert_array_equal(
        loaded.generate(**arguments), teacher.generate(**arguments)
    )
    ends = [
        model.evaluate(toy_images(8), labels, verbose=0)
        for model in (teacher, loaded)
    ]
    np.testing.assert_array_equal(*ends)

    # And a student of the loaded teacher is one of the saved one.
    student = MultistepConsistencyModel.from_teacher(
        loaded, student_steps=2, teacher_steps=10, method="training"
    )
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    assert config_of(loaded) == config_of(student)
    for name in ("student_steps", "method", "eta", "teacher_steps"):
        assert getattr(loaded, name) == getattr(student, name)
    np.testing.assert_array_equal(
        loaded.generate(noise=toy_images(3)),
        student.generate(noise=toy_images(3)),
    )


def test_a_file_holds_no_teacher(
    pair, toy_images, weights_of, tmp_path, make_student
):
    teacher, make = pair
    sizes = []
    for method in ("distillation", "training"):
        student = make_student(teacher=teacher, student_with={"method": method})
        path = tmp_path / f"{method}.weights.h5"
        student.save_weights(path)
        sizes.append(path.stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 4096

    # Loading weights leaves an attached teacher as it is.
    student = make(0)
    for weight in teacher.ema_network.weights:
        weight.assign(2.0 * weight)
    student.attach_teacher(teacher)
    before = weights_of(student.teacher)
    student.load_weights(tmp_path / "distillation.weights.h5")
    assert_same(weights_of(student.teacher), before)


def test_random_states_are_saved(make_teacher, toy_images, tmp_path):
    # Not as of the start: as they are.
    teacher = make_teacher(dropout=0.3)
    state = keras.ops.convert_to_numpy(teacher.seed_generator.state).copy()
    teacher.fit(toy_images(8), verbose=0)
    moved = keras.ops.convert_to_numpy(teacher.seed_generator.state)
    assert np.any(state != moved)
    teacher.save(tmp_path / "teacher.keras")
    loaded = keras.saving.load_model(tmp_path / "teacher.keras")
    states = [states_of_training(m) for m in (teacher, loaded)]
    assert len(states[0]) == 2  # the model's and the dropout's
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(ours),
            keras.ops.convert_to_numpy(theirs),
        )


def test_a_uvit_is_saved(tiny_uvit, toy_images, tmp_path):
    model = DiffusionModel(tiny_uvit(num_classes=2, dropout=0.1))
    model.save(tmp_path / "uvit.keras")
    loaded = keras.saving.load_model(tmp_path / "uvit.keras")
    inputs = {
        "z": toy_images(2, (8, 8, 1)),
        "logsnr": np.zeros(2, "float32"),
        "labels": np.arange(2),
    }
    np.testing.assert_array_equal(
        model.predict(inputs, verbose=0), loaded.predict(inputs, verbose=0)
    )


def test_a_file_fits_every_backend(make_teacher):
    # Keras would write what "auto" is here, and PyTorch's own optimizers.
    model = make_teacher(
        compile_with={
            "optimizer": keras.optimizers.LossScaleOptimizer(
                keras.optimizers.AdamW(1e-3)
            )
        }
    )
    config = model.get_compile_config()
    assert config["jit_compile"] == "auto"
    outer = config["optimizer"]
    for optimizer in (outer, outer["config"]["inner_optimizer"]):
        assert optimizer["module"] == "keras.optimizers"
        assert optimizer["registered_name"] is None
    model.compile("adam", jit_compile=False)
    assert model.get_compile_config()["jit_compile"] is False
    made = keras.saving.deserialize_keras_object(
        model.get_compile_config()["optimizer"]
    )
    assert type(made) is type(model.optimizer)


def test_a_mixed_precision_model_is_saved(make_teacher, toy_images, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make_teacher(dropout=0.3)
    finally:
        keras.config.set_dtype_policy(before)
    images = toy_images(8)
    model.fit(images, batch_size=4, verbose=0)
    model.save(tmp_path / "mixed.keras")
    # In a process whose own policy is another one.
    loaded = keras.saving.load_model(tmp_path / "mixed.keras")
    for layer in (loaded, loaded.network.layers[-2]):
        assert layer.dtype_policy.name == "mixed_bfloat16"
    ends = []
    for trained in (model, loaded):
        history = trained.fit(images, batch_size=4, shuffle=False, verbose=0)
        ends.append(trained.get_weights() + [history.history["loss"][0]])
    assert_same(*ends)
