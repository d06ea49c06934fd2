"""Files that a stranger made run no code, and take no memory that isn't theirs.

A payload only makes a file, `marker`, or is the replaced `os.system` and the
like, which then does. Beside each refusal stands a control, in which the same
payload does run: so the suite can't pass because nothing was tried.
"""

import copy
import io
import json
import marshal
import os
import pickle
import subprocess
import zipfile
from base64 import encodebytes

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    Condition,
    DenoisingModel,
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    losses,
    preset_files,
    spaces,
)
from keras_mscm import presets as listed
from keras_mscm.metrics import Reference
from keras_mscm.preset_files import folder, untrusted
from keras_mscm.presets import training_cost

resource = pytest.importorskip("resource")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def payload(marker, monkeypatch):
    """What makes the marker, whatever it is called with; it is `os.system`."""

    def run(*args, **kwargs):
        marker.touch()
        return args[0] if args else None

    run.__module__, run.__qualname__ = "os", "system"
    for module, name in ((os, "system"), (subprocess, "call")):
        monkeypatch.setattr(module, name, run)
    monkeypatch.setattr("builtins.input", run)
    return run


def lambda_code(marker):
    """A marshalled lambda that makes the marker and returns its argument."""
    source = f"lambda x, *args, **kwargs: [open({str(marker)!r}, 'w'), x][1]"
    code = eval(source).__code__
    return encodebytes(marshal.dumps(code)).decode("ascii")


def a_lambda(marker):
    value = [lambda_code(marker), None, None]
    return {"class_name": "__lambda__", "config": {"value": value}}


def a_function(module, name, **others):
    return {
        "module": module,
        "class_name": "function",
        "config": name,
        "registered_name": name,
        **others,
    }


def a_class(module, name, **others):
    return {
        "module": module,
        "class_name": name,
        "config": {},
        "registered_name": None,
        **others,
    }


FUNCTIONS = {
    "os": a_function("os", "system"),
    "posix": a_function("posix", "system"),
    "subprocess": a_function("subprocess", "call"),
    "builtins": a_function("builtins", "input"),
    "exec": a_function("builtins", "exec"),
    "no_name": a_function("os", "system", registered_name=None),
    "path": a_function("os.path", "os.system"),
    "pretends": a_function(
        "os", "system", registered_name="keras_mscm>uniform"
    ),
    "by_keras": a_function("keras.src.saving.saving_lib", "os.system"),
    "of_keras": a_function("keras.src.saving.saving_lib", "get_temp_dir"),
    "class": a_class("os", "system"),
    "popen": a_class("subprocess", "Popen", config={"args": ["true"]}),
    "class_of_keras": a_class("keras.src.saving.saving_lib", "os"),
    "pretends_class": a_class("os", "system", registered_name="os>system"),
    "typespec": a_class(
        "os", "__typespec__", spec_name="system", config=[], registered_name=""
    ),
    "acts": a_function("keras.distribution", "set_distribution"),
    "acts_class": a_class("keras.distribution", "set_distribution"),
    "downloads": a_function("keras.datasets.mnist", "load_data"),
    "plots": a_function("keras.utils", "plot_model"),
    "reads": a_function("keras.saving", "load_model"),
    "unsafe": a_function("keras.config", "enable_unsafe_deserialization"),
}
# Where a file says what is to be called, and whether that is called on loading.
SLOTS = {
    ("config", "teacher_steps"): True,
    ("config", "weighting"): False,
    ("config", "x_var"): True,
    ("config", "integrator"): False,
    ("config", "integrator", "config", "x_var"): False,
    ("config", "schedule"): False,
    ("config", "network"): False,
    ("config", "dtype"): False,
    ("compile_config", "loss"): True,
    ("compile_config", "loss", "config", "loss"): False,
    ("compile_config", "metrics"): True,
    ("compile_config", "optimizer"): False,
    ("compile_config", "optimizer", "config", "learning_rate"): False,
}
LAYER = ("config", "network", "config", "layers", "dense", "config")
SLOTS |= {
    (*LAYER, "activation"): True,
    (*LAYER, "kernel_initializer"): True,
    (*LAYER, "bias_initializer"): True,
    (*LAYER, "kernel_regularizer"): False,
    (*LAYER, "kernel_constraint"): False,
}
# Of these Keras makes no function of marshalled code, even if told to.
NAMED = "kernel_initializer", "bias_initializer"
slots = pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: ".".join(slot))


def a_network():
    inputs = {
        "z": keras.Input((4, 4, 1), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
    }
    h = keras.layers.Reshape((16,))(inputs["z"])
    h = keras.layers.Dense(16, name="dense")(h)
    return keras.Model(inputs, keras.layers.Reshape((4, 4, 1))(h))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A student's file, with an optimizer, a loss and a metric."""
    student = MultistepConsistencyModel(
        a_network(), student_steps=2, image_shape=(4, 4, 1)
    )
    rate = keras.optimizers.schedules.CosineDecay(1e-3, 10)
    student.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss=losses.Multiscale(losses.SquaredL2()),
        metrics=[keras.metrics.MeanSquaredError()],
    )
    path = tmp_path_factory.mktemp("saved") / "student.keras"
    student.save(path)
    return path


def rewrite(source, target, *, config=None, weights=None):
    """A file with another configuration, or other weights."""
    replaced = {"config.json": config, "model.weights.h5": weights}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if replaced.get(name):
                content = replaced[name](content)
            new.writestr(name, content)
    return target


def put(config, slot, value):
    """Puts something into a place of a configuration."""
    for key in slot[:-1]:
        if key == "layers":
            layers = {layer["name"]: layer for layer in config[key]}
        else:
            config = layers[key] if key == "dense" else config[key]
    is_list = slot[-1] == "metrics"
    config[slot[-1]] = [value] if is_list else value


def with_payload(source, target, slot, value):
    def change(content):
        config = json.loads(content)
        put(config, slot, copy.deepcopy(value))
        return json.dumps(config).encode()

    return rewrite(source, target, config=change)


def load(path, **options):
    """Loads a file, or says why not."""
    try:
        return keras.saving.load_model(path, **options)
    except Exception as error:
        return error


def places(model):
    """The functions that a loaded model holds."""
    dense = model.network.get_layer("dense")
    return [
        model.teacher_steps,
        model.weighting,
        model.x_var,
        model.integrator,
        getattr(model.integrator, "x_var", None),
        model.schedule,
        getattr(model.optimizer, "_learning_rate", None),
        dense.kernel_regularizer,
        dense.kernel_constraint,
    ]


# Models' files.


def test_the_file_itself_loads(saved):
    assert isinstance(load(saved), MultistepConsistencyModel)


@slots
def test_a_function_in_any_place_of_a_model(
    saved, tmp_path, payload, marker, slot
):
    function = FUNCTIONS["os"]
    path = with_payload(saved, tmp_path / "evil.keras", slot, function)
    refused = load(path)
    assert isinstance(refused, Exception), refused
    assert not marker.exists()
    # The control: it would run there, or be held, were it allowed.
    got = load(path, custom_objects={"system": payload})
    if SLOTS[slot]:
        assert marker.exists()
    elif isinstance(got, keras.Model):
        assert payload in places(got)
    else:
        # There no function can be, and Keras or the constructor says so.
        assert "function" in str(got) or slot[-1] in str(got), got


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    "slot", [("config", "teacher_steps"), ("compile_config", "loss")]
)
def test_any_function_where_it_would_be_called(
    saved, tmp_path, payload, marker, function, slot
):
    path = with_payload(saved, tmp_path / "evil.keras", slot, function)
    refused = load(path)
    assert isinstance(refused, (ValueError, TypeError)), refused
    assert not marker.exists()
    assert keras.distribution.distribution() is None
    # It is a name that is refused, and not a shape that did not fit.
    assert "onfig" in str(refused) or "deserial" in str(refused), refused


def test_a_function_of_keras_that_acts_would_act():
    # Whoever calls the constructor chooses what it calls.
    acts = keras.distribution.set_distribution
    try:
        with pytest.raises(Exception, match=r"float|argument|teacher_steps"):
            MultistepConsistencyModel(
                a_network(),
                student_steps=2,
                image_shape=(4, 4, 1),
                teacher_steps=acts,
            )
        assert keras.distribution.distribution() is not None
    finally:
        acts(None)


def test_a_constructor_would_call_it(payload, marker):
    with pytest.raises(ValueError, match="teacher_steps"):
        MultistepConsistencyModel(
            a_network(),
            student_steps=2,
            image_shape=(4, 4, 1),
            teacher_steps=payload,
        )
    assert marker.exists()


@slots
def test_marshalled_code_in_any_place(saved, tmp_path, marker, slot):
    path = with_payload(saved, tmp_path / "evil.keras", slot, a_lambda(marker))
    refused = load(path)
    assert isinstance(refused, Exception), refused
    assert not marker.exists()
    load(path, safe_mode=False)
    assert marker.exists() == (SLOTS[slot] and slot[-1] not in NAMED)


def a_lambda_layer(marker):
    function = {"code": lambda_code(marker), "defaults": None, "closure": None}
    function = {"class_name": "__lambda__", "config": function}
    config = {"name": "evil", "function": function, "arguments": {}}
    return a_class("keras.layers", "Lambda", config=config)


def a_network_with_a_lambda(marker):
    layers = [
        a_class("keras.layers", "Flatten"),
        a_lambda_layer(marker),
        a_class("keras.layers", "Reshape", config={"target_shape": [4, 4, 1]}),
    ]
    first = {"batch_shape": [None, 4, 4, 1]}
    config = {"name": "evil", "layers": layers}
    layers.insert(0, a_class("keras.layers", "InputLayer", config=first))
    return a_class("keras", "Sequential", config=config)


def test_a_lambda_layer_in_a_models_network(saved, tmp_path, marker):
    path = with_payload(
        saved,
        tmp_path / "evil.keras",
        ("config", "network"),
        a_network_with_a_lambda(marker),
    )
    refused = load(path)
    assert "unsafe" in str(refused) or "arbitrary code" in str(refused)
    assert not marker.exists()
    load(path, safe_mode=False)
    assert marker.exists()


# Presets.


@pytest.fixture
def preset(tmp_path):
    student = MultistepConsistencyModel(
        a_network(), student_steps=2, image_shape=(4, 4, 1)
    )
    student.save_to_preset(tmp_path / "preset")
    return tmp_path / "preset"


def change(path, slot, value):
    config = json.loads(path.read_text())
    put(config, slot, copy.deepcopy(value))
    path.write_text(json.dumps(config))


EVIL = {k: v for k, v in FUNCTIONS.items() if k in ("os", "acts", "class")}
TASK_SLOTS = [slot for slot in SLOTS if slot[0] == "config" and len(slot) < 5]


@pytest.mark.parametrize("function", [*EVIL, "lambda"])
@pytest.mark.parametrize("slot", TASK_SLOTS, ids=lambda s: ".".join(s))
def test_a_function_in_any_place_of_a_presets_model(
    preset, payload, marker, slot, function
):
    value = EVIL.get(function) or a_lambda(marker)
    change(preset / "task.json", slot, value)
    with pytest.raises(ValueError, match=r"task\.json"):
        MultistepConsistencyModel.from_preset(preset)
    with pytest.raises(ValueError, match=r"task\.json"):
        MultistepConsistencyModel.from_preset(preset, dtype="float32")
    assert not marker.exists()
    assert keras.distribution.distribution() is None
    # The control: the place is one that is read.
    if function == "os" and slot[-1] == "teacher_steps":
        with (
            keras.saving.custom_object_scope({"system": payload}),
            pytest.raises(ValueError, match="teacher_steps"),
        ):
            MultistepConsistencyModel.from_preset(preset)
        assert marker.exists()


@pytest.mark.parametrize("function", [*EVIL, "lambda"])
@pytest.mark.parametrize(
    "slot", [s[2:] for s in SLOTS if len(s) > 5], ids=lambda s: s[-1]
)
def test_a_function_in_any_place_of_a_presets_network(
    preset, payload, marker, slot, function
):
    value = EVIL.get(function) or a_lambda(marker)
    change(preset / "config.json", slot, value)
    for load_weights in (True, False):
        for cls in (keras.Layer, keras.Model):
            with pytest.raises(ValueError, match=r"config\.json"):
                preset_files.load_network(cls, preset, load_weights)
        with pytest.raises(ValueError, match=r"config\.json"):
            DenoisingModel.from_preset(preset, load_weights)
    assert not marker.exists()


def test_the_commands_run_no_code(preset, marker, monkeypatch):
    config = a_network_with_a_lambda(marker)
    (preset / "config.json").write_text(json.dumps(config))
    (preset / "task.json").unlink()
    for run in (
        lambda: training_cost.training_step(preset, 4),
        lambda: preset_files.count(preset),
        lambda: preset_files.load_network(keras.Layer, preset, False),
    ):
        with pytest.raises(ValueError, match=r"arbitrary code|unsafe"):
            run()
    monkeypatch.setattr(folder, "BUILT_IN", preset.parent)
    with pytest.raises(ValueError, match=r"config\.json.*image_shape"):
        listed._facts("preset")
    monkeypatch.setattr(listed, "PRESETS", {"preset": {}})
    with pytest.raises(ValueError, match=r"arbitrary code|unsafe"):
        listed.summary()
    assert not marker.exists()
    network = keras.saving.deserialize_keras_object(config, safe_mode=False)
    assert isinstance(network, keras.Sequential)
    assert marker.exists()


def test_a_pickled_network_of_pytorch(preset):
    layer = a_class("keras.layers", "TorchModuleWrapper")
    layer["config"] = {"module": "AAAA"}
    (preset / "config.json").write_text(json.dumps(layer))
    with pytest.raises(ValueError, match=r"config\.json"):
        preset_files.load_network(keras.Layer, preset, False)


# Files of weights.

ARRAY = "layers/dense/vars/0"
HUGE = 25_000_000_000  # 100 GB in float32


def replace_array(file, make):
    path = next(
        name for name in (ARRAY, f"ema_network/{ARRAY}") if name in file
    )
    del file[path]
    make(file, path)
    return path


def a_secret(folder):
    with h5py.File(folder / "secret.h5", "w") as file:
        file["secret"] = np.full((16, 16), 7.0, "float32")
    (folder / "secret.bin").write_bytes(np.full(256, 7.0, "float32").tobytes())


def an_external_link(folder):
    def make(file, path):
        file[path] = h5py.ExternalLink(str(folder / "secret.h5"), "secret")

    return make


def a_soft_link(folder):
    def make(file, path):
        file["copy"] = np.full((16, 16), 7.0, "float32")
        file[path] = h5py.SoftLink("/copy")

    return make


def an_external_array(folder):
    def make(file, path):
        part = (str(folder / "secret.bin"), 0, 1024)
        file.create_dataset(path, (16, 16), "float32", external=[part])

    return make


def a_virtual_array(folder):
    def make(file, path):
        layout = h5py.VirtualLayout((16, 16), "float32")
        source = h5py.VirtualSource(
            str(folder / "secret.h5"), "secret", (16, 16)
        )
        layout[:] = source
        file.create_virtual_dataset(path, layout)

    return make


def a_huge_array(folder):
    def make(file, path):
        file.create_dataset(path, (HUGE,), "float32", chunks=(2**20,))

    return make


def a_huge_unchunked_array(folder):
    def make(file, path):
        file.create_dataset(path, (HUGE,), "float32")

    return make


def many_arrays_that_are_not_stored(folder):
    def make(file, path):
        for i in range(400):  # of 63 MiB each, which alone may be
            file.create_dataset(f"{path}_{i}", (63 * 2**18,), "float32")
        file.create_dataset(path, (16, 16), "float32")

    return make


def one_array_many_times(folder):
    def make(file, path):
        file.create_dataset(path, data=np.zeros(2**20, "float32"))
        for i in range(100):
            file[f"{path}_{i}"] = file[path]

    return make


def strings(folder):
    def make(file, path):
        file[path] = np.array(["a", "b"], dtype=h5py.string_dtype())

    return make


def a_circle(folder):
    def make(file, path):
        file[path] = file["/"]

    return make


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


LINKS = [an_external_link, a_soft_link, an_external_array, a_virtual_array]
SIZES = [a_huge_array, a_huge_unchunked_array]


OTHERS = [
    many_arrays_that_are_not_stored,
    one_array_many_times,
    strings,
    a_circle,
]


@pytest.mark.parametrize("kind", [*LINKS, *SIZES, *OTHERS])
def test_weights_that_are_not_in_their_file(preset, tmp_path, kind):
    a_secret(tmp_path)
    path = preset / "model.weights.h5"
    with h5py.File(path, "r+") as file:
        name = replace_array(file, kind(tmp_path))
        # The control: HDF5 itself follows where it leads.
        if kind in LINKS:
            np.testing.assert_array_equal(file[name][()], np.full((16, 16), 7))
        elif kind in SIZES:
            assert file[name].nbytes == 4 * HUGE
    before = peak()
    for cls in (DenoisingModel, MultistepConsistencyModel):
        with pytest.raises(ValueError, match=r"weights\.h5 must be"):
            cls.from_preset(preset)
    assert peak() - before < 3e8


@pytest.mark.parametrize("kind", [*LINKS, *SIZES])
def test_a_models_weights_that_are_not_in_its_file(saved, tmp_path, kind):
    a_secret(tmp_path)

    def change(content):
        stream = io.BytesIO(content)
        with h5py.File(stream, "r+") as file:
            replace_array(file, kind(tmp_path))
        return stream.getvalue()

    path = rewrite(saved, tmp_path / "evil.keras", weights=change)
    before = peak()
    refused = load(path)
    assert isinstance(refused, ValueError), refused
    assert "could not be loaded" in str(refused)
    assert peak() - before < 3e8


def a_huge_network():
    config = json.loads(
        (preset_files.BUILT_IN / "digits/config.json").read_text()
    )
    config["config"] |= {"widths": [65536], "depths": [2]}  # 100 GB and more
    return config


@pytest.mark.parametrize("load_weights", [True, False])
def test_a_preset_of_100_gb(preset, monkeypatch, load_weights):
    (preset / "config.json").write_text(json.dumps(a_huge_network()))
    if not load_weights:
        monkeypatch.setattr(untrusted, "memory", lambda: 3.2e10)
    assert preset_files.count(preset)["parameters"] > HUGE
    before = peak()
    for cls in (UViT, MultistepConsistencyModel):
        with pytest.raises(ValueError, match=r"config\.json.*must fit.*GB"):
            cls.from_preset(preset, load_weights=load_weights)
    assert peak() - before < 3e8


def test_a_model_of_100_gb(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "memory", lambda: 3.2e10)
    slot = ("config", "network")
    path = with_payload(saved, tmp_path / "l.keras", slot, a_huge_network())
    before = peak()
    assert "must fit, here into 32 GB" in str(load(path))
    assert peak() - before < 3e8


# A reference's file.


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def features(images):
    return ops.convert_to_numpy(images)[:, :2, 0, 0]


@pytest.fixture
def reference(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 1))
    reference = Reference(images, features, name="noise")
    reference.save(tmp_path / "reference.npz")
    return tmp_path / "reference.npz"


@pytest.mark.parametrize("name", ["about", "mean", "covariance", "features"])
def test_pickles_in_a_reference(reference, marker, name):
    with np.load(reference) as file:
        arrays = dict(file)
    arrays[name] = np.array([Evil(marker)], dtype=object)
    np.savez(reference, **arrays)
    before = reference.read_bytes()
    with pytest.raises(ValueError, match=r"`path` must be.*reference\.npz"):
        Reference.load(reference, features)
    assert not marker.exists()
    assert reference.read_bytes() == before
    with np.load(reference, allow_pickle=True) as file:
        assert file[name].shape == (1,)
    assert marker.exists()


def test_a_reference_that_is_a_pickle(tmp_path, marker):
    path = tmp_path / "reference.npz"
    path.write_bytes(pickle.dumps(Evil(marker)))
    marker.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="`path` must be"):
        Reference.load(path, features)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_a_reference_of_100_gb(reference):
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (HUGE,)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(reference, "a") as archive:
        names = archive.namelist()
        archive.writestr("more.npy", header.getvalue())
    assert "features.npy" in names
    before = peak()
    with pytest.raises(ValueError, match="is more than is stored"):
        Reference.load(reference, features)
    assert peak() - before < 3e8


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("mean", np.zeros(3), "its covariance must be floats of shape"),
        ("covariance", np.zeros((2, 3)), r"shape \(2, 2\)"),
        ("features", np.zeros((4, 2)), r"shape \(5, 2\)"),
        ("features", np.full((5, 2), np.nan), "not finite"),
        ("mean", np.zeros(2, int), "its mean must be floats"),
        ("about", np.array("[]"), "description"),
        ("about", np.array("{"), "Expecting"),
        ("about", np.array("[" * 100_000), "recursion"),
    ],
)
def test_a_reference_of_other_contents(reference, name, array, says):
    with np.load(reference) as file:
        arrays = dict(file)
    np.savez(reference, **{**arrays, name: array})
    with pytest.raises(ValueError, match=rf"`path` must be.*npz.*{says}"):
        Reference.load(reference, features)


@pytest.mark.parametrize("content", [b"", b"mine", b"PK\x03\x04"])
def test_a_reference_replaces_only_references(reference, tmp_path, content):
    images = np.zeros((3, 4, 4, 1))
    made = Reference(images, features, name="zeros")
    made.save(reference)
    assert Reference.load(reference, features).name == "zeros"
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match="`path` must be"):
            made.save(place)
    assert path.read_bytes() == content
    with pytest.raises(ValueError, match="`path` must be"):
        Reference.load(tmp_path / "nowhere.npz", features)
    # A link stays one, and whoever may read files may read it.
    (tmp_path / "link").symlink_to(reference)
    made.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert reference.stat().st_mode == path.stat().st_mode


# Adapters' files.


def truncated(path, arrays):
    path.write_bytes(path.read_bytes()[:-200])


def other_contents(name, value):
    def damage(path, arrays):
        np.savez(path, **{**arrays, name: value})

    return damage


def one_less(path, arrays):
    np.savez(path, **{k: v for k, v in arrays.items() if k != "0.scale"})


def a_header_of_100_gb(path, arrays):
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (HUGE,)}
    np.lib.format.write_array_header_1_0(header, described)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("0.more.npy", header.getvalue())


def a_bomb(path, arrays):
    header = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (2**27,)}
    np.lib.format.write_array_header_1_0(header, described)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("0.more.npy", "w") as member,
    ):
        member.write(header.getvalue())
        for _ in range(512):
            member.write(bytes(2**20))


LORA = {
    "truncated": truncated,
    "empty": lambda path, arrays: path.write_bytes(b""),
    "array": lambda path, arrays: path.write_bytes(b"\x93NUMPY\x01\x00"),
    "zip": lambda path, arrays: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "other_rank": other_contents("0.lora_kernel_a", np.zeros((16, 3), "f4")),
    "nan": other_contents("0.lora_kernel_b", np.full((2, 16), np.nan, "f4")),
    "infinite": other_contents("0.scale", np.float32("inf")),
    "words": other_contents("0.scale", np.array("1")),
    "complex": other_contents("0.scale", np.array(1j)),
    "one_less": one_less,
    "header": a_header_of_100_gb,
    "bomb": a_bomb,
}


@pytest.fixture
def adapted(tmp_path):
    model = DiffusionModel(a_network(), image_shape=(4, 4, 1), lora_rank=2)
    model.save_lora(tmp_path / "lora.npz")
    return model, tmp_path / "lora.npz"


def refuses(model, path):
    before = [ops.convert_to_numpy(w) for w in model.weights]
    memory = peak()
    with pytest.raises(ValueError, match="`path` must"):
        model.load_lora(path)
    assert peak() - memory < 3e8
    for ours, was in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), was)


@pytest.mark.parametrize("damage", LORA.values(), ids=LORA)
def test_adapters_that_are_damaged(adapted, damage):
    model, path = adapted
    model.load_lora(path)
    with np.load(path) as file:
        arrays = dict(file)
    damage(path, arrays)
    refuses(model, path)


def test_pickles_in_adapters(adapted, marker):
    model, path = adapted
    with np.load(path) as file:
        arrays = dict(file)
    arrays["0.scale"] = np.array([Evil(marker)], dtype=object)
    np.savez(path, **arrays)
    refuses(model, path)
    assert not marker.exists()


# What a model says of its examples.

DECLARED = {
    "space_function": ("space", FUNCTIONS["os"]),
    "space_class": ("space", FUNCTIONS["popen"]),
    "decoder": (("space", "config", "decoder"), FUNCTIONS["os"]),
    "shape": (("space", "config", "shape"), [4, -4, 1]),
    "scale": (("space", "config", "scale"), float("nan")),
    "declaration": ("conditioning", {"pooled": FUNCTIONS["os"]}),
    "size": (("conditioning", "pooled", "config", "shape"), [HUGE]),
    "null": (("conditioning", "pooled", "config", "null"), [[1.0], 2.0]),
    "classes": (("conditioning", "pooled", "config", "num_classes"), -1),
}


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """A file of a model of latents, which are conditioned on something."""
    inputs = {
        "z": keras.Input((4, 4, 1), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
        "pooled": keras.Input((3,), name="pooled"),
    }
    told = keras.layers.Dense(1)(inputs["pooled"])[:, None, None]
    network = keras.Model(inputs, keras.layers.Dense(1)(inputs["z"]) + told)
    double = keras.layers.UpSampling2D(2, data_format="channels_last")
    model = DiffusionModel(
        network,
        space=spaces.Latents((4, 4, 1), None, double, image_shape=(8, 8, 1)),
        conditioning={"pooled": Condition((3,), null=0.0)},
    )
    path = tmp_path_factory.mktemp("declared") / "model.keras"
    model.save(path)
    return path


@pytest.mark.parametrize(("slot", "value"), DECLARED.values(), ids=DECLARED)
def test_what_a_model_says_of_its_examples(
    declared, tmp_path, payload, marker, slot, value
):
    assert isinstance(load(declared), DiffusionModel)
    slot = ("config", *((slot,) if isinstance(slot, str) else slot))
    path = with_payload(declared, tmp_path / "evil.keras", slot, value)
    before = peak()
    refused = load(path)
    assert isinstance(refused, (ValueError, TypeError)), refused
    assert not marker.exists()
    assert peak() - before < 3e8
