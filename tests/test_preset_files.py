"""A preset's files: what is refused, and what is never touched."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import h5py
import keras
import numpy as np
import pytest

from keras_mscm import (
    DenoisingModel,
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    preset_files,
)
from keras_mscm import presets as listed
from keras_mscm.preset_files import folder as folder_module
from keras_mscm.preset_files import load_model, load_network, untrusted


def tree(folder):
    """Every path below, with its bytes, or where a link leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.fixture
def preset(tiny_uvit, tmp_path):
    """A preset of a model, in a folder that holds nothing else."""
    model = DiffusionModel(tiny_uvit())
    model.save_to_preset(tmp_path / "preset")
    return tmp_path / "preset"


# What is replaced.


def a_repository(path):
    (path / ".git").mkdir(parents=True)
    (path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (path / "config.json").write_text("{}")


def a_thesis(path):
    path.mkdir()
    (path / "config.json").write_text('{"font": "serif"}')
    (path / "thesis.tex").write_text("mine")


def a_foreign_config(path):
    path.mkdir()
    (path / "config.json").write_text('{"font": "serif"}')


def a_preset_of_keras_hub(path):
    path.mkdir()
    config = {"module": "keras_hub", "class_name": "Backbone", "config": {}}
    (path / "config.json").write_text(json.dumps(config))
    facts = {"keras_version": "3", "parameter_count": 1}
    (path / "metadata.json").write_text(json.dumps(facts))
    (path / "model.weights.h5").write_bytes(b"weights")


def ours(path):
    UViT((8, 8, 1), widths=(16,), depths=(1,), attention=False).save_to_preset(
        path
    )


def ours_and_a_note(path):
    ours(path)
    (path / "notes.txt").write_text("mine")


def ours_and_a_folder(path):
    ours(path)
    (path / "samples").mkdir()


def ours_with_linked_weights(path):
    ours(path)
    (path / "model.weights.h5").rename(path.parent / "weights")
    (path / "model.weights.h5").symlink_to(path.parent / "weights")


def a_config_that_is_a_folder(path):
    (path / "config.json").mkdir(parents=True)


def a_file(path):
    path.write_text("mine")


def a_link(path):
    ours(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def a_link_to_nothing(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (a_repository, r"holds \.git/"),
        (a_thesis, r"holds thesis\.tex"),
        (a_foreign_config, r"holds no preset"),
        (a_preset_of_keras_hub, r"not those of `save_to_preset`"),
        (ours_and_a_note, r"holds notes\.txt"),
        (ours_and_a_folder, r"holds samples/"),
        (ours_with_linked_weights, r"holds model\.weights\.h5"),
        (a_config_that_is_a_folder, r"holds config\.json/"),
        (a_file, r"is a file"),
        (a_link, r"a symbolic link to .*elsewhere"),
        (a_link_to_nothing, r"a symbolic link to .*nowhere"),
    ],
)
def test_what_is_no_preset_is_left_as_it_is(tiny_uvit, tmp_path, make, says):
    make(tmp_path / "place")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=rf"`preset`.*place.*{says}"):
        tiny_uvit().save_to_preset(tmp_path / "place")
    assert tree(tmp_path) == before


def test_a_preset_below_a_linked_folder(tiny_uvit, tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "large_disk")
    for num_classes in (3, 4):
        network = tiny_uvit(num_classes=num_classes)
        network.save_to_preset(tmp_path / "runs" / "preset")
    assert (tmp_path / "runs").is_symlink()
    kept = UViT.from_preset(tmp_path / "large_disk" / "preset")
    assert kept.num_classes == 4


def test_the_working_directory_is_not_replaced(
    tiny_uvit, tmp_path, monkeypatch
):
    (tmp_path / "empty" / "within").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "within")
    for place in (".", tmp_path / "empty"):
        with pytest.raises(ValueError, match="this program is working"):
            tiny_uvit().save_to_preset(place)


def test_a_name_of_the_packages_is_for_that_alone(
    tiny_uvit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must not be the name"):
        tiny_uvit().save_to_preset("digits")
    tiny_uvit().save_to_preset(pathlib.Path("digits"))
    loaded = UViT.from_preset(pathlib.Path("digits"))
    assert loaded.widths == (32,)
    assert UViT.from_preset("digits", load_weights=False).widths == (128,)


def test_a_place_that_cannot_be_written_to(tiny_uvit, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`preset` must be.*file"):
        tiny_uvit().save_to_preset(tmp_path / "file" / "preset")

    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(folder_module.tempfile, "mkdtemp", refuse)
    with pytest.raises(ValueError, match=r"can be written to.*read-only"):
        tiny_uvit().save_to_preset(tmp_path / "preset")
    assert tree(tmp_path) == {"file": b"mine"}


def test_what_comes_while_it_is_written_is_kept(tiny_uvit, preset, monkeypatch):
    save = keras.saving.save_weights

    def save_slowly(network, path):
        save(network, path)
        (preset / "notes.txt").write_text("mine")

    monkeypatch.setattr(keras.saving, "save_weights", save_slowly)
    before = tree(preset)
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        tiny_uvit().save_to_preset(preset)
    assert tree(preset) == {**before, "notes.txt": b"mine"}
    assert [*preset.parent.iterdir()] == [preset]


def test_what_comes_between_two_renamings_is_kept(
    tiny_uvit, preset, monkeypatch
):
    rename = pathlib.Path.rename

    def rename_late(self, target):
        if self == preset:
            (preset / "notes.txt").write_text("mine")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", rename_late)
    with pytest.warns(UserWarning, match="is kept"):
        tiny_uvit(num_classes=5).save_to_preset(preset)
    (left,) = preset.parent.glob(".preset.*")
    assert tree(left) == {"old": False, "old/notes.txt": b"mine"}
    assert UViT.from_preset(preset).num_classes == 5


def test_the_old_preset_returns_if_the_new_one_cannot_come(
    tiny_uvit, preset, monkeypatch
):
    before, rename = tree(preset), pathlib.Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError("disk failed")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="disk failed"):
        tiny_uvit().save_to_preset(preset)
    assert tree(preset) == before
    assert [*preset.parent.iterdir()] == [preset]


SAVE_WITHOUT_END = """
import pathlib, sys, time
import keras
from keras_mscm import UViT
network = UViT((8, 8, 1), widths=(16,), depths=(1,), attention=False)
rename = pathlib.Path.rename
def wait(*args):
    print("now", flush=True)
    time.sleep(600)
def rename_once(self, target):
    if self.name == "new":
        wait()
    return rename(self, target)
if sys.argv[2] == "while it is written":
    keras.saving.save_weights = wait
else:
    pathlib.Path.rename = rename_once
network.save_to_preset(sys.argv[1])
"""


@pytest.mark.once
@pytest.mark.parametrize("when", ["while it is written", "between renamings"])
def test_a_kill_loses_nothing(tiny_uvit, tmp_path, when):
    preset = tmp_path / "preset"
    tiny_uvit(num_classes=3).save_to_preset(preset)
    before = tree(preset)
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_WITHOUT_END, str(preset), when],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.glob(".preset.*")
    if when == "between renamings":
        message = r"interrupted left this.*\.preset\..*old"
        with pytest.raises(ValueError, match=message):
            UViT.from_preset(preset)
        (left / "old").rename(preset)
    assert tree(preset) == before
    kept = tree(left)
    tiny_uvit(num_classes=4).save_to_preset(preset)
    assert UViT.from_preset(preset).num_classes == 4
    assert tree(left) == kept  # which may be another's, still at work


# What is saved.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_saved(tiny_uvit, tmp_path, value):
    network = tiny_uvit()
    weight = network.trainable_variables[-1]
    array = keras.ops.convert_to_numpy(weight).copy()
    array.flat[1] = value
    weight.assign(array)
    message = f"finite weights.*1 of {array.size} not finite in {weight.path}"
    with pytest.raises(ValueError, match=message):
        network.save_to_preset(tmp_path / "preset")
    assert tree(tmp_path) == {}


def test_half_precision_that_overflows_is_not_saved(tiny_uvit, tmp_path):
    network = tiny_uvit()
    weight = network.trainable_variables[-1]
    weight.assign(keras.ops.full(weight.shape, -65504.0))
    network.save_to_preset(tmp_path / "fits", weights_dtype="float16")
    loaded = UViT.from_preset(tmp_path / "fits")
    assert np.min(loaded.trainable_variables[-1]) == -65504
    weight.assign(keras.ops.full(weight.shape, -7e4))
    message = rf"`weights_dtype` must be 'float32'.*70000 in {weight.path}"
    with pytest.raises(ValueError, match=message):
        network.save_to_preset(tmp_path / "not", weights_dtype="float16")
    network.save_to_preset(tmp_path / "not")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (5, "mapping.*5 of type int"),
        (["a"], "mapping.*list"),
        ({1: "a"}, "mapping.*1 of type int"),
        ({"images": np.zeros(3)}, r"metadata\['images'\].*shape \(3,\)"),
        ({"score": float("nan")}, r"metadata\['score'\]=nan"),
        ({"made": {1, 2}}, r"metadata\['made'\]"),
        ({"parameters": 5}, "leave parameters.*'parameters'"),
    ],
)
def test_metadata_that_are_no_json(tiny_uvit, tmp_path, metadata, says):
    with pytest.raises(ValueError, match=f"`metadata` must.*{says}"):
        tiny_uvit().save_to_preset(tmp_path / "preset", metadata=metadata)
    assert tree(tmp_path) == {}


def test_metadata_are_kept_whatever_their_names(tiny_uvit, tmp_path):
    given = {"build_config": {"compile_config": 1}}
    tiny_uvit().save_to_preset(tmp_path / "preset", metadata=given)
    facts = preset_files.read(tmp_path / "preset", "metadata.json")
    assert facts["build_config"] == given["build_config"]


def test_only_networks_and_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="`saved` must be a network"):
        preset_files.save_to_preset(5, tmp_path / "preset")


# What is asked for.


LOADERS = [
    UViT.from_preset,
    DiffusionModel.from_preset,
    preset_files.count,
    preset_files.find,
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "preset",
    [None, 5, "", True, b"digits", ["digits"], "a\0b", "../../x", "x" * 5000],
)
def test_no_preset_is_an_error_that_names_those_there_are(load, preset):
    message = r"`preset` must be a directory.*one of.*'digits'.*Received: pres"
    with pytest.raises(ValueError, match=message):
        load(preset)


def test_a_name_never_leads_out_of_the_package(tmp_path, monkeypatch):
    ours(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    built_in = os.path.relpath(preset_files.BUILT_IN / "digits")
    found = preset_files.find("here")
    assert found.resolve() == (tmp_path / "here").resolve()
    assert preset_files.find(built_in) != preset_files.BUILT_IN / "digits"
    with pytest.raises(ValueError, match="`preset` must be"):
        preset_files.find("../presets/digits")


@pytest.mark.parametrize("load_weights", [None, 1, "yes"])
def test_load_weights_is_true_or_false(load_weights):
    for cls in (UViT, DiffusionModel):
        with pytest.raises(ValueError, match="`load_weights` must be True"):
            cls.from_preset("digits", load_weights=load_weights)


@pytest.mark.parametrize("cls", [UViT, DiffusionModel])
def test_a_callers_unknown_keyword_is_named(cls):
    # A ValueError, as Keras raises it of any model.
    with pytest.raises(ValueError, match="'widdths'"):
        cls.from_preset("digits", load_weights=False, widdths=(3,))


def test_a_network_alone_is_no_model_of_no_algorithm():
    with pytest.raises(ValueError, match=r"DenoisingModel.*names no class"):
        DenoisingModel.from_preset("digits", load_weights=False)


def test_a_callers_network_is_one():
    with pytest.raises(ValueError, match="`network` must be a Keras layer"):
        DiffusionModel.from_preset("digits", network=5)


def test_a_callers_bad_argument_is_named():
    with pytest.raises(ValueError, match=r"(?s)patch_size.*Received"):
        UViT.from_preset("digits", load_weights=False, patch_size=3)


# What is in the files.


NO_OBJECTS = [b"[]", b"null", b"5", b"", b"{", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("file", ["config.json", "task.json"])
@pytest.mark.parametrize("content", NO_OBJECTS, ids=lambda c: str(c[:5]))
def test_a_file_that_holds_no_object_is_named(preset, file, content):
    (preset / file).write_bytes(content)
    message = rf"{file} must hold an object of JSON in UTF-8. Received"
    with pytest.raises(ValueError, match=message):
        DiffusionModel.from_preset(preset)
    if file == "config.json":
        for load in (UViT.from_preset, preset_files.count):
            with pytest.raises(ValueError, match=message):
                load(preset)


def test_a_file_without_end_is_not_read(preset, monkeypatch):
    monkeypatch.setattr(folder_module, "LARGEST", 1000)
    (preset / "config.json").write_text(" " * 1001 + "{}")
    with pytest.raises(ValueError, match=r"config.json.*more than 1000 bytes"):
        UViT.from_preset(preset)


@pytest.mark.parametrize("content", NO_OBJECTS, ids=lambda c: str(c[:5]))
def test_metadata_that_are_no_object_are_named(
    preset, content, monkeypatch, tmp_path
):
    monkeypatch.setattr(folder_module, "BUILT_IN", tmp_path)
    (preset / "metadata.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"metadata.json must hold an object"):
        listed._facts("preset")


@keras.saving.register_keras_serializable(package="test_preset_files")
def a_function(logsnr):
    return logsnr


def a_network(**changed):
    config = json.loads(
        (preset_files.BUILT_IN / "digits/config.json").read_text()
    )
    return {**config, **changed}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "must describe a network as Keras does"),
        ({"class_name": "UViT"}, "must describe a network as Keras does"),
        (a_network(config=None), "must describe a network as Keras does"),
        (a_network(config=[]), "must describe a network as Keras does"),
        (a_network(class_name=5), "must describe a network as Keras does"),
        (a_network(config={}), "'image_shape'"),
        (a_network(config={"image_shape": 5}), "image_shape|not iterable"),
        (
            a_network(config={"image_shape": [8, 8, 1], "wide": 5}),
            "wide",
        ),
        (a_network(registered_name="keras_mscm>Unknown"), "Could not locate"),
        (a_network(registered_name="test_preset_files>a_function"), "function"),
        (
            a_network(registered_name="keras_mscm>CosineSchedule", config={}),
            "must hold a.*CosineSchedule",
        ),
        (
            {"module": "os", "class_name": "system", "config": {}},
            "Could not locate",
        ),
    ],
)
@pytest.mark.parametrize("cls", [UViT, DiffusionModel])
def test_a_config_of_no_network(preset, cls, config, says):
    (preset / "config.json").write_text(json.dumps(config))
    for load_weights in (True, False):
        with pytest.raises(ValueError, match=rf"(?s)preset.*({says})"):
            cls.from_preset(preset, load_weights=load_weights)
    if "CosineSchedule" not in str(config):
        with pytest.raises(ValueError, match=rf"config.json.*({says})"):
            preset_files.count(preset)


def test_a_network_that_does_not_count_itself(tmp_path):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    preset_files.save_to_preset(network, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"config.json.*`flops`"):
        preset_files.count(tmp_path / "dense")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"registered_name": 5}, "must be known to Keras"),
        ({"registered_name": ["a"]}, "must be known to Keras"),
        ({"registered_name": "keras_mscm>No"}, "must be known to Keras"),
        (
            {"registered_name": "test_preset_files>a_function"},
            "must name the class of a model.*a_function",
        ),
        (
            {"registered_name": "keras_mscm>CosineSchedule"},
            "must name the class of a model.*CosineSchedule",
        ),
        ({"registered_name": "keras_mscm>UViT"}, "is of a UViT"),
        ({"config": []}, "must hold a model's arguments"),
        ({"config": {"unheard": 5}}, "'unheard'"),
        ({"config": {"ema_decay": 7}}, "ema_decay"),
        ({"config": {"network": 7}}, "network"),
        ({"config": {"schedule": 7}}, "schedule"),
        (
            {
                "config": {
                    "schedule": {
                        "module": "os",
                        "class_name": "system",
                        "config": {},
                    }
                }
            },
            "Could not locate",
        ),
    ],
)
@pytest.mark.parametrize("cls", [DenoisingModel, DiffusionModel])
def test_a_task_of_no_model(preset, cls, changed, says):
    path = preset / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(
        ValueError, match=rf"task\.json.*{says}|{says}.*task\.json"
    ):
        cls.from_preset(preset)


def test_a_task_that_lacks_an_argument(tiny_uvit, tmp_path):
    student = MultistepConsistencyModel(tiny_uvit(), student_steps=2)
    student.save_to_preset(tmp_path / "student")
    path = tmp_path / "student" / "task.json"
    task = json.loads(path.read_text())
    del task["config"]["student_steps"]
    path.write_text(json.dumps(task))
    for kwargs in ({}, {"eta": 0.5}):
        with pytest.raises(ValueError, match=r"task\.json.*student_steps"):
            MultistepConsistencyModel.from_preset(path.parent, **kwargs)
    # Where it is the caller who should give it, Python says so.
    with pytest.raises(TypeError, match="student_steps"):
        MultistepConsistencyModel.from_preset("colour64", load_weights=False)


def test_a_truncated_file_of_weights(preset):
    path = preset / "model.weights.h5"
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"weights.h5 must be a whole"):
            UViT.from_preset(preset)
        with pytest.raises(ValueError, match=r"weights.h5 must be a whole"):
            DiffusionModel.from_preset(preset)


def test_weights_of_another_network(tiny_uvit, preset, tmp_path):
    tiny_uvit(embedding_width=16).save_to_preset(tmp_path / "other")
    weights = (tmp_path / "other" / "model.weights.h5").read_bytes()
    (preset / "model.weights.h5").write_bytes(weights)
    for load in (UViT.from_preset, DiffusionModel.from_preset):
        with pytest.raises(ValueError, match=r"weights.h5 must hold weights"):
            load(preset)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_loaded(preset, value):
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file["entry/vars/0"][0, 0] = value
    for load in (UViT.from_preset, DiffusionModel.from_preset):
        with pytest.raises(
            ValueError, match=r"weights.h5 must hold finite.*1 of.*entry/kernel"
        ):
            load(preset)


def test_weights_that_are_finite_in_the_file_alone(preset):
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        file["entry/vars/0"][0, 0] = 1e5
    assert UViT.from_preset(preset)
    with pytest.raises(ValueError, match=r"must hold finite.*entry/kernel"):
        UViT.from_preset(preset, dtype="float16")


def test_files_that_are_links_are_read(tiny_uvit, preset, tmp_path):
    # As in the cache of Hugging Face's hub.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    preset.rename(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = tree(tmp_path)
    assert DiffusionModel.from_preset(snapshot)
    with pytest.raises(ValueError, match="Nothing has been changed"):
        tiny_uvit().save_to_preset(snapshot)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("load", [load_network, load_model])
def test_a_file_that_never_ends_is_no_file(preset, load):
    cls = keras.Model
    (preset / "config.json").unlink()
    os.mkfifo(preset / "config.json")
    begun = time.monotonic()
    with pytest.raises(ValueError, match="`preset` must be a directory"):
        load(cls, preset)
    assert time.monotonic() - begun < 5


def test_the_memory_that_there_is():
    assert 1e8 < untrusted.memory() <= float("inf")
