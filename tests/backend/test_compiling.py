"""Compiled functions of tensors."""

import keras
import numpy as np
from keras import ops

from keras_mscm import backend


def test_compile_inference():
    # Not a bare 2.0: JAX takes that for weakly typed, and traces once more.
    weight, traces = keras.Variable(np.float32(2.0)), []

    def function(x, y):
        traces.append(1)
        return weight * x + y

    run = backend.compile_inference(function, [weight])
    x = np.arange(3, dtype="float32")
    got = ops.convert_to_numpy(run(x, np.float32(1)))
    np.testing.assert_allclose(got, [1, 3, 5])
    weight.assign(3.0)
    got = ops.convert_to_numpy(run(x, np.float32(0)))
    np.testing.assert_allclose(got, [0, 3, 6])
    assert len(traces) == (2 if backend.NAME == "torch" else 1)


def test_fused(gradients):
    """A value, and a gradient of what has one, with settings and integers."""

    @backend.fused
    def function(x, y, count, *, power):
        return x**power * y * ops.cast(count, "float32")

    x, y = np.float32([1, 2, 3]), np.float32([4, 5, 6])
    count = ops.convert_to_tensor(2, "int32")
    for power in (2, 3):
        got = function(*map(ops.convert_to_tensor, (x, y)), count, power=power)
        np.testing.assert_allclose(
            ops.convert_to_numpy(got), 2 * x**power * y, rtol=1e-6
        )
        of_x, of_y = gradients(
            lambda x, y, power=power: function(x, y, count, power=power), x, y
        )
        np.testing.assert_allclose(
            of_x, 2 * power * x ** (power - 1) * y, rtol=1e-6
        )
        np.testing.assert_allclose(of_y, 2 * x**power, rtol=1e-6)
