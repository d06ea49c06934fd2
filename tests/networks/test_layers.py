import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm.networks.attention import CrossAttention
from keras_mscm.networks.context import ContextEmbedding
from keras_mscm.networks.layers import (
    NoiseLevelEmbedding,
    PositionEmbedding,
    ResNetBlock,
    TransformerBlock,
)

# Of feature maps, for either kind of block, of the embedding and of a context.
SHAPES = {ResNetBlock: (3, 4, 8, 40), TransformerBlock: (3, 2, 4, 32)}
EMBEDDING = 3, 32
CONTEXT = 3, 5, 24


def random_inputs(cls, dtype="float32"):
    rng = np.random.default_rng(0)
    return [
        ops.convert_to_tensor(rng.standard_normal(shape), dtype)
        for shape in (SHAPES[cls], EMBEDDING)
    ]


def fill(layer, seed=0):
    """Random numbers into every weight, so that none is 0 or 1."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_variables:
        fan_in = np.prod(weight.shape[:-1])
        weight.assign(rng.standard_normal(weight.shape) / np.sqrt(fan_in))
    return layer


def built(cls, **config):
    block = cls(**config)
    block.build((SHAPES[cls], EMBEDDING))
    return fill(block)


def run(layer, *args, **kwargs):
    got = layer(*args, **kwargs)
    return ops.convert_to_numpy(ops.cast(got, "float32"))


def weights(layer):
    """Weights in float64, by `layer/weight`."""
    return {
        "/".join(weight.path.split("/")[-2:]): np.asarray(
            ops.convert_to_numpy(weight), "float64"
        )
        for weight in layer.trainable_variables
    }


def dense(w, name, x):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))


def group_norm(x, groups, w, name):
    split = x.reshape(*x.shape[:-1], groups, -1)
    mean = split.mean(axis=(1, 2, 4), keepdims=True)
    variance = split.var(axis=(1, 2, 4), keepdims=True)
    split = (split - mean) / np.sqrt(variance + 1e-3)
    return split.reshape(x.shape) * w[f"{name}/gamma"] + w[f"{name}/beta"]


def convolution(w, name, x):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return w[f"{name}/bias"] + sum(
        padded[:, i : i + height, j : j + width] @ w[f"{name}/kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )


def modulated(w, h, embedding):
    modulation = dense(w, "modulation", silu(embedding))[:, None, None]
    scale, shift = np.split(modulation, 2, axis=-1)
    return h * (1 + scale) + shift


def numpy_resnet(block, x, embedding):
    w = weights(block)
    h = convolution(w, "conv_1", silu(group_norm(x, 8, w, "norm_1")))
    h = modulated(w, group_norm(h, 8, w, "norm_2"), embedding)
    return x + convolution(w, "conv_2", silu(h))


def numpy_transformer(block, x, embedding, head_width=16):
    w = weights(block)
    batch, height, width, channels = x.shape
    tokens = rms_norm(x).reshape(batch, -1, channels)
    query, key, value = (
        part.reshape(batch, height * width, -1, head_width)
        for part in np.split(dense(w, "query_key_value", tokens), 3, axis=-1)
    )
    query, key = rms_norm(query) * w["norm_query/scale"], rms_norm(key)
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(head_width)
    share = np.exp(logits - logits.max(axis=-1, keepdims=True))
    share /= share.sum(axis=-1, keepdims=True)
    attended = np.einsum("bhqk,bkhd->bqhd", share, value).reshape(x.shape)
    x = x + dense(w, "attention_output", attended)
    h = silu(dense(w, "mlp_hidden", rms_norm(x)))
    return x + dense(w, "mlp_output", modulated(w, h, embedding))


BLOCKS = {
    "resnet": (ResNetBlock, {}, numpy_resnet),
    "transformer": (TransformerBlock, {"head_width": 16}, numpy_transformer),
}
every_block = pytest.mark.parametrize(
    ("cls", "config", "reference"), BLOCKS.values(), ids=BLOCKS
)


@every_block
def test_block_is_its_numpy_reference(cls, config, reference):
    block, inputs = built(cls, **config), random_inputs(cls)
    exact = [ops.convert_to_numpy(x).astype("float64") for x in inputs]
    # Sums of hundreds of products, and norms, in float32.
    expected = reference(block, *exact)
    np.testing.assert_allclose(run(block, inputs), expected, atol=3e-5)


@every_block
def test_block_begins_as_the_identity(cls, config, reference):
    maps, embedding = random_inputs(cls)
    got = run(cls(**config), (maps, embedding))
    np.testing.assert_array_equal(got, maps)


@every_block
def test_dropout_is_on_in_training_only(cls, config, reference):
    block, inputs = (
        built(cls, dropout=0.5, seed=3, **config),
        random_inputs(cls),
    )
    still = run(block, inputs, training=False)
    np.testing.assert_array_equal(run(block, inputs), still)
    first = run(block, inputs, training=True)
    second = run(block, inputs, training=True)
    assert not np.allclose(first, still)
    assert not np.allclose(first, second)
    # The seed decides the masks.
    twin = built(cls, dropout=0.5, seed=3, **config)
    np.testing.assert_array_equal(run(twin, inputs, training=True), first)
    other = built(cls, dropout=0.5, seed=4, **config)
    assert not np.allclose(run(other, inputs, training=True), first)


@every_block
def test_block_config_round_trip(cls, config, reference):
    block = built(cls, dropout=0.25, seed=5, **config)
    stored = keras.saving.serialize_keras_object(block)
    loaded = keras.saving.deserialize_keras_object(stored)
    assert loaded.get_config() == block.get_config()
    fill(loaded)
    inputs = random_inputs(cls)
    np.testing.assert_array_equal(run(loaded, inputs), run(block, inputs))


def test_resnet_block_in_half_precision():
    exact = run(built(ResNetBlock), random_inputs(ResNetBlock))
    block = built(ResNetBlock, dtype="mixed_bfloat16")
    inputs = random_inputs(ResNetBlock, "bfloat16")
    assert keras.backend.standardize_dtype(block(inputs).dtype) == "bfloat16"
    for weight in block.trainable_variables:
        assert keras.backend.standardize_dtype(weight.dtype) == "float32"
    # bfloat16 has 8 bits: 0.4% each time that something is stored.
    error = np.abs(run(block, inputs) - exact)
    assert error.mean() < 0.02 * np.abs(exact).mean()


def test_parameters_of_a_transformer_block():
    block = built(TransformerBlock, head_width=16)
    c, e, hidden = 32, 32, 4 * 32
    # Attention 4 c^2, MLP 8 c^2, modulation; biases; norms.
    matrices = 12 * c**2 + 2 * e * hidden
    biases = 3 * c + c + hidden + c + 2 * hidden
    assert block.count_params() == matrices + biases + 16


def test_parameters_of_a_resnet_block():
    block = built(ResNetBlock)
    c, e = 40, 32
    # Two convolutions 9 c^2 each, modulation; biases; norms.
    matrices = 18 * c**2 + 2 * e * c
    assert block.count_params() == matrices + (2 * c + 2 * c) + 4 * c


def test_the_mlp_ratio_is_that_of_the_hidden_layer():
    block = built(TransformerBlock, head_width=16, mlp_ratio=2)
    assert tuple(block.mlp_hidden.kernel.shape) == (32, 64)
    assert tuple(block.modulation.kernel.shape) == (32, 128)


def test_a_transformer_block_attends_to_all_places_and_no_other_image():
    block = built(TransformerBlock, head_width=16)
    maps, embedding = (
        ops.convert_to_numpy(x) for x in random_inputs(TransformerBlock)
    )
    changed = maps.copy()
    changed[0, 0, 0] += 1
    before, after = (
        run(block, [ops.convert_to_tensor(x) for x in (images, embedding)])
        for images in (maps, changed)
    )
    moved = np.abs(after - before).max(axis=-1)
    assert np.all(moved[0] > 0)
    np.testing.assert_allclose(moved[1:], 0, atol=1e-6)


@pytest.mark.parametrize("rate", [20, 1000])
def test_noise_level_embedding_is_its_numpy_reference(rate):
    layer = NoiseLevelEmbedding(16, time_rate=rate)
    layer.build((None,))
    fill(layer)
    logsnr = np.linspace(-20, 20, 41).astype("float32")
    time = np.arctan(np.exp(-logsnr.astype("float64") / 2)) * 2 / np.pi
    rates = np.geomspace(1, rate, 8)
    phase = time[:, None] * rates
    waves = np.concatenate([np.sin(phase), np.cos(phase)], axis=-1)
    w = weights(layer)
    expected = dense(w, "projection", silu(dense(w, "hidden", waves)))
    # Phases up to 1000, to a float32's 6e-5.
    got = run(layer, ops.convert_to_tensor(logsnr))
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_noise_level_embedding_tells_a_teachers_steps_apart():
    layer = NoiseLevelEmbedding(32)
    t = np.linspace(1e-3, 1 - 1e-3, 1281)
    logsnr = -2 * np.log(np.tan(np.pi / 2 * t))
    got = run(layer, ops.convert_to_tensor(logsnr, "float32"))
    steps = np.linalg.norm(np.diff(got, axis=0), axis=1)
    assert steps.min() > 0.05 * np.linalg.norm(got, axis=1).mean()


def test_noise_level_embedding_keeps_its_phase_in_half_precision():
    full = NoiseLevelEmbedding(16)
    half = NoiseLevelEmbedding(16, dtype="mixed_bfloat16")
    for layer in (full, half):
        layer.build((None,))
        fill(layer)
    # Of no round number, as rounding the log-SNR would be as bad.
    logsnr = ops.convert_to_tensor(np.linspace(-14.9, 14.7, 61), "float32")
    exact, got = run(full, logsnr), run(half, logsnr)
    assert keras.backend.standardize_dtype(half(logsnr).dtype) == "bfloat16"
    # Phases in bfloat16 would be wrong by whole turns.
    assert np.abs(got - exact).max() < 0.03 * np.abs(exact).max()


def test_noise_level_embedding_config_round_trip():
    layer = NoiseLevelEmbedding(
        12, name="noise", time_rate=20, dtype="mixed_bfloat16"
    )
    stored = keras.saving.serialize_keras_object(layer)
    loaded = keras.saving.deserialize_keras_object(stored)
    assert loaded.get_config() == layer.get_config()
    assert loaded.width == 12
    assert loaded.time_rate == 20
    assert "time_rate" not in NoiseLevelEmbedding(12).get_config()
    with pytest.raises(ValueError, match=r"`time_rate` must.*Received: "):
        NoiseLevelEmbedding(12, time_rate=1)


def test_position_embedding_adds_one_vector_per_place():
    layer = PositionEmbedding()
    maps, _ = random_inputs(ResNetBlock)
    got = run(layer, maps) - ops.convert_to_numpy(maps)
    position = ops.convert_to_numpy(layer.position)
    assert position.shape == maps.shape[1:]
    assert 0.01 < position.std() < 0.03
    for image in got:
        np.testing.assert_allclose(image, position, atol=1e-6)


def random_context():
    """A sequence, and its mask: some real tokens, none, all."""
    rng = np.random.default_rng(5)
    sequence = rng.standard_normal(CONTEXT).astype("float32")
    mask = np.zeros(CONTEXT[:2], "bool")
    mask[0, :3] = mask[2] = True
    return sequence, mask


def numpy_context(layer, sequence, mask):
    w = {v.name: ops.convert_to_numpy(v) for v in layer.weights}
    all_pooled = []
    for tokens, real in zip(sequence.astype("float64"), mask):
        tokens = rms_norm(np.stack([w["null_token"], *tokens[real]]))
        all_pooled.append(tokens.mean(axis=0) @ w["kernel"] + w["bias"])
    return np.stack(all_pooled)


def test_context_embedding_is_its_numpy_reference():
    layer = ContextEmbedding(16)
    sequence, mask = random_context()
    layer.build([sequence.shape, mask.shape])
    fill(layer)
    tokens, tokens_mask, pooled = map(
        ops.convert_to_numpy, layer((sequence, mask))
    )
    expected = numpy_context(layer, sequence, mask)
    np.testing.assert_allclose(pooled, expected, atol=1e-5)
    null = ops.convert_to_numpy(layer.null_token)
    for i in range(3):
        np.testing.assert_array_equal(tokens_mask[i], [True, *mask[i]])
        expected = rms_norm(np.stack([null, *sequence[i][mask[i]]]))
        got = tokens[i][tokens_mask[i]]
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_context_embedding_knows_nothing_of_masked_places():
    layer = ContextEmbedding(16)
    sequence, mask = random_context()
    expected = [ops.convert_to_numpy(x) for x in layer((sequence, mask))]
    sequence[~mask] = np.nan
    # As tokenizers give it.
    integers = ops.convert_to_tensor(mask, "int32")
    for got, want in zip(layer((sequence, integers)), expected):
        np.testing.assert_array_equal(ops.convert_to_numpy(got), want)


def test_context_embedding_config_round_trip():
    layer = ContextEmbedding(12, name="context", dtype="mixed_bfloat16")
    stored = keras.saving.serialize_keras_object(layer)
    loaded = keras.saving.deserialize_keras_object(stored)
    assert loaded.get_config() == layer.get_config()
    assert loaded.width == 12


def numpy_cross_attention(w, places, tokens, mask, head_width=16):
    heads = (len(places), -1, places.shape[-1] // head_width, head_width)
    query = dense(w, "query", places).reshape(heads)
    key, value = (
        part.reshape(heads)
        for part in np.split(dense(w, "key_value", tokens), 2, axis=-1)
    )
    query, key = rms_norm(query) * w["norm_query/scale"], rms_norm(key)
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(head_width)
    share = np.exp(logits - logits.max(axis=-1, keepdims=True))
    share *= mask[:, None, None]
    share /= share.sum(axis=-1, keepdims=True)
    attended = np.einsum("bhqk,bkhd->bqhd", share, value)
    return dense(w, "attention_output", attended.reshape(places.shape))


def places_of(maps):
    return ops.reshape(maps, (maps.shape[0], -1, maps.shape[-1]))


def built_with_context():
    """A transformer block, and inputs with tokens and their mask."""
    inputs = random_inputs(TransformerBlock)
    tokens, mask = random_context()
    mask[1, 4] = True
    inputs += [ops.convert_to_tensor(tokens), ops.convert_to_tensor(mask)]
    block = TransformerBlock(head_width=16)
    block.build([tuple(x.shape) for x in inputs])
    return fill(block), inputs


def test_cross_attention_is_its_numpy_reference():
    block, (maps, _, tokens, mask) = built_with_context()
    layer, places = block.cross_attention, places_of(maps)
    exact = [
        ops.convert_to_numpy(x).astype("float64") for x in (places, tokens)
    ]
    expected = numpy_cross_attention(
        weights(layer), *exact, ops.convert_to_numpy(mask)
    )
    got = run(layer, (places, tokens, mask))
    np.testing.assert_allclose(got, expected, atol=3e-5)


def test_cross_attention_stands_between_self_attention_and_mlp():
    block, (maps, embedding, *context) = built_with_context()
    places = places_of(maps)
    x = places + block._attention(ops.rms_normalization(places))
    x = x + block.cross_attention((ops.rms_normalization(x), *context))
    h = ops.silu(block.mlp_hidden(ops.rms_normalization(x)))
    modulation = block.modulation(ops.silu(embedding))[:, None]
    scale, shift = ops.split(modulation, 2, axis=-1)
    expected = x + block.mlp_output(h * (1 + scale) + shift)
    got = places_of(run(block, (maps, embedding, *context)))
    np.testing.assert_allclose(got, ops.convert_to_numpy(expected), atol=1e-5)


def test_a_block_with_context_begins_as_the_identity():
    _, inputs = built_with_context()
    got = run(TransformerBlock(head_width=16), inputs)
    np.testing.assert_array_equal(got, ops.convert_to_numpy(inputs[0]))


def test_cross_attention_config_round_trip():
    layer = CrossAttention(12, name="cross", dtype="mixed_bfloat16")
    stored = keras.saving.serialize_keras_object(layer)
    loaded = keras.saving.deserialize_keras_object(stored)
    assert loaded.get_config() == layer.get_config()
    assert loaded.head_width == 12
