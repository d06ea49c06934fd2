import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    backend,
    conditioning,
    samplers,
)
from keras_mscm.schedules import CosineSchedule
from tests.adapters.tiny import check_several_steps

if backend.NAME != "jax":
    pytest.skip(
        "Flax's modules run on the jax backend only", allow_module_level=True
    )

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from keras_mscm.adapters.flax import from_flax_linen, from_flax_nnx
from keras_mscm.adapters.linen_module import LinenModule
from keras_mscm.adapters.nnx_module import NnxModule
from keras_mscm.preset_files import untrusted

SHAPE = (4, 4, 2)


def features(x, t):
    t = jnp.broadcast_to(t[:, None, None, None], (*x.shape[:-1], 1))
    return jnp.concatenate([x, t.astype(x.dtype)], -1)


class LinenTime(nn.Module):
    width: int

    @nn.compact
    def __call__(self, t):
        return nn.Dense(self.width)(jnp.tanh(t)[:, None])


class LinenTimed(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x, t, labels=None):
        h = (
            nn.Dense(self.width)(x)
            + nn.Embed(4, self.width)(labels)[:, None, None]
        )
        h = h + LinenTime(self.width, name="time")(t)[:, None, None]
        return nn.Dense(2)(nn.silu(h))


class NnxTimed(nnx.Module):
    def __init__(self, width=8):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(2, width, rngs=rngs)
        self.time = nnx.Linear(1, width, rngs=rngs)
        self.embed = nnx.Embed(4, width, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x, t, labels=None):
        h = self.first(x) + self.embed(labels)[:, None, None]
        h = h + self.time(jnp.tanh(t)[:, None])[:, None, None]
        return self.last(nnx.silu(h))


class Linen(nn.Module):
    """A network with all kinds of state, called by other names than ours."""

    width: int = 8
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, t, labels=None, train=False):
        h = nn.Conv(self.width, (3, 3))(features(x, t))
        if labels is not None:
            h = h + nn.Embed(4, self.width)(labels)[:, None, None]
        h = nn.BatchNorm(use_running_average=not train)(h)
        h = nn.Dropout(self.rate, deterministic=not train)(nn.silu(h))
        return nn.Dense(2)(h)


class Nnx(nnx.Module):
    def __init__(self, width=8, rate=0.0, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.embed = nnx.Embed(4, width, rngs=rngs)
        self.last = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x, t, labels=None):
        h = self.first(features(x, t))
        if labels is not None:
            h = h + self.embed(labels)[:, None, None]
        return self.last(self.drop(nnx.silu(self.norm(h))))


@keras.saving.register_keras_serializable("test_flax")
def make_linen(**arguments):
    return Linen(**arguments)


@keras.saving.register_keras_serializable("test_flax")
def make_nnx(**arguments):
    return Nnx(**arguments)


@keras.saving.register_keras_serializable("test_flax")
def make_linen_timed(**arguments):
    return LinenTimed(**arguments)


@keras.saving.register_keras_serializable("test_flax")
def make_nnx_timed(**arguments):
    return NnxTimed(**arguments)


MAKE = {
    "linen": make_linen,
    "nnx": make_nnx,
    "linen_timed": make_linen_timed,
    "nnx_timed": make_nnx_timed,
}
both = pytest.mark.parametrize("kind", ["linen", "nnx"])


def foreign(kind, **arguments):
    module = MAKE[kind](**arguments)
    if kind.startswith("nnx"):
        return (module,)
    x, t = jnp.zeros((1, *SHAPE)), jnp.zeros(1)
    labels = jnp.zeros(1, "int32")
    return module, module.init(jax.random.key(0), x, t, labels)


def layer_of(kind, arguments=None, **kwargs):
    cls = LinenModule if kind == "linen" else NnxModule
    return cls(*foreign(kind, **(arguments or {})), **kwargs)


def model_of(kind, arguments=None, **kwargs):
    keras.utils.set_random_seed(0)
    linen = kind.startswith("linen")
    adapt = from_flax_linen if linen else from_flax_nnx
    parts = foreign(kind, **(arguments or {}))
    kwargs.setdefault("ema_decay", 0.0)
    model = adapt(
        *parts,
        SHAPE,
        CosineSchedule(),
        output="epsilon",
        names={"z": "x", "logsnr": "t"},
        conditioning=conditioning.standard(num_classes=3),
        builder=MAKE[kind],
        arguments=arguments,
        seed=1,
        **kwargs,
    )
    model.compile(optimizer="adam")
    return model


def data(batch=8):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (batch, *SHAPE)).astype("float32")
    return images, rng.integers(0, 3, batch)


def inputs():
    images, labels = data()
    return {
        "x": ops.convert_to_tensor(images),
        "t": ops.linspace(-5.0, 5.0, len(images)),
        "labels": ops.convert_to_tensor(labels, "int32"),
    }


def arrays(layer):
    return [np.array(ops.convert_to_numpy(w)) for w in layer.weights]


def assert_same(one, other):
    for ours, theirs in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
        )


def test_weights_have_names():
    linen = {w.name for w in layer_of("linen").weights}
    assert "params.Conv_0.kernel" in linen
    assert "batch_stats.BatchNorm_0.mean" in linen
    names = [w.name for w in layer_of("nnx").non_trainable_weights]
    assert names == ["norm.mean", "norm.var"]


@both
def test_it_calls_the_module(kind):
    module, *variables = foreign(kind)
    if kind == "linen":
        expected = module.apply(*variables, **inputs())
    else:
        module.eval()
        expected = module(**inputs())
    output = layer_of(kind)(inputs())
    np.testing.assert_allclose(output, expected, atol=1e-6)


@both
def test_statistics_follow_training(kind):
    layer = layer_of(kind)
    before = [ops.copy(w.value) for w in layer.non_trainable_weights]
    layer(inputs(), training=False)
    for old, new in zip(before, layer.non_trainable_weights):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))
    layer(inputs(), training=True)
    for old, new in zip(before, layer.non_trainable_weights):
        assert np.any(np.asarray(old) != ops.convert_to_numpy(new))


@both
def test_dropout_is_by_the_layers_seed(kind):
    layer = layer_of(kind, dict(rate=0.5), seed=3)
    states = [v for v in layer.variables if "seed" in v.path]
    assert len(states) == 1
    with backend.rewound(states):
        one = layer(inputs(), training=True)
    two = layer(inputs(), training=True)
    three = layer(inputs(), training=True)
    np.testing.assert_array_equal(one, two)
    assert np.any(np.asarray(two) != np.asarray(three))
    again = layer_of(kind, dict(rate=0.5), seed=3)(inputs(), training=True)
    np.testing.assert_array_equal(one, again)


@both
def test_clone_is_independent(kind):
    layer = layer_of(kind)
    layer.trainable = False
    clone = layer.clone("second")
    assert clone.name == "second"
    assert clone.trainable_weights
    assert_same(layer, clone)
    before = arrays(clone)
    for weight in layer.weights:
        weight.assign(ops.zeros(weight.shape, weight.dtype))
    for old, new in zip(before, arrays(clone)):
        np.testing.assert_array_equal(old, new)


@both
def test_mixed_bfloat16(kind):
    layer = layer_of(kind, dtype="mixed_bfloat16")
    assert {w.dtype for w in layer.trainable_weights} == {"float32"}
    np.testing.assert_allclose(
        ops.cast(layer(inputs()), "float32"),
        layer_of(kind)(inputs()),
        atol=0.05,
    )


@both
@pytest.mark.parametrize("num_steps", [4, 50])
def test_it_samples_as_the_module_itself(kind, num_steps):
    model = model_of(kind)
    module, *variables = foreign(kind)
    labels = jnp.array([0, 1, 2, 1])

    def predict(z, logsnr):
        named = {"x": z, "t": logsnr, "labels": labels}
        if kind == "linen":
            return module.apply(*variables, **named)
        module.eval()
        return module(**named)

    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, *SHAPE)).astype("float32")
    times = np.linspace(1, 0, num_steps + 1).astype("float32")
    levels = ops.convert_to_numpy(model.schedule(times)).astype("float64")
    signal = (1 / (1 + np.exp(-levels))) ** 0.5
    spread = (1 / (1 + np.exp(levels))) ** 0.5
    z = noise.astype("float64")
    for i in range(num_steps):
        level = np.full(4, levels[i], "float32")
        epsilon = np.asarray(predict(z.astype("float32"), level), "float64")
        x = (z - spread[i] * epsilon) / signal[i]
        z = signal[i + 1] * x + spread[i + 1] * epsilon
    with jax.default_matmul_precision("highest"):
        drawn = samplers.DDIM()(
            lambda z, logsnr: model.denoise(
                model.network, z, logsnr, {"labels": labels}
            ),
            noise,
            model.schedule,
            num_steps,
        )
    np.testing.assert_allclose(drawn, z, atol=1e-4 * z.std())


@both
def test_fit_and_distil(kind):
    model = model_of(kind)
    before = arrays(model.network)
    model.fit(*data(), batch_size=4, verbose=0)
    changed = [np.any(a != b) for a, b in zip(before, arrays(model.network))]
    assert all(changed)
    for ours, theirs in zip(arrays(model.ema_network), arrays(model.network)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    student = MultistepConsistencyModel.from_teacher(
        model, student_steps=2, guidance_scale=2.0
    )
    teacher = arrays(student.teacher)
    student.compile(optimizer="adam")
    student.fit(*data(), batch_size=4, verbose=0)
    for old, new in zip(teacher, arrays(student.teacher)):
        np.testing.assert_array_equal(old, new)
    trained = zip(teacher, arrays(student.network))
    assert any(np.any(old != new) for old, new in trained)


@both
def test_a_student_of_several_numbers_of_steps(kind, tmp_path):
    model = model_of(f"{kind}_timed", time_embedding="time")
    images, labels = data(2)
    check_several_steps(model, images, {"labels": labels}, tmp_path)


@both
def test_what_is_no_time_embedding_is_refused(kind):
    for name in ("nothing", "first" if kind == "nnx" else "Dense_0"):
        model = model_of(f"{kind}_timed", time_embedding=name)
        with pytest.raises(ValueError, match="`time_embedding` must name a"):
            model.network.take_logsnr_end()


@both
def test_saved_and_loaded(kind, tmp_path):
    model = model_of(kind)
    model.fit(*data(), batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(model.network, loaded.network)
    model.save_to_preset(tmp_path / "preset")
    loaded = DiffusionModel.from_preset(tmp_path / "preset")
    assert_same(model.ema_network, loaded.network)
    assert_same(model.ema_network, loaded.ema_network)
    loaded.compile(optimizer="adam")
    loaded.fit(*data(), batch_size=4, verbose=0)


def test_too_large_a_module_takes_no_memory():
    config = layer_of("nnx", builder=make_nnx, arguments={}).get_config()
    config["arguments"] = {"width": 2**34}
    with pytest.raises(ValueError, match="must fit"):
        untrusted.check_size(lambda: NnxModule.from_config(config), 2**33)
    config = layer_of("linen", builder=make_linen).get_config()
    config["variables"][0][1] = [2**34]
    with pytest.raises(ValueError, match="must fit"):
        untrusted.check_size(lambda: LinenModule.from_config(config), 2**33)


@both
def test_a_whole_model_needs_a_builder(kind):
    with pytest.raises(ValueError, match="`builder` must be given"):
        layer_of(kind).get_config()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LinenModule(3, {"a": 1}), "module"),
        (lambda: LinenModule(Linen(), {}), "params"),
        (lambda: NnxModule(3), "module"),
        (lambda: NnxModule(Nnx(), builder=lambda: Nnx()), "builder"),
        (lambda: NnxModule(Nnx(), arguments={}), "arguments"),
        (lambda: NnxModule(Nnx(), seed=-1), "seed"),
    ],
)
def test_bad_arguments(make, named):
    with pytest.raises(ValueError, match=f"`{named}` must be"):
        make()
