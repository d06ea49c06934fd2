import os
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_mscm import DiffusionModel, datasets, spaces
from keras_mscm.datasets import ImageBatches, LatentBatches, cache_latents

SHIFT, SCALE = (0.1, -0.2), (0.5, 2.0)


def conv(channels=2, seed=0):
    """An encoder that halves the sides, of weights that a seed says."""
    return keras.layers.Conv2D(
        channels,
        2,
        strides=2,
        data_format="channels_last",
        kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
        bias_initializer=keras.initializers.RandomNormal(seed=seed),
    )


def make_space(encoder=None, **kwargs):
    encoder = conv() if encoder is None else encoder
    kwargs = {"scale": SCALE, "shift": SHIFT, **kwargs}
    return spaces.Latents((4, 4, 2), encoder, image_shape=(8, 8, 3), **kwargs)


@pytest.fixture
def space():
    return make_space()


@pytest.fixture
def images(pictures):
    return pictures(10, 8, 8)


SMALL = {"encode_batch_size": 4, "images_per_file": 4}
IN_ORDER = {"batch_size": 10, "shuffle": False, **SMALL}


def encoded(space, images):
    """What the encoder says of images, without any cache."""
    x = images.astype("float32") / 127.5 - 1
    return keras.ops.convert_to_numpy(space.encoder(x))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def counted(images, indices):
    """A data set that notes what is read of it, but for single images."""

    def read(chosen):
        if len(chosen) > 1:
            indices.extend(chosen.tolist())
        return images[chosen]

    return ImageBatches(read, len(images), batch_size=10, shuffle=False)


def test_latents_are_what_the_encoder_says(space, images, tmp_path):
    labels = np.arange(10) % 3
    batches = cache_latents(
        images, space, tmp_path / "new" / "cache", labels=labels, **IN_ORDER
    )
    latents, given = batches[0]
    assert latents.dtype == np.float32
    assert given.dtype == np.int32
    np.testing.assert_array_equal(given, labels)
    expected = (encoded(space, images) - SHIFT) * np.float32(SCALE)
    np.testing.assert_allclose(latents, expected, rtol=1e-3, atol=1e-4)
    by_space = space.encode(images.astype("float32") / 127.5 - 1)
    by_space = keras.ops.convert_to_numpy(by_space)
    np.testing.assert_allclose(latents, by_space, rtol=1e-3, atol=1e-4)
    assert batches.latent_shape == (4, 4, 2)
    assert not batches.moments
    names = ["00000.npy", "00001.npy", "00002.npy", "labels.npy"]
    names.append("manifest.json")
    assert sorted(content(tmp_path / "new" / "cache")) == names
    stored = np.load(tmp_path / "new" / "cache" / "00002.npy")
    assert (stored.dtype, stored.shape) == (np.float16, (2, 4, 4, 2))


def test_latents_train_a_model(space, images, tmp_path):
    inputs = {
        "z": keras.Input((4, 4, 2), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
    }
    network = keras.Model(inputs, keras.layers.Dense(2)(inputs["z"]))
    space.encoder.build((None, 8, 8, 3))
    model = DiffusionModel(network, space=space, seed=0)
    model.compile("adam", run_eagerly=keras.backend.backend() == "torch")
    batches = cache_latents(
        images, model.space, tmp_path / "cache", batch_size=5, **SMALL
    )
    history = model.fit(batches, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert int(model.iteration) == 4


def test_a_data_set_gives_its_options(images, tmp_path):
    dataset = datasets.from_arrays(
        images, np.arange(10) % 2, batch_size=3, seed=7, class_names=["a", "b"]
    )
    batches = cache_latents(dataset, make_space(), tmp_path / "cache", **SMALL)
    assert (batches.batch_size, batches.seed, batches.shuffle) == (3, 7, True)
    assert batches.class_names == ["a", "b"]
    # Its order is that of the images.
    for one, other in zip(batches, dataset):
        np.testing.assert_array_equal(one[1], other[1])
    batches = cache_latents(
        dataset, make_space(), tmp_path / "cache", batch_size=2, repeat=True
    )
    assert (batches.batch_size, batches.repeat) == (2, True)
    assert batches.num_batches is None


def test_a_finished_cache_is_used_again(images, tmp_path):
    folder, read = tmp_path / "cache", []
    dataset = counted(images, read)
    first = cache_latents(dataset, make_space(), folder, **SMALL)
    before = content(folder)
    read.clear()
    # An encoder of the same weights and another name is the same.
    again = cache_latents(
        dataset, make_space(), folder, **{**SMALL, "images_per_file": 3}
    )
    assert read == [0, 0, 0, 0]  # by which the encoder is recognised
    assert content(folder) == before
    np.testing.assert_array_equal(again[0], first[0])
    alone = LatentBatches(folder, batch_size=10, shuffle=False)
    np.testing.assert_array_equal(alone[0], first[0])


def test_an_interrupted_cache_goes_on(images, tmp_path):
    whole = cache_latents(images, make_space(), tmp_path / "whole", **IN_ORDER)
    folder, read = tmp_path / "cache", []
    dataset = counted(images, read)
    good = dataset.read

    def fails(chosen):
        if len(chosen) > 1 and chosen.max() == 9:
            raise OSError("the disk is gone")
        return good(chosen)

    dataset.read = fails
    with pytest.raises(OSError, match="the disk is gone"):
        cache_latents(dataset, make_space(), folder, **SMALL)
    assert sorted(content(folder)) == [
        "00000.npy",
        "00001.npy",
        "manifest.json",
    ]
    with pytest.raises(ValueError, match=r"lacks 00002\.npy"):
        LatentBatches(folder, batch_size=10)
    (folder / ".latents-0123abc.tmp").write_bytes(b"left by a killed process")
    dataset.read = good
    read.clear()
    batches = cache_latents(dataset, make_space(), folder, **SMALL)
    assert set(read) == {0, 8, 9}
    np.testing.assert_array_equal(batches[0], whole[0])
    assert content(folder) == content(tmp_path / "whole")


KILLED = """
import os, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_latent_cache import SMALL, counted, make_space
from keras_mscm.datasets import cache_latents

dataset = counted(np.load(sys.argv[2]), [])
read = dataset.read

def dies(chosen):
    if len(chosen) > 1 and chosen.max() == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(chosen)

dataset.read = dies
cache_latents(dataset, make_space(), sys.argv[3], **SMALL)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="not on Windows")
def test_a_killed_process_goes_on(images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    folder, read = tmp_path / "cache", []
    arguments = [os.path.dirname(__file__), tmp_path / "images.npy", folder]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert sorted(content(folder)) == ["00000.npy", "manifest.json"]
    space = make_space()
    batches = cache_latents(counted(images, read), space, folder, **SMALL)
    assert set(read) == {0, 4, 5, 6, 7, 8, 9}
    expected = (encoded(space, images) - SHIFT) * np.float32(SCALE)
    np.testing.assert_allclose(batches[0], expected, rtol=1e-3, atol=1e-4)


def pooling(size):
    layer = keras.layers.AveragePooling2D(2, data_format="channels_last")
    roll = keras.layers.Lambda(lambda x: x[..., :2] * size)
    return keras.Sequential([layer, roll])


OTHERS = {
    "images": lambda images: {"images": images + 1},
    "fewer images": lambda images: {"images": images[:9]},
    "floats": lambda images: {"images": images / 127.5 - 1},
    "labels": lambda images: {"labels": np.zeros(10, "int32")},
    "weights": lambda images: {"space": make_space(conv(seed=1))},
    "scale": lambda images: {"space": make_space(scale=1.0)},
    "shift": lambda images: {"space": make_space(shift=0.0)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("finished", [True, False])
def test_another_cache_is_refused_and_left(name, finished, images, tmp_path):
    folder = tmp_path / "cache"
    arguments = {"images": images, "space": make_space(), "path": folder}
    cache_latents(**arguments, **SMALL)
    if not finished:
        (folder / "00001.npy").unlink()
    before = content(folder)
    other = {**arguments, **OTHERS[name](images)}
    with pytest.raises(ValueError, match="`path` must be a new folder, or the"):
        cache_latents(**other, **SMALL)
    assert content(folder) == before


def test_encoders_without_weights_are_told_apart(images, tmp_path):
    folder = tmp_path / "cache"
    cache_latents(images, make_space(pooling(1.0)), folder, **SMALL)
    before = content(folder)
    with pytest.raises(ValueError, match="another latent of the first image"):
        cache_latents(images, make_space(pooling(2.0)), folder, **SMALL)
    assert content(folder) == before
    cache_latents(images, make_space(pooling(1.0)), folder, **SMALL)


def test_what_is_no_cache_is_refused_and_left(images, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "00000.npy").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"in which there is '00000\.npy'"):
        cache_latents(images, make_space(), folder, **SMALL)
    assert content(folder) == {"00000.npy": b"precious"}
    (folder / "manifest.json").write_text('{"format": "of an archive"}')
    with pytest.raises(ValueError, match="is of something else"):
        cache_latents(images, make_space(), folder, **SMALL)
    with pytest.raises(ValueError, match="is of something else"):
        LatentBatches(folder, batch_size=1)
    with pytest.raises(ValueError, match="a folder, or new"):
        cache_latents(images, make_space(), folder / "00000.npy", **SMALL)
    assert (folder / "00000.npy").read_bytes() == b"precious"
    with pytest.raises(ValueError, match="that `cache_latents` filled"):
        LatentBatches(tmp_path / "new", batch_size=1)
    (tmp_path / "empty").mkdir()
    cache_latents(images, make_space(), tmp_path / "empty", **SMALL)


@pytest.mark.parametrize("text", ["[]", "{}", "[[", '{"format": 1}', "\xff"])
def test_a_damaged_manifest_is_refused(text, images, tmp_path):
    (tmp_path / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"whose manifest\.json is of"):
        LatentBatches(tmp_path, batch_size=1)


def test_a_damaged_file_is_named(images, tmp_path):
    folder = tmp_path / "cache"
    batches = cache_latents(images, make_space(), folder, **SMALL)
    np.save(folder / "00001.npy", np.zeros((4, 4, 4, 1), "float16"))
    batches = LatentBatches(folder, batch_size=10)
    with pytest.raises(ValueError, match=r"00001\.npy, which is to be float16"):
        batches[0]
    (folder / "00000.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000\.npy"):
        LatentBatches(folder, batch_size=10)


MEAN, LOG_VARIANCE = np.float32([0.3, -1.0]), np.float32([-2.0, 1.0])


def moments_encoder():
    """Returns the mean of 2x2 pixels and a fixed one, and log-variances."""
    encoder = conv(4)
    encoder.build((None, 8, 8, 3))
    encoder.set_weights(
        [np.zeros((2, 2, 3, 4)), np.concatenate([MEAN, LOG_VARIANCE])]
    )
    return encoder


def test_moments_are_drawn_from_anew(space, tmp_path, pictures):
    space = make_space(moments_encoder())
    images = pictures(256, 8, 8)
    folder = tmp_path / "cache"
    batches = cache_latents(
        images,
        space,
        folder,
        moments=True,
        batch_size=256,
        seed=3,
        encode_batch_size=64,
    )
    assert batches.moments
    first = batches[0]
    np.testing.assert_array_equal(first, batches[0])
    batches.on_epoch_end()
    second = batches[0]
    assert first.shape == second.shape == (256, 4, 4, 2)
    mean = (MEAN - SHIFT) * SCALE
    std = np.exp(LOG_VARIANCE / 2) * SCALE
    both = np.stack([first, second]).reshape(2, -1, 2)
    num = both.shape[1]
    for latents in both:
        error = 5 * std / np.sqrt(num)
        assert np.all(np.abs(latents.mean(axis=0) - mean) < error)
        np.testing.assert_allclose(latents.std(axis=0), std, rtol=0.05)
    for channel in range(2):
        correlation = np.corrcoef(both[..., channel])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(num)
    again = LatentBatches(folder, batch_size=256, seed=3)
    np.testing.assert_array_equal(again[0], first)
    # As the space itself draws: the same of the same noise.
    drawn = space.encode(
        images.astype("float32") / 127.5 - 1,
        lambda shape: keras.ops.ones(tuple(int(n) for n in shape)),
    )
    expected = keras.ops.convert_to_numpy(drawn)[0, 0, 0]
    np.testing.assert_allclose(mean + std, expected, rtol=1e-5)

    with pytest.raises(ValueError, match="which is of another moments"):
        cache_latents(images, space, folder)
    means = cache_latents(images, space, tmp_path / "means")
    np.testing.assert_allclose(
        means[0], np.broadcast_to(mean, (128, 4, 4, 2)), atol=1e-3
    )


@pytest.mark.parametrize(
    ("name", "change"),
    {
        "moments": {"moments": True},
        "space": {"space": make_space(conv(3))},
        "encoder": {"space": spaces.Latents((4, 4, 2))},
        "images": {"images": np.zeros((2, 4, 4, 3), "uint8")},
        "float16": {"space": make_space(scale=1e9)},
        "flip": {"flip": True},
        "verbose": {"verbose": 2},
        "encode_batch_size": {"encode_batch_size": 0},
        "images_per_file": {"images_per_file": 1.5},
        "path": {"path": ""},
    }.items(),
)
def test_what_cannot_be_is_said_before_anything_is_written(
    name, change, images, tmp_path
):
    folder = tmp_path / "cache"
    arguments = {"images": images, "space": make_space(), "path": folder}
    with pytest.raises(ValueError, match=name):
        cache_latents(**{**arguments, **change})
    assert not folder.exists()


def test_what_a_data_set_says_itself(images, tmp_path):
    def batches(**kwargs):
        return datasets.from_arrays(images, batch_size=2, **kwargs)

    space = make_space()
    with pytest.raises(ValueError, match="`images` must not be flipped"):
        cache_latents(batches(flip=True), space, tmp_path / "cache")
    with pytest.raises(ValueError, match="`labels` must be None with an"):
        cache_latents(batches(), space, tmp_path / "cache", labels=[0] * 10)
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        cache_latents(batches(), space, tmp_path / "cache", step=1)


def test_one_process_writes(images, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr("keras_mscm.backend.process", lambda: (1, 2))
    with pytest.raises(ValueError, match="where several processes train"):
        cache_latents(images, make_space(), folder, **SMALL)
    monkeypatch.undo()
    cache_latents(images, make_space(), folder, **SMALL)
    monkeypatch.setattr("keras_mscm.backend.process", lambda: (1, 2))
    part = cache_latents(images, make_space(), folder, **SMALL)
    assert part.shard == (1, 2)
    assert part.shard_size == 5
    shutil.rmtree(folder)
