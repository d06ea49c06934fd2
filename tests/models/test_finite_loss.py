"""A loss that is no number stops training; the last good weights stay."""

import keras
import numpy as np
import pytest

from keras_mscm.models import streams
from tests.models.data_forms import Batches

NUM_BAD = 3  # The batch that spoils it, of 6.


@pytest.fixture(autouse=True)
def unwatched(monkeypatch):
    """Lets the NaNs pass, as those do that lie on an accelerator."""
    monkeypatch.setattr(streams, "watched", lambda x, watch: x)


def six_batches(images, bad):
    """The same six times; one may hold NaNs."""
    batches = [images] * 6
    if bad is not None:
        batches[bad] = np.full_like(images, np.nan)
    return Batches(batches)


class Saver(keras.callbacks.Callback):
    """What a checkpoint after each batch would hold."""

    def __init__(self, weights_of):
        super().__init__()
        self.weights_of, self.saved, self.averages = weights_of, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.saved.append(self.weights_of(self.model))
        self.averages.append(self.weights_of(self.model.ema_network))


def assert_finite(arrays):
    assert all(np.all(np.isfinite(array)) for array in arrays)


@pytest.mark.parametrize("kind", ["diffusion", "distillation"])
def test_nan_in_a_later_batch(
    kind, make_teacher, make_student, toy_images, weights_of
):
    make = make_teacher if kind == "diffusion" else make_student
    model, images = make(batch_norm=True), toy_images(4)
    model.fit(images, epochs=2, verbose=0)
    before = weights_of(model.network)
    with pytest.raises(FloatingPointError) as error:
        model.fit(
            six_batches(images, NUM_BAD), shuffle=False, epochs=2, verbose=0
        )
    for part in ("epoch 1", "batch", "nan", "learning rate", "average"):
        assert part in str(error.value)
    assert_finite(weights_of(model))
    assert_finite(weights_of(model.optimizer))
    for ours, average in zip(
        model.network.weights, model.ema_network.weights, strict=True
    ):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(ours),
            keras.ops.convert_to_numpy(average),
        )
    # The good updates before it have not been undone.
    assert any(
        np.any(a != b) for a, b in zip(before, weights_of(model.network))
    )
    assert np.all(np.isfinite(model.generate(2, num_steps=2)))
    history = model.fit(images, epochs=2, validation_data=images, verbose=0)
    assert_finite(history.history.values())
    assert_finite(weights_of(model))


def test_the_average_is_that_of_the_good_batches(
    make_teacher, toy_images, weights_of
):
    images, ends = toy_images(4), []
    for bad in (None, NUM_BAD):
        keras.utils.set_random_seed(0)
        model, saver = make_teacher(), Saver(weights_of)
        run = dict(shuffle=False, callbacks=[saver], verbose=0)
        if bad is None:
            model.fit(six_batches(images, None), **run)
            ends.append(saver.averages[NUM_BAD - 1])
            continue
        with pytest.raises(FloatingPointError):
            model.fit(six_batches(images, bad), **run)
        ends.append(weights_of(model.ema_network))
        # It stopped at once, and no callback has seen a bad weight.
        assert len(saver.saved) == NUM_BAD + 1
        for weights in saver.saved:
            assert_finite(weights)
    for ours, theirs in zip(*ends):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_checkpoints_hold_no_bad_weights(
    make_teacher, toy_images, weights_of, tmp_path
):
    path = tmp_path / "last.weights.h5"
    model = make_teacher()
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, save_weights_only=True, save_freq=1
    )
    with pytest.raises(FloatingPointError):
        model.fit(
            six_batches(toy_images(4), NUM_BAD),
            shuffle=False,
            callbacks=[checkpoint],
            verbose=0,
        )
    other = make_teacher()
    other.load_weights(path)
    assert_finite(weights_of(other))
    assert_finite(weights_of(other.optimizer))


def test_a_learning_rate_that_is_too_high(make_student, toy_images, weights_of):
    student = make_student(
        compile_with={"optimizer": keras.optimizers.SGD(1e30)}
    )
    with pytest.raises(FloatingPointError, match="learning rate"):
        student.fit(toy_images(8), batch_size=2, epochs=10, verbose=0)
    assert_finite(weights_of(student))
    assert_finite(weights_of(student.optimizer))


def test_with_gradient_accumulation(make_teacher, toy_images, weights_of):
    optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2)
    model = make_teacher(compile_with={"optimizer": optimizer})
    images = toy_images(4)
    with pytest.raises(FloatingPointError):
        model.fit(six_batches(images, 2), shuffle=False, verbose=0)
    assert_finite(weights_of(model.optimizer))
    model.fit(six_batches(images, None), verbose=0)
    assert_finite(weights_of(model))


def test_steps_per_execution(make_teacher, toy_images, weights_of):
    model = make_teacher(compile_with={"steps_per_execution": 3})
    if keras.backend.backend() == "torch":
        with pytest.raises(ValueError, match="steps_per_execution"):
            model.fit(toy_images(4), verbose=0)
        return
    with pytest.raises(FloatingPointError):
        model.fit(six_batches(toy_images(4), NUM_BAD), shuffle=False, verbose=0)
    assert_finite(weights_of(model))
    assert_finite(weights_of(model.optimizer))


def test_a_callback_list(make_teacher, toy_images):
    model = make_teacher()
    callbacks = keras.callbacks.CallbackList([], model=model)
    with pytest.raises(FloatingPointError):
        model.fit(six_batches(toy_images(4), 1), callbacks=callbacks, verbose=0)
