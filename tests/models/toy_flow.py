"""A network in closed form, with its derivatives, for float64 references."""

import keras
import numpy as np
from keras import ops

FACTOR = 0.8


@keras.saving.register_keras_serializable(package="tests_models")
class ToyFlow(keras.layers.Layer):
    """Predicts `x = factor sin(z) s + 0.05 end z`, `s = sigmoid(0.3 l)`.

    It counts its calls: on JAX and TensorFlow, outside of compiled steps.
    """

    takes_logsnr_end = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.factor = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(FACTOR)
        )
        self.calls = 0
        self.built = True

    def call(self, inputs, training=False):
        self.calls += 1
        z, level = inputs["z"], inputs["logsnr"][:, None, None, None]
        end = inputs.get("logsnr_end")
        x = self.factor * ops.sin(z) * ops.sigmoid(0.3 * level)
        if end is None:
            return x
        return x + 0.05 * end[:, None, None, None] * z


def toy(z, level, end=0.0):
    """In float64: x, and its derivatives by z, by l and by the factor."""
    s = 1 / (1 + np.exp(-0.3 * level))
    return (
        FACTOR * np.sin(z) * s + 0.05 * end * z,
        FACTOR * np.cos(z) * s + 0.05 * end,
        FACTOR * np.sin(z) * 0.3 * s * (1 - s),
        np.sin(z) * s,
    )


def half(z, logsnr, conditioning):
    """A teacher in closed form."""
    return 0.5 * z


def as_float64(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def column(values):
    return as_float64(values)[:, None, None, None]


def trained_by(model, images):
    """How far one update of SGD moves the factor: minus the gradient."""
    model.compile(optimizer=keras.optimizers.SGD(1.0))
    before = as_float64(model.network.factor)
    model.fit(images, batch_size=len(images), shuffle=False, verbose=0)
    return as_float64(model.network.factor) - before
