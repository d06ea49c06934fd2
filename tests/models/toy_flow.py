"""A network in closed form, with its derivatives, for float64 references."""

import keras
import numpy as np
from keras import ops

FACTOR = 0.8
# Of the Gaussian images whose teacher `gaussian` is.
DEVIATION = 0.25


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


@keras.saving.register_keras_serializable(package="tests_models")
class Gain(keras.layers.Layer):
    """Predicts its input times a smooth function of the angles."""

    takes_logsnr_end = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(
            32,
            activation="tanh",
            kernel_initializer=keras.initializers.GlorotUniform(seed=0),
        )
        self.out = keras.layers.Dense(1, kernel_initializer="zeros")
        self.hidden.build((None, 6))
        self.out.build((None, 32))
        self.built = True

    def call(self, inputs, training=False):
        level = inputs["logsnr"]
        end = inputs.get("logsnr_end")
        end = ops.zeros_like(level) if end is None else end
        angles = ops.arctan(ops.exp(-ops.stack([level, end], -1) / 2))
        waves = [angles, ops.sin(angles), ops.cos(angles)]
        gain = self.out(self.hidden(ops.concatenate(waves, -1)))
        return gain[:, :, None, None] * inputs["z"]


def gaussian(z, logsnr, conditioning):
    """The mean of x for images of independent Gaussian pixels."""
    alpha, sigma = ops.sqrt(ops.sigmoid(logsnr)), ops.sqrt(ops.sigmoid(-logsnr))
    variance = DEVIATION**2 * alpha**2 + sigma**2
    return (DEVIATION**2 * alpha / variance)[:, None, None, None] * z


def learn_gaussian(model, iterations=300):
    """Trains a student of `gaussian`, on such images."""
    rng = np.random.default_rng(0)
    images = DEVIATION * rng.standard_normal((32 * iterations, 4, 4, 1))
    rate = keras.optimizers.schedules.CosineDecay(1e-2, iterations)
    model.compile(optimizer=keras.optimizers.Adam(rate))
    images = np.clip(images, -1, 1).astype("float32")
    model.fit(images, batch_size=32, verbose=0)


def gain_of(model, num_steps):
    """What noise is multiplied by on its way to an image."""
    noise = np.random.default_rng(1).standard_normal((200, 4, 4, 1))
    noise = noise.astype("float32")
    images = model.generate(
        noise=noise, num_steps=num_steps, seed=0, decode=False
    )
    return np.mean(images * noise) / np.mean(noise**2)
