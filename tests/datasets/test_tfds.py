"""A TFDS data set that is prepared from local files and read back."""

import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from keras_mscm import backend
from keras_mscm.datasets import from_tfds
from keras_mscm.datasets.resizing import center_square

NUM = 12


class MscmTestPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures of different sizes with thumbnails, from a folder of PNGs."""

    VERSION = tfds.core.Version("1.0.0")
    source = None

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "thumbnail": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=NUM),
                    "name": tfds.features.Text(),
                }
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for path in self.source.glob("image*.png"):
            number = int(path.stem.removeprefix("image"))
            yield (
                path.name,
                {
                    "image": path,
                    "thumbnail": self.source / f"thumbnail{number}.png",
                    "label": number,
                    "name": path.name,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The prepared set's `data_dir`, the pictures and the thumbnails."""
    source = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    images, thumbnails = [], []
    for i in range(NUM):
        shape = (*rng.integers(10, 40, 2), 3)
        images.append(rng.integers(0, 256, shape, "uint8"))
        thumbnails.append(rng.integers(0, 256, (8, 8, 1), "uint8"))
        Image.fromarray(images[i]).save(source / f"image{i}.png")
        Image.fromarray(thumbnails[i][..., 0]).save(
            source / f"thumbnail{i}.png"
        )
    data_dir = tmp_path_factory.mktemp("data")
    MscmTestPictures.source = source
    MscmTestPictures(data_dir=data_dir).download_and_prepare()
    return data_dir, images, thumbnails


@pytest.fixture
def load(prepared):
    def load(*args, **kwargs):
        kwargs = {"data_dir": prepared[0], "batch_size": 4, **kwargs}
        return from_tfds("mscm_test_pictures", *args, **kwargs)

    return load


def thumbnails_of(load, **kwargs):
    """Images and labels of one pass over the thumbnails."""
    dataset = load(image_key="thumbnail", **kwargs)
    batches = [(x.numpy(), y.numpy()) for x, y in dataset]
    return tuple(np.concatenate(part) for part in zip(*batches))


def test_pixels_are_those_of_the_files(load, prepared, check_batch):
    for batch in load(image_key="thumbnail"):
        check_batch([part.numpy() for part in batch], (4, 8, 8, 1))
    images, labels = thumbnails_of(load)
    assert sorted(labels) == list(range(NUM))
    expected = np.stack(prepared[2])[labels] / 127.5 - 1
    np.testing.assert_allclose(images, expected, atol=1e-6)


@pytest.mark.parametrize("cache", [False, True])
def test_different_sizes_become_one(load, prepared, cache):
    dataset = load(image_size=16, cache=cache)
    for _ in range(2):
        for images, labels in dataset:
            assert images.shape == (4, 16, 16, 3)
            expected = [center_square(prepared[1][i], 16) for i in labels]
            expected = np.stack(expected) / 127.5 - 1
            np.testing.assert_allclose(images, expected, atol=1e-6)


def test_shuffling_by_seed(load):
    dataset = load(image_key="thumbnail", batch_size=NUM, seed=1)
    first, second = (next(iter(dataset))[1].numpy().tolist() for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)
    again = load(image_key="thumbnail", batch_size=NUM, seed=1)
    assert next(iter(again))[1].numpy().tolist() == first
    straight = [thumbnails_of(load, shuffle=False)[1] for _ in range(2)]
    np.testing.assert_array_equal(*straight)


def test_flip(load, prepared):
    originals = np.stack(prepared[2]) / 127.5 - 1
    mirrored = []
    for _ in range(4):
        images, labels = thumbnails_of(load, flip=True, seed=len(mirrored))
        there = np.abs(images - originals[labels]).max((1, 2, 3)) < 1e-6
        back = np.abs(images - originals[labels][:, :, ::-1]).max((1, 2, 3))
        np.testing.assert_array_equal(there, back > 1e-6)
        mirrored += [*~there]
    assert 10 <= sum(mirrored) <= 38  # of 48, 4 standard deviations
    again = [thumbnails_of(load, flip=True, seed=7)[0] for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_ends(load):
    def sizes(**kwargs):
        dataset = load(image_key="thumbnail", batch_size=5, **kwargs)
        return [len(labels) for _, labels in dataset.take(4)]

    assert sizes() == [5, 5, 2]
    assert sizes(drop_remainder=True) == [5, 5]
    assert sizes(repeat=True) == [5, 5, 5, 5]


def test_parts_share_out_the_images(load, prepared, monkeypatch):
    def part(**kwargs):
        return thumbnails_of(load, **{"batch_size": 3, **kwargs})[1].tolist()

    # Of 11, one is left out, so that all have as many batches.
    parts = [part(split="train[:11]", shard=(i, 2)) for i in range(2)]
    assert [len(labels) for labels in parts] == [5, 5]
    assert len({*parts[0], *parts[1]}) == 10
    whole = part(shuffle=False)
    assert part(shuffle=False, shard=(1, 3)) == whole[4:8]
    monkeypatch.setattr(backend, "process", lambda: (2, 3))
    assert part(shuffle=False) == whole[8:]
    assert part(shuffle=False, shard=(0, 1)) == whole


def test_a_part_is_not_shared_out_again(load, monkeypatch):
    """By TensorFlow's workers, or by Keras where it does so."""
    policy = (
        load(image_size=8, shard=(0, 2))
        .options()
        .experimental_distribute.auto_shard_policy
    )
    assert policy.name == "OFF"
    distribution = SimpleNamespace(num_processes=2, auto_shard_dataset=True)
    monkeypatch.setattr(
        keras.distribution, "distribution", lambda: distribution
    )
    with pytest.raises(ValueError, match="auto_shard_dataset = False"):
        load(image_size=8, shard=(1, 2))
    load(image_size=8, shard=(0, 1))
    distribution.auto_shard_dataset = False
    load(image_size=8, shard=(1, 2))


@pytest.mark.parametrize("labels", [True, False])
def test_a_model_trains(load, train, labels):
    dataset = load(
        "train[:8]", image_size=8, labels=labels, flip=True, repeat=True
    )
    train(dataset, (8, 8, 3), NUM if labels else None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "`image_size` must be given: the images are of different sizes"),
        ({"image_size": -1}, "`image_size` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"shuffle_buffer": 0}, "`shuffle_buffer` must be at least 1"),
        ({"seed": 1.5}, "`seed` must be an integer"),
        ({"image_key": "picture"}, "must be features of the data set"),
        ({"image_key": "label"}, "`image_key` must be a feature of uint8"),
        ({"image_size": 8, "label_key": "name"}, "`label_key` must be a"),
        ({"image_size": 8, "shard": (1, 1)}, "`shard` must be .index, count."),
        ({"as_supervised": True}, "`as_supervised` and `with_info` must not"),
    ],
)
def test_bad_arguments(load, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load(**kwargs)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"keras-mscm\[tfds,tensorflow\]"):
        from_tfds("cifar10", batch_size=2)


def test_leaves_gpus_to_the_backend_that_trains(load):
    import tensorflow as tf

    load(image_size=8)
    if keras.backend.backend() != "tensorflow":
        assert tf.config.get_visible_devices("GPU") == []
