"""LoRA against float64, and files of adapters."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import lora


def make_network(dense=True):
    """Two dense layers, or an `EinsumDense`, of `z` and log-SNR."""
    layers = keras.layers
    z = keras.Input((4, 2), name="z")
    logsnr = keras.Input((), name="logsnr")
    h = layers.EinsumDense(
        "bld,dhk->blhk", (4, 3, 2), bias_axes="hk", name="heads"
    )(z)
    h = layers.Reshape((4, 6))(h)
    h = layers.Dense(6, activation="tanh", name="middle")(h)
    h = h * layers.Reshape((1, 1))(logsnr)
    h = layers.Dense(2, name="last")(h)
    return keras.Model({"z": z, "logsnr": logsnr}, h, name="net")


def inputs_of(network):
    return {
        "z": keras.KerasTensor((None, 4, 2), "float32"),
        "logsnr": keras.KerasTensor((None,), "float32"),
    }


def example(num=5):
    rng = np.random.default_rng(num)
    return {
        "z": rng.standard_normal((num, 4, 2)).astype("float32"),
        "logsnr": rng.standard_normal(num).astype("float32"),
    }


def filled(network):
    """Gives adapters random values."""
    rng = np.random.default_rng(0)
    for layer in lora.adapted(network):
        for name in lora.ADAPTERS:
            weight = getattr(layer, name)
            weight.assign(rng.standard_normal(weight.shape).astype("float32"))
    return network


def run(network, given=None):
    output = network(given or example(), training=False)
    return ops.convert_to_numpy(output)


def weights_of(layer):
    return [
        np.asarray(ops.convert_to_numpy(w), "float64") for w in layer.weights
    ]


def test_adapters_begin_without_effect_and_are_all_that_is_trained():
    network = make_network()
    before = run(network)
    layers = lora.enable(network, 2)
    np.testing.assert_array_equal(run(network), before)
    assert [layer.name for layer in layers] == ["heads", "middle", "last"]
    names = [weight.name for weight in network.trainable_weights]
    assert names == [*lora.ADAPTERS] * 3


def test_against_float64():
    network = make_network()
    lora.enable(network, 2, alpha=3.0)
    filled(network)
    (kernel_h, bias_h, a_h, b_h), (kernel_m, bias_m, a_m, b_m), last = (
        weights_of(network.get_layer(name))
        for name in ("heads", "middle", "last")
    )
    kernel_l, bias_l, a_l, b_l = last
    given = example()
    z, logsnr = (given[k].astype("float64") for k in ("z", "logsnr"))
    h = np.einsum("bld,dhk->blhk", z, kernel_h + 1.5 * a_h @ b_h) + bias_h
    h = h.reshape(5, 4, 6)
    h = np.tanh(h @ (kernel_m + 1.5 * a_m @ b_m) + bias_m)
    h = h * logsnr[:, None, None]
    expected = h @ (kernel_l + 1.5 * a_l @ b_l) + bias_l
    np.testing.assert_allclose(run(network, given), expected, rtol=2e-4)


def test_targets_are_parts_of_paths():
    network = make_network()
    layers = lora.enable(network, 2, targets=["middle"])
    assert [layer.name for layer in layers] == ["middle"]
    assert len(network.trainable_weights) == 2


def test_without_adapters_it_is_the_network_before():
    network = make_network()
    before = run(network)
    lora.enable(network, 2)
    filled(network)
    assert np.abs(run(network) - before).max() > 0.1
    view = lora.WithoutAdapters(network)
    np.testing.assert_array_equal(run(view), before)
    assert not view.variables  # it shares them
    assert all(layer.lora_enabled for layer in lora.adapted(network))


def test_an_error_within_leaves_the_adapters_on():
    network = make_network()
    lora.enable(network, 2)
    with pytest.raises(KeyError), lora.disabled(lora.adapted(network)):
        raise KeyError
    assert len(lora.adapted(network)) == 3


def test_merged_is_plain_and_says_the_same():
    network = make_network()
    lora.enable(network, 2)
    filled(network)
    plain = lora.merged(network, inputs_of(network))
    np.testing.assert_allclose(run(plain), run(network), atol=1e-5)
    assert not lora.adapted(plain)
    assert len(plain.weights) == 6
    assert len(plain.trainable_weights) == 6


def test_weights_files_keep_adapters_apart(tmp_path):
    network = make_network()
    lora.enable(network, 2)
    filled(network)
    network.save_weights(tmp_path / "net.weights.h5")
    other = make_network()
    lora.enable(other, 2)
    other.load_weights(tmp_path / "net.weights.h5")
    for ours, theirs in zip(network.weights, other.weights, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
        )


def test_weights_of_a_network_without_adapters_can_be_loaded(tmp_path):
    plain, network = make_network(), make_network()
    plain.save_weights(tmp_path / "plain.weights.h5")
    lora.enable(network, 2)
    filled(network)
    network.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(run(network), run(plain), atol=1e-6)
    # Not 0 both, which no training could move.
    a = network.get_layer("middle").lora_kernel_a
    assert np.any(ops.convert_to_numpy(a))


def test_a_file_of_adapters(tmp_path):
    network = make_network()
    lora.enable(network, 2)
    filled(network)
    path = tmp_path / "adapters.npz"
    lora.save_adapters(path, network, {})
    other = make_network()
    other.set_weights([*map(np.asarray, make_base(network))])
    lora.enable(other, 2, alpha=4.0)  # counted twice as much
    lora.load_adapters(path, other)
    np.testing.assert_allclose(run(other), run(network), atol=1e-5)
    assert [*tmp_path.iterdir()] == [path]


def make_base(network):
    adapters = {
        id(getattr(layer, name))
        for layer in lora.adapted(network)
        for name in lora.ADAPTERS
    }
    return [
        ops.convert_to_numpy(w)
        for w in network.weights
        if id(w) not in adapters
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("1.scale"), "differs in"),
        (lambda file: file.update(more=np.ones(1, "float32")), "differs in"),
        (
            lambda file: file.update({"0.lora_kernel_a": np.ones((4, 3, 5))}),
            "0.lora_kernel_a",
        ),
        (
            lambda file: file.update({"2.scale": np.float32(np.nan)}),
            "finite",
        ),
    ],
)
def test_other_adapters_are_refused_and_change_nothing(
    change, message, tmp_path
):
    network = make_network()
    lora.enable(network, 2)
    filled(network)
    path = tmp_path / "adapters.npz"
    lora.save_adapters(path, network, {})
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)
    before = [ops.convert_to_numpy(w).copy() for w in network.weights]
    with pytest.raises(ValueError, match=message):
        lora.load_adapters(path, network)
    for old, new in zip(before, network.weights):
        np.testing.assert_array_equal(old, ops.convert_to_numpy(new))


def test_what_is_no_file_of_adapters(tmp_path):
    network = make_network()
    lora.enable(network, 2)
    path = tmp_path / "a.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="save_lora"):
        lora.load_adapters(path, network)
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        lora.save_adapters(tmp_path / "a.h5", network, {})
    with pytest.raises(ValueError, match="lora_rank"):
        lora.save_adapters(path, make_network(), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`lora_rank`"),
        ({"rank": 2.0}, "`lora_rank`"),
        ({"rank": 2, "alpha": 0}, "`lora_alpha`"),
        ({"rank": 2, "targets": []}, "`lora_targets`"),
        ({"rank": 2, "targets": "middle"}, "`lora_targets`"),
        ({"rank": 2, "targets": ["nothing"]}, "`lora_targets`.*nothing"),
    ],
)
def test_bad_arguments(arguments, message):
    network = make_network()
    with pytest.raises(ValueError, match=message):
        lora.enable(network, **arguments)
    assert not lora.adapted(network)
