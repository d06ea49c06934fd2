"""What lies in the directory of a resumed training: whatever, nothing is lost.

Damaged saves, those of other trainings and models, and what isn't any.
"""

import importlib.util
import json
import os
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mscm import DiffusionModel, MultistepConsistencyModel
from keras_mscm.callbacks import ResumeTraining, saves

SCRIPT = Path(__file__).with_name("resumable.py")
spec = importlib.util.spec_from_file_location("resumable", SCRIPT)
resumable = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resumable)
make_student, make_data = resumable.make_student, resumable.make_data
train = resumable.train


class At(keras.callbacks.Callback):
    """Interrupts a `fit` before some batch of it, and notes where it began."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.began = batch, None

    def on_train_batch_begin(self, batch, logs=None):
        if self.began is None:
            self.began = keras.ops.convert_to_numpy(self.model.iteration)
        if not self.batch:
            raise KeyboardInterrupt
        self.batch -= 1


def trained(folder, batches, student=None, save_freq=2):
    """The iteration at which a training of so many batches has begun."""
    at = At(batches)
    resume = ResumeTraining(folder, save_freq)
    with pytest.raises(KeyboardInterrupt):
        train(student or make_student(), make_data(), at, resume)
    return int(at.began)


def held(folder):
    return {
        path.name: path.read_bytes() if path.is_file() else None
        for path in folder.iterdir()
    }


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    """A directory of the saves at iterations 2 and 4, not to be changed."""
    folder = tmp_path_factory.mktemp("saves")
    trained(folder, 5)
    assert sorted(held(folder)) == ["00000002.keras", "00000004.keras"]
    return folder


@pytest.fixture
def folder(two_saves, tmp_path):
    return Path(shutil.copytree(two_saves, tmp_path / "saves"))


# Damage.


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def replace_position(path, content):
    """Writes a save anew with another position, or none."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    del files["position.json"]
    if content is not None:
        files["position.json"] = content
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in files.items():
            archive.writestr(name, value)


def position_of(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("position.json"))


def changed(name, value):
    def change(path):
        position = position_of(path)
        if value is None and name != "teacher":
            del position[name]
        else:
            position[name] = value
        replace_position(path, json.dumps(position))

    return change


def random_states(key, value):
    def change(path):
        position = position_of(path)
        position["random"][key] = value
        replace_position(path, json.dumps(position))

    return change


def a_directory(path):
    path.unlink()
    path.mkdir()
    (path / "notes").write_text("mine")


def a_link_to_a_save(path):
    path.unlink()
    path.symlink_to(path.with_name("00000002.keras"))


def a_link_to_nothing(path):
    path.unlink()
    path.symlink_to("nowhere")


def a_copy_of_another(path):
    shutil.copy(path.with_name("00000002.keras"), path)


def saved_by_keras(path):
    make_student().save(path)


NAN = float("nan")
DAMAGE = {
    "truncated": truncate,
    "a bit": flip_a_bit,
    "empty": empty,
    "directory": a_directory,
    "link to a save": a_link_to_a_save,
    "link to nothing": a_link_to_nothing,
    "copy of another": a_copy_of_another,
    "saved by Keras": saved_by_keras,
    "no position": lambda path: replace_position(path, None),
    "empty position": lambda path: replace_position(path, "{}"),
    "no JSON": lambda path: replace_position(path, "no JSON"),
    "no text": lambda path: replace_position(path, b"\xff\xfe\x00"),
    "a list": lambda path: replace_position(path, "[]"),
    "deep": lambda path: replace_position(path, "[" * 100_000),
    **{f"no {name}": changed(name, None) for name in saves.COUNTS},
    "no metrics": changed("metrics", None),
    "no random": changed("random", None),
    **{
        f"{name} {value}": changed(name, value)
        for name in saves.COUNTS
        for value in (-1, 1.5, "1", True, NAN, [1])
    },
    "epoch 1e9": changed("epoch", 10**9),
    "iteration": changed("iteration", 3),
    "teacher": changed("teacher", 3),
    "metrics NaN": changed("metrics", [NAN, NAN]),
    "metrics text": changed("metrics", ["1", "2"]),
    "metrics 5": changed("metrics", 5),
    "random 5": changed("random", 5),
    "random {}": changed("random", {}),
    "random_of_epoch": changed("random_of_epoch", {"python": [3, [1], None]}),
    "Python's": random_states("python", [3, [1, 2, 3], None]),
    "NumPy's": random_states("numpy", {"bit_generator": "MT19937"}),
    **(
        {"PyTorch's": random_states("torch", [1, 2, 3])}
        if keras.backend.backend() == "torch"
        else {}
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_save_stays_and_the_one_before_is_read(name, two_saves):
    path = two_saves / "00000004.keras"
    sound = path.read_bytes()
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    DAMAGE[name](path)
    damaged = held(two_saves)
    resume, student = ResumeTraining(two_saves), make_student()
    resume.set_model(student)
    resume._data = None  # as `fit` would say
    try:
        with pytest.warns(UserWarning, match="4.keras can't be read, so the"):
            resume.on_train_begin()
        assert resume._last_save == 2
        assert int(student.iteration) == 2
        assert held(two_saves) == damaged
        after = np.random.get_state()[1].tolist()  # noqa: NPY002
        assert (before == after) == bool(resume._restored["batch"])
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.write_bytes(sound)


def test_training_goes_on_beside_damaged_saves(folder):
    truncate(folder / "00000004.keras")
    damaged = (folder / "00000004.keras").read_bytes()
    with pytest.warns(UserWarning, match="4.keras can't be read"):
        assert trained(folder, 5) == 2
    # 2 is passed over, 3 and 4 are done.
    assert sorted(held(folder)) == [
        "000000004.keras",
        "00000002.keras",
        "00000004.keras",
    ]
    assert trained(folder, 7) == 4
    assert sorted(held(folder)) == [
        "000000004.keras",
        "00000004.keras",
        "00000006.keras",
    ]
    assert (folder / "00000004.keras").read_bytes() == damaged
    for path in folder.iterdir():
        truncate(path)
    with (
        pytest.warns(UserWarning, match="can't be read"),
        pytest.raises(OSError, match="To begin anew, remove them"),
    ):
        train(make_student(), make_data(), ResumeTraining(folder))


def test_what_is_not_named_like_a_save_is_left_alone(folder):
    others = [
        "00000032 (1).keras",
        "1_best.keras",
        "7.keras",
        "0000001.keras",
        "best.keras",
        "-0000008.keras",
        "٠٠٠٠٠٠٠٩.keras",
        "00000004.unreadable",
        ".00000004.keras.swp",
        ".00000004.keras.abcd_123",
        ".best.keras.abcd_124",
    ]
    for name in others:
        (folder / name).write_bytes(b"mine")
    # A directory as ours is called, with something else within; one of Keras'.
    for name in (".00000004.keras.abcd_125", ".best.keras.abcd_126"):
        (folder / name).mkdir()
        (folder / name / "notes").write_bytes(b"mine")
        others.append(name)
    left = folder / ".00000006.keras.abcd_127"
    left.mkdir()
    for name in ("new.keras", "tmpabcd_123"):
        (left / name).write_bytes(b"half")
    assert trained(folder, 9) == 4
    found = held(folder)
    assert sorted(found) == sorted(
        [*others, "00000006.keras", "00000008.keras"]
    )
    assert {found[name] for name in others} == {b"mine", None}


def test_saves_of_another_training_are_not_removed(folder, tmp_path):
    other = tmp_path / "other"
    trained(other, 4, save_freq=1)
    shutil.copy(other / "00000003.keras", folder)
    trained(folder, 9)
    assert sorted(held(folder)) == [
        "00000003.keras",
        "00000006.keras",
        "00000008.keras",
    ]


# Other models.


class Other(MultistepConsistencyModel):
    """A model of another class."""


def student_of(teacher, **kw):
    kw = {"student_steps": 2, "reference": "ema", "seed": 2} | kw
    kind = kw.pop("kind", MultistepConsistencyModel)
    optimizer = kw.pop("optimizer", None) or keras.optimizers.Adam(1e-2)
    student = kind.from_teacher(teacher, **kw)
    student.compile(optimizer)
    return student


def wider_teacher():
    inputs = {
        "z": keras.Input((4, 4, 1), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
        "labels": keras.Input((), dtype="int32", name="labels"),
    }
    h = keras.layers.Embedding(4, 24)(inputs["labels"])
    h = keras.layers.Flatten()(inputs["z"]) + keras.layers.Dense(16)(h)
    network = keras.Model(inputs, keras.layers.Reshape((4, 4, 1))(h))
    return DiffusionModel(network, image_shape=(4, 4, 1), num_classes=3)


def a_diffusion_model():
    model = resumable.make_teacher()
    model.compile(keras.optimizers.Adam(1e-2))
    return model


OTHERS = {
    "network": lambda: student_of(wider_teacher()),
    "class": lambda: student_of(resumable.make_teacher(), kind=Other),
    "optimizer": lambda: student_of(resumable.make_teacher(), optimizer="sgd"),
    "optimizer's slots": lambda: make_student(accumulation=2),
    "student_steps": lambda: student_of(
        resumable.make_teacher(), student_steps=4
    ),
    "teacher": lambda: make_student(teacher=resumable.make_teacher(seed=9)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_save_of_another_model_is_refused(name, folder):
    model, before = OTHERS[name](), held(folder)
    weights = [keras.ops.convert_to_numpy(w) for w in model.network.weights]
    message = f"of the same .*{name.split(chr(39))[0]}"
    if name == "teacher":
        message = "`teacher` must be the one of"
    with pytest.raises(ValueError, match=message):
        train(model, make_data(), ResumeTraining(folder))
    for weight, value in zip(model.network.weights, weights, strict=True):
        np.testing.assert_array_equal(weight, value)
    assert int(model.iteration) == 0
    assert held(folder) == before


def test_saves_of_version_0_1(folder):
    """They don't say whose they are, nor of what model."""
    for path in folder.iterdir():
        position = position_of(path)
        for name in ("training", "model", "iteration", "first_epoch"):
            del position[name]
        replace_position(path, json.dumps(position))
    model = MultistepConsistencyModel(
        wider_teacher().network,
        student_steps=2,
        image_shape=(4, 4, 1),
        num_classes=3,
    )
    model.attach_teacher(resumable.make_teacher())
    model.compile(keras.optimizers.Adam(1e-2))
    with pytest.raises(ValueError, match="The model must be the one of"):
        train(model, make_data(), ResumeTraining(folder))
    model = student_of(resumable.make_teacher(), optimizer="sgd")
    with pytest.raises(ValueError, match="The model must be the one of"):
        train(model, make_data(), ResumeTraining(folder))
    assert trained(folder, 9) == 4
    assert sorted(held(folder)) == [
        "00000002.keras",
        "00000004.keras",
        "00000006.keras",
        "00000008.keras",
    ]


def test_other_metrics_are_refused(folder):
    student = make_student(metrics=[keras.metrics.MeanAbsoluteError()])
    with pytest.raises(ValueError, match="`compile` must be given the metrics"):
        train(student, make_data(), ResumeTraining(folder))
    assert int(student.iteration) == 0


def test_other_models_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="must be used with a DenoisingModel"):
        model.fit(
            np.ones((2, 1)),
            np.ones((2, 1)),
            verbose=0,
            callbacks=[ResumeTraining(tmp_path)],
        )


# Arguments.


@pytest.mark.parametrize(
    "save_freq", [0, -1, 1.5, "batch", True, None, NAN, np.ones(2)]
)
def test_bad_frequencies(save_freq, tmp_path):
    with pytest.raises(ValueError, match='`save_freq` must be "epoch" or an'):
        ResumeTraining(tmp_path, save_freq)


@pytest.mark.parametrize("directory", [None, 3, "", b"", "a\0b"])
def test_bad_paths(directory):
    with pytest.raises(ValueError, match="`directory` must be a path"):
        ResumeTraining(directory)


@pytest.mark.parametrize("place", ["file", "file/in", "/proc/none"])
def test_where_nothing_can_be_written(place, tmp_path):
    (tmp_path / "file").touch()
    student = make_student()
    resume = ResumeTraining(tmp_path / place)
    message = "`directory` must be where files can be written"
    with pytest.raises(ValueError, match=message):
        train(student, make_data(), resume)
    assert int(student.iteration) == 0
