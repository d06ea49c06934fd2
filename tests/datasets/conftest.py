"""What every loader must do: feed a model that trains."""

from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mscm import DiffusionModel

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Loaders are the same on every backend; models and encoders are not."""
    for item in items:
        if HERE in item.path.parents and not {"train", "space"} & {
            *item.fixturenames
        }:
            item.add_marker("once")


@pytest.fixture
def train():
    """A function that trains two steps of a tiny model, and returns it.

    Its network is one dense layer over channels, which is quick to compile.
    """

    def train(dataset, image_shape, num_classes=None, **kwargs):
        inputs = {
            "z": keras.Input(image_shape, name="z"),
            "logsnr": keras.Input((), name="logsnr"),
        }
        if num_classes:
            labels = keras.Input((), dtype="int32", name="labels")
            inputs["labels"] = labels
        network = keras.Model(
            inputs, keras.layers.Dense(image_shape[-1])(inputs["z"])
        )
        model = DiffusionModel(
            network, image_shape=image_shape, num_classes=num_classes, seed=0
        )
        model.compile(optimizer="adam", run_eagerly=EAGER)
        kwargs = {"steps_per_epoch": 2, "verbose": 0, **kwargs}
        history = model.fit(dataset, **kwargs)
        assert np.all(np.isfinite(history.history["loss"]))
        assert int(model.iteration) == 2
        return model

    return train


EAGER = keras.backend.backend() == "torch"


@pytest.fixture
def check_batch():
    """A function that checks what every batch must be."""

    def check(batch, shape, labels=True):
        images, *rest = batch if labels else (batch,)
        images = keras.ops.convert_to_numpy(images)
        assert images.shape == shape
        assert images.dtype == np.float32
        assert images.min() >= -1
        assert images.max() <= 1
        for label in rest:
            label = keras.ops.convert_to_numpy(label)
            assert label.shape == shape[:1]
            assert label.dtype == np.int32

    return check


@pytest.fixture
def pictures():
    """A function that makes noise of some size, uint8."""

    def make(num, height, width, channels=3, seed=0):
        rng = np.random.default_rng(seed)
        shape = (num, height, width, channels)
        return rng.integers(0, 256, shape, "uint8")

    return make
