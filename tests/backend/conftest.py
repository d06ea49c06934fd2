"""Gradients on every backend."""

import keras
import numpy as np
import pytest
from keras import ops

NAME = keras.backend.backend()


@pytest.fixture
def gradients():
    """A function that differentiates the sum of a function's result."""

    def differentiate(function, *arrays):
        if NAME == "jax":
            import jax

            places = tuple(range(len(arrays)))
            # Compiled as a whole, which is less than operation by operation.
            gradient = jax.grad(lambda *x: ops.sum(function(*x)), places)
            found = jax.jit(gradient)(*arrays)
        elif NAME == "tensorflow":
            import tensorflow as tf

            tensors = [tf.convert_to_tensor(x) for x in arrays]
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                total = ops.sum(function(*tensors))
            found = tape.gradient(total, tensors)
        else:
            import torch

            tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
            total = ops.sum(function(*tensors))
            found = torch.autograd.grad(total, tensors)
        return [np.asarray(ops.convert_to_numpy(x)) for x in found]

    return differentiate
