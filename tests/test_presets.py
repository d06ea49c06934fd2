"""Presets: the paper's networks by size, and a round trip through a folder."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DenoisingModel,
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    preset_files,
)
from keras_mscm.presets import PRESETS, __main__, training_cost
from keras_mscm.schedules import CosineSchedule, InterpolatedCosineSchedule

# Appendix A.1: parameters, dropout per stage, resolution of the images.
PAPER = {
    "imagenet64_small": (394e6, (0, 0, 0.2), 64),
    "imagenet64_large": (1.23e9, (0, 0.1, 0.1), 64),
    "imagenet128_small": (397e6, (0, 0, 0, 0.1), 128),
    "imagenet128_large": (1.25e9, (0, 0.1, 0.1, 0.1), 128),
    # The paper gives no number for this one.
    "text_to_image_512": (5.558e9, (0, 0, 0, 0, 0.1), 512),
}
LAPTOP = {
    "digits": (8, 8, 1),
    "grey28": (28, 28, 1),
    "colour32": (32, 32, 3),
    "colour64": (64, 64, 3),
}
SHIPPED = [name for name, facts in PRESETS.items() if facts["weights"]]


def inputs_for(network, batch=2):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((batch, *network.image_shape))
    inputs = {
        "z": ops.convert_to_tensor(z, "float32"),
        "logsnr": ops.convert_to_tensor(rng.uniform(-9, 9, batch), "float32"),
    }
    if network.num_classes:
        inputs["labels"] = ops.arange(batch, dtype="int32")
    return inputs


def outputs(network, inputs):
    return ops.convert_to_numpy(network(inputs))


def make_student(network, **kwargs):
    """A student whose moving average is not its network."""
    schedule = CosineSchedule(logsnr_max=9.0)
    student = MultistepConsistencyModel(
        network, schedule, student_steps=3, **kwargs
    )
    for weight in student.network.weights:
        weight.assign(weight + 1)
    return student


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What comes with the package.


@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_the_papers_networks(name):
    expected, _, _ = PAPER[name]
    got = preset_files.count(name)
    print(f"{name}: {got['parameters']:,} parameters, {got['flops']:,} FLOPs")
    assert got["parameters"] == pytest.approx(expected, rel=0.015)
    in_paper = PRESETS[name].get("paper_parameters", expected)
    assert in_paper == expected


def test_counting_takes_no_memory_and_leaves_nothing_behind():
    resource = pytest.importorskip("resource")

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    preset_files.count("imagenet128_large")
    with keras.StatelessScope():
        pass  # which gives values to variables that have none
    assert peak() - before < 1e9  # the weights alone would be 5e9


@pytest.mark.parametrize("name", ["digits", "grey28"])
def test_the_count_is_that_of_the_network(name):
    network = UViT.from_preset(name, load_weights=False)
    assert preset_files.count(name) == {
        "parameters": network.count_params(),
        "flops": network.flops(),
    }


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_dropout_and_schedule(name):
    _, dropout, resolution = PAPER[name]
    network = preset_files.read(name, "config.json")["config"]
    assert tuple(network["dropout"]) == dropout
    assert network["image_shape"] == [resolution, resolution, 3]
    schedule = keras.saving.deserialize_keras_object(
        preset_files.read(name, "task.json")["config"]["schedule"]
    )
    assert isinstance(schedule, InterpolatedCosineSchedule)
    assert schedule.image_resolution == resolution
    assert schedule.noise_resolution_low == 32
    assert schedule.noise_resolution_high == resolution


@pytest.mark.parametrize("name", LAPTOP)
def test_laptop_presets(name):
    network = UViT.from_preset(name, load_weights=False)
    assert network.image_shape == LAPTOP[name] == PRESETS[name]["image_shape"]
    assert PRESETS[name]["model"] is None
    assert_is_a_training_step(PRESETS[name]["training_step"])


def assert_is_a_training_step(step):
    assert step["milliseconds"] > 0
    assert "keras" in step["versions"]
    for fact in ("batch_size", "backend", "hardware", "date"):
        assert step[fact]


def test_the_cost_of_a_training_step(tiny_uvit, tmp_path, capsys):
    tiny_uvit(num_classes=3).save_to_preset(tmp_path / "tiny")
    preset, options = tmp_path / "tiny", ["--batch-size=4", "--num-steps=3"]
    before = preset_files.read(preset, "metadata.json")
    training_cost.main([str(preset), *options, "--write"])
    step = json.loads(capsys.readouterr().out)
    assert preset_files.read(preset, "metadata.json") == {
        **before,
        "training_step": step,
    }
    assert_is_a_training_step(step)
    assert step["batch_size"] == 4
    assert step["backend"] == keras.backend.backend()
    assert keras.backend.backend() in step["versions"]


def test_every_preset_says_what_it_is():
    assert {*PAPER, *LAPTOP} <= {*PRESETS}
    replaced = {f"digits_{k}_step" for k in (1, 8)}
    assert [*PRESETS] == sorted({*preset_files.names()} - replaced)
    for facts in PRESETS.values():
        assert facts["description"]


def test_the_list_as_data(capsys):
    __main__.main(["--json"])
    listed = {
        facts["name"]: facts for facts in json.loads(capsys.readouterr().out)
    }
    assert list(listed) == list(PRESETS)
    facts = listed["imagenet64_small"]
    assert facts["parameters"] == pytest.approx(394e6, rel=0.015)
    assert facts["flops"] > 2e11
    assert facts["image_shape"] == [64, 64, 3]
    assert facts["weights"] is False


def test_the_list_as_a_table(capsys):
    __main__.main([])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["name", "images", "parameters", "FLOPs"]
    assert [row.split()[0] for row in rows] == list(PRESETS)
    (row,) = (row for row in rows if row.startswith("imagenet64_small"))
    assert row.split()[1:] == ["64x64x3", "395.4", "M", "217.1", "G", "no"]


def test_the_shipped_weights_are_small():
    sizes = [(preset_files.find(name) / "model.weights.h5") for name in SHIPPED]
    assert sum(path.stat().st_size for path in sizes) < 8e6


# Networks.


def test_a_network_with_other_arguments():
    network = UViT.from_preset(
        "digits", load_weights=False, num_classes=3, dtype="mixed_bfloat16"
    )
    assert network.num_classes == 3
    assert network.widths == (128,)
    assert network.dtype_policy.name == "mixed_bfloat16"


def test_a_preset_that_is_not_there(tmp_path):
    for preset in ("imagenet65", tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match=r"one of.*imagenet64_small"):
            UViT.from_preset(preset)


def test_a_preset_without_weights():
    with pytest.raises(ValueError, match=r"`load_weights` must be False.*True"):
        UViT.from_preset("imagenet64_large")


def test_a_network_of_another_class(tmp_path):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    preset_files.save_to_preset(network, tmp_path / "dense")
    with pytest.raises(ValueError, match=r"hold a UViT.*holds a Sequential"):
        UViT.from_preset(tmp_path / "dense")
    loaded = preset_files.load_network(keras.Model, tmp_path / "dense")
    x = np.ones((1, 2))
    np.testing.assert_array_equal(outputs(loaded, x), outputs(network, x))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_network_there_and_back(tiny_uvit, tmp_path, as_text):
    network = tiny_uvit(num_classes=3, dropout=0.1)
    preset = tmp_path / "new" / "preset"
    preset = str(preset) if as_text else preset
    network.save_to_preset(preset, metadata={"description": "tiny"})
    loaded = UViT.from_preset(preset)
    assert loaded.get_config() == network.get_config()
    inputs = inputs_for(network)
    np.testing.assert_array_equal(
        outputs(loaded, inputs), outputs(network, inputs)
    )
    facts = preset_files.read(preset, "metadata.json")
    assert facts["description"] == "tiny"
    assert facts["parameters"] == network.count_params()
    fresh = UViT.from_preset(preset, load_weights=False)
    assert not np.any(outputs(fresh, inputs))


def test_half_precision_in_the_file(tiny_uvit, tmp_path):
    network = tiny_uvit()
    sizes = {}
    for dtype in ("float32", "float16"):
        preset = tmp_path / dtype
        network.save_to_preset(preset, weights_dtype=dtype)
        sizes[dtype] = (preset / "model.weights.h5").stat().st_size
        assert sorted(contents(preset)) == [
            "config.json",
            "metadata.json",
            "model.weights.h5",
        ]
    assert sizes["float16"] < 0.7 * sizes["float32"]
    loaded = UViT.from_preset(tmp_path / "float16")
    for ours, theirs in zip(loaded.weights, network.weights):
        assert keras.backend.standardize_dtype(ours.dtype) == "float32"
        # 11 bits; below 6e-5 fewer.
        np.testing.assert_allclose(
            ops.convert_to_numpy(ours),
            ops.convert_to_numpy(theirs),
            rtol=2**-11,
            atol=2**-25,
        )
    with pytest.raises(ValueError, match=r"`weights_dtype` must be.*bfloat16"):
        network.save_to_preset(tmp_path / "other", weights_dtype="bfloat16")


@keras.saving.register_keras_serializable(package="tests")
class Counter(keras.layers.Layer):
    """Holds a number that float16 can't."""

    def build(self, input_shape):
        self.counter = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False
        )

    def call(self, inputs):
        return inputs


def test_half_precision_is_for_real_numbers_only(tmp_path):
    network = keras.Sequential([keras.Input((2,)), Counter()])
    network.layers[0].counter.assign(123457)
    preset_files.save_to_preset(
        network, tmp_path / "a", weights_dtype="float16"
    )
    loaded = preset_files.load_network(keras.Model, tmp_path / "a")
    assert int(loaded.layers[0].counter) == 123457


def test_saving_is_all_or_nothing(tiny_uvit, tmp_path, monkeypatch):
    network, preset = tiny_uvit(), tmp_path / "preset"
    network.save_to_preset(preset)
    before = contents(preset)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(keras.saving, "save_weights", fail)
        for target in (preset, tmp_path / "new"):
            with pytest.raises(OSError, match="disk full"):
                network.save_to_preset(target)
    assert contents(preset) == before
    assert [*tmp_path.iterdir()] == [preset]
    tiny_uvit(num_classes=7).save_to_preset(preset)
    assert UViT.from_preset(preset).num_classes == 7
    assert [*tmp_path.iterdir()] == [preset]


def test_saving_replaces_nothing_but_presets(tiny_uvit, tmp_path):
    kept = tmp_path / "thesis.txt"
    kept.write_text("mine")
    with pytest.raises(ValueError, match="`preset` must be a new directory"):
        tiny_uvit().save_to_preset(tmp_path)
    assert kept.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    tiny_uvit().save_to_preset(tmp_path / "empty")
    assert UViT.from_preset(tmp_path / "empty")


# Models.


@pytest.mark.parametrize("asked", [MultistepConsistencyModel, DenoisingModel])
def test_a_model_there_and_back(tiny_uvit, tmp_path, asked):
    student = make_student(
        tiny_uvit(num_classes=3), eta=0.5, prediction_type="x", ema_decay=0.9
    )
    student.save_to_preset(tmp_path / "student")
    task = preset_files.read(tmp_path / "student", "task.json")
    assert "network" not in task["config"]
    loaded = asked.from_preset(tmp_path / "student")
    assert type(loaded) is MultistepConsistencyModel
    configs = [model.get_config() for model in (student, loaded)]
    assert configs[0].pop("network") == configs[1].pop("network")
    assert configs[0] == configs[1]
    # The moving average, in both networks.
    for network in (loaded.network, loaded.ema_network):
        for ours, theirs in zip(network.weights, student.ema_network.weights):
            np.testing.assert_array_equal(
                ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
            )
    assert loaded.network.trainable
    assert not loaded.ema_network.trainable
    images = [
        model.generate(labels=np.arange(3), seed=1)
        for model in (student, loaded)
    ]
    np.testing.assert_array_equal(*images)


def test_a_model_with_other_arguments(tiny_uvit, tmp_path):
    make_student(tiny_uvit()).save_to_preset(tmp_path / "student")
    loaded = MultistepConsistencyModel.from_preset(
        tmp_path / "student",
        eta=0.25,
        schedule=CosineSchedule(),
        dtype="mixed_bfloat16",
    )
    assert (loaded.eta, loaded.student_steps) == (0.25, 3)
    assert loaded.schedule.logsnr_max == 15
    assert loaded.network.dtype_policy.name == "mixed_bfloat16"
    assert loaded.dtype_policy.name == "mixed_bfloat16"
    network = tiny_uvit(num_classes=5)
    loaded = MultistepConsistencyModel.from_preset(
        tmp_path / "student", network=network
    )
    assert loaded.network is network
    assert loaded.num_classes == 5


def test_a_model_of_another_class(tiny_uvit, tmp_path):
    make_student(tiny_uvit()).save_to_preset(tmp_path / "student")
    with pytest.raises(ValueError, match=r"`MultistepConsistencyModel.from_"):
        DiffusionModel.from_preset(tmp_path / "student")


def test_a_subclass_of_what_is_there(tiny_uvit, tmp_path):
    class Mine(DiffusionModel):
        pass

    teacher = DiffusionModel(tiny_uvit())
    teacher.save_to_preset(tmp_path / "teacher")
    assert type(Mine.from_preset(tmp_path / "teacher")) is Mine
    Mine(tiny_uvit()).save_to_preset(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"known to Keras.*Mine"):
        DiffusionModel.from_preset(tmp_path / "mine")


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [(DiffusionModel, {}), (MultistepConsistencyModel, {"student_steps": 4})],
)
def test_a_new_model_around_a_network(cls, kwargs):
    model = cls.from_preset(
        "colour64", load_weights=False, ema_decay=0.5, **kwargs
    )
    assert type(model) is cls
    assert model.network.widths == (128, 256)
    assert model.schedule.noise_resolution_high == 64
    assert model.ema_decay == 0.5
    with pytest.raises(ValueError, match=r"must be False.*without weights"):
        cls.from_preset("colour64", **kwargs)


def test_a_model_around_a_foreign_network(tmp_path):
    inputs = {
        "z": keras.Input((4, 4, 1), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
    }
    h = keras.layers.Flatten()(inputs["z"])
    h = keras.layers.Dense(16)(h)
    network = keras.Model(inputs, keras.layers.Reshape((4, 4, 1))(h))
    model = DiffusionModel(network, image_shape=(4, 4, 1))
    model.save_to_preset(tmp_path / "foreign")
    loaded = DiffusionModel.from_preset(tmp_path / "foreign")
    images = [m.generate(2, num_steps=2, seed=0) for m in (model, loaded)]
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_draw_digits(name):
    model = DenoisingModel.from_preset(name)
    for num_steps in model.get_config().get("student_steps", [16]):
        images = model.generate(num_images=16, seed=0, num_steps=num_steps)
        assert images.shape == (16, 8, 8, 1)
        # As digits are, neither empty nor noise: dark at the sides, light
        # within.
        mean = images.mean(axis=(0, 3))
        assert mean[:, [0, 7]].max() < -0.8
        assert mean[2:6, 3:5].mean() > -0.2


@pytest.mark.parametrize("k", [1, 8])
def test_students_of_one_number_of_steps_still_load(k):
    assert f"digits_{k}_step" not in PRESETS
    with pytest.warns(FutureWarning, match="take 'digits_any_step'"):
        student = MultistepConsistencyModel.from_preset(f"digits_{k}_step")
    assert student.student_steps == k
    assert student.generate(2, seed=0).shape == (2, 8, 8, 1)
