import numpy as np
import pytest
from PIL import Image

from keras_mscm.datasets import from_folder
from keras_mscm.datasets.resizing import center_square


@pytest.fixture
def folder(tmp_path, pictures):
    """A folder of three cats and two dogs, and the images in that order."""
    images = [*pictures(3, 8, 8)] + [*pictures(2, 10, 14)]
    names = ["cat/1.png", "cat/2.bmp", "cat/more/3.PNG", "dog/1.png"]
    for name, image in zip([*names, "dog/2.png"], images, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "cat/notes.txt").write_text("not an image")
    return tmp_path, images


def test_images_and_classes(folder, check_batch):
    path, images = folder
    dataset = from_folder(path, image_size=8, batch_size=5, shuffle=False)
    check_batch(dataset[0], (5, 8, 8, 3))
    assert dataset.class_names == ["cat", "dog"]
    found, labels = dataset[0]
    assert labels.tolist() == [0, 0, 0, 1, 1]
    expected = [image / 127.5 - 1 for image in images[:3]]
    np.testing.assert_allclose(found[:3], expected, atol=1e-6)
    expected = [center_square(image, 8) / 127.5 - 1 for image in images[3:]]
    np.testing.assert_allclose(found[3:], expected, atol=1e-6)


def test_without_labels(folder, check_batch):
    path, _ = folder
    dataset = from_folder(
        path / "cat", image_size=4, batch_size=3, labels=False, channels=1
    )
    check_batch(dataset[0], (3, 4, 4, 1), labels=False)
    assert dataset.class_names is None


def test_files_are_read_when_they_are_due(folder):
    path, _ = folder
    dataset = from_folder(path, image_size=8, batch_size=1, shuffle=False)
    (path / "dog/1.png").write_bytes((path / "dog/1.png").read_bytes()[:200])
    assert [len(dataset[i][0]) for i in (0, 1, 2, 4)] == [1] * 4
    with pytest.raises(ValueError, match=r"can't be read. Received: .*1.png"):
        dataset[3]


def test_16_bits_are_not_clipped(tmp_path):
    pixels = np.full((4, 4), 1000, "uint16")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = from_folder(tmp_path, image_size=4, batch_size=1, labels=False)
    with pytest.raises(ValueError, match="of 8 bits per channel"):
        dataset[0]


def test_transparent_is_white(tmp_path):
    pixels = np.zeros((4, 4, 4), "uint8")
    pixels[:, 2:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = from_folder(tmp_path, image_size=4, batch_size=1, labels=False)
    np.testing.assert_array_equal(dataset[0][0, :, :, 0], [[1, 1, -1, -1]] * 4)


def test_a_turned_camera(tmp_path):
    pixels = np.zeros((4, 4, 3), "uint8")
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    dataset = from_folder(tmp_path, image_size=4, batch_size=1, labels=False)
    expected = [[-1] * 4] * 3 + [[1] * 4]
    np.testing.assert_array_equal(dataset[0][0, :, :, 0], expected)


@pytest.mark.parametrize("labels", [True, False])
def test_a_model_trains(folder, train, labels):
    dataset = from_folder(
        folder[0],
        image_size=8,
        batch_size=2,
        labels=labels,
        flip=True,
        drop_remainder=True,
    )
    train(dataset, (8, 8, 3), 2 if labels else None, steps_per_epoch=None)


@pytest.mark.parametrize(
    ("where", "kwargs", "message"),
    [
        ("cat", {}, "in subfolders, one per class .* some outside"),
        ("none", {}, "`directory` must be a folder of .* with 0 images"),
        ("", {"channels": 4}, "`channels` must be 1 .* Received: channels=4"),
        ("", {"image_size": 0}, "`image_size` must be at least 1"),
        ("", {"workers": 0}, "`workers` must be at least 1"),
    ],
)
def test_bad_arguments(folder, where, kwargs, message):
    kwargs = {"image_size": 8, "batch_size": 2, **kwargs}
    with pytest.raises(ValueError, match=message):
        from_folder(folder[0] / where, **kwargs)
