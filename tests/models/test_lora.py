"""Students that train adapters of their teacher's own network."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    GuidanceDistillationModel,
    MultistepConsistencyModel,
    ProgressiveDistillationModel,
)

LABELS = np.arange(8) % 3


@pytest.fixture
def make_pair(make_teacher, toy_images):
    """A teacher that was trained a little, and a compiled LoRA student."""

    def make(cls=MultistepConsistencyModel, copy=True, **kwargs):
        teacher = make_teacher(num_classes=3, model_with={"label_dropout": 0.2})
        teacher.fit(toy_images(8), LABELS, verbose=0)
        if cls is MultistepConsistencyModel:
            kwargs = {"student_steps": 2, "teacher_steps": 8, **kwargs}
        student = cls.from_teacher(
            teacher,
            copy=copy,
            guidance_scale=2.0,
            lora_rank=2,
            ema_decay=0.5,
            seed=3,
            **kwargs,
        )
        student.compile(optimizer=keras.optimizers.Adam(1e-2))
        return teacher, student

    return make


def predicted(model, network, toy_images):
    z = toy_images(8)
    logsnr = np.linspace(-3, 3, 8).astype("float32")
    x = model.denoise(network, z, logsnr, {"labels": LABELS})
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize(
    "cls", [MultistepConsistencyModel, GuidanceDistillationModel]
)
def test_the_teacher_is_the_base_and_stays(cls, make_pair, toy_images):
    teacher, student = make_pair(cls)
    said = predicted(teacher, teacher.ema_network, toy_images)
    for network in (student.network, student.ema_network):
        np.testing.assert_array_equal(
            predicted(student, network, toy_images), said
        )
    student.fit(toy_images(8), LABELS, epochs=3, verbose=0)
    z, logsnr = toy_images(8), np.linspace(-3, 3, 8).astype("float32")
    of_base = student.teacher.predict(z, logsnr, {"labels": LABELS})
    np.testing.assert_array_equal(ops.convert_to_numpy(of_base), said)
    for network in (student.network, student.ema_network):
        moved = predicted(student, network, toy_images) - said
        assert np.abs(moved).max() > 1e-3


def test_weights_are_held_once(make_pair):
    teacher, student = make_pair()
    base = sum(int(np.prod(w.shape)) for w in teacher.network.weights)
    adapters = sum(int(np.prod(w.shape)) for w in student.trainable_weights)
    held = {id(v): int(np.prod(v.shape)) for v in student.variables}
    # The base, adapters and their average; counters and random states.
    assert base + 2 * adapters <= sum(held.values())
    assert sum(held.values()) < base + 2 * adapters + 32
    slots = [v for v in student.optimizer.variables if len(v.shape)]
    assert sum(int(np.prod(v.shape)) for v in slots) == 2 * adapters


def test_without_a_copy_it_is_the_teachers_own_network(make_pair, toy_images):
    teacher, student = make_pair(copy=False)
    assert student.network is teacher.ema_network
    student.fit(toy_images(8), LABELS, verbose=0)


def test_its_target_is_that_of_a_student_with_a_copy(make_pair, toy_images):
    teacher, student = make_pair()
    plain = MultistepConsistencyModel.from_teacher(
        teacher,
        student_steps=2,
        teacher_steps=8,
        guidance_scale=2.0,
        ema_decay=0.5,
        seed=3,
    )
    plain.compile()
    images = toy_images(8)
    losses = [m.evaluate(images, LABELS, verbose=0) for m in (student, plain)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_it_is_saved_loaded_and_goes_on(make_pair, toy_images, tmp_path):
    _, student = make_pair()
    images = toy_images(8)
    student.fit(images, LABELS, verbose=0)
    path = tmp_path / "student.keras"
    student.save(path)
    loaded = keras.saving.load_model(path)
    assert (loaded.lora_rank, loaded.lora_targets) == (2, None)
    noise = toy_images(4)
    ends = []
    for model in (student, loaded):
        model.fit(images, LABELS, epochs=2, shuffle=False, verbose=0)
        drawn = model.generate(noise=noise, labels=LABELS[:4])
        ends.append([drawn, *map(ops.convert_to_numpy, model.weights)])
    for ours, theirs in zip(*ends, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_adapters_travel_alone(make_pair, toy_images, tmp_path):
    teacher, student = make_pair()
    student.fit(toy_images(8), LABELS, verbose=0)
    student.save_lora(tmp_path / "adapters.npz")
    other = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=2, teacher_steps=8, lora_rank=2
    )
    other.load_lora(tmp_path / "adapters.npz")
    noise = toy_images(4)
    given = {"noise": noise, "labels": LABELS[:4]}
    expected = student.generate(**given)
    np.testing.assert_allclose(other.generate(**given), expected, atol=1e-6)


def test_merged_and_preset_are_plain(make_pair, toy_images, tmp_path):
    _, student = make_pair()
    student.fit(toy_images(8), LABELS, verbose=0)
    said = predicted(student, student.ema_network, toy_images)
    merged = student.merged_network()
    np.testing.assert_allclose(
        predicted(student, merged, toy_images), said, atol=1e-5
    )
    student.save_to_preset(tmp_path / "preset")
    loaded = MultistepConsistencyModel.from_preset(tmp_path / "preset")
    assert loaded.lora_rank is None
    np.testing.assert_allclose(
        predicted(loaded, loaded.ema_network, toy_images), said, atol=1e-5
    )


def test_a_diffusion_model_can_be_tuned(dense_network, toy_images):
    model = DiffusionModel(
        dense_network(), image_shape=(4, 4, 1), lora_rank=2, ema="bfloat16"
    )
    model.compile()
    model.fit(toy_images(8), verbose=0)
    assert model.generate(2, num_steps=2).shape == (2, 4, 4, 1)


def test_what_cannot_be(make_teacher, dense_network):
    with pytest.raises(ValueError, match=r"`lora_targets`.*`lora_rank`"):
        DiffusionModel(
            dense_network(), image_shape=(4, 4, 1), lora_targets=["dense"]
        )
    with pytest.raises(ValueError, match="`lora_rank` must be None"):
        ProgressiveDistillationModel.from_teacher(
            make_teacher(),
            student_steps=2,
            teacher_steps=8,
            lora_rank=2,
        )
