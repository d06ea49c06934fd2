"""A training that can be interrupted: as a script, one that can be killed.

Everything about the student depends on something that must be restored: its
dropout and noise on random states, its target on the moving average, the
annealing and a teacher, its data on the epoch and the batch.
"""

import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np

from keras_mscm import DiffusionModel, MultistepConsistencyModel
from keras_mscm.callbacks import ResumeTraining, TeacherStepAnneal
from keras_mscm.datasets import from_arrays

STEPS, EPOCHS = 5, 4
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), "uint8")
LABELS = np.arange(20) % 3


def make_teacher(seed=1, dropout=0.3):
    def init():
        return keras.initializers.RandomNormal(0.3, seed=seed)

    inputs = {
        "z": keras.Input((4, 4, 1), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
        "labels": keras.Input((), dtype="int32", name="labels"),
    }
    embed = keras.layers.Embedding(4, 16, init())
    h = keras.layers.Flatten()(inputs["z"]) + embed(inputs["labels"])
    h = keras.layers.Dense(16, "swish", kernel_initializer=init())(h)
    h = keras.layers.Dropout(dropout, seed=seed)(h)
    h = keras.layers.Dense(16, kernel_initializer=init())(h)
    network = keras.Model(inputs, keras.layers.Reshape((4, 4, 1))(h))
    return DiffusionModel(
        network, image_shape=(4, 4, 1), num_classes=3, seed=seed
    )


def make_student(accumulation=None, teacher=None, **compile_with):
    student = MultistepConsistencyModel.from_teacher(
        teacher or make_teacher(), student_steps=2, reference="ema", seed=2
    )
    student.compile(
        keras.optimizers.Adam(1e-2, gradient_accumulation_steps=accumulation),
        **compile_with,
    )
    return student


def make_data(kind="finite"):
    """What `fit` is given as data, but for the number of epochs."""
    if kind == "arrays":
        images = IMAGES.astype("float32") / 127.5 - 1
        shuffle = keras.backend.backend() != "tensorflow"
        return {"x": images, "y": LABELS, "batch_size": 4, "shuffle": shuffle}
    if kind == "loader":
        import torch

        images = torch.tensor(IMAGES / 127.5 - 1, dtype=torch.float32)
        pairs = torch.utils.data.TensorDataset(images, torch.tensor(LABELS))
        return {"x": torch.utils.data.DataLoader(pairs, 4, shuffle=True)}
    data = from_arrays(
        IMAGES,
        LABELS,
        batch_size=4,
        seed=3,
        flip=True,
        repeat=kind == "endless",
    )
    if kind == "endless":
        return {"x": data, "steps_per_epoch": STEPS, "shuffle": False}
    return {"x": data}


def train(student, data, *callbacks, epochs=EPOCHS):
    anneal = TeacherStepAnneal(4, 16, 20)
    return student.fit(
        **data, epochs=epochs, callbacks=[anneal, *callbacks], verbose=0
    ).history


def state_of(student):
    """Every number of a student: also random states and the optimizer's."""
    variables = [*student.variables, *student.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


class Progress(keras.callbacks.Callback):
    """Notes the iteration before each batch, and takes its time.

    In a file, without any buffer that would be lost with the process.
    """

    def __init__(self, path, seconds):
        super().__init__()
        self.file = path.open("ab", buffering=0)
        self.seconds = seconds

    def on_train_batch_begin(self, batch, logs=None):
        self.file.write(b"%d\n" % int(self.model.iteration))
        time.sleep(self.seconds)


def die_while_saving(number):
    """Lets the process be killed in the middle of writing the n-th save."""
    write, left = zipfile.ZipFile.writestr, [number]

    def die(archive, name, content, *args):
        left[0] -= str(name) == "model.weights.h5"
        if not left[0]:
            archive.fp.write(content[: len(content) // 2])
            archive.fp.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(archive, name, content, *args)

    zipfile.ZipFile.writestr = die


if __name__ == "__main__":
    folder, kind, save_freq, dying = sys.argv[1:]
    folder = Path(folder)
    if int(dying):
        die_while_saving(int(dying))
    keras.utils.set_random_seed(0)
    student = make_student()
    progress = Progress(folder / "progress", 0.01)
    resume = ResumeTraining(folder / "saves", save_freq=int(save_freq))
    train(student, make_data(kind), progress, resume)
    np.savez(folder / "end.npz", *state_of(student))
