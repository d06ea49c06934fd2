"""What is in the files."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from keras_mscm.callbacks import SampleGrid
from keras_mscm.callbacks.sample_grid import grid_of


def train(model, images, callback, **kw):
    model.fit(images, batch_size=4, callbacks=[callback], verbose=0, **kw)


def test_grid():
    images = np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((1, 2, 3, 1))
    grid = grid_of(images, columns=2)[:, :, 0]
    expected = np.zeros((8, 7), int)
    for i, value in enumerate((0, 64, 128, 191, 255)):
        row, column = divmod(i, 2)
        expected[3 * row : 3 * row + 2, 4 * column : 4 * column + 3] = value
    np.testing.assert_array_equal(grid, expected)
    assert grid_of(images, columns=9).shape == (2, 19, 1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_files(make_model, tmp_path, channels, mode):
    images = np.zeros((24, 4, 4, channels), "float32")
    model = make_model(channels=channels)
    grid = SampleGrid(
        tmp_path / "grids",
        every=3,
        num_images=6,
        columns=3,
        batch_size=4,
        seed=2,
        num_steps=2,
    )
    train(model, images, grid)
    files = sorted(path.name for path in (tmp_path / "grids").iterdir())
    assert files == ["00000003.png", "00000006.png"]
    # At the end the weights are what they were then.
    noise = np.random.default_rng(2).standard_normal(
        (6, 4, 4, channels), "float32"
    )
    expected = grid_of(model.generate(noise=noise, num_steps=2, seed=2), 3)
    with Image.open(tmp_path / "grids" / files[1]) as image:
        assert image.mode == mode
        written = np.asarray(image).reshape(9, 14, channels).astype(int)
    np.testing.assert_allclose(written, expected, atol=1)


def test_tensorboard(make_model, images, tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import (
        LegacyEventFileLoader,
    )

    logs = tmp_path / "logs"
    grid = SampleGrid(
        tmp_path, every=3, num_images=4, tensorboard=logs, num_steps=2
    )
    model = make_model()
    train(model, images, grid)
    train(model, images, grid)
    seen = []
    for path in sorted(logs.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                assert value.tag == "samples"
                png = value.image.encoded_image_string
                assert png == (tmp_path / f"{event.step:08d}.png").read_bytes()
                with Image.open(io.BytesIO(png)) as picture:
                    size = value.image.width, value.image.height
                    assert picture.size == size == (9, 9)
                seen.append(event.step)
    assert seen == [3, 6, 9, 12]
    assert len([*logs.iterdir()]) == 2


def test_bad_arguments(make_model, tmp_path):
    with pytest.raises(ValueError, match="`columns` must be at least 1"):
        SampleGrid(tmp_path, every=1, columns=0)
    model = make_model(channels=2)
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels.*\(4, 4, 2\)"):
        train(model, np.zeros((4, 4, 4, 2)), SampleGrid(tmp_path, every=1))


@pytest.mark.parametrize(
    ("module", "extra", "kw"),
    [
        ("PIL", "images", {}),
        (
            "tensorboard.summary.writer.record_writer",
            "tensorboard",
            {"tensorboard": "logs"},
        ),
    ],
)
def test_missing_packages(
    make_model, images, tmp_path, monkeypatch, module, extra, kw
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"keras-mscm\[{extra}\]"):
        train(make_model(), images, SampleGrid(tmp_path, every=1, **kw))
