"""Forward-mode derivatives, against closed forms and finite differences."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import backend
from tests.backend.test_plain_scope import LOGSNR, RNG, Z, of_z

OF_Z = RNG.standard_normal(Z.shape).astype("float32")
OF_LOGSNR = np.float32([0.7, -0.4])


def as_arrays(results):
    return keras.tree.map_structure(ops.convert_to_numpy, results)


def test_of_a_known_function():
    x, y = np.float32([0.3, 1.1]), np.float32([2.0, -0.5])
    dx, dy = np.float32([1.0, -2.0]), np.float32([0.5, 3.0])

    def function(x, y):
        return ops.sin(x) * y, {"square": y**2, "still": ops.ones_like(x)}

    (product, others), (of_product, of_others) = as_arrays(
        backend.jvp(function, (x, y), (dx, dy))
    )
    np.testing.assert_allclose(product, np.sin(x) * y, rtol=1e-6)
    np.testing.assert_allclose(others["square"], y**2, rtol=1e-6)
    np.testing.assert_allclose(
        of_product, np.cos(x) * dx * y + np.sin(x) * dy, rtol=1e-5
    )
    np.testing.assert_allclose(of_others["square"], 2 * y * dy, rtol=1e-6)
    np.testing.assert_array_equal(of_others["still"], [0, 0])


def test_arguments_may_be_structures_or_the_same_tensor():
    x = ops.convert_to_tensor(np.float32([1.0, 2.0]))

    def function(pair, z):
        return pair["a"] * pair["b"] * z

    primals = {"a": x, "b": x}, x
    tangents = {"a": np.float64([1, 0]), "b": np.zeros(2)}, np.float32([0, 1])
    got, rate = as_arrays(backend.jvp(function, primals, tangents))
    np.testing.assert_allclose(got, [1, 8])
    np.testing.assert_allclose(rate, [1, 4])


@pytest.fixture(params=["plain", "everything"])
def network(request, tiny_uvit):
    """One without and one with what a UViT may have."""
    common = dict(num_classes=3, context_width=5)
    if request.param == "plain":
        return tiny_uvit(**common)
    return tiny_uvit(
        widths=(16, 32),
        depths=(1, 1),
        attention=(False, True),
        dropout=0.1,
        **common,
    )


def difference(function, step=0.003):
    """A central difference of fourth order, for float32's few digits."""

    def moved(by):
        at = Z + by * OF_Z, LOGSNR + by * OF_LOGSNR
        result = function(*map(ops.convert_to_tensor, at))
        return ops.convert_to_numpy(result).astype("float64")

    near, far = (moved(h) - moved(-h) for h in (step, 2 * step))
    return (8 * near - far) / (12 * step)


def test_of_a_network(network):
    function = of_z(network)
    expected = difference(function)
    got, rate = as_arrays(backend.jvp(function, (Z, LOGSNR), (OF_Z, OF_LOGSNR)))
    value = function(*map(ops.convert_to_tensor, (Z, LOGSNR)))
    np.testing.assert_allclose(got, ops.convert_to_numpy(value), atol=2e-5)
    scale = np.abs(expected).max()
    assert scale > 0.1
    np.testing.assert_allclose(rate, expected, atol=2e-3 * scale)


def test_compiled(network):
    function = of_z(network)

    def both(*args):
        return backend.jvp(function, args[:2], args[2:])

    args = Z, LOGSNR, OF_Z, OF_LOGSNR
    expected = as_arrays(both(*args))
    got = as_arrays(backend.compile_inference(both, network.variables)(*args))
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, atol=1e-4)


class RateMatching(keras.Model):
    """Trains a network by its rate of change, as flow maps do."""

    def __init__(self, network, stop, **kwargs):
        super().__init__(**kwargs)
        self.network, self.stop = network, stop

    def call(self, inputs, training=False):
        # As in training, so with dropout and rematerialisation.
        function = of_z(self.network, training)
        value, rate = backend.jvp(
            function, inputs, (ops.convert_to_tensor(OF_Z), OF_LOGSNR)
        )
        return value + (ops.stop_gradient(rate) if self.stop else rate)


@pytest.mark.parametrize("stop", [True, False], ids=["constant", "trained"])
def test_in_a_training_step(tiny_uvit, stop):
    """The gradient by the weights is that of differences of the network."""
    step, found = 0.003, []

    class ByDifferences(RateMatching):
        def call(self, inputs, training=False):
            z, logsnr = inputs
            function = of_z(self.network, training)

            def moved(by):
                return function(z + by * OF_Z, logsnr + by * OF_LOGSNR)

            near, far = (moved(h) - moved(-h) for h in (step, 2 * step))
            rate = (8 * near - far) / (12 * step)
            if self.stop:
                rate = ops.stop_gradient(rate)
            return function(z, logsnr) + rate

    for kind in (RateMatching, ByDifferences):
        keras.utils.set_random_seed(0)
        network = tiny_uvit(num_classes=3, context_width=5)
        model = kind(network, stop)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        before = [ops.convert_to_numpy(w) for w in network.trainable_variables]
        goal = np.ones_like(Z)
        model.fit((Z, LOGSNR), goal, batch_size=2, epochs=1, verbose=0)
        found.append(
            np.concatenate(
                [
                    np.ravel(ops.convert_to_numpy(after) - weight)
                    for weight, after in zip(
                        before, network.trainable_variables
                    )
                ]
            )
        )
    scale = np.abs(found[1]).max()
    assert scale > 1e-3
    np.testing.assert_allclose(*found, atol=2e-2 * scale)


def test_with_dropout(tiny_uvit):
    """Which assigns a seed, and drops the same of value and rate."""
    network = tiny_uvit(num_classes=3, context_width=5, dropout=0.5)
    function = of_z(network, training=True)
    results = [
        as_arrays(backend.jvp(function, (Z, LOGSNR), (OF_Z, OF_LOGSNR)))
        for _ in range(2)
    ]
    for one, other in zip(*results):
        assert np.all(np.isfinite(one))
        assert np.abs(one - other).max() > 0.01


def test_of_what_is_computed_again():
    def function(x):
        return backend.remat(lambda x: ops.sin(x) ** 2)(x)

    x, dx = np.float32([0.3, 1.1]), np.float32([1.0, -2.0])
    _, rate = as_arrays(backend.jvp(function, (x,), (dx,)))
    np.testing.assert_allclose(rate, np.sin(2 * x) * dx, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_in_half_precision(tiny_uvit, policy):
    kind = dict(num_classes=3, context_width=5)
    exact, half = tiny_uvit(**kind), tiny_uvit(**kind, dtype=policy)
    half.set_weights(exact.get_weights())
    rates = [
        backend.compile_inference(
            lambda *x: backend.jvp(of_z(network), x[:2], x[2:])[1],  # noqa: B023
            network.variables,
        )(Z, LOGSNR, OF_Z, OF_LOGSNR)
        for network in (exact, half)
    ]
    expected, got = (
        ops.convert_to_numpy(ops.cast(rate, "float32")) for rate in rates
    )
    np.testing.assert_allclose(got, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.skipif(backend.NAME != "jax", reason="Keras runs on TPUs by JAX")
def test_traced_for_tpus(network):
    import jax

    args = Z, LOGSNR, OF_Z, OF_LOGSNR
    function = of_z(network)
    with backend.compiling_for("tpu"):
        both = jax.eval_shape(
            lambda *x: backend.jvp(function, x[:2], x[2:]), *args
        )
    assert [x.shape for x in both] == [Z.shape, Z.shape]


@pytest.mark.skipif(backend.NAME != "torch", reason="PyTorch's kernels")
def test_what_has_no_forward_derivative_is_differentiated_twice():
    import torch

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            context.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(context, upstream):
            (x,) = context.saved_tensors
            return 3 * x**2 * upstream

    weight = torch.tensor(2.0, requires_grad=True)
    x = torch.tensor([1.0, 2.0])
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            got, rate = backend.jvp(
                lambda x: (weight * Cube.apply(x), torch.ones(3)),
                (x,),
                (np.float32([1.0, -1.0]),),
            )
        np.testing.assert_allclose(got[0].detach(), [2.0, 16.0])
        np.testing.assert_allclose(rate[0].detach(), [6.0, -24.0])
        np.testing.assert_allclose(rate[1].detach(), [0.0, 0.0, 0.0])
    got, rate = backend.jvp(
        lambda x: weight * Cube.apply(x), (x,), (torch.ones(2),)
    )
    (of_weight,) = torch.autograd.grad(rate.sum(), weight)
    np.testing.assert_allclose(of_weight, 3 * 1 + 3 * 4)


@pytest.mark.skipif(backend.NAME != "torch", reason="PyTorch's kernels")
def test_other_errors_are_not_hidden():
    def function(x):
        raise RuntimeError("of the function's own")

    with pytest.raises(RuntimeError, match="of the function's own"):
        backend.jvp(function, (np.ones(2),), (np.ones(2),))


def test_keras_own_attention():
    """Whose kernels on PyTorch have no forward derivative."""
    layer = keras.layers.MultiHeadAttention(2, 4, seed=1)
    x = RNG.standard_normal((2, 5, 8)).astype("float32")
    direction = RNG.standard_normal(x.shape).astype("float32")
    layer.build(x.shape, x.shape)

    def function(x):
        return layer(x, x)

    step = 1e-2

    def both(x, direction):
        _, rate = backend.jvp(function, (x,), (direction,))
        moved = (x + step * direction, x - step * direction)
        return rate, *map(function, moved)

    compiled = backend.compile_inference(both, layer.variables)
    rate, up, down = as_arrays(
        compiled(*map(ops.convert_to_tensor, (x, direction)))
    )
    expected = (up - down) / (2 * step)
    np.testing.assert_allclose(rate, expected, atol=2e-3)
