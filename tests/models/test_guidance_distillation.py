import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    GuidanceDistillationModel,
    MultistepConsistencyModel,
    samplers,
)

LABELS = np.arange(32, dtype="int32") % 3


@pytest.fixture
def teacher(dense_network, toy_images):
    # The network sees the label 3, "none", as well.
    teacher = DiffusionModel(
        dense_network(num_classes=4),
        image_shape=(4, 4, 1),
        num_classes=3,
        label_dropout=0.3,
        seed=0,
    )
    teacher.compile(keras.optimizers.Adam(1e-2))
    teacher.fit(toy_images(32), LABELS, epochs=3, verbose=0)
    return teacher


def distilled(teacher, **kwargs):
    model = GuidanceDistillationModel.from_teacher(
        teacher, guidance_scale=3.0, seed=1, **kwargs
    )
    model.compile(keras.optimizers.Adam(3e-3))
    return model


def guided(teacher, inputs):
    """x_u + 3 (x_c - x_u), by two calls."""

    def x(labels):
        return ops.convert_to_numpy(teacher({**inputs, "labels": labels}))

    conditional = x(inputs["labels"])
    without = x(ops.full_like(inputs["labels"], 3))
    return without + 3.0 * (conditional - without)


def test_the_target_is_the_guided_prediction(teacher, toy_images):
    model = distilled(teacher)
    labels = ops.convert_to_tensor(LABELS)
    inputs, target, weight = model.training_example(
        ops.convert_to_tensor(toy_images(32)), {"labels": labels}, True
    )
    expected = guided(teacher, inputs)
    np.testing.assert_allclose(
        ops.convert_to_numpy(target), expected, atol=1e-4, rtol=1e-4
    )
    conditional = ops.convert_to_numpy(teacher(inputs))
    assert np.mean(np.abs(conditional - expected)) > 1e-3
    np.testing.assert_allclose(
        ops.convert_to_numpy(weight),
        np.exp(ops.convert_to_numpy(inputs["logsnr"])) + 1,
        rtol=1e-5,
    )


def test_it_comes_to_sample_as_the_guided_teacher(teacher, toy_images):
    model = distilled(teacher, ema_decay=0.9)
    common = dict(
        noise=3 * toy_images(30),
        labels=LABELS[:30],
        num_steps=4,
        sampler=samplers.DDIM(),
    )
    goal = teacher.generate(guidance_scale=3.0, **common)

    def distance():
        return np.mean((model.generate(**common) - goal) ** 2)

    before = distance()
    model.fit(
        np.tile(toy_images(32), (32, 1, 1, 1)),
        np.tile(LABELS, 32),
        batch_size=64,
        epochs=10,
        verbose=0,
    )
    assert distance() < 0.3 * before


def test_it_is_a_teacher_and_a_file_holds_none(teacher, toy_images, tmp_path):
    model = distilled(teacher)
    student = MultistepConsistencyModel.from_teacher(model, student_steps=2)
    student.compile(keras.optimizers.Adam(1e-2))
    student.fit(toy_images(32), LABELS, verbose=0)
    assert int(student.iteration) == 1

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    noise = toy_images(3)
    np.testing.assert_array_equal(
        loaded.generate(noise=noise, num_steps=2),
        model.generate(noise=noise, num_steps=2),
    )
    assert loaded.guidance_scale == 3.0
    with pytest.raises(ValueError, match="`teacher` must be attached"):
        loaded.fit(toy_images(32), LABELS, verbose=0)
    loaded.attach_teacher(teacher)
    loaded.fit(toy_images(32), LABELS, verbose=0)


def test_a_teacher_that_was_never_without_labels_is_refused(dense_network):
    teacher = DiffusionModel(
        dense_network(num_classes=3), image_shape=(4, 4, 1), num_classes=3
    )
    with pytest.raises(ValueError, match=r"`guidance_scale`.*label_dropout"):
        GuidanceDistillationModel.from_teacher(teacher, guidance_scale=2.0)
