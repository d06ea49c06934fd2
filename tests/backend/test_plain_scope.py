"""Plain operations: the same numbers, without custom gradients."""

import contextlib
import functools

import numpy as np
import pytest
from keras import ops

from keras_mscm import backend

RNG = np.random.default_rng(0)
Z = RNG.standard_normal((2, 8, 8, 1)).astype("float32")
LOGSNR = np.float32([-1.0, 2.0])
TOKENS = RNG.standard_normal((2, 3, 5)).astype("float32")
MASK = np.array([[True, True, False], [True, False, False]])


@pytest.fixture
def network(tiny_uvit):
    """Of every layer that a UViT has."""
    return tiny_uvit(
        widths=(16, 32),
        depths=(1, 1),
        attention=(False, True),
        num_classes=3,
        context_width=5,
        dropout=0.5,
    )


def of_z(network, training=False):
    """A function of noisy images and log-SNR, two tensors."""

    def function(z, logsnr):
        inputs = {
            "z": z,
            "logsnr": logsnr,
            "labels": ops.convert_to_tensor(np.int32([0, 2])),
            "context": ops.convert_to_tensor(TOKENS),
            "context_mask": ops.convert_to_tensor(MASK),
        }
        return network(inputs, training=training)

    return function


def in_plain(function):
    @functools.wraps(function)
    def run(*args):
        with backend.plain():
            return function(*args)

    return run


def test_the_scope_ends():
    assert not backend.is_plain()
    with backend.plain():
        with backend.plain():
            assert backend.is_plain()
        assert backend.is_plain()
    assert not backend.is_plain()
    with contextlib.suppress(KeyError), backend.plain():
        raise KeyError
    assert not backend.is_plain()


def test_outputs_and_gradients_are_the_same(network, gradients):
    function = of_z(network)
    # Weighed, because a network's mean has hardly a gradient.
    weights = RNG.standard_normal(Z.shape).astype("float32")

    def weighed(run):
        return lambda *x: run(*x) * ops.convert_to_tensor(weights)

    results = [
        [
            ops.convert_to_numpy(run(*map(ops.convert_to_tensor, (Z, LOGSNR)))),
            *gradients(weighed(run), Z, LOGSNR),
        ]
        for run in (function, in_plain(function))
    ]
    for got, expected in zip(*results):
        assert np.abs(expected).max() > 1e-3
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=1e-5 * scale)


def test_training_drops_the_same(network):
    """Dropout, too, is plain, and takes the same bits."""
    layers = [layer for layer in network._flatten_layers()]
    generators = [
        layer.seed_generator
        for layer in layers
        if getattr(layer, "seed_generator", None) is not None
    ]
    states = [ops.convert_to_numpy(one.state) for one in generators]
    found = []
    for scope in (contextlib.nullcontext, backend.plain):
        for one, state in zip(generators, states):
            one.state.assign(state)
        with scope():
            result = of_z(network, training=True)(
                *map(ops.convert_to_tensor, (Z, LOGSNR))
            )
        found.append(ops.convert_to_numpy(result))
    np.testing.assert_allclose(*found, atol=1e-5)


def jaxpr_primitives(jaxpr):
    """Every operation, also in the jaxprs within."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from jaxpr_primitives(inner)


def graph_operations(function):
    """Every operation of a TensorFlow graph and of the functions it calls."""
    import tensorflow as tf

    graph = tf.function(function, autograph=False).get_concrete_function(
        *(tf.TensorSpec(x.shape, x.dtype) for x in (Z, LOGSNR))
    )
    nodes = graph.graph.as_graph_def()
    yield from [
        *nodes.node,
        *(n for inner in nodes.library.function for n in inner.node_def),
    ]


@pytest.mark.skipif(backend.NAME != "jax", reason="jaxprs are JAX's")
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_jaxpr_has_no_gradients_of_its_own(network, platform):
    import jax

    function = of_z(network)

    def names(function):
        with backend.compiling_for(platform):
            jaxpr = jax.make_jaxpr(function)(Z, LOGSNR).jaxpr
        return [
            (equation.primitive.name, equation.params.get("name"))
            for equation in jaxpr_primitives(jaxpr)
        ]

    got = names(in_plain(function))
    assert not [name for name, _ in got if name.startswith("custom")]
    # What JAX itself compiles is small; nothing of ours is.
    compiled = {name for kind, name in got if kind in ("jit", "pjit")}
    assert compiled <= {"silu", "_where", "_take"}
    if platform == "tpu":  # and the test can see what it looks for
        before = [name for name, _ in names(function)]
        assert [name for name in before if name.startswith("custom_vjp")]


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="TensorFlow's graphs")
def test_a_graph_calls_no_other(network):
    def calls(function):
        return [
            node.op
            for node in graph_operations(function)
            if "PartitionedCall" in node.op
        ]

    function = of_z(network)
    assert not calls(in_plain(function))
    assert calls(function)  # and the test can see them


def test_remat_is_plain_too(gradients):
    @backend.fused
    def cube(x):
        return x**3

    def function(x):
        return backend.remat(lambda x: ops.sin(cube(x)))(x)

    x = np.float32([0.5, 1.0, 1.5])
    for run in (function, in_plain(function)):
        (found,) = gradients(run, x)
        expected = 3 * x**2 * np.cos(x**3)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_plain_remat_calls_the_function_once(gradients):
    calls = []

    def function(x):
        calls.append(x)
        return x * x

    gradients(in_plain(lambda x: backend.remat(function)(x)), np.float32([1.0]))
    assert len(calls) == 1
