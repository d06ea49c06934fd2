"""What networks and layers refuse, and what they take all the same."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import UViT
from keras_mscm.networks.attention import CrossAttention
from keras_mscm.networks.context import ContextEmbedding
from keras_mscm.networks.dropout import Dropout, seeds_apart
from keras_mscm.networks.layers import (
    NoiseLevelEmbedding,
    ResNetBlock,
    TransformerBlock,
)
from keras_mscm.networks.normalization import GroupNormalization

# No number, no sequence of numbers, and no switch.
NOTHING = [
    float("nan"),
    float("inf"),
    -1,
    10**30,
    "no",
    b"1",
    {},
    set(),
    object(),
    np.ones(2),
    np.array(3),
    [],
    (),
    [[1]],
    [None],
    ["1"],
    [10**30],
    [float("nan")],
]
# Of each argument, what else it is not.
BAD = {
    "image_shape": [None, 5, True, (8, 8), (8, 8, 0), (8, 8, 2.0)],
    "widths": [None, 5, True, (0,), (True,), (2.0,), (32,) * 99],
    "depths": [None, 1, True, (0,), (1, 2), (True,), (1.5,)],
    "attention": [None, 0, 1, (True, False), (1,)],
    "num_classes": [0, True, False, 2.0],
    "context_width": [0, True, 2.0],
    "patch_size": [None, 0, True, 2.0],
    "head_width": [None, 0, True, 2.0],
    "mlp_ratio": [None, 0, True, 2.5],
    "embedding_width": [None, 0, 2, 15, True, 32.0],
    "dropout": [None, True, 1, 1.0, 1.5, -0.1, (0.1, 0.1), (1.0,)],
    "seed": [True, 2.0, 2**31 - 2],
    "remat": [None, 0, 1, (True, False), (1,)],
}


@pytest.mark.parametrize("name", BAD)
def test_no_argument_of_a_network_is_taken_that_it_is_not(tiny_uvit, name):
    for value in NOTHING + BAD[name]:
        with pytest.raises(ValueError, match=f"`{name}` must .*Received: "):
            tiny_uvit(**{name: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_shape": (8, 8)}, "`image_shape` must be"),
        ({"image_shape": (2**17, 8, 1)}, "each at most 65536"),
        ({"image_shape": (9, 8, 1), "patch_size": 2}, "multiples of 2"),
        (
            {
                "image_shape": (8, 12, 1),
                "widths": (16,) * 3,
                "depths": (1,) * 3,
                "patch_size": 2,
            },
            "multiples of 8",
        ),
        ({"widths": (24,)}, "multiples of `head_width`=16"),
        ({"depths": (1, 2)}, "`depths` must have one entry per stage"),
        ({"attention": (True, False)}, "`attention` must have one entry"),
        ({"dropout": (0.1, 0.1)}, "`dropout` must have one entry"),
        ({"remat": (True, False)}, "`remat` must have one entry"),
        ({"remat": "full"}, "`remat` must be True or False"),
        ({"depths": (0,)}, r"at least 1 and at most 1024.*depths=\(0,\)"),
        ({"dropout": 1.0}, r"a number in \[0, 1\).*dropout=\(1.0,\)"),
        ({"num_classes": 0}, "or None. Received: num_classes=0 of type int"),
        ({"embedding_width": 15}, "an even integer of at least 4"),
    ],
)
def test_bad_arguments(tiny_uvit, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_uvit(**config)


def test_numbers_of_numpy_and_lists_are_stored_as_plain_pythons(tiny_uvit):
    plain = tiny_uvit(
        image_shape=(8, 8, 1),
        widths=(32,),
        depths=(1,),
        attention=(True,),
        num_classes=3,
        context_width=8,
        patch_size=2,
        mlp_ratio=2,
        dropout=(0.5,),
        remat=(False,),
        name="network",
    ).get_config()
    given = {
        key: [np.asarray(x)[()] for x in value]
        if isinstance(value, tuple)
        else np.asarray(value)[()]
        for key, value in plain.items()
        if key in BAD
    }
    got = UViT(**given, name="network").get_config()
    assert json.dumps(got) == json.dumps(plain)
    # As from a file, where tuples are lists.
    again = UViT.from_config(json.loads(json.dumps(plain)))
    assert again.get_config() == plain


BAD_OF_LAYERS = [
    (NoiseLevelEmbedding, "width", [3, 2, *NOTHING]),
    (ContextEmbedding, "width", [0, True, *NOTHING]),
    (CrossAttention, "head_width", [0, True, *NOTHING]),
    (TransformerBlock, "head_width", [0, True, *NOTHING]),
    (TransformerBlock, "mlp_ratio", [0, 1.5, *NOTHING]),
    *(
        (block, name, [*bad, *NOTHING])
        for block in (TransformerBlock, ResNetBlock)
        for name, bad in {
            "dropout": [1.0, True, None],
            "seed": [2**31 - 2, True],
            "remat": [1, None],
        }.items()
    ),
    (Dropout, "rate", [1.0, True, None, *NOTHING]),
    (Dropout, "seed", [2**31 - 2, True, *NOTHING]),
    (Dropout, "noise_shape", [(1, 2), *NOTHING]),
    (GroupNormalization, "axis", [1, *NOTHING[:2], *NOTHING[3:]]),
]


@pytest.mark.parametrize(
    ("layer", "name", "values"),
    BAD_OF_LAYERS,
    ids=[f"{layer.__name__}-{name}" for layer, name, _ in BAD_OF_LAYERS],
)
def test_no_argument_of_a_layer_is_taken_that_it_is_not(layer, name, values):
    needed = {"width": 8} if "Embedding" in layer.__name__ else {}
    needed |= {"rate": 0.5} if layer is Dropout else {}
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be .*Received: "):
            layer(**{**needed, name: value})


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (TransformerBlock, ((3, 2, 4, 32), (3, 32))),
        (CrossAttention, ((3, 8, 32), (3, 5, 24), (3, 5))),
    ],
)
def test_heads_must_divide_a_layers_channels(layer, shapes):
    with pytest.raises(ValueError, match=r"divide the channels, 32.*=24"):
        layer(head_width=24).build(shapes)


@pytest.mark.parametrize(
    "bad", [*NOTHING[:5], 2.0, True, None, "5", np.array(3)], ids=repr
)
def test_flops_are_of_a_number_of_tokens(tiny_uvit, bad):
    network = tiny_uvit(context_width=8)
    with pytest.raises(ValueError, match="`context_length` must be"):
        network.flops(context_length=bad)


def inputs_for(network):
    return {
        "z": ops.ones((2, *network.image_shape)),
        "logsnr": ops.zeros(2),
        "labels": ops.zeros(2, "int32"),
        "context": ops.ones((2, 3, 8)),
        "context_mask": ops.ones((2, 3), "bool"),
    }


@pytest.mark.parametrize("lacking", ["z", "logsnr", "labels", "context_mask"])
def test_a_call_says_which_input_is_lacking(tiny_uvit, lacking):
    network = tiny_uvit(num_classes=3, context_width=8)
    inputs = inputs_for(network)
    kept = {name: x for name, x in inputs.items() if name != lacking}
    for bad in (kept, {**inputs, lacking: None}):
        with pytest.raises(ValueError, match=rf"none for \['{lacking}'\]"):
            network(bad)


def test_a_call_takes_a_dictionary_with_or_without_more(tiny_uvit):
    network = tiny_uvit()
    inputs = inputs_for(network)
    assert network(inputs).shape == inputs["z"].shape
    for bad in (inputs["z"], list(inputs.values())):
        with pytest.raises(ValueError, match=r"`inputs` must be a dict.*'z'"):
            network(bad)


def test_seeds_apart_are_as_they_were_and_in_the_range_of_seeds():
    words = np.random.SeedSequence(3).generate_state(1000) >> 1
    seeds = seeds_apart(3, 1000, True)
    assert seeds == words.tolist()
    assert max(seeds) < 2**31 - 2
    # Without dropout none is drawn, and weights are what they were.
    assert seeds_apart(None, 5, False) == seeds_apart(0, 5, True)


@pytest.fixture
def floatx(request):
    """Sets the number format of weights, as a user's script does first."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    # As Keras keeps the policy that it first made of it.
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


@pytest.mark.parametrize(
    "floatx", ["float16", "bfloat16", "float64"], indirect=True
)
def test_every_number_format_is_finite_or_refused(tiny_uvit, floatx):
    network = tiny_uvit(num_classes=3, context_width=8, dropout=0.1, remat=True)
    inputs = inputs_for(network)
    network.compile(keras.optimizers.Adam(1e-3), "mse")
    if floatx == "float16":
        with pytest.raises(ValueError, match=r"aren't float16.*mixed_float16"):
            network.train_on_batch(inputs, inputs["z"])
    else:
        for _ in range(3):
            network.train_on_batch(inputs, inputs["z"])
    for logsnr in (-20.0, 0.0, 20.0):
        output = network({**inputs, "logsnr": ops.full((2,), logsnr)})
        output = ops.convert_to_numpy(ops.cast(output, "float32"))
        assert np.all(np.isfinite(output))


def fitted(tiny_uvit, seed):
    keras.utils.set_random_seed(seed)
    network = tiny_uvit(dropout=0.5, seed=None)
    network.compile(keras.optimizers.SGD(0.1), "mse")
    inputs = inputs_for(network)
    inputs = {name: inputs[name] for name in ("z", "logsnr")}
    network.fit(inputs, inputs["z"], epochs=2, verbose=0)
    assert network.get_config()["seed"] is None
    return [ops.convert_to_numpy(w) for w in network.trainable_variables]


def test_the_seed_of_all_fixes_what_is_trained_with_dropout(tiny_uvit):
    first, again, other = (fitted(tiny_uvit, seed) for seed in (3, 3, 4))
    for one, two in zip(first, again):
        np.testing.assert_array_equal(one, two)
    assert any(np.any(one != two) for one, two in zip(first, other))


def test_the_seed_of_all_fixes_dropout_itself():
    config = dict(widths=(8,), depths=(1,), attention=False, dropout=0.5)

    def masks(seed):
        keras.utils.set_random_seed(seed)
        networks = [UViT((4, 4, 1), **config) for _ in range(2)]
        return [network.middle[0].seed for network in networks]

    assert masks(3) == masks(3)
    assert len({*masks(3), *masks(4)}) == 4
