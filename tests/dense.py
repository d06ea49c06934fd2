"""Small networks of dense layers, on arrays of any rank, and float64 rates."""

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable(package="tests_dense")
class MaskedMean(keras.layers.Layer):
    """The mean of the vectors of a sequence that count; 0 if none does."""

    def call(self, inputs):
        sequence, mask = inputs
        mask = ops.cast(mask, sequence.dtype)[..., None]
        count = ops.maximum(ops.sum(mask, axis=1), 1.0)
        return ops.sum(sequence * mask, axis=1) / count


def dense_network(shape, conditioning=None, width=16, name="dense"):
    """A functional network that takes what `conditioning` declares.

    Args:
        shape: Of one example.
        conditioning: Name to `Condition`; the network doesn't say it itself.
        width: Of the hidden layer.
        name: The network's name.
    """
    layers, declared = keras.layers, conditioning or {}
    inputs = {
        "z": keras.Input(shape, name="z"),
        "logsnr": keras.Input((), name="logsnr"),
        **{
            name: keras.Input(c.shape, dtype=c.dtype, name=name)
            for name, c in declared.items()
        },
    }
    size = int(np.prod(shape))
    level = layers.Reshape((1,))(inputs["logsnr"])
    parts = [layers.Reshape((size,))(inputs["z"]), layers.Rescaling(0.1)(level)]
    for key, condition in declared.items():
        entry = inputs[key]
        if condition.num_classes:
            part = layers.Embedding(condition.num_classes + 1, 4)(entry)
        elif condition.mask:
            part = MaskedMean()([entry, inputs[condition.mask]])
        elif condition.dtype == "bool":
            continue
        elif None in condition.shape:
            part = layers.GlobalAveragePooling1D()(entry)
        else:
            part = layers.Reshape((int(np.prod(condition.shape)),))(entry)
        parts.append(part)
    hidden = layers.Concatenate()(parts)
    hidden = layers.Dense(width, activation="swish")(hidden)
    output = layers.Reshape(shape)(layers.Dense(size)(hidden))
    return keras.Model(inputs, output, name=name)


def numbers(num, shape, seed=0):
    """Always the same numbers in [-1, 1], `(num, *shape)`."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (num, *shape)).astype("float32")


def array(tensor):
    """A tensor in float64, on the host."""
    return np.asarray(ops.convert_to_numpy(tensor), "float64")


def logsnr_at(t):
    """The default cosine schedule, from 15 to -15, in float64."""
    low = np.arctan(np.exp(-7.5))
    return -2 * np.log(np.tan(low + t * (np.pi / 2 - 2 * low)))


def rates(logsnr, rank):
    """Signal and noise rate in float64, of a shape for arrays of `rank`."""
    logsnr = np.reshape(logsnr, (-1, *[1] * (rank - 1))).astype("float64")
    return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5


def x_of(output, z, logsnr, prediction_type):
    """The prediction of x, in float64, of a network's output."""
    alpha, sigma = rates(logsnr, np.ndim(z))
    return {
        "v": lambda: alpha * z - sigma * output,
        "epsilon": lambda: (z - sigma * output) / alpha,
        "x": lambda: output,
    }[prediction_type]()
