import numpy as np
import pytest

from keras_mscm.datasets import from_arrays


def test_bytes_become_floats(pictures, check_batch):
    images = pictures(6, 4, 5)
    images[0, 0, 0] = 0, 128, 255
    dataset = from_arrays(images, range(6), batch_size=3, shuffle=False)
    check_batch(dataset[0], (3, 4, 5, 3))
    found = np.concatenate([batch for batch, _ in dataset])
    expected = images.astype("float64") / 127.5 - 1
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_floats_stay(check_batch):
    images = np.random.default_rng(0).uniform(-1, 1, (6, 4, 4, 1))
    dataset = from_arrays(images, batch_size=6, shuffle=False)
    check_batch(dataset[0], (6, 4, 4, 1), labels=False)
    np.testing.assert_array_equal(dataset[0], images.astype("float32"))


def test_one_channel_needs_no_axis(pictures, check_batch):
    dataset = from_arrays(pictures(3, 4, 4, 1)[..., 0], batch_size=2)
    check_batch(dataset[0], (2, 4, 4, 1), labels=False)


def test_image_size(pictures, check_batch):
    dataset = from_arrays(pictures(3, 9, 12), batch_size=3, image_size=4)
    check_batch(dataset[0], (3, 4, 4, 3), labels=False)


@pytest.mark.parametrize("num_classes", [None, 5])
def test_a_model_trains(pictures, train, num_classes):
    labels = np.arange(8) % 5 if num_classes else None
    dataset = from_arrays(pictures(8, 4, 4), labels, batch_size=4, flip=True)
    train(dataset, (4, 4, 3), num_classes)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4)), r"`images` must have shape \(num, height, width"),
        (np.zeros((0, 4, 4, 3), "uint8"), "`images` must have shape"),
        (np.full((2, 4, 4, 3), 200, "int64"), "Received: dtype int64 from 200"),
        (np.full((2, 4, 4, 3), 2.0), "`images` must be floats in"),
        (np.full((2, 4, 4, 3), np.nan), "`images` must be finite"),
        (np.full((2, 4, 4, 3), 0.5), r"look like \[0, 1\]"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(images, batch_size=2)


@pytest.mark.parametrize(
    ("images", "image_size", "message"),
    [
        (np.full((2, 4, 4, 3), -0.5), 8, "`image_size` must be None but for"),
        (np.zeros((2, 4, 4, 2), "uint8"), 8, "2 channels"),
        (np.zeros((2, 4, 4, 3), "uint8"), 0, "`image_size` must be at least 1"),
    ],
)
def test_bad_image_size(images, image_size, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(images, batch_size=2, image_size=image_size)
