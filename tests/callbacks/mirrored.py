"""Every callback within TensorFlow's MirroredStrategy: a process of its own.

Devices are virtual, on the CPU, and counted when TensorFlow starts. Called with
a folder, into which it writes what came of it: on one device and on two.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import resumable  # noqa: E402, beside this script

from keras_mscm import MultistepConsistencyModel  # noqa: E402
from keras_mscm.callbacks import (  # noqa: E402
    EvaluateSamples,
    ResumeTraining,
    SampleGrid,
    TeacherStepAnneal,
)

NOISE = np.random.default_rng(0).standard_normal((4, 4, 4, 1), "float32")
LABELS = resumable.LABELS[:4]
IMAGES = resumable.IMAGES[:4] / 127.5 - 1


def scope(strategy):
    return strategy.scope() if strategy else contextlib.nullcontext()


def make_student(strategy):
    with scope(strategy):
        # Keras' Dropout draws for a share of the batch, not for the whole.
        teacher = resumable.make_teacher(dropout=0.0)
        student = MultistepConsistencyModel.from_teacher(
            teacher, student_steps=2, reference="ema", seed=2
        )
        student.compile(keras.optimizers.Adam(1e-2, epsilon=1e-4))
    return student


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if keras.ops.convert_to_numpy(self.model.iteration) == 8:
            raise KeyboardInterrupt


def callbacks(folder):
    mean = keras.metrics.Mean(name="mean")
    return [
        TeacherStepAnneal(),
        EvaluateSamples(
            [mean],
            every=4,
            num_images=3,
            best_weights=folder / "best.weights.h5",
            results=folder / "results.jsonl",
        ),
        SampleGrid(folder / "grids", every=4, num_images=3),
        keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(
            folder / "{epoch}.weights.h5", save_weights_only=True
        ),
        ResumeTraining(folder / "saves", save_freq=3),
    ]


def fit(student, *more):
    data = {**resumable.make_data(), "epochs": 3, "verbose": 0}
    # Keras draws a shuffled order at another moment for several devices.
    return student.fit(**data, shuffle=False, callbacks=[*more]).history


def diverge(strategy):
    """Numbers that aren't finite in a model that has diverged."""
    student = make_student(strategy)

    class Spoil(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                velocity = self.model.optimizer.variables[-1]
                velocity.assign(np.full(velocity.shape, np.nan, "float32"))

    try:
        fit(student, Spoil())
    except FloatingPointError:
        state = resumable.state_of(student)
        return int(sum((~np.isfinite(value)).sum() for value in state))
    return None


def run(folder, strategy):
    folder.mkdir()
    keras.utils.set_random_seed(0)
    student = make_student(strategy)
    losses = fit(student, TeacherStepAnneal())["loss"]
    results = {"losses": losses, "diverged": diverge(strategy)}

    keras.utils.set_random_seed(0)
    with contextlib.suppress(KeyboardInterrupt):
        fit(make_student(strategy), Interrupt(), *callbacks(folder))
    keras.utils.set_random_seed(1)
    resumed = make_student(strategy)
    history = fit(resumed, *callbacks(folder))
    results["resumed_losses"] = history["loss"]
    results["mean"] = history["mean"]
    ours, theirs = map(resumable.state_of, (resumed, student))
    results["differ"] = sum(
        not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )

    # Within the scope, and outside of it.
    for name, within in {"in": strategy, "out": None}.items():
        with scope(within):
            file = folder / f"{name}.keras"
            resumed.save(file)
            images = resumed.generate(noise=NOISE, labels=LABELS, seed=0)
            loss = resumed.evaluate(
                IMAGES.astype("float32"), LABELS, batch_size=4, verbose=0
            )
            assert np.isfinite(loss)
            for saved in (file, folder / "3.weights.h5", folder / "3.keras"):
                other = make_student(strategy)
                other.load_weights(saved)
                theirs = zip(resumed.weights, other.weights, strict=True)
                for mine, loaded in theirs:
                    np.testing.assert_array_equal(mine, loaded)
            results[f"images_{name}"] = images.tolist()
    results["files"] = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*")
    )
    return results, ours


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, strategy in {
        "one": None,
        "two": tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
    }.items():
        results, state = run(folder / name, strategy)
        (folder / f"{name}.json").write_text(json.dumps(results))
        np.savez(folder / f"{name}.npz", *state)
