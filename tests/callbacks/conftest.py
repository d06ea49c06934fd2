"""A small model to train, and images."""

import keras
import numpy as np
import pytest

from keras_mscm import DiffusionModel


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (24, 4, 4, 1)).astype("float32")


@pytest.fixture
def make_model():
    """A factory of compiled diffusion models that compile quickly."""

    def make(num_classes=None, channels=1, accumulation=None, **compile_with):
        shape = (4, 4, channels)
        inputs = {
            "z": keras.Input(shape, name="z"),
            "logsnr": keras.Input((), name="logsnr"),
        }
        h = keras.layers.Dense(
            channels, kernel_initializer=keras.initializers.RandomNormal(seed=0)
        )(inputs["z"])
        if num_classes:
            inputs["labels"] = keras.Input((), dtype="int32", name="labels")
            embed = keras.layers.Embedding(num_classes + 1, channels)
            add = embed(inputs["labels"])
            h = h + keras.layers.Reshape((1, 1, channels))(add)
        model = DiffusionModel(
            keras.Model(inputs, h),
            image_shape=shape,
            num_classes=num_classes,
            seed=0,
        )
        model.compile(
            keras.optimizers.Adam(
                1e-2, gradient_accumulation_steps=accumulation
            ),
            **compile_with,
        )
        return model

    return make
