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


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        *(
            ({name: value}, f"`{name}` must be an integer of at least 1")
            for name in ("every", "num_images", "columns", "batch_size")
            for value in (0, -1, 2.5, True, "4", float("nan"))
        ),
        ({"seed": None}, "`seed` must be an integer"),
        ({"seed": 2**40}, "`seed` must be an integer"),
        ({"labels": 3}, "`labels` must be an array of one entry"),
        ({"directory": None}, "`directory` must be a path"),
        ({"directory": ""}, "`directory` must be a path"),
        ({"directory": b"x\0"}, "`directory` must be a path"),
        ({"tensorboard": 3}, "`tensorboard` must be a path"),
        ({"num_images": 4, "noise": 3}, "`noise` must not be given"),
    ],
)
def test_bad_arguments(tmp_path, kw, message):
    with pytest.raises(ValueError, match=message):
        SampleGrid(**{"directory": tmp_path, "every": 1, **kw})


def test_bad_models(make_model, tmp_path):
    model = make_model(channels=2)
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels.*\(4, 4, 2\)"):
        train(model, np.zeros((4, 4, 4, 2)), SampleGrid(tmp_path, every=1))


def write(path):
    path.write_bytes(b"mine")


@pytest.mark.parametrize(
    "put",
    [
        write,
        lambda path: Image.new("L", (2, 2)).save(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
    ],
)
def test_pictures_of_someone_else_are_refused(
    make_model, images, tmp_path, put
):
    path = tmp_path / "00000003.png"
    put(path)
    model, grid = make_model(), SampleGrid(tmp_path, every=3, num_images=4)
    message = "`directory` must be where nothing but grids.*00000003.png"
    with pytest.raises(ValueError, match=message):
        train(model, images, grid)
    assert int(model.iteration) == 0
    assert [*tmp_path.iterdir()] == [path]


def test_its_own_grids_are_replaced_and_nothing_else(
    make_model, images, tmp_path
):
    def train_anew(seed):
        grid = SampleGrid(
            tmp_path, every=3, num_images=4, seed=seed, num_steps=2
        )
        train(make_model(), images, grid)
        return (tmp_path / "00000003.png").read_bytes()

    others = ["3.png", "00000003 (1).png", "00000003.jpg", ".00000003.png.mine"]
    for name in others:
        write(tmp_path / name)
    left = tmp_path / ".00000003.png.abcd_123"
    left.mkdir()
    write(left / "new.png")
    assert train_anew(0) != train_anew(1)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*others, "00000003.png", "00000006.png"}
    assert {(tmp_path / name).read_bytes() for name in others} == {b"mine"}


def test_a_picture_that_comes_while_training(make_model, images, tmp_path):
    grid = SampleGrid(tmp_path, every=3, num_images=4, num_steps=2)
    path = tmp_path / "00000006.png"
    drawing = grid.on_drawing

    def on_drawing(iteration, batches):
        drawing(iteration, batches)
        if iteration == 3:
            write(path)

    grid.on_drawing = on_drawing
    with pytest.warns(UserWarning, match=r"00000006.png could not be written"):
        train(make_model(), images, grid)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["directory", "tensorboard"])
@pytest.mark.parametrize("place", ["file", "file/in", "/proc/none"])
def test_where_nothing_can_be_written(
    make_model, images, tmp_path, name, place
):
    (tmp_path / "file").touch()
    kw = {"directory": tmp_path / "grids", name: tmp_path / place}
    model, grid = make_model(), SampleGrid(every=1, num_images=4, **kw)
    message = f"`{name}` must be where files can be written"
    with pytest.raises(ValueError, match=message):
        train(model, images, grid)
    assert int(model.iteration) == 0


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


def test_several_numbers_of_steps_stand_below_one_another(make_model, tmp_path):
    model, grids = make_model(), []
    for num_steps in ((1, 2), 1, 2):
        folder = tmp_path / str(num_steps)
        grid = SampleGrid(folder, every=6, num_images=4, num_steps=num_steps)
        grid.set_model(model)
        grid.on_train_begin()
        grid.on_drawing(6, {k: grid._draw(k) for k in grid.num_steps})
        grids.append(np.asarray(Image.open(folder / "00000006.png")))
    several, one, two = grids
    height = len(one)
    np.testing.assert_array_equal(several[:height], one)
    np.testing.assert_array_equal(several[height : height + 4], 0)
    np.testing.assert_array_equal(several[height + 4 :], two)
