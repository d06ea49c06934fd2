import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import UViT, backend
from keras_mscm.networks.patches import to_patches, to_pixels

SHAPES = {
    "vit": {},
    # Everything at once: three stages, of which the first needs no whole heads;
    # patches; images that are not square.
    "all": {
        "image_shape": (8, 16, 2),
        "widths": (40, 32, 16),
        "depths": (1, 1, 2),
        "attention": (False, True, True),
        "patch_size": 2,
        "num_classes": 3,
        "dropout": (0.0, 0.1, 0.2),
        "remat": (True, False, True),
    },
    "context": {
        "widths": (40, 32),
        "depths": (1, 1),
        "attention": (False, True),
        "num_classes": 3,
        "context_width": 24,
    },
}
every_shape = pytest.mark.parametrize(
    "config", SHAPES.values(), ids=list(SHAPES)
)


def inputs_for(network):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((3, *network.image_shape))
    inputs = {
        "z": ops.convert_to_tensor(z, "float32"),
        "logsnr": ops.convert_to_tensor(rng.uniform(-9, 9, 3), "float32"),
    }
    if network.num_classes:
        inputs["labels"] = ops.arange(3, dtype="int32")
    if network.context_width:
        context = rng.standard_normal((3, 4, network.context_width))
        # Some real tokens, none, all.
        mask = [[True, True, False, False], [False] * 4, [True] * 4]
        inputs["context"] = ops.convert_to_tensor(context, "float32")
        inputs["context_mask"] = ops.convert_to_tensor(mask)
    return inputs


def outputs(network, inputs, **kwargs):
    got = network(inputs, **kwargs)
    return ops.convert_to_numpy(ops.cast(got, "float32"))


@every_shape
def test_output_has_the_shape_of_the_images(tiny_uvit, config):
    network = tiny_uvit(**config)
    got = network(inputs_for(network))
    assert tuple(got.shape) == (3, *network.image_shape)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    assert ops.convert_to_numpy(got).std() > 0.01


@every_shape
def test_mixed_precision(tiny_uvit, config):
    full = tiny_uvit(**config)
    half = tiny_uvit(**config, dtype="mixed_bfloat16")
    half.set_weights(full.get_weights())
    inputs = inputs_for(full)
    compiled = backend.compile_inference(
        lambda *values: half(dict(zip(inputs, values))), half.variables
    )
    got = compiled(*inputs.values())
    assert keras.backend.standardize_dtype(got.dtype) == "bfloat16"
    for weight in half.trainable_variables:
        assert keras.backend.standardize_dtype(weight.dtype) == "float32"
    exact = outputs(full, inputs)
    # bfloat16 has 8 bits, and a block stores some ten times.
    error = np.abs(ops.convert_to_numpy(ops.cast(got, "float32")) - exact)
    assert error.mean() < 0.05 * np.abs(exact).mean()


def test_half_precision_tells_a_teachers_steps_apart(tiny_uvit):
    network = tiny_uvit(dtype="mixed_bfloat16")
    inputs = inputs_for(network)
    # These are one number in bfloat16.
    got = [
        outputs(network, {**inputs, "logsnr": ops.full((3,), logsnr)})
        for logsnr in (5.0, 5.01)
    ]
    assert np.abs(got[0] - got[1]).max() > 1e-3


def test_a_new_network_says_zero(tiny_uvit):
    network = tiny_uvit(random_output=False)
    got = outputs(network, inputs_for(network))
    np.testing.assert_array_equal(got, np.zeros_like(got))


@every_shape
def test_config_round_trip(tiny_uvit, config):
    network = tiny_uvit(**config)
    again = UViT.from_config(network.get_config())
    stored = keras.saving.serialize_keras_object(network)
    loaded = keras.saving.deserialize_keras_object(stored)
    inputs = inputs_for(network)
    for other in (again, loaded):
        assert other.get_config() == network.get_config()
        other.set_weights(network.get_weights())
    np.testing.assert_array_equal(
        outputs(loaded, inputs), outputs(network, inputs)
    )


def test_count_of_parameters_in_closed_form(tiny_uvit):
    network = tiny_uvit(**SHAPES["all"])
    (c_0, c_1, c_2), e, pixels = network.widths, 32, 2 * 2 * 2

    def transformer(c):
        return 12 * c**2 + 9 * c + (e + 1) * 8 * c + 16

    resnet = 18 * c_0**2 + 2 * c_0 + (e + 1) * 2 * c_0 + 4 * c_0
    blocks = 2 * resnet + 2 * transformer(c_1) + 2 * transformer(c_2)
    conditioning = 2 * e * (e + 1) + (3 + 1) * e
    ends = (pixels + 1) * c_0 + c_0 + (c_0 + 1) * pixels
    widen = (c_0 + 1) * c_1 + (c_1 + 1) * c_2
    narrow = (c_1 + 1) * c_0 + (c_2 + 1) * c_1
    places = 2 * 4 * c_1 + 1 * 2 * c_2
    assert network.count_params() == (
        blocks + conditioning + ends + widen + narrow + places
    )


def test_parameters_of_the_conditioning_on_a_context(tiny_uvit):
    with_context = SHAPES["context"]
    without = {**with_context, "context_width": None}
    more, less = (
        tiny_uvit(**config).count_params() for config in (with_context, without)
    )
    c, w, e, head = 32, 24, 32, 16
    # Query and output; keys and values; a norm. One block in the middle.
    cross_attention = 2 * (c + 1) * c + (w + 1) * 2 * c + head
    null_token, pooled = w, (w + 1) * e
    assert more - less == cross_attention + null_token + pooled


def test_every_block_is_added_to_its_mirror_image(tiny_uvit):
    network = tiny_uvit(
        image_shape=(4, 8, 8),
        widths=(40, 32),
        depths=(2, 1),
        attention=(False, True),
    )
    inputs = inputs_for(network)
    embedding = network.embed_noise(inputs["logsnr"])
    first, second = network.down[0]
    a = first((network.entry(inputs["z"]), embedding))
    b = second((a, embedding))
    maps = network.positions[1](network.widen[0](network.pool(b)))
    maps = network.middle[0]((maps, embedding))
    maps = network.narrow[0](network.unpool(maps))
    first, second = network.up[0]
    maps = first((maps + b, embedding))
    maps = second((maps + a, embedding))
    expected = network.exit(ops.silu(network.exit_norm(maps)))
    np.testing.assert_allclose(
        outputs(network, inputs), ops.convert_to_numpy(expected), atol=1e-5
    )


def test_labels_change_the_output(tiny_uvit):
    network = tiny_uvit(num_classes=3)
    inputs = inputs_for(network)
    got = [
        outputs(network, {**inputs, "labels": ops.full((3,), i, "int32")})
        for i in range(4)  # 3: no class
    ]
    for one, other in itertools.pairwise(got):
        assert not np.allclose(one, other, atol=1e-3)
    # Each example has its own.
    mixed = {**inputs, "labels": ops.convert_to_tensor([2, 0, 1], "int32")}
    expected = [got[2][0], got[0][1], got[1][2]]
    np.testing.assert_allclose(outputs(network, mixed), expected, atol=1e-5)


def test_masked_tokens_have_no_influence(tiny_uvit):
    network = tiny_uvit(**SHAPES["context"])
    inputs = inputs_for(network)
    expected = outputs(network, inputs)
    mask = inputs["context_mask"]
    poisoned = ops.where(mask[..., None], inputs["context"], np.nan)
    got = outputs(network, {**inputs, "context": poisoned})
    np.testing.assert_array_equal(got, expected)
    longer = {
        **inputs,
        "context": ops.pad(poisoned, ((0, 0), (0, 3), (0, 0))),
        "context_mask": ops.pad(ops.cast(mask, "int32"), ((0, 0), (0, 3))),
    }
    np.testing.assert_allclose(outputs(network, longer), expected, atol=1e-5)


def test_real_tokens_have_influence_each_on_its_own_image(tiny_uvit):
    network = tiny_uvit(**SHAPES["context"])
    inputs = inputs_for(network)
    expected = outputs(network, inputs)
    context = ops.convert_to_numpy(inputs["context"]).copy()
    context[0, 1] = -context[0, 1]
    changed = {**inputs, "context": ops.convert_to_tensor(context)}
    got = outputs(network, changed)
    assert not np.allclose(got[0], expected[0], atol=1e-3)
    np.testing.assert_allclose(got[1:], expected[1:], atol=1e-6)


def test_a_mask_of_nothing_is_a_network_without_a_context(tiny_uvit):
    network = tiny_uvit(**SHAPES["context"])
    inputs = inputs_for(network)
    got = []
    for length in (4, 1):
        none = {
            "context": ops.full((3, length, 24), 9.0 * length),
            "context_mask": ops.zeros((3, length), "bool"),
        }
        got.append(outputs(network, {**inputs, **none}))
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(*got, atol=1e-6)
    np.testing.assert_allclose(
        got[0][1], outputs(network, inputs)[1], atol=1e-6
    )


def test_a_mask_of_nothing_has_finite_gradients(tiny_uvit):
    network = tiny_uvit(**SHAPES["context"])
    inputs = inputs_for(network)
    inputs["context"] = inputs["context"] * np.nan
    inputs["context_mask"] = ops.zeros((3, 4), "bool")
    target, before = inputs["z"], network.get_weights()
    network.compile(keras.optimizers.SGD(0.1), "mse")
    assert np.isfinite(network.train_on_batch(inputs, target))
    changed = 0
    for weight, old in zip(network.trainable_variables, before):
        new = ops.convert_to_numpy(weight)
        assert np.all(np.isfinite(new)), weight.path
        changed += np.any(new != old)
    assert changed > len(before) / 2


def test_the_length_of_the_context_may_be_unknown(tiny_uvit):
    network = tiny_uvit(**SHAPES["context"])
    inputs = inputs_for(network)
    symbolic = {
        name: keras.KerasTensor(
            (None, None, *value.shape[2:])
            if "context" in name
            else (None, *value.shape[1:]),
            keras.backend.standardize_dtype(value.dtype),
        )
        for name, value in inputs.items()
    }
    assert network(symbolic).shape == (None, 8, 8, 1)
    compiled = backend.compile_inference(
        lambda *values: network(dict(zip(inputs, values))), network.variables
    )
    for length in (4, 2):
        part = {
            **inputs,
            "context": inputs["context"][:, :length],
            "context_mask": inputs["context_mask"][:, :length],
        }
        np.testing.assert_allclose(
            ops.convert_to_numpy(compiled(*part.values())),
            outputs(network, part),
            atol=1e-5,
        )


def test_noise_level_changes_the_output(tiny_uvit):
    network = tiny_uvit()
    inputs = inputs_for(network)
    other = {**inputs, "logsnr": inputs["logsnr"] + 1.0}
    got, changed = outputs(network, inputs), outputs(network, other)
    assert not np.allclose(got, changed, atol=1e-3)


@pytest.mark.parametrize("shape", ["all", "context"])
def test_every_weight_has_a_say(tiny_uvit, shape):
    network = tiny_uvit(**SHAPES[shape])
    inputs = inputs_for(network)
    compiled = backend.compile_inference(
        lambda *values: network(dict(zip(inputs, values))), network.variables
    )

    def run():
        return ops.convert_to_numpy(compiled(*inputs.values()))

    before = run()
    np.testing.assert_allclose(before, outputs(network, inputs), atol=1e-5)
    rng = np.random.default_rng(0)
    for weight in network.trainable_variables:
        value = ops.convert_to_numpy(weight) + 0
        weight.assign(value + 0.3 * rng.standard_normal(value.shape))
        assert np.abs(run() - before).max() > 1e-4, weight.path
        weight.assign(value)


@pytest.mark.parametrize("shape", ["all", "context"])
def test_examples_do_not_see_each_other(tiny_uvit, shape):
    network = tiny_uvit(**SHAPES[shape])
    inputs = inputs_for(network)
    swapped = {name: ops.flip(value, 0) for name, value in inputs.items()}
    got, other = outputs(network, inputs), outputs(network, swapped)
    np.testing.assert_allclose(other, got[::-1], atol=1e-5)
    changed = {
        **inputs,
        "z": inputs["z"] + np.float32([[[[1]]], [[[0]]], [[[0]]]]),
    }
    other = outputs(network, changed)
    assert not np.allclose(other[0], got[0], atol=1e-3)
    np.testing.assert_allclose(other[1:], got[1:], atol=1e-5)


def test_positions_matter(tiny_uvit):
    network = tiny_uvit()
    inputs = inputs_for(network)
    turned = {**inputs, "z": ops.flip(inputs["z"], axis=1)}

    def difference():
        here = outputs(network, inputs)[:, ::-1]
        return np.abs(outputs(network, turned) - here).max()

    assert difference() > 1e-3
    # Without them a ViT takes its tokens in any order.
    (position,) = (p.position for p in network.positions if p)
    position.assign(ops.zeros(position.shape))
    assert difference() < 1e-5


def test_only_stages_that_attend_have_positions(tiny_uvit):
    network = tiny_uvit(**SHAPES["all"])
    shapes = [p and tuple(p.position.shape) for p in network.positions]
    assert shapes == [None, (2, 4, 32), (1, 2, 16)]


def test_patches_are_the_squares_of_the_image():
    images = np.arange(2 * 4 * 6 * 3, dtype="float32").reshape(2, 4, 6, 3)
    patches = ops.convert_to_numpy(to_patches(ops.convert_to_tensor(images), 2))
    assert patches.shape == (2, 2, 3, 12)
    for i in range(2):
        for j in range(3):
            square = images[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(
                patches[:, i, j], square.reshape(2, 12)
            )


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_pixels_undo_patches(patch_size):
    images = np.random.default_rng(0).standard_normal((2, 8, 4, 3), "float32")
    patches = to_patches(ops.convert_to_tensor(images), patch_size)
    np.testing.assert_array_equal(to_pixels(patches, patch_size), images)


def test_dropout_is_on_in_training_only(tiny_uvit):
    network = tiny_uvit(**SHAPES["all"])
    inputs = inputs_for(network)
    still = outputs(network, inputs, training=False)
    np.testing.assert_array_equal(outputs(network, inputs), still)
    first = outputs(network, inputs, training=True)
    second = outputs(network, inputs, training=True)
    assert not np.allclose(first, still)
    assert not np.allclose(first, second)
    twin = tiny_uvit(**SHAPES["all"])
    twin.set_weights(network.get_weights())
    np.testing.assert_array_equal(outputs(twin, inputs, training=True), first)


def test_dropout_is_per_stage_and_its_seeds_are_all_different(tiny_uvit):
    network = tiny_uvit(**SHAPES["all"])
    stages = [[*down, *up] for down, up in zip(network.down, network.up)]
    stages.append(network.middle)
    rates = [{block.dropout_rate for block in stage} for stage in stages]
    assert rates == [{0.0}, {0.1}, {0.2}]
    seeds = [block.seed for stage in stages for block in stage]
    assert len(set(seeds)) == len(seeds) == 6
    # Keras draws from seed + counter on one backend: far apart they must be.
    assert np.diff(np.sort(seeds)).min() > 100_000


def trained(network, steps=2):
    """A network's variables after some steps of gradient descent."""
    network.compile(keras.optimizers.SGD(0.3), "mse")
    inputs = inputs_for(network)
    for _ in range(steps):
        network.train_on_batch(inputs, ops.flip(inputs["z"], 1))
    return [ops.convert_to_numpy(variable) for variable in network.variables]


def test_rematerialisation_changes_no_gradient(tiny_uvit):
    config = {**SHAPES["context"], "dropout": 0.3}
    without, network = (tiny_uvit(**config, remat=on) for on in (False, True))
    network.set_weights(without.get_weights())
    start = [ops.convert_to_numpy(v) + 0 for v in without.variables]
    expected, got, moved = trained(without), trained(network), 0
    paths = [variable.path for variable in network.variables]
    for path, before, one, other in zip(paths, start, expected, got):
        # Also the states of the seeds: each counts its calls once.
        np.testing.assert_allclose(
            other, one, rtol=1e-4, atol=1e-5, err_msg=path
        )
        moved += np.abs(one - before).max() > 1e-3
    assert moved > len(start) / 2


def test_what_is_rematerialised_is_computed_twice(tiny_uvit, monkeypatch):
    asked = []
    monkeypatch.setattr(
        keras, "remat", lambda block: asked.append(block) or block
    )
    config = {**SHAPES["all"], "remat": (False, True, False)}
    network = tiny_uvit(**config)
    symbolic = {
        name: keras.KerasTensor(value.shape, value.dtype)
        for name, value in inputs_for(network).items()
    }
    network(symbolic)
    assert len(asked) == 0  # nothing is kept for a gradient anyway
    network(symbolic, training=True)
    assert len(asked) == 2  # the stage's block on the way down, and up


def test_weights_are_the_same_with_rematerialisation(tiny_uvit, tmp_path):
    without = tiny_uvit(**SHAPES["context"])
    network = UViT.from_config({**without.get_config(), "remat": True})
    inputs, path = inputs_for(without), tmp_path / "network.weights.h5"
    without.save_weights(path)
    network.load_weights(path)
    expected = outputs(without, inputs)
    np.testing.assert_array_equal(outputs(network, inputs), expected)
    network.save_weights(path)
    again = UViT.from_config(without.get_config())
    again.load_weights(path)
    np.testing.assert_array_equal(outputs(again, inputs), expected)
    without.save_to_preset(tmp_path / "preset")
    network = UViT.from_preset(tmp_path / "preset", remat=True)
    assert network.remat == (True,) * len(network.widths)
    np.testing.assert_array_equal(outputs(network, inputs), expected)


@every_shape
def test_saved_and_loaded(tiny_uvit, config, tmp_path):
    network = tiny_uvit(**config)
    inputs = inputs_for(network)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(
        outputs(loaded, inputs), outputs(network, inputs)
    )


def test_flops_in_closed_form(tiny_uvit):
    network = tiny_uvit(**SHAPES["all"], context_width=24)
    (c_0, c_1, c_2), e, w, pixels = network.widths, 32, 24, 2 * 2 * 2
    n_0, n_1, n_2 = 4 * 8, 2 * 4, 1 * 2
    length = 5 + 1

    def transformer(c, n):
        dense = n * (4 + 2 * 4) * c**2 + e * 8 * c
        cross = n * 2 * c**2 + length * w * 2 * c
        return dense + 2 * n * n * c + cross + 2 * n * length * c

    # At the edge a convolution reaches beyond the image, where nothing is.
    taps = (4 * 3 - 2) * (8 * 3 - 2)
    resnet = 2 * taps * c_0**2 + e * 2 * c_0
    products = 2 * (resnet + transformer(c_1, n_1) + transformer(c_2, n_2))
    products += 2 * e**2 + w * e + 2 * n_0 * pixels * c_0
    products += n_1 * c_0 * c_1 + n_2 * c_1 * c_2  # after pooling
    products += n_2 * c_1 * c_2 + n_1 * c_0 * c_1  # before unpooling
    assert network.flops(context_length=5) == 2 * products


@pytest.mark.skipif(backend.NAME != "jax", reason="XLA counts, by JAX")
@pytest.mark.parametrize("context_width", [None, 96])
def test_flops_are_xlas(context_width):
    import jax

    network = UViT(
        image_shape=(16, 32, 3),
        widths=(128, 256),
        depths=(1, 2),
        attention=(False, True),
        embedding_width=256,
        num_classes=3,
        context_width=context_width,
    )
    # Of one image, as what is once per image must not be once per batch.
    inputs = {name: x[:1] for name, x in inputs_for(network).items()}

    def forward(values, inputs):
        with keras.StatelessScope(zip(network.variables, values)):
            return network(inputs)

    values = [variable.value for variable in network.variables]
    compiled = jax.jit(forward).lower(values, inputs).compile()
    assert network.flops(context_length=4) == pytest.approx(
        compiled.cost_analysis()["flops"], rel=0.02
    )
