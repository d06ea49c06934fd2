import os
import struct
import warnings
import zlib

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
    with pytest.raises(
        ValueError, match=r"can't be read. Received: .*dog/1.png"
    ):
        dataset[3]


@pytest.fixture
def one(tmp_path):
    """A function that gives the batch of a folder with one image."""

    def one(**kwargs):
        kwargs = {"labels": False, "image_size": 4, **kwargs}
        return from_folder(tmp_path, batch_size=1, **kwargs)[0]

    return one


def png(bits, color, channels):
    """A PNG of 4x4 pixels, as Pillow doesn't write them."""

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    rows = (b"\0" + bytes(4 * channels * bits // 8)) * 4
    header = struct.pack(">IIBBBBB", 4, 4, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, content)
        for name, content in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
    )


@pytest.mark.parametrize(
    ("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)]
)
def test_16_bits_are_not_made_8(tmp_path, one, color, channels):
    (tmp_path / "a.png").write_bytes(png(16, color, channels))
    with pytest.raises(ValueError, match=r"a.png.*of 8 bits per channel"):
        one()
    (tmp_path / "a.png").write_bytes(png(8, color, channels))
    assert one().shape == (1, 4, 4, 3)


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_floats_and_long_integers_are_not_clipped(tmp_path, one, kind):
    pixels = np.full((4, 4), 1000, kind)
    Image.fromarray(pixels).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(ValueError, match=r"a.png.*of 8 bits per channel"):
        one()


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("1", "a.png"),
        ("1", "a.bmp"),
        ("L", "a.jpg"),
        ("LA", "a.png"),
        ("P", "a.png"),
        ("P", "a.GIF"),
        ("CMYK", "a.jpg"),
        ("RGBA", "a.webp"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_8_bits(tmp_path, one, mode, name, channels):
    pixels = np.zeros((4, 4, 3), "uint8")
    pixels[:, 2:] = 255
    Image.fromarray(pixels).convert("L").convert(mode).save(tmp_path / name)
    expected = np.broadcast_to([[-1], [-1], [1], [1]], (1, 4, 4, channels))
    np.testing.assert_allclose(one(channels=channels), expected, atol=0.06)


def test_of_an_animation_the_first_picture(tmp_path, one):
    black, white = (Image.new("RGB", (4, 4), c) for c in ("black", "white"))
    black.save(tmp_path / "a.gif", save_all=True, append_images=[white])
    np.testing.assert_array_equal(one(), -np.ones((1, 4, 4, 3)))


@pytest.mark.parametrize(
    "content",
    [b"", b"text", png(8, 2, 3)[:45], b"GIF89a", b"\xff\xd8\xff\xe0", b"BM"],
)
def test_names_a_file_that_is_no_image(tmp_path, one, content):
    (tmp_path / "\u00e4\n.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"can't be read.*'.*/\u00e4\\n.png'"):
        one()


def test_names_a_file_that_may_not_be_read(tmp_path, one, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(png(8, 2, 3))
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"a.png' \(.*Permission denied"):
        one()


def test_names_a_file_that_is_too_large(tmp_path, one, monkeypatch):
    """Pillow refuses twice the limit, and warns of less."""
    (tmp_path / "a.png").write_bytes(png(8, 2, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(ValueError, match=r"a.png' \(.*MAX_IMAGE_PIXELS"):
        one()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.warns(Image.DecompressionBombWarning, match=r"a.png' has 4x4"):
        one()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"a.png' \(.*MAX_IMAGE_PIXELS"):
            one()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    one()


def test_what_systems_put_there_is_left_out(folder):
    path, _ = folder
    picture = (path / "dog/1.png").read_bytes()
    for name in (
        ".ipynb_checkpoints/a.png",
        "__MACOSX/cat/._1.png",
        "@eaDir/a.jpg",
        "lost+found/notes",
        ".a.png",
        "cat/._1.png",
        "cat/.ipynb_checkpoints/a.png",
        "cat/more/__MACOSX/a.png",
        "cat/Thumbs.db",
        "desktop.ini",
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(picture)
    (path / ".#lock").symlink_to("nowhere")
    dataset = from_folder(path, image_size=8, batch_size=5)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]
    dataset = from_folder(path, image_size=8, batch_size=5, labels=False)
    assert dataset.num_images == 5


def test_a_folder_may_be_below_a_hidden_one_and_called_like_an_image(folder):
    path, _ = folder
    (path / ".hidden").mkdir()
    (path / "cat").rename(path / ".hidden/c.png")
    (path / "dog").rename(path / ".hidden/\u732b")
    dataset = from_folder(path / ".hidden", image_size=8, batch_size=5)
    assert dataset.class_names == ["c.png", "\u732b"]
    assert dataset[0][0].shape == (5, 8, 8, 3)


def test_links_are_followed(folder, tmp_path_factory):
    path, _ = folder
    linked = tmp_path_factory.mktemp("linked")
    (linked / "dog").mkdir()
    (linked / "ape").symlink_to(path / "cat")
    (linked / "dog/1.png").symlink_to(path / "dog/1.png")
    (linked / "dog/more").symlink_to(path / "dog")
    dataset = from_folder(linked, image_size=8, batch_size=6, shuffle=False)
    assert dataset.class_names == ["ape", "dog"]
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(dataset[0][0][3], dataset[0][0][4])


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    ("link", "to", "message"),
    [
        ("cat/again", "..", "lead back to a folder above"),
        ("ape", ".", "lead back to a folder above"),
        ("cat/more/again", "..", "lead back to a folder above"),
        ("dog/again", "../..", "lead back to a folder above"),
        ("ape", "nowhere", "a link that leads nowhere"),
        ("ape", "ape", "a link that leads nowhere"),
        ("dog/3.png", "gone.png", "a link that leads nowhere"),
    ],
)
def test_names_a_link_that_leads_nowhere(folder, link, to, message, labels):
    path = folder[0] / "photos"
    path.mkdir()
    for name in ("cat", "dog"):
        (folder[0] / name).rename(path / name)
    (path / link).symlink_to(to)
    with pytest.raises(ValueError, match=message) as caught:
        from_folder(path, image_size=8, batch_size=2, labels=labels)
    assert repr(link)[1:] in str(caught.value)


def test_names_what_is_neither_file_nor_folder(folder):
    os.mkfifo(folder[0] / "dog/pipe.png")
    with pytest.raises(ValueError, match=r"pipe.png', none"):
        from_folder(folder[0], image_size=8, batch_size=2)


def test_names_a_folder_that_may_not_be_read(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if path.name == "more":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cat/more' \(Permission denied"):
        from_folder(folder[0], image_size=8, batch_size=2)


def test_a_class_without_images_is_named_or_meant(folder):
    path, _ = folder
    (path / "bat/notes").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"bat' with 0 images.*`class_names`"):
        from_folder(path, image_size=8, batch_size=2)
    for names, labels in (
        (["bat", "cat", "dog"], [1, 1, 1, 2, 2]),
        (("dog", "cat"), [1, 1, 1, 0, 0]),
        (["dog"], [0, 0]),
    ):
        dataset = from_folder(
            path, image_size=8, batch_size=2, class_names=names
        )
        assert dataset.class_names == [*names]
        assert dataset.labels.tolist() == labels


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
        ("cat", {}, "in subfolders, one per class.*cat' with 2 images outside"),
        ("none", {}, "`directory` must be a folder.*none' .No such file"),
        ("cat/1.png", {}, "`directory` must be a folder.*1.png' .Not a"),
        ("cat/more", {"labels": False, "batch_size": 0}, "`batch_size` must"),
        ("", {"channels": 4}, "`channels` must be 1 .* Received: channels=4"),
        ("", {"channels": True}, "`channels` must be an integer"),
        (
            "",
            {"image_size": 0},
            "`image_size` must be an integer of at least 1",
        ),
        ("", {"image_size": True}, "`image_size` must be an integer"),
        ("", {"workers": 0}, "`workers` must be an integer of at least 1"),
        ("", {"labels": "no"}, "`labels` must be True or False.*'no'"),
        ("", {"shuffle": "no"}, "`shuffle` must be True or False"),
        ("", {"seed": 0.5}, "`seed` must be an integer in 0"),
        ("", {"class_names": "cat"}, "`class_names` must be a list of names"),
        ("", {"class_names": ["cat", 1]}, "`class_names` must be a list"),
        ("", {"class_names": ["cat", "cat"]}, "each once.*'cat', 'cat'"),
        ("", {"class_names": ["cat", "cow"]}, "there is no 'cow'"),
        (
            "",
            {"labels": False, "class_names": ["cat"]},
            "`class_names` must be",
        ),
    ],
)
def test_bad_arguments(folder, where, kwargs, message):
    kwargs = {"image_size": 8, "batch_size": 2, **kwargs}
    with pytest.raises(ValueError, match=message):
        from_folder(folder[0] / where, **kwargs)


@pytest.mark.parametrize("path", [None, 5, b"", b"photos", "", "a\0b"])
def test_names_what_is_no_path(path):
    with pytest.raises(ValueError, match="`directory` must be a path"):
        from_folder(path, image_size=8, batch_size=2)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    for labels in (True, False):
        with pytest.raises(ValueError, match=r"must be a folder of.*0 images"):
            from_folder(tmp_path, image_size=8, batch_size=2, labels=labels)


def test_an_unknown_keyword(folder):
    message = r"from_folder\(\) got an unexpected .*'shufle'.* it takes batch"
    with pytest.raises(TypeError, match=message):
        from_folder(folder[0], image_size=8, batch_size=2, shufle=False)
