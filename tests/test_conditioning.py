"""Conditioning: declared, checked, left out, guided with, and in files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, callbacks, conditioning, samplers, spaces
from keras_mscm.conditioning import Condition
from tests.dense import array, dense_network, logsnr_at, numbers, rates

SHAPE = (3, 2)
NULL = np.array([0.5, -1.0, 2.0], "float32")


def caption():
    """A sequence with its mask, and a pooled vector with a stored null."""
    return {
        "context": Condition((None, 4), mask="context_mask"),
        "context_mask": Condition((None,), "bool", null=False),
        "pooled": Condition((3,), null=NULL),
    }


def of_caption(num, seed=0):
    mask = np.arange(5) < 1 + np.arange(num)[:, None] % 5
    return {
        "context": numbers(num, (5, 4), seed),
        "context_mask": mask,
        "pooled": numbers(num, (3,), seed + 1),
    }


def make(declared, **kw):
    model = DiffusionModel(
        dense_network(SHAPE, declared),
        space=spaces.Box(SHAPE),
        conditioning=declared,
        seed=0,
        **kw,
    )
    model.compile(keras.optimizers.Adam(1e-2))
    return model


def tensors(given):
    return {name: ops.convert_to_tensor(v) for name, v in given.items()}


# Declarations.

VALID = {
    "a class": Condition((), "int32", null=4, num_classes=4),
    "a sequence": Condition((None, 4), mask="mask"),
    "a mask": Condition((None,), "bool", null=False),
    "a vector": Condition((3,), null=NULL),
    "an image": Condition((4, 4, 1)),
    "a number": Condition(null=0),
}


@pytest.mark.once
@pytest.mark.parametrize("kind", VALID)
def test_comes_back_from_its_configuration(kind):
    condition = VALID[kind]
    config = keras.saving.serialize_keras_object(condition)
    again = keras.saving.deserialize_keras_object(config)
    assert again == condition
    assert again.get_config() == condition.get_config()
    for other, theirs in VALID.items():
        assert (condition == theirs) == (other == kind)
    assert condition != kind


@pytest.mark.once
@pytest.mark.parametrize(
    ("kw", "name"),
    [
        ({"shape": 3}, "shape"),
        ({"shape": (0,)}, "shape"),
        ({"shape": "ab"}, "shape"),
        ({"shape": (2.0,)}, "shape"),
        ({"dtype": "float16"}, "dtype"),
        ({"dtype": "int32", "num_classes": 0}, "num_classes"),
        ({"num_classes": 3}, "num_classes"),
        ({"shape": (2,), "dtype": "int32", "num_classes": 3}, "num_classes"),
        ({"mask": "m"}, "mask"),
        ({"shape": (2,), "mask": ""}, "mask"),
        ({"null": "none"}, "null"),
        ({"null": np.nan}, "null"),
        ({"null": object()}, "null"),
        ({"shape": (3,), "null": np.zeros(2)}, "null"),
        ({"shape": (None, 3), "null": np.zeros(3)}, "null"),
    ],
)
def test_refused(kw, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        Condition(**kw)


@pytest.mark.once
@pytest.mark.parametrize(
    ("declared", "part"),
    [
        ([Condition()], "a dictionary of name"),
        ({"a": (3,)}, "a dictionary of name"),
        ({3: Condition()}, "a dictionary of name"),
        ({"z": Condition()}, "must not name z"),
        ({"logsnr_end": Condition()}, "must not name z"),
        ({"a": Condition((3,), mask="m")}, "named 'm'"),
        (
            {"a": Condition((3,), mask="m"), "m": Condition((3,))},
            "dtype 'bool' named 'm'",
        ),
    ],
)
def test_a_wrong_declaration_is_refused(declared, part):
    with pytest.raises(ValueError, match=r"`conditioning` must") as error:
        DiffusionModel(
            dense_network(SHAPE),
            space=spaces.Box(SHAPE),
            conditioning=declared,
        )
    assert part in str(error.value)


@pytest.mark.parametrize("kw", [{"label_dropout": 0.1}, {"guidable": True}])
def test_what_can_not_be_left_out_is_refused(kw):
    declared = {"image": Condition((2, 2, 1))}
    with pytest.raises(ValueError, match=f"`{next(iter(kw))}` must be .*null"):
        make(declared, **kw)
    with pytest.raises(ValueError, match="without conditioning"):
        make({}, **kw)


def test_a_network_must_take_what_is_declared():
    with pytest.raises(ValueError, match="pooled"):
        DiffusionModel(
            dense_network(SHAPE),
            space=spaces.Box(SHAPE),
            conditioning={"pooled": Condition((3,))},
        )


class Declaring(keras.layers.Layer):
    """A network that declares a stored embedding, its own untrained weight."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.null = self.add_weight(
            shape=(3,), initializer="ones", trainable=False, name="null"
        )
        self.dense = keras.layers.Dense(3)

    @property
    def conditioning(self):
        return {"pooled": Condition((3,), null=self.null)}

    def build(self, shape=None):
        self.dense.build((None, 7))

    def call(self, inputs, training=None):
        level = ops.expand_dims(inputs["logsnr"], -1) / 10
        parts = [inputs["z"], level, inputs["pooled"]]
        return self.dense(ops.concatenate(parts, -1))


def test_a_network_and_its_model_must_agree():
    for given in ({"pooled": Condition((3,))}, {}):
        with pytest.raises(ValueError, match="what the network says"):
            DiffusionModel(
                Declaring(), space=spaces.Box((3,)), conditioning=given
            )
    for size in ({"num_classes": 3}, {"context_width": 3}):
        with pytest.raises(ValueError, match="what the conditioning says"):
            DiffusionModel(Declaring(), space=spaces.Box((3,)), **size)


@pytest.mark.parametrize("shape", [(), (3,), (None, 3)])
def test_an_entry_may_have_any_name_and_shape(shape):
    # "context" is a sequence's vectors elsewhere, but nothing is taken for
    # granted.
    declared = {"context": Condition(shape, null=0.0)}
    network = dense_network(SHAPE, declared)
    model = DiffusionModel(
        network, space=spaces.Box(SHAPE), conditioning=declared
    )
    assert model.context_width == (3 if len(shape) == 2 else None)
    sizes = [2 if size is None else size for size in shape]
    got = model.generate(context=numbers(2, sizes), num_steps=1)
    assert got.shape == (2, *SHAPE)


# What says nothing.


def test_absent_and_dropped_are_the_null():
    declared, given = caption(), of_caption(4)
    absent = conditioning.absent(declared, tensors(given))
    expected = {
        "context": given["context"],
        "context_mask": np.zeros((4, 5), bool),
        "pooled": np.tile(NULL, (4, 1)),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(array(absent[name]), value)
        assert ops.shape(absent[name]) == value.shape
    drop = np.array([True, False, True, False])
    dropped = conditioning.dropped(
        declared, tensors(given), ops.convert_to_tensor(drop)
    )
    for name, value in expected.items():
        where = drop.reshape(-1, *[1] * (value.ndim - 1))
        want = np.where(where, value, given[name])
        np.testing.assert_array_equal(array(dropped[name]), want)


def test_a_null_of_every_kind():
    variable = keras.Variable(np.arange(6.0).reshape(2, 3), trainable=False)
    for null, shape in (
        (0.5, (None, 3)),
        (np.ones((2, 3)), (None, 3)),
        (variable, (None, 3)),
        (ops.ones((3,)), (3,)),
    ):
        condition = Condition(shape, null=null)
        value = numbers(4, [2, 3][-len(shape) :])
        got = array(condition.absent(ops.convert_to_tensor(value)))
        stored = null.value if isinstance(null, keras.Variable) else null
        want = np.broadcast_to(array(ops.convert_to_tensor(stored)), got.shape)
        np.testing.assert_array_equal(got, want)
        default = condition.default(4)
        assert default.dtype == np.float32
        assert np.ndim(default) == len(shape) + 1
        assert default.shape[0] == 4
    assert Condition((3,)).default(4) is None


def test_a_stored_null_says_the_length():
    # Dropout and guidance put it in the place of what is given.
    declared = {"tokens": Condition((None, 3), null=np.ones((5, 3)))}
    model = make(declared, label_dropout=0.5)
    images = numbers(4, SHAPE)
    with pytest.raises(ValueError, match=r"\(batch, 5, 3\).*\(4, 7, 3\)"):
        model.fit(images, {"tokens": numbers(4, (7, 3))}, verbose=0)
    model.fit(images, {"tokens": numbers(4, (5, 3))}, verbose=0)
    assert model.generate(2, guidance_scale=2.0, num_steps=1).shape[0] == 2


@pytest.mark.parametrize("share", [0.25])
def test_dropout_puts_the_null_in_place(share):
    model, num = make(caption(), label_dropout=share), 1000
    given = of_caption(num)
    inputs, _, _ = model._example((numbers(num, SHAPE), given), True)
    seen = {name: array(inputs[name]) for name in given}
    dropped = np.all(seen["pooled"] == NULL, axis=1)
    assert abs(dropped.mean() - share) < 4 * (share * (1 - share) / num) ** 0.5
    np.testing.assert_array_equal(
        seen["pooled"][~dropped], given["pooled"][~dropped]
    )
    mask = given["context_mask"] & ~dropped[:, None]
    np.testing.assert_array_equal(seen["context_mask"] > 0, mask)
    np.testing.assert_array_equal(seen["context"], given["context"])
    inputs, _, _ = model._example((numbers(num, SHAPE), given), False)
    np.testing.assert_array_equal(array(inputs["pooled"]), given["pooled"])


def guided_by_numpy(model, noise, given, without, scale, num_steps=3):
    """DDIM with guidance, in float64 but for the network itself."""
    z = noise.astype("float64")

    def predict(entries):
        inputs = {"z": z.astype("float32"), "logsnr": logsnr, **entries}
        v = array(model.ema_network(tensors(inputs)))
        return alpha_t * z - sigma_t * v

    for i in range(num_steps, 0, -1):
        at = logsnr_at(i / num_steps)
        logsnr = np.full(len(z), at, "float32")
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            rates(np.full(len(z), level), z.ndim)
            for level in (at, logsnr_at((i - 1) / num_steps))
        )
        x, x_without = map(predict, (given, without))
        x = x_without + scale * (x - x_without)
        z = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
    return z


@pytest.mark.parametrize("kw", [{"label_dropout": 0.1}, {"guidable": True}])
def test_guidance_is_the_numpy_guidance(kw):
    model = make(caption(), **kw)
    noise, given = numbers(4, SHAPE, 9), of_caption(4)
    without = {
        **given,
        "context_mask": np.zeros((4, 5), bool),
        "pooled": np.tile(NULL, (4, 1)),
    }
    arguments = {"noise": noise, "num_steps": 3, "sampler": samplers.DDIM()}
    for scale in (0.0, 1.0, 3.0):
        got = model.generate(
            conditioning=given, guidance_scale=scale, **arguments
        )
        want = guided_by_numpy(model, noise, given, without, scale)
        np.testing.assert_allclose(got, want, atol=2e-4)
    # What isn't given is what says nothing.
    none = model.generate(**arguments)
    want = guided_by_numpy(model, noise, without, without, 1.0)
    np.testing.assert_allclose(none, want, atol=2e-4)


def test_a_networks_own_weight_says_nothing(tmp_path):
    model = DiffusionModel(
        Declaring(), space=spaces.Box((3,)), label_dropout=0.5, seed=0
    )
    model.compile()
    x, pooled = numbers(64, (3,)), numbers(64, (3,), 1)
    noise = numbers(2, (3,), 3)

    def seen():
        inputs, _, _ = model._example((x, {"pooled": pooled}), True)
        seen = array(inputs["pooled"])
        return seen[np.any(seen != pooled, axis=1)]

    assert np.all(seen() == 1)
    first = model.generate(noise=noise, num_steps=2)
    # Its value at the time of a call counts, in what is compiled already too.
    model.network.null.assign(NULL)
    nulls = seen()
    assert len(nulls) > 5
    np.testing.assert_array_equal(nulls, np.tile(NULL, (len(nulls), 1)))
    arguments = {"noise": noise, "num_steps": 2, "guidance_scale": 0.0}
    given = {"pooled": pooled[:2]}
    one = model.generate(conditioning=given, **arguments)
    model.network.null.assign(2 * NULL)
    other = model.generate(conditioning=given, **arguments)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(first - model.generate(noise=noise, num_steps=2)).max() > 1e-3
    # It isn't trained, and training takes the value it has.
    model.fit(x, {"pooled": pooled}, verbose=0)
    np.testing.assert_array_equal(array(model.network.null.value), 2 * NULL)
    assert len(model.trainable_variables) == 2


# What comes to `fit`, `evaluate` and `generate`.

FIVE = of_caption(5)


@pytest.mark.parametrize(
    ("y", "part"),
    [
        (None, r"`x \(context\)` must be given"),
        (np.zeros(5), "labels"),
        ({**FIVE, "pooled": None}, r"`x \(pooled\)` must be given"),
        ({**FIVE, "text": FIVE["pooled"]}, r"\['text'\] besides"),
        ({**FIVE, "pooled": FIVE["pooled"][:, :2]}, r"\(batch, 3\)"),
        ({**FIVE, "pooled": FIVE["pooled"][:4]}, "one entry per image"),
        ({**FIVE, "pooled": np.full((5, 3), np.nan)}, "finite"),
        ({**FIVE, "context": FIVE["context"][..., :3]}, "length, 4"),
        ({**FIVE, "context_mask": np.ones((5, 4), bool)}, r"\(5, 5\)"),
        ({**FIVE, "labels": np.zeros(5, "int32")}, "no classes"),
        ({**FIVE, "pooled": [[1.0] * 3] * 5}, "an array of float32"),
    ],
    ids=range(11),
)
def test_what_is_not_as_declared_is_refused(y, part):
    model, images = make(caption()), numbers(5, SHAPE)
    for run in (
        lambda: model.fit(images, y),
        lambda: model.evaluate(images, y),
        lambda: model.fit(images, FIVE, validation_data=(images, y)),
        lambda: model.fit(iter([(images, y)])),
    ):
        expected = part.replace("`x ", "`.*")
        with pytest.raises(ValueError, match=expected):
            run()
    assert int(model.iteration) == 0


@pytest.mark.parametrize(
    ("kw", "part"),
    [
        ({"conditioning": [1]}, "`conditioning` must be a dictionary"),
        ({"conditioning": {"text": np.ones(2)}}, "`text` must not be given"),
        ({"conditioning": {3: np.ones(2)}}, "`3` must not be given"),
        ({"conditioning": {"pooled": "x"}}, "`pooled` must be an array"),
        ({"conditioning": {"pooled": np.ones((2, 2))}}, r"\(batch, 3\)"),
        ({"conditioning": {"pooled": np.ones((0, 3))}}, "one entry or more"),
        (
            {
                "conditioning": {"context": FIVE["context"]},
                "context": FIVE["context"],
            },
            "`context` must be given once.*both",
        ),
        ({"conditioning": FIVE, "num_images": 3}, "must agree in number"),
        ({"labels": [1]}, "no classes"),
        (
            {"conditioning": {"context_mask": FIVE["context_mask"]}},
            "`context` must be given",
        ),
    ],
    ids=range(10),
)
def test_what_generate_refuses(kw, part):
    with pytest.raises(ValueError, match=part):
        make(caption()).generate(num_steps=1, **kw)


def test_short_forms_are_entries():
    model, noise = make(caption()), numbers(5, SHAPE, 4)

    def generate(**kw):
        return model.generate(noise=noise, num_steps=2, **kw)

    short = {k: FIVE[k] for k in ("context", "context_mask")}
    rest = {"pooled": FIVE["pooled"]}
    whole = generate(conditioning=FIVE)
    np.testing.assert_array_equal(generate(conditioning=rest, **short), whole)
    lists = {k: v.tolist() for k, v in FIVE.items()}
    np.testing.assert_array_equal(generate(conditioning=lists), whole)
    # All of a sequence counts where nothing else is said.
    whole = generate(context=FIVE["context"])
    ones = generate(
        context=FIVE["context"], context_mask=np.ones((5, 5), "bool")
    )
    np.testing.assert_array_equal(whole, ones)
    in_parts = model.generate(
        noise=noise, num_steps=2, context=FIVE["context"], batch_size=2
    )
    np.testing.assert_allclose(in_parts, whole, atol=1e-5)


def test_an_image_as_conditioning():
    # Super-resolution: the small image says what the large one is.
    declared = {"small": Condition((2, 2, 1))}
    model = DiffusionModel(
        dense_network((4, 4, 1), declared),
        image_shape=(4, 4, 1),
        conditioning=declared,
        seed=0,
    )
    model.compile()
    images = numbers(8, (4, 4, 1))
    small = images.reshape(8, 2, 2, 2, 2, 1).mean((2, 4))
    model.fit(images, {"small": small}, verbose=0)
    model.evaluate(images, {"small": small}, verbose=0)
    model.measure_x_var(images, {"small": small})
    assert np.all(np.isfinite(model.x_var.table))
    noise = numbers(2, (4, 4, 1), 5)
    one, other = (
        model.generate(noise=noise, conditioning={"small": s}, num_steps=2)
        for s in (small[:2], small[2:4])
    )
    assert np.abs(one - other).max() > 1e-3
    with pytest.raises(ValueError, match="`small` must be given"):
        model.generate(2, num_steps=1)
    with pytest.raises(ValueError, match="`guidance_scale` must not be given"):
        model.generate(
            conditioning={"small": small}, num_steps=1, guidance_scale=2.0
        )


def test_classes_beside_another_entry():
    declared = {**VALID_CLASSES, "pooled": Condition((3,), null=0.0)}
    model = make(declared, label_dropout=0.2)
    y = {"labels": np.arange(8) % 4, "pooled": numbers(8, (3,))}
    model.fit(numbers(8, SHAPE), y, verbose=0)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        model.fit(numbers(8, SHAPE), {**y, "labels": np.arange(8)})
    # One of each class, in turn, by default.
    assert model.generate(num_steps=1).shape == (4, *SHAPE)
    noise = numbers(4, SHAPE, 2)
    turn = model.generate(noise=noise, num_steps=2)
    given = model.generate(noise=noise, num_steps=2, labels=[0, 1, 2, 3])
    np.testing.assert_array_equal(turn, given)


VALID_CLASSES = {"labels": VALID["a class"]}


def batches(num, y, size=4):
    x = numbers(num, SHAPE)
    for i in range(0, num, size):
        part = {name: value[i : i + size] for name, value in y.items()}
        yield x[i : i + size], part


def test_streams_train_as_arrays_do():
    y, ends = of_caption(8), []

    class Stream(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return [*batches(8, y)][index]

    for data, kw in (
        ((numbers(8, SHAPE), y), {"batch_size": 4}),
        ((Stream(),), {}),
        ((batches(8, y),), {}),
    ):
        keras.utils.set_random_seed(0)
        model = make(caption(), label_dropout=0.3)
        history = model.fit(*data, shuffle=False, verbose=0, **kw)
        ends.append([history.history["loss"][0], *model.network.get_weights()])
    for other in ends[1:]:
        for ours, theirs in zip(other, ends[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    def spoilt():
        yield from batches(4, y)
        yield numbers(4, SHAPE), {**of_caption(4), "pooled": np.ones((4, 2))}

    with pytest.raises(ValueError, match=r"batch 1 of x.*pooled"):
        make(caption()).fit(spoilt(), verbose=0)


def test_callbacks_draw_with_it(tmp_path):
    declared = {"pooled": Condition((3,), null=NULL)}
    model = DiffusionModel(
        dense_network((4, 4, 1), declared),
        image_shape=(4, 4, 1),
        conditioning=declared,
        label_dropout=0.1,
        seed=0,
    )
    model.compile()
    x, y = numbers(8, (4, 4, 1)), {"pooled": numbers(8, (3,))}
    seen = []

    class Seen(keras.metrics.Mean):
        def update_state(self, images):
            seen.append(images)
            super().update_state(images)

    def run(given, metric):
        model.fit(
            x,
            y,
            verbose=0,
            callbacks=[
                callbacks.SampleGrid(
                    tmp_path / "grids",
                    every=1,
                    num_images=4,
                    conditioning=given,
                    num_steps=1,
                ),
                callbacks.EvaluateSamples(
                    [metric],
                    every=1,
                    num_images=4,
                    batch_size=4,
                    conditioning=given,
                    num_steps=2,
                    guidance_scale=2.0,
                ),
            ],
        )

    given = {"pooled": y["pooled"][:4]}
    run(given, Seen(name="seen"))
    assert len([*(tmp_path / "grids").glob("*.png")]) == 1
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 4, 4, 1), dtype="float32")
    want = model.generate(
        noise=noise, conditioning=given, num_steps=2, guidance_scale=2.0
    )
    np.testing.assert_allclose(seen[0], want, atol=1e-5)
    for bad, part in (
        ({"pooled": np.ones((4, 2))}, r"\(batch, 3\)"),
        ({"pooled": np.ones((3, 3))}, "one entry per image"),
        ({"text": np.ones((4, 3))}, "text"),
    ):
        with pytest.raises(ValueError, match=part):
            run(bad, Seen(name="seen"))


# Files.


def test_a_network_without_declaration_saved_and_loaded(tmp_path):
    declared = {
        **caption(),
        "image": Condition((2, 2, 1), null=-1.0),
        "labels": VALID["a class"],
    }
    model = make(declared, label_dropout=0.2)
    given = {
        **of_caption(4),
        "image": numbers(4, (2, 2, 1)),
        "labels": np.arange(4),
    }
    model.fit(numbers(4, SHAPE), given, verbose=0)
    arguments = {"noise": numbers(4, SHAPE), "num_steps": 2}
    arguments |= {"conditioning": given, "guidance_scale": 2.0}
    expected = model.generate(**arguments)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    preset = DiffusionModel.from_preset(tmp_path / "preset")
    for other in (loaded, preset):
        assert {**other.conditioning} == {**model.conditioning}
        np.testing.assert_allclose(
            other.generate(**arguments), expected, atol=1e-6
        )
    loaded.fit(numbers(4, SHAPE), given, verbose=0)


@pytest.mark.parametrize(
    ("declared", "keys"),
    [
        ({}, set()),
        (conditioning.standard(3), set()),
        (conditioning.standard(None, 4), set()),
        (conditioning.standard(3, 4), set()),
        ({"pooled": Condition((3,))}, {"conditioning"}),
        ({"labels": Condition((), "int32", num_classes=3)}, {"conditioning"}),
    ],
    ids=range(6),
)
def test_a_configuration_has_a_new_key_where_it_must(declared, keys):
    # Version 0.1 reads what it could have written.
    model = DiffusionModel(
        dense_network((2, 2, 1), declared),
        image_shape=(2, 2, 1),
        conditioning=declared,
    )
    new = {"conditioning", "space", "ema", "guidable"}
    config = model.get_config()
    assert {*config} & new == keys
    again = DiffusionModel.from_config(config)
    assert {**again.conditioning} == declared
    assert again.get_config().keys() == config.keys()
