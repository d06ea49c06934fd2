"""Small models for the tests of training, sampling and saving."""

import keras
import numpy as np
import pytest

from keras_mscm import DiffusionModel, MultistepConsistencyModel
from tests.dense import MaskedMean


@pytest.fixture
def dense_network():
    """A factory of foreign networks: functional models with dict inputs.

    Dense layers only, so that compiling costs little.
    """

    def make(
        *,
        image_shape=(4, 4, 1),
        num_classes=None,
        context_width=None,
        width=32,
        dropout=0.0,
        dropout_seed=5,
        batch_norm=False,
        name="dense_network",
    ):
        layers, size = keras.layers, int(np.prod(image_shape))
        inputs = {
            "z": keras.Input(image_shape, name="z"),
            "logsnr": keras.Input((), name="logsnr"),
        }
        level = layers.Reshape((1,))(inputs["logsnr"])
        level = layers.Rescaling(0.1)(level)
        parts = [layers.Reshape((size,))(inputs["z"]), level]
        if num_classes:
            inputs["labels"] = keras.Input((), dtype="int32", name="labels")
            embed = layers.Embedding(num_classes + 1, 8)
            parts.append(embed(inputs["labels"]))
        if context_width:
            context = keras.Input((None, context_width), name="context")
            mask = keras.Input((None,), dtype="bool", name="context_mask")
            inputs |= {"context": context, "context_mask": mask}
            parts.append(MaskedMean()([context, mask]))
        h = layers.Concatenate()(parts)
        h = layers.Dense(width, activation="swish")(h)
        if batch_norm:
            h = layers.BatchNormalization()(h)
        if dropout:
            h = layers.Dropout(dropout, seed=dropout_seed)(h)
        h = layers.Dense(width, activation="swish")(h)
        h = layers.Dense(size)(h)
        outputs = layers.Reshape(image_shape)(h)
        return keras.Model(inputs, outputs, name=name)

    return make


@pytest.fixture
def toy_images():
    """A factory of images in [-1, 1]; always the same for the same number."""

    def make(num, image_shape=(4, 4, 1)):
        rng = np.random.default_rng(num)
        return rng.uniform(-1, 1, (num, *image_shape)).astype("float32")

    return make


@pytest.fixture
def make_teacher(dense_network):
    """A factory of compiled diffusion models; keywords as the network's."""

    def make(
        *,
        compile_with=None,
        model_with=None,
        network=None,
        prediction_type="v",
        **network_kw,
    ):
        model = DiffusionModel(
            network or dense_network(**network_kw),
            **{
                "image_shape": (4, 4, 1),
                "num_classes": network_kw.get("num_classes"),
                "context_width": network_kw.get("context_width"),
                "prediction_type": prediction_type,
                "seed": 1,
                **(model_with or {}),
            },
        )
        model.compile(
            **{
                "optimizer": keras.optimizers.Adam(1e-2),
                **(compile_with or {}),
            }
        )
        return model

    return make


@pytest.fixture
def make_student(make_teacher):
    """A factory of compiled students of 2 steps, with their teacher."""

    def make(*, teacher=None, compile_with=None, student_with=None, **kw):
        student = MultistepConsistencyModel.from_teacher(
            teacher or make_teacher(**kw),
            **{
                "student_steps": 2,
                "teacher_steps": 8,
                "seed": 2,
                **(student_with or {}),
            },
        )
        student.compile(
            **{
                "optimizer": keras.optimizers.Adam(1e-2),
                **(compile_with or {}),
            }
        )
        return student

    return make


@pytest.fixture
def count_calls():
    """Counts how often a method's Python code runs.

    Under JAX and TensorFlow that is how often it is traced, on PyTorch it is
    once per step.
    """

    def count(model, name="training_example"):
        calls, method = [], getattr(model, name)

        def counting(*args, **kwargs):
            calls.append(name)
            return method(*args, **kwargs)

        setattr(model, name, counting)
        return calls

    return count


@pytest.fixture
def weights_of():
    """Copies a layer's (or optimizer's) variables to NumPy."""

    def copy(layer):
        return [
            np.array(keras.ops.convert_to_numpy(v)) for v in layer.variables
        ]

    return copy


@pytest.fixture
def snapshots(weights_of):
    """A callback that keeps the trained weights after every batch."""

    class Snapshots(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append(weights_of(self.model.network))

    return Snapshots()


@pytest.fixture(params=["diffusion", "training", "distillation"])
def make_model(request, make_teacher, make_student):
    """A factory of each algorithm's model."""

    def make(*, model_with=None, **kw):
        if request.param == "diffusion":
            return make_teacher(model_with=model_with, **kw)
        method = {"method": request.param}
        return make_student(student_with={**method, **(model_with or {})}, **kw)

    return make
