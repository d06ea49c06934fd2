import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import functional as F
from keras_mscm.adapters import AdaptedNetwork
from keras_mscm.conditioning import Condition

SHAPE = (6, 3)
LOGSNR = np.array([-30, -9, -1, 0, 2, 11, 30], "float32")
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.cumprod(1 - BETAS)


@keras.saving.register_keras_serializable(package="tests")
class Foreign(keras.Layer):
    """Tells what it was given: `z` or time, or a dense layer of `z`."""

    def __init__(self, tell="z", **kwargs):
        super().__init__(**kwargs)
        self.tell = tell

    def build(self, input_shape):
        self.dense = keras.layers.Dense(3, dtype=self.dtype_policy)
        self.dense.build((None, *SHAPE))

    def call(self, inputs):
        if isinstance(inputs, (list, tuple)):
            inputs = dict(zip(("time", "text", "z"), inputs))
        if self.tell == "dense":
            return self.dense(inputs["z"]) + ops.mean(
                ops.cast(inputs["time"], self.compute_dtype)
            )
        value = inputs[self.tell]
        value = value[(..., *[None] * (3 - len(value.shape)))]
        return ops.broadcast_to(value, (ops.shape(value)[0], *SHAPE))

    def get_config(self):
        return {**super().get_config(), "tell": self.tell}


def told(tell, z, **arguments):
    """What a foreign network is given for `tell`, at each log-SNR."""
    network = AdaptedNetwork(
        Foreign(tell), SHAPE, names={"logsnr": "time"}, **arguments
    )
    got = network({"z": z, "logsnr": LOGSNR})
    return ops.convert_to_numpy(got)


@pytest.fixture
def process():
    """Data, noise, and what others have for `z`, in float64."""
    rng = np.random.default_rng(0)
    x, epsilon = rng.standard_normal((2, len(LOGSNR), *SHAPE))
    level = LOGSNR.astype("float64")[:, None, None]
    alpha = 1 / np.sqrt(1 + np.exp(-level))
    sigma = 1 / np.sqrt(1 + np.exp(level))
    return x, epsilon, alpha, sigma


def test_the_network_is_given_its_own_coordinates(process):
    x, epsilon, alpha, sigma = process
    z, t, level = alpha * x + sigma * epsilon, sigma / (alpha + sigma), 0.7
    for name, expected in {
        "variance_preserving": z,
        "rectified_flow": (1 - t) * x + t * epsilon,
        "variance_exploding": x + sigma / alpha * epsilon,
        "edm": z / np.sqrt(sigma**2 + level**2 * alpha**2),
    }.items():
        got = told("z", z, process=name, sigma_data=level)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_network_is_given_its_own_time(process):
    x, _, alpha, sigma = process
    for name, expected in {
        "logsnr": LOGSNR[:, None, None],
        "sigma": sigma / alpha,
        "noise_variance": sigma**2,
        "flow_time": sigma / (alpha + sigma),
        "edm": np.log(sigma / alpha) / 4,
    }.items():
        got = told("time", x, time=name, time_scale=10.0)
        expected = np.broadcast_to(10 * expected, x.shape)
        np.testing.assert_allclose(got, expected, rtol=3e-6, atol=1e-5)


def test_time_is_a_place_in_a_table(process):
    got = told("time", process[0], time="discrete_step", alphas_cumprod=ALPHAS)
    # At its ends or beyond, and in between where log-SNR says.
    step = got[:, 0, 0]
    assert list(step[[0, 1, 5, 6]]) == [999, 999, 0, 0]
    table = np.log(ALPHAS / (1 - ALPHAS))
    place = np.interp(LOGSNR[2:5][::-1], table[::-1], np.arange(1000)[::-1])
    np.testing.assert_allclose(step[2:5][::-1], place, rtol=1e-5)


def test_time_has_the_axes_and_the_embedding_that_are_asked_for():
    class Shapes(keras.Layer):
        def call(self, inputs):
            self.seen = tuple(inputs["logsnr"].shape)
            return inputs["z"]

    foreign = Shapes()
    inputs = {"z": np.zeros((2, *SHAPE)), "logsnr": np.zeros(2)}
    AdaptedNetwork(foreign, SHAPE, time_axes=3)(inputs)
    assert foreign.seen == (2, 1, 1, 1)
    AdaptedNetwork(foreign, SHAPE, time_width=320)(inputs)
    assert foreign.seen == (2, 320)


@pytest.mark.parametrize("output", ["v", "x", "epsilon", "flow", "edm"])
def test_what_it_says_is_turned_into_x(process, output):
    x, epsilon, alpha, sigma = process
    z = alpha * x + sigma * epsilon
    v = alpha * epsilon - sigma * x
    level = 0.7
    variance = sigma**2 + level**2 * alpha**2
    c_skip = level**2 * alpha / variance  # of z
    c_out = level * sigma / np.sqrt(variance)
    said = {
        "v": v,
        "x": x,
        "epsilon": epsilon,
        "flow": epsilon - x,
        "edm": (x - c_skip * z) / c_out,
    }

    class Says(keras.Layer):
        def call(self, inputs):
            return ops.convert_to_tensor(said[output], "float32")

    foreign = Says()
    foreign.built = True
    network = AdaptedNetwork(foreign, SHAPE, output=output, sigma_data=level)
    z = ops.convert_to_tensor(z, "float32")
    logsnr = ops.convert_to_tensor(LOGSNR)
    got = F.predict_x(
        network({"z": z, "logsnr": logsnr}), z, logsnr, network.prediction_type
    )
    # From epsilon, x has the digits that are left; from the others, its own.
    atol = 1e-6 / alpha if output == "epsilon" else 3e-6
    assert np.all(np.abs(ops.convert_to_numpy(got) - x) <= atol)


def dense(**arguments):
    null = np.random.default_rng(1).standard_normal((4, 5))
    return AdaptedNetwork(
        Foreign("dense", **arguments),
        SHAPE,
        process="rectified_flow",
        time="flow_time",
        output="flow",
        names=["logsnr", "text", "z"],
        conditioning={"text": Condition((4, 5), null=null)},
    )


INPUTS = {
    "z": np.random.default_rng(2).standard_normal((2, *SHAPE)),
    "logsnr": np.array([-1.0, 3.0]),
    "text": np.zeros((2, 4, 5)),
}


def outputs(network):
    return ops.convert_to_numpy(network(INPUTS))


def test_a_clone_has_the_same_weights_and_shares_none():
    network = dense()
    clone = network.clone(name="other")
    assert clone.name == "other"
    np.testing.assert_array_equal(outputs(clone), outputs(network))
    before = outputs(network)
    for weight in clone.weights:
        weight.assign(weight + 1.0)
    np.testing.assert_array_equal(outputs(network), before)


def test_saved_and_loaded_it_says_the_same(tmp_path):
    network = dense()
    network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(network))
    null = network.conditioning["text"].null
    np.testing.assert_array_equal(loaded.conditioning["text"].null, null)
    assert null in network.non_trainable_variables


def test_constants_are_given_to_every_example():
    network = AdaptedNetwork(
        Foreign("ids"), SHAPE, constants={"ids": np.arange(6)[:, None]}
    )
    got = network({"z": np.zeros((2, *SHAPE)), "logsnr": np.zeros(2)})
    expected = np.broadcast_to(np.arange(6.0)[:, None], (2, *SHAPE))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        network.clone().constants["ids"][:, 0], np.arange(6)
    )


def test_half_precision_is_the_networks_alone():
    network = dense(dtype="mixed_bfloat16")
    got = network(INPUTS)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    full = dense()
    full.set_weights(network.get_weights())
    error = np.abs(outputs(network) - outputs(full))
    assert 0 < error.max() < 0.02
    seen = {}

    class Sees(keras.Layer):
        def call(self, inputs):
            seen.update(inputs)
            return inputs["z"]

    foreign = Sees(dtype="mixed_bfloat16", autocast=False)
    wrapped = AdaptedNetwork(foreign, SHAPE, time="flow_time", time_scale=1e3)
    wrapped({"z": INPUTS["z"], "logsnr": np.array([-14.5, -11.8])})
    times = ops.convert_to_numpy(seen["logsnr"])
    np.testing.assert_allclose(times, [999.29, 997.27], atol=0.01)


def test_what_cannot_be_made_anew_says_so():
    class Needs(keras.Layer):
        def __init__(self, module):
            super().__init__()

        def call(self, inputs):
            return inputs["z"]

    with pytest.raises(ValueError, match="`network` must be one that can be"):
        AdaptedNetwork(Needs(object()), SHAPE).clone()


@keras.saving.register_keras_serializable(package="tests")
class Timed(keras.Layer):
    """Embeds time in a layer of its own, whose name is Keras' choice."""

    def build(self, input_shape):
        self.time = keras.layers.Dense(8, dtype=self.dtype_policy)
        self.first = keras.layers.Dense(8, dtype=self.dtype_policy)
        self.last = keras.layers.Dense(3, dtype=self.dtype_policy)
        self.time.build((None, 1))
        self.first.build((None, *SHAPE))
        self.last.build((None, SHAPE[0], 8))

    def call(self, inputs):
        time = self.time(inputs["logsnr"][:, None])[:, None]
        return self.last(ops.tanh(self.first(inputs["z"]) + time))


def timed(**arguments):
    dtype = arguments.pop("dtype", None)
    return AdaptedNetwork(Timed(dtype=dtype), SHAPE, **arguments)


def told_ends(network, *ends):
    """What a network says at each end, in numbers."""
    inputs = {"z": INPUTS["z"], "logsnr": INPUTS["logsnr"]}
    said = [network({**inputs, "logsnr_end": np.full(2, end)}) for end in ends]
    return [ops.convert_to_numpy(value) for value in (network(inputs), *said)]


def learnt(network):
    """Lets a network be told an end, as if it had been trained with it."""
    network.take_logsnr_end()
    rng = np.random.default_rng(5)
    for weight in network.embed_end.weights:
        weight.assign(rng.standard_normal(weight.shape))
    return network


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_end_is_added_to_the_embedding_of_time(dtype):
    network = timed(time_embedding="time", dtype=dtype)
    assert not network.takes_logsnr_end
    plain, ignored = told_ends(network, 3.0)
    np.testing.assert_array_equal(plain, ignored)
    network.take_logsnr_end()
    network.take_logsnr_end()  # once more changes nothing
    assert network.takes_logsnr_end
    for same in told_ends(network, -2.0, 3.0):
        np.testing.assert_array_equal(same, plain)

    same, far, near = told_ends(learnt(network), -2.0, 3.0)
    np.testing.assert_array_equal(same, plain)
    foreign = network.network
    for said, end in ((far, -2.0), (near, 3.0)):
        embedded = network.embed_end(np.full(2, end, "float32"))
        embedded = ops.convert_to_numpy(embedded)
        time = foreign.time(np.float32(INPUTS["logsnr"])[:, None])
        time = ops.convert_to_numpy(ops.cast(time, "float32")) + embedded
        hidden = foreign.first(np.float32(INPUTS["z"]))
        hidden = ops.convert_to_numpy(ops.cast(hidden, "float32"))
        hidden = np.tanh(hidden + time[:, None])
        expected = foreign.last(hidden.astype("float32"))
        expected = ops.convert_to_numpy(ops.cast(expected, "float32"))
        limit = 1e-5 if dtype == "float32" else 0.05
        np.testing.assert_allclose(said, expected, atol=limit)
    assert "call" not in vars(foreign.time)


def test_the_end_is_added_to_time_that_is_embedded_outside():
    network = learnt(AdaptedNetwork(Foreign("logsnr"), SHAPE, time_width=6))
    assert network.embed_end.width == 6
    plain, said = told_ends(network, 2.0)
    embedded = network.embed_end(np.full(2, 2.0, "float32"))
    embedded = ops.convert_to_numpy(embedded)[..., None]
    np.testing.assert_allclose(said - plain, embedded + 0 * said, atol=1e-5)


def test_a_network_that_is_told_an_end_is_copied_and_saved(tmp_path):
    plain = timed(time_embedding="time")
    assert "end_width" not in plain.get_config()
    assert "time_embedding" not in timed().get_config()
    network = learnt(plain)
    network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    for other in (network.clone(), loaded):
        assert [w.shape for w in other.weights] == [
            w.shape for w in network.weights
        ]
        for ours, theirs in zip(
            told_ends(other, -2.0, 3.0), told_ends(network, -2.0, 3.0)
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_a_network_that_cannot_be_told_an_end_says_why():
    with pytest.raises(ValueError, match="`time_embedding` must be given"):
        timed().take_logsnr_end()
    with pytest.raises(ValueError, match="`time_embedding` must be given"):
        timed(end_width=8)
    with pytest.raises(ValueError, match="`end_width` must be an even"):
        timed(time_embedding="time", end_width=7)
    for name in ("clock", "first.dense", ""):
        with pytest.raises(ValueError, match="`time_embedding` must"):
            timed(time_embedding=name)
    with pytest.raises(ValueError, match="a vector for each example"):
        timed(time_embedding="first").take_logsnr_end()
    odd = AdaptedNetwork(
        Foreign("dense"),
        SHAPE,
        names={"logsnr": "time"},
        time_embedding="dense",
    )
    with pytest.raises(ValueError, match="`time_embedding` must"):
        odd.take_logsnr_end()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"process": "ddpm"}, "`process` must be one of"),
        ({"time": "t"}, "`time` must be one of"),
        ({"output": "u"}, "`output` must be one of"),
        ({"time": "discrete_step"}, "`alphas_cumprod` must be 2 or more"),
        ({"alphas_cumprod": [0.9, 0.1]}, "`alphas_cumprod` must be None"),
        ({"sigma_data": 0}, "`sigma_data` must be a positive number"),
        ({"time_scale": -1.0}, "`time_scale` must be a positive number"),
        ({"time_axes": 1.5}, "`time_axes` must be an integer"),
        ({"time_width": 5}, "`time_width` must be even"),
        ({"names": {"x": "y"}}, "`names` must be a dictionary of"),
        ({"names": ["z"]}, "`names` must be a list of"),
        ({"conditioning": {"z": Condition()}}, "`conditioning` must not name"),
        ({"constants": {"a": 1}, "names": ["z", "logsnr"]}, "`constants` must"),
    ],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        AdaptedNetwork(Foreign(), SHAPE, **bad)
    with pytest.raises(ValueError, match="`network` must be a Keras layer"):
        AdaptedNetwork(object(), SHAPE)
    with pytest.raises(ValueError, match="`image_shape` must be"):
        AdaptedNetwork(Foreign(), 8)
