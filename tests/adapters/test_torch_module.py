import zipfile

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, backend

if backend.NAME != "torch":
    pytest.skip(
        "PyTorch's modules run on the torch backend only",
        allow_module_level=True,
    )

import torch

from keras_mscm.adapters.torch_module import TorchModule


class Denoiser(torch.nn.Module):
    """A network of the contract, with all kinds of state."""

    def __init__(self, width=8, rate=0.0):
        super().__init__()
        self.first = torch.nn.Conv2d(2, width, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(width)
        self.drop = torch.nn.Dropout(rate)
        self.last = torch.nn.Conv2d(width, 1, 3, padding=1)
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self, inputs):
        z = inputs["z"].permute(0, 3, 1, 2)
        t = torch.sigmoid(inputs["logsnr"])[:, None, None, None]
        t = t.expand_as(z).to(z.dtype)
        hidden = self.norm(self.first(torch.cat([z, t], 1)))
        hidden = self.drop(torch.nn.functional.silu(hidden)) * self.table[0]
        return self.last(hidden).permute(0, 2, 3, 1)


@keras.saving.register_keras_serializable("test_torch_module")
def make_denoiser(**arguments):
    return Denoiser(**arguments)


def layer_of(**kwargs):
    torch.manual_seed(0)
    layer = TorchModule(Denoiser(), **kwargs)
    layer.image_shape = (8, 8, 1)
    return layer


def inputs(batch=3):
    rng = np.random.default_rng(0)
    return {
        "z": ops.convert_to_tensor(
            rng.standard_normal((batch, 8, 8, 1)).astype("float32")
        ),
        "logsnr": ops.convert_to_tensor(
            rng.standard_normal(batch).astype("float32")
        ),
    }


def numpy(layer):
    return {w.path: ops.convert_to_numpy(w) for w in layer.weights}


def assert_same(one, other):
    for ours, theirs in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
        )


def test_weights_are_the_modules_own():
    layer = layer_of()
    named = dict(layer.module.named_parameters())
    names = {w.name.replace("-", ".") for w in layer.trainable_weights}
    assert names == {*named}
    assert [w.name for w in layer.non_trainable_weights] == [
        "norm-running_mean",
        "norm-running_var",
        "norm-num_batches_tracked",
    ]
    for weight in layer.trainable_weights:
        assert weight.value is named[weight.name.replace("-", ".")]


def test_it_calls_the_module():
    layer = layer_of()
    expected = layer.module.eval()(inputs())
    np.testing.assert_array_equal(layer(inputs()).detach(), expected.detach())


def test_mode_and_statistics_follow_training():
    layer = layer_of()
    before = numpy(layer)
    layer(inputs(), training=False)
    for name, value in numpy(layer).items():
        np.testing.assert_array_equal(value, before[name])
    layer(inputs(), training=True)
    for name, value in numpy(layer).items():
        same = np.array_equal(value, before[name])
        assert same == ("running" not in name and "num_batches" not in name)
    assert layer.module.training


def test_what_requires_no_gradient_is_not_trainable():
    module = Denoiser()
    module.first.weight.requires_grad_(False)
    layer = TorchModule(module)
    assert "first-weight" not in {w.name for w in layer.trainable_weights}
    assert "first-weight" not in {
        w.name for w in layer.clone().trainable_weights
    }


def test_frozen_layer_has_a_clone_that_learns():
    layer = layer_of()
    layer.trainable = False
    assert not any(p.requires_grad for p in layer.module.parameters())
    clone = layer.clone()
    assert len(clone.trainable_weights) == 6
    assert all(p.requires_grad for p in clone.module.parameters())


def test_clone_is_independent():
    layer = layer_of()
    clone = layer.clone("second")
    assert clone.name == "second"
    assert_same(layer, clone)
    before = numpy(clone)
    for weight in layer.weights:
        weight.assign(ops.zeros_like(weight))
    for name, value in numpy(clone).items():
        np.testing.assert_array_equal(value, before[name])
    clone(inputs(), training=True)
    assert not np.any(ops.convert_to_numpy(layer.non_trainable_weights[0]))


def test_shape_is_told_without_computing():
    layer = layer_of()
    spec = layer.compute_output_spec(
        {
            "z": keras.KerasTensor((None, 8, 8, 1)),
            "logsnr": keras.KerasTensor((None,)),
        }
    )
    assert spec.shape == (None, 8, 8, 1)
    assert spec.dtype == "float32"


def test_times_stay_in_float32():
    class Times(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.half))

        def forward(self, z, t):
            return z * self.weight, t

    z, t = TorchModule(Times())(ops.ones((1, 2)), ops.full((1,), 999.45))
    assert z.dtype == torch.float16
    assert float(t[0]) == np.float32(999.45)


def test_mixed_bfloat16():
    layer = layer_of(dtype="mixed_bfloat16")
    assert {w.dtype for w in layer.trainable_weights} == {"float32"}
    output = layer(inputs())
    assert output.dtype == torch.bfloat16
    expected = layer_of()(inputs())
    np.testing.assert_allclose(
        output.detach().float(), expected.detach(), atol=0.02
    )


def test_dropout_is_rewound():
    torch.manual_seed(0)
    layer = TorchModule(Denoiser(rate=0.5))
    layer.module.norm.momentum = 0.0
    with backend.rewound([]):
        one = layer(inputs(), training=True)
    two = layer(inputs(), training=True)
    three = layer(inputs(), training=True)
    np.testing.assert_array_equal(one.detach(), two.detach())
    assert np.any(ops.convert_to_numpy(two) != ops.convert_to_numpy(three))


def model_of(**kwargs):
    keras.utils.set_random_seed(0)
    # A decay of 0: the average is what the network was after its last update.
    model = DiffusionModel(layer_of(**kwargs), ema_decay=0.0)
    model.compile(optimizer="adam")
    return model


def test_fit_trains_the_module_and_its_average():
    model = model_of()
    before = numpy(model.network)
    images = np.zeros((16, 8, 8, 1), "float32")
    model.fit(images, batch_size=8, epochs=2, verbose=0)
    for weight in model.network.trainable_weights:
        assert np.any(ops.convert_to_numpy(weight) != before[weight.path])
    for average, weight in zip(
        model.ema_network.weights, model.network.weights, strict=True
    ):
        np.testing.assert_allclose(
            ops.convert_to_numpy(average),
            ops.convert_to_numpy(weight),
            atol=1e-6,
        )
    own = dict(model.ema_network.module.named_parameters())
    for weight in model.ema_network.weights:
        name = weight.name.replace("-", ".")
        if name in own:
            assert weight.value is own[name]


def test_saved_and_loaded(tmp_path):
    model = model_of(builder=make_denoiser)
    model.fit(np.zeros((8, 8, 8, 1), "float32"), batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(model.network, loaded.network)
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 1))
    np.testing.assert_array_equal(
        model.generate(num_steps=2, noise=noise),
        loaded.generate(num_steps=2, noise=noise),
    )
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert sorted(file.namelist()) == [
            "config.json",
            "metadata.json",
            "model.weights.h5",
        ]
    loaded.fit(np.zeros((8, 8, 8, 1), "float32"), batch_size=8, verbose=0)


def test_preset(tmp_path):
    model = model_of(builder=make_denoiser)
    model.save_to_preset(tmp_path / "preset")
    loaded = DiffusionModel.from_preset(tmp_path / "preset")
    assert_same(model.ema_network, loaded.network)
    fresh = DiffusionModel.from_preset(tmp_path / "preset", load_weights=False)
    assert len(fresh.network.weights) == len(model.network.weights)
    (tmp_path / "preset" / "model.weights.h5").unlink()


def test_too_large_a_module_takes_no_memory(tmp_path):
    config = TorchModule(builder=make_denoiser).get_config()
    config["arguments"] = {"width": 2**40}
    from keras_mscm.preset_files import untrusted

    with pytest.raises(ValueError, match="must fit"):
        untrusted.check_size(lambda: TorchModule.from_config(config), 2**33)


def test_weights_alone_need_no_builder(tmp_path):
    model = model_of()
    model.save_weights(tmp_path / "model.weights.h5")
    other = model_of()
    for weight in other.network.weights:
        weight.assign(ops.zeros_like(weight))
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(model.network, other.network)


def test_whole_model_needs_a_builder(tmp_path):
    with pytest.raises(ValueError, match="`builder` must be given"):
        model_of().save(tmp_path / "model.keras")


def test_other_weights_are_refused(tmp_path):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(2, 2)

    keras.saving.save_weights(TorchModule(Other()), tmp_path / "a.weights.h5")
    with pytest.raises(ValueError, match=r"other\.weight"):
        keras.saving.load_weights(layer_of(), tmp_path / "a.weights.h5")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(module=3), "module"),
        (dict(), "module"),
        (dict(module=torch.nn.LazyLinear(2)), "module"),
        (dict(builder=3), "builder"),
        (dict(builder=lambda: torch.nn.Linear(2, 2)), "builder"),
        (dict(module=torch.nn.Linear(2, 2), arguments={}), "arguments"),
        (dict(builder=make_denoiser, arguments=[1]), "arguments"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=f"`{named}` must be"):
        TorchModule(**arguments)
