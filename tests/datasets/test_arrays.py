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
        (np.zeros((2, 4)), r"`images` must be an array of shape \(num, height"),
        (np.zeros((0, 4, 4, 3), "uint8"), "`images` must be an array of shape"),
        (np.zeros((0, 4, 4, 3)), "`images` must be an array of shape"),
        (np.full((2, 4, 4, 3), 300, "int64"), r"shape .*\), dtype int64"),
        (np.full((2, 4, 4, 3), 200, "int64"), r"images.astype\('uint8'\)"),
        (np.zeros((2, 4, 4, 3), "uint16"), r"images.astype\('uint8'\)"),
        (np.zeros((2, 4, 4, 3), bool), r"by `images \* 2.0 - 1`.*dtype bool"),
        (np.zeros((2, 4, 4, 3), object), "dtype object"),
        (np.zeros((2, 4, 4, 3), complex), "dtype complex128"),
        ("photos", "`images` must be an array"),
        (None, "`images` must be an array"),
        ([np.zeros((1, 1, 1)), np.zeros((2, 1, 1))], "`images` must be an"),
        (np.full((2, 4, 4, 3), 2.0), "`images` must be floats in"),
        (np.full((2, 4, 4, 3), np.nan), "`images` must be finite"),
        (np.full((2, 4, 4, 3), -np.inf), "`images` must be floats in"),
        (np.full((2, 4, 4, 3), 0.5), r"look like \[0, 1\].*`nonnegative=True`"),
        (np.zeros((2, 3, 8, 8), "uint8"), r"`np.moveaxis\(images, 1, -1\)`"),
        (np.zeros((2, 1, 28, 28)), r"`np.moveaxis\(images, 1, -1\)`"),
        (np.zeros((2, 4, 6, 8)), r"`np.moveaxis\(images, 1, -1\)`"),
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
        (np.zeros((2, 4, 4, 3), "uint8"), 0, "`image_size` must be an integer"),
        (np.zeros((2, 4, 4, 3), "uint8"), "8", "`image_size` must be an integ"),
    ],
)
def test_bad_image_size(images, image_size, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(images, batch_size=2, image_size=image_size)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3)),
        np.full((2, 4, 4, 3), 0.5, "float16"),
        np.full((2, 4, 4, 3), 1, "float32"),
    ],
)
def test_floats_that_are_meant_not_to_go_below_0(images):
    dataset = from_arrays(images, batch_size=2, nonnegative=True)
    np.testing.assert_array_equal(dataset[0], images)


def test_images_all_of_0_look_like_nothing():
    assert from_arrays(np.zeros((2, 4, 4, 3)), batch_size=2)[0].max() == 0


@pytest.mark.parametrize(
    "shape", [(2, 4, 4, 16), (2, 3, 5, 2), (2, 5, 3, 8), (2, 3, 8, 4)]
)
def test_channels_are_last_or_may_be(shape):
    assert from_arrays(np.zeros(shape), batch_size=2)[0].shape == shape


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"nonnegative": True}, "`nonnegative` must be False of uint8 images"),
        ({"nonnegative": "no"}, "`nonnegative` must be True or False"),
        ({"batch_size": "2"}, "`batch_size` must be an integer"),
        ({"labels": [0, -1]}, "`labels` must be .*from -1 to 0.* at 1"),
        ({"labels": [0, 1, 2]}, r"`labels` must be .*shape \(3,\)"),
        ({"labels": [0, 2], "class_names": ["a", "b"]}, "`labels` must be in"),
        ({"flip": "no"}, "`flip` must be True or False"),
    ],
)
def test_bad_arguments(pictures, kwargs, message):
    with pytest.raises(ValueError, match=message):
        from_arrays(pictures(2, 4, 4), **{"batch_size": 2, **kwargs})


def test_an_unknown_keyword(pictures):
    with pytest.raises(TypeError, match=r"from_arrays\(\) got .*'mirror'"):
        from_arrays(pictures(2, 4, 4), batch_size=2, mirror=True)
