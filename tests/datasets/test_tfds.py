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
                    "more": {"width": np.int64},
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
                    "more": {"width": number},
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


@pytest.fixture
def builder(prepared):
    return MscmTestPictures(data_dir=prepared[0])


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
        ({"image_size": -1}, "`image_size` must be an integer of at least 1"),
        ({"image_size": 8.0}, "`image_size` must be an integer"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"shuffle_buffer": 0}, "`shuffle_buffer` must be an integer"),
        ({"seed": 0.5}, "`seed` must be an integer in 0"),
        ({"seed": 2**31}, "`seed` must be an integer in 0"),
        ({"labels": "no"}, "`labels` must be True or False"),
        ({"shuffle": "no"}, "`shuffle` must be True or False"),
        ({"flip": "no"}, "`flip` must be True or False"),
        ({"repeat": 1}, "`repeat` must be True or False"),
        ({"drop_remainder": "no"}, "`drop_remainder` must be True or False"),
        ({"cache": None}, "`cache` must be True, False or the path"),
        ({"cache": ""}, "`cache` must be a path"),
        ({"image_key": None}, "`image_key` must be a string"),
        ({"image_key": "picture"}, "must be features of the data set"),
        ({"image_key": "label"}, "`image_key` must be a feature of uint8"),
        ({"image_key": "more"}, "`image_key` must be a feature of uint8"),
        ({"image_size": 8, "label_key": "name"}, "`label_key` must be a"),
        ({"image_size": 8, "label_key": "more"}, "`label_key` must be a"),
        ({"image_size": 8, "label_key": 5}, "`label_key` must be a string"),
        ({"image_size": 8, "shard": (1, 1)}, "`shard` must be .index, count."),
        ({"image_size": 8, "shard": (True, 2)}, "`shard` must be .index, c"),
        ({"split": None}, "`split` must be a string such as"),
        ({"split": ["train"]}, "`split` must be a string such as"),
        ({"split": "trian"}, "trian"),
        ({"read_config": "fast"}, "`read_config` must be a `tfds.ReadConfig`"),
        ({"as_dataset_kwargs": 5}, "`as_dataset_kwargs` must be a dictionary"),
        (
            {"seed": 1, "read_config": tfds.ReadConfig(shuffle_seed=2)},
            "`seed` must be None where `read_config` .*seed=1, shuffle_seed=2",
        ),
    ],
)
def test_bad_arguments(load, kwargs, message):
    with pytest.raises(ValueError, match=message):
        load(**kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"as_supervised": True},
        {"with_info": True},
        {"shuffle_files": True},
        {"as_dataset_kwargs": {"as_supervised": True}},
        {"as_dataset_kwargs": {"split": "test"}},
        {"as_dataset_kwargs": {"batch_size": 2}},
    ],
)
def test_names_alone_what_is_not_to_be_given(load, kwargs):
    (offender,) = {**kwargs, **kwargs.get("as_dataset_kwargs", {})}.keys() - {
        "as_dataset_kwargs"
    }
    message = f"^`{offender}` must not be given: .*Received: {offender}=\\S+$"
    with pytest.raises(ValueError, match=message):
        load(image_size=8, try_gcs=False, **kwargs)


def test_an_unknown_keyword(load, builder):
    for name in ("mscm_test_pictures", builder):
        with pytest.raises(TypeError, match="argument 'imagesize', which"):
            from_tfds(name, batch_size=4, imagesize=8)


@pytest.mark.parametrize("name", [None, 5, "", b"cifar10", ["cifar10"]])
def test_names_what_is_neither_name_nor_builder(name):
    with pytest.raises(ValueError, match="`name` must be the name of a data"):
        from_tfds(name, batch_size=2)


def test_a_class_is_no_builder():
    with pytest.raises(ValueError, match="`name` must be the name of a data"):
        from_tfds(MscmTestPictures, batch_size=2)


def test_a_builder_gives_what_its_name_gives(load, builder):
    def given(**kwargs):
        return from_tfds(builder, **{"batch_size": 4, **kwargs})

    for kwargs in ({"seed": 3, "flip": True}, {"shard": (1, 2), "seed": 3}):
        expected = thumbnails_of(load, **kwargs)
        for part, other in zip(thumbnails_of(given, **kwargs), expected):
            np.testing.assert_array_equal(part, other)


def test_read_config_and_decoders_are_handed_on(load, builder):
    config = tfds.ReadConfig(add_tfds_id=True, shuffle_seed=1)
    for kwargs in (
        {"read_config": config},
        {"as_dataset_kwargs": {"read_config": config}},
    ):
        _, ids = next(
            iter(load(image_size=8, label_key="label", seed=1, **kwargs))
        )
        assert len(ids) == 4
        with pytest.raises(ValueError, match="tfds_id"):
            load(image_size=8, label_key="tfds_id", **kwargs)
    skip = {"thumbnail": tfds.decode.SkipDecoding()}
    for name in ("mscm_test_pictures", builder):
        kwargs = {} if name is builder else {"data_dir": builder.data_dir_root}
        with pytest.raises(ValueError, match=r"`image_key` must be .*string"):
            from_tfds(
                name,
                batch_size=4,
                image_key="thumbnail",
                decoders=skip,
                **kwargs,
            )


@pytest.mark.parametrize("kwargs", [{"data_dir": "/"}, {"download": False}])
def test_a_builder_has_what_a_name_needs(builder, kwargs):
    (key,) = kwargs
    message = f"^`{key}` must not be given with a builder.*{key}="
    with pytest.raises(ValueError, match=message):
        from_tfds(builder, batch_size=4, **kwargs)


def test_a_data_set_that_is_not_prepared(tmp_path):
    message = "`name` must be of a data set that is prepared.*download"
    with pytest.raises(ValueError, match=message):
        from_tfds(MscmTestPictures(data_dir=tmp_path), batch_size=4)
    with pytest.raises(ValueError, match=message):
        from_tfds(
            "mscm_test_pictures",
            batch_size=4,
            data_dir=tmp_path,
            download=False,
        )


@pytest.fixture
def image_folder(tmp_path, prepared):
    """Three cats and two dogs, for `tfds.folder_dataset.ImageFolder`."""
    for i, name in enumerate(["cat/0", "cat/1", "cat/2", "dog/3", "dog/4"]):
        path = tmp_path / f"train/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(prepared[1][i]).save(path)
    return tfds.folder_dataset.ImageFolder(str(tmp_path))


def test_a_folder_of_tfds(image_folder, prepared, train):
    def pass_of(dataset):
        images, labels = zip(*((x.numpy(), y.numpy()) for x, y in dataset))
        return np.concatenate(images), np.concatenate(labels)

    common = {"batch_size": 2, "image_size": 8}
    images, labels = pass_of(from_tfds(image_folder, shuffle=False, **common))
    assert sorted(labels) == [0, 0, 0, 1, 1]
    expected = np.stack([center_square(x, 8) for x in prepared[1][:5]])
    found = np.round((images + 1) * 127.5)
    places = [
        int(np.argmin(np.abs(expected - image).max((1, 2, 3))))
        for image in found
    ]
    assert sorted(places) == list(range(5))
    np.testing.assert_array_equal(found, expected[places])
    np.testing.assert_array_equal(labels, np.array(places) > 2)
    # Its order is that of the seed, though TFDS mixes it without one.
    first, second = (
        from_tfds(image_folder, seed=5, **common) for _ in range(2)
    )
    passes = [pass_of(first)[0] for _ in range(4)]
    for images in passes:
        np.testing.assert_array_equal(images, pass_of(second)[0])
    assert any(np.any(images != passes[0]) for images in passes)
    endless = from_tfds(image_folder, repeat=True, **common)
    train(endless, (8, 8, 3), 2)


def test_a_folder_of_tfds_is_not_read_in_parts(image_folder):
    with pytest.raises(ValueError, match=r"`shard` must be .*`from_folder`"):
        from_tfds(image_folder, batch_size=2, image_size=8, shard=(0, 2))


def test_a_file_of_another_size_is_not_taken_for_a_cache(load, tmp_path):
    path = tmp_path / "cache"
    assert len([*load(image_size=8, cache=path)]) == 3
    assert [*tmp_path.iterdir()]
    with pytest.raises(Exception, match="shape"):
        next(iter(load(image_size=16, cache=str(path))))


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"keras-mscm\[tfds,tensorflow\]"):
        from_tfds("cifar10", batch_size=2)


def test_leaves_gpus_to_the_backend_that_trains(load):
    import tensorflow as tf

    load(image_size=8)
    if keras.backend.backend() != "tensorflow":
        assert tf.config.get_visible_devices("GPU") == []
