"""Keras' training loop over every kind of data."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.models.data_forms import (
    Batches,
    as_py_dataset,
    as_tf_data,
    in_batches,
)

EAGER = keras.backend.backend() == "torch"


def fit(model, *data, **kw):
    return model.fit(*data, verbose=0, **kw).history


def as_data_loader(images, labels):
    torch = pytest.importorskip("torch")
    arrays = [images] if labels is None else [images, labels]
    data = torch.utils.data.TensorDataset(*map(torch.as_tensor, arrays))
    return torch.utils.data.DataLoader(data, batch_size=4)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_every_kind_of_data_gives_the_same_training(
    num_classes, make_teacher, toy_images, weights_of
):
    # 10 images in batches of 4: the last one is smaller.
    images = toy_images(10)
    labels = np.arange(10) % 3 if num_classes else None
    model = make_teacher(num_classes=num_classes)
    start = model.get_weights()
    seed_state = ops.copy(model.seed_generator.state.value)
    optimizer_start = weights_of(model.optimizer)

    def train(*data, **kw):
        model.set_weights(start)
        model.seed_generator.state.assign(ops.copy(seed_state))
        for variable, value in zip(model.optimizer.variables, optimizer_start):
            variable.assign(value)
        history = fit(model, *data, **kw)
        assert int(model.iteration) == 3
        return history["loss"], weights_of(model.ema_network)

    arrays = [images] if labels is None else [images, labels]
    expected = train(*arrays, batch_size=4, shuffle=False)
    for stream in (as_tf_data, as_data_loader, in_batches, as_py_dataset):
        got = train(stream(images, labels), shuffle=False, steps_per_epoch=3)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
        for ours, theirs in zip(got[1], expected[1]):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_endless_generator(make_teacher, toy_images):
    def endless():
        while True:
            yield toy_images(4)

    model = make_teacher()
    fit(model, endless(), steps_per_epoch=2, epochs=2)
    assert int(model.iteration) == 4


def test_the_end_of_a_stream_is_no_step(make_teacher, toy_images):
    # TensorFlow would begin one more, as long as that needs no data, and count.
    model, images = make_teacher(), toy_images(8)
    state = ops.convert_to_numpy(model.seed_generator.state)
    for updates in (2, 4):
        fit(model, in_batches(images))
        assert int(model.iteration) == updates
        assert int(model.optimizer.iterations) == updates
    drawn = ops.convert_to_numpy(model.seed_generator.state) - state
    np.testing.assert_array_equal(drawn, [0, 2 * 4])  # times and noise


def test_fit_validates_then_fits_again_and_predicts(
    make_model, toy_images, weights_of
):
    model, images = make_model(num_classes=3), toy_images(8)
    labels = np.arange(8) % 3
    before = weights_of(model.network)
    history = fit(model, images, labels, validation_data=(images, labels))
    assert set(history) == {"loss", "val_loss"}
    assert np.all(np.isfinite([*history.values()]))
    middle = weights_of(model.network)
    assert all(np.any(a != b) for a, b in zip(before, middle))

    history = fit(
        model,
        Batches([(images, labels)]),
        validation_data=Batches([(images, labels)]),
    )
    assert np.all(np.isfinite([*history.values()]))
    after = weights_of(model.network)
    assert all(np.any(a != b) for a, b in zip(middle, after))

    inputs = {"z": images, "logsnr": np.zeros(8, "float32"), "labels": labels}
    predicted = model.predict(inputs, verbose=0)
    assert predicted.shape == images.shape
    assert np.all(np.isfinite(predicted))
    assert all(np.all(np.isfinite(w)) for w in weights_of(model))


def test_validation_split(make_teacher, toy_images):
    model = make_teacher()
    history = fit(model, toy_images(8), batch_size=3, validation_split=0.25)
    assert int(model.iteration) == 2
    assert np.isfinite(history["val_loss"][0])
