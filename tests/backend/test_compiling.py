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
