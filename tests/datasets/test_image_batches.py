"""Order, flips and ends of batches."""

import random
import subprocess
import sys

import numpy as np
import pytest

from keras_mscm import backend
from keras_mscm.datasets import ImageBatches


def make(num=10, batch_size=4, seed=0, **kwargs):
    """Batches whose labels are the images' indices."""
    images = np.linspace(-1, 1, num, dtype="float32").reshape(num, 1, 1, 1)
    given = {"read": images.__getitem__, "num_images": num, **kwargs}
    given = {"labels": np.arange(num), **given}
    return ImageBatches(batch_size=batch_size, seed=seed, **given)


def order(dataset):
    return np.concatenate([labels for _, labels in dataset]).tolist()


def test_in_order():
    assert order(make(shuffle=False)) == list(range(10))


def test_an_epoch_has_each_image_once():
    dataset = make()
    assert [len(labels) for _, labels in dataset] == [4, 4, 2]
    assert sorted(order(dataset)) == list(range(10))
    assert order(dataset) != list(range(10))


def test_the_order_is_that_of_seed_and_epoch():
    one, two = make(num=50), make(num=50)
    first = order(one)
    one.on_epoch_end()
    second = order(one)
    assert order(two) == first != second
    two.epoch = 1
    assert order(two) == second
    assert order(make(num=50, seed=1)) not in (first, second)


def test_a_batch_is_the_same_whoever_asks_and_when():
    dataset = make(num=50, batch_size=8, flip=True, repeat=True)
    there = [dataset[i] for i in range(20)]
    back = [dataset[i] for i in reversed(range(20))][::-1]
    for (x, y), (other_x, other_y) in zip(there, back, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


def test_no_seed_follows_keras_set_random_seed():
    random.seed(3)
    first = order(make(num=50, seed=None))
    assert order(make(num=50, seed=None)) != first
    random.seed(3)
    assert order(make(num=50, seed=None)) == first


def test_images_go_with_their_labels():
    for images, labels in make():
        np.testing.assert_allclose(images.ravel(), labels / 4.5 - 1, atol=1e-6)


def test_drop_remainder():
    dataset = make(drop_remainder=True)
    assert dataset.num_batches == 2
    assert [len(labels) for _, labels in dataset] == [4, 4]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"drop_remainder": True},
        {"repeat": True},
        {"batch_size": 5},
        {"batch_size": 11},
        {"shard": (1, 2)},
        {"shard": (0, 3), "batch_size": 2},
    ],
)
def test_tells_the_size_of_the_last_batch(kwargs):
    dataset = make(**kwargs)
    last = (dataset.num_batches or 7) - 1
    assert len(dataset[last][1]) == dataset.last_batch_size


@pytest.mark.parametrize(("index", "repeat"), [(-1, True), (-1, False), (3, 0)])
def test_there_is_no_such_batch(index, repeat):
    with pytest.raises(IndexError, match=f"`index` must be .* index={index}"):
        make(repeat=bool(repeat))[index]


@pytest.mark.parametrize("batch_size", [4, 25])
def test_endless_batches_are_full_and_run_through_every_epoch(batch_size):
    dataset = make(batch_size=batch_size, repeat=True, drop_remainder=True)
    assert dataset.num_batches is None
    batches = [dataset[i][1] for i in range(-(-50 // batch_size))]
    assert {len(batch) for batch in batches} == {batch_size}
    passes = np.concatenate(batches)[:50].reshape(5, 10)
    np.testing.assert_array_equal(np.sort(passes), [range(10)] * 5)
    assert len(np.unique(passes, axis=0)) == 5
    dataset.on_epoch_end()  # Keras' epochs are not ours
    np.testing.assert_array_equal(dataset[0][1], batches[0])


def test_an_endless_one_goes_on_where_it_was():
    whole, rest = (make(batch_size=4, repeat=True, flip=True) for _ in range(2))
    rest.first_batch = 7
    for i in range(3):
        for ours, theirs in zip(rest[i], whole[7 + i]):
            np.testing.assert_array_equal(ours, theirs)


def test_flip_mirrors_half_of_the_images():
    images = np.zeros((1000, 2, 3, 1), "float32")
    images[:] = np.array([-1.0, 0.0, 1.0])[:, None]
    dataset = ImageBatches(
        images.__getitem__, 1000, batch_size=500, seed=0, flip=True
    )
    left = np.concatenate([batch[:, :, 0, 0] for batch in dataset])
    right = np.concatenate([batch[:, :, 2, 0] for batch in dataset])
    np.testing.assert_array_equal(left, -right)
    np.testing.assert_array_equal(left[:, 0], left[:, 1])
    assert 400 < (left[:, 0] == 1).sum() < 600  # 6 standard deviations
    before = dataset[0]
    dataset.on_epoch_end()
    assert np.any(dataset[0] != before)


@pytest.mark.parametrize("shuffle", [False, True])
def test_parts_share_out_each_epoch(shuffle):
    parts = [
        make(num=11, shard=(i, 3), shuffle=shuffle, batch_size=2)
        for i in range(3)
    ]
    left_out = set()
    for _ in range(2):
        orders = [order(part) for part in parts]
        assert [len(indices) for indices in orders] == [3, 3, 3]
        together = set(np.concatenate(orders))
        assert len(together) == 9
        left_out |= set(range(11)) - together
        for part in parts:
            assert part.num_batches == 2
            part.on_epoch_end()
    # Another part of the whole in each epoch, if it is shuffled.
    assert shuffle == (len(left_out) > 2)
    if not shuffle:
        assert orders[1] == [1, 4, 7]


def test_an_endless_part():
    parts = [
        make(num=10, shard=(i, 2), repeat=True, batch_size=4) for i in range(2)
    ]
    epoch = [
        np.concatenate([part[i][1] for i in range(5)]).reshape(4, 5)
        for part in parts
    ]
    for passes in np.concatenate(epoch, axis=1):
        assert sorted(passes) == list(range(10))


def test_parts_are_mirrored_each_in_its_own_way():
    images = np.zeros((200, 1, 2, 1), "float32")
    images[:, :, 1] = 1.0
    first, second = (
        ImageBatches(
            images.__getitem__,
            200,
            batch_size=100,
            seed=0,
            flip=True,
            shard=(i, 2),
        )[0]
        for i in range(2)
    )
    assert 30 < (first != second).any((1, 2, 3)).sum() < 70  # of 100


def test_each_process_has_its_part(monkeypatch):
    assert make().shard == (0, 1)
    monkeypatch.setattr(backend, "process", lambda: (1, 2))
    assert make().shard == (1, 2)
    assert make(shard=(0, 1)).shard == (0, 1)


def test_keras_counts_the_epochs_of_a_finite_one(train):
    dataset = make()
    seen = []
    read = dataset.read
    dataset.read = lambda chosen: (seen.append(dataset.epoch), read(chosen))[1]
    train(dataset, (1, 1, 1), 10, epochs=2, steps_per_epoch=1)
    # Once before `fit` begins: the docstring says so.
    assert dataset.epoch == 3
    # Keras reads ahead: what was read last may be of the epoch that would come.
    assert set(seen) & {1, 2}


def test_fit_of_an_endless_one(train):
    train(make(repeat=True), (1, 1, 1), 10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num": 0}, "`num_images` must be an integer of at least 1.*=0"),
        ({"num_images": 10.0}, "`num_images` must be an integer"),
        ({"num_images": True}, "`num_images` must be an integer"),
        ({"read": None}, "`read` must be a function of an array of indices"),
        ({"read": np.zeros((10, 1, 1, 1))}, "`read` must be a function"),
        ({"read": "images"}, "Received: read='images'"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"batch_size": 2.0}, "`batch_size` must be an integer"),
        ({"batch_size": True}, "`batch_size` must be an integer"),
        (
            {"seed": -1},
            r"`seed` must be an integer in 0\.\.2\*\*31 - 3, or None",
        ),
        ({"seed": 2**31}, r"`seed` must be an integer in 0\.\.2\*\*31 - 3"),
        ({"seed": 0.5}, "Received: seed=0.5"),
        ({"seed": True}, "Received: seed=True"),
        ({"seed": "a"}, "Received: seed='a'"),
        ({"shuffle": "no"}, "`shuffle` must be True or False.*'no'"),
        ({"flip": 1}, "`flip` must be True or False"),
        ({"repeat": "False"}, "`repeat` must be True or False"),
        ({"drop_remainder": None}, "`drop_remainder` must be True or False"),
        ({"class_names": "abcdefghij"}, "`class_names` must be a list of"),
        ({"class_names": [*range(10)]}, "`class_names` must be a list of"),
        ({"class_names": [""] * 10}, "`class_names` must be a list of"),
        ({"class_names": [*"abc"]}, "0..2, as there are 3.*first of 7 .* at 3"),
        ({"labels": None, "class_names": ["a"]}, "`class_names` must be None"),
        (
            {"batch_size": 11, "drop_remainder": True},
            "`batch_size` must be at most the number of images, 10",
        ),
        (
            {"batch_size": 6, "drop_remainder": True, "shard": (0, 2)},
            "`batch_size` must be at most the number of images, 5",
        ),
        ({"shard": (2, 2)}, r"0 <= index < count, or None.*\(2, 2\)"),
        ({"shard": (0.0, 2)}, "`shard` must be .index, count., integers"),
        ({"shard": (0, 11)}, "`shard` must be of at most as many parts as"),
        ({"shard": 2}, "Received: shard=2"),
        ({"shard": (True, 2)}, r"Received: shard=\(True, 2\)"),
        ({"shard": (0, True)}, r"Received: shard=\(0, True\)"),
        ({"shard": (0, 1, 2)}, r"Received: shard=\(0, 1, 2\)"),
        ({"shard": "01"}, "Received: shard='01'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("labels", "received"),
    [
        (np.arange(9), r"shape \(9,\)"),
        (np.arange(10.0), "dtype float64"),
        (-np.arange(10), "from -9 to 0, the first of 9 bad ones at 1"),
        (np.full(10, 2**31), "from 2147483648 to .* bad ones at 0"),
        (np.eye(10, dtype=int), r"shape \(10, 10\)"),
        (np.zeros((10, 1), int), r"shape \(10, 1\)"),
        (np.zeros(10, bool), "dtype bool"),
        (3, r"shape \(\)"),
        ([*"abcdefghij"], "dtype <U1"),
        ([[1], [1, 2]], r"\[\[1\], \[1, 2\]\]"),
        ([None] * 10, "dtype object"),
    ],
)
def test_bad_labels(labels, received):
    message = f"`labels` must be an integer of at least 0 per .*{received}"
    with pytest.raises(ValueError, match=message):
        make(labels=labels)


@pytest.mark.parametrize(
    ("images", "received"),
    [
        (None, "dtype object"),
        ([np.zeros((1, 1, 1)), np.zeros((2, 1, 1))], "a function that returns"),
        (np.zeros((3, 1, 1, 1)), r"shape \(3, 1, 1, 1\)"),
        (np.zeros((4, 1, 1)), r"shape \(4, 1, 1\)"),
        (np.zeros((4, 0, 1, 1)), r"shape \(4, 0, 1, 1\)"),
        (np.zeros((4, 1, 1, 1), int), "dtype int64"),
        (np.zeros((4, 1, 1, 1), bool), "dtype bool"),
        (np.full((4, 1, 1, 1), 255.0), "from 255 to 255"),
        (np.full((4, 1, 1, 1), -1.1), "from -1.1 to -1.1"),
        (np.full((4, 1, 1, 1), np.nan), "from nan to nan"),
        (np.full((4, 1, 1, 1), -np.inf), "from -inf to -inf"),
    ],
)
def test_what_is_read_must_be_images(images, received):
    dataset = make(read=lambda chosen: images)
    with pytest.raises(ValueError, match=f"`read` must .*{received}"):
        dataset[0]


def test_what_is_read_must_be_of_one_shape():
    sizes = iter([1, 1, 2])
    dataset = make(
        read=lambda chosen: np.zeros((len(chosen), next(sizes), 1, 1)),
        repeat=True,
    )
    dataset[0], dataset[1]
    with pytest.raises(ValueError, match=r"of shape \(1, 1, 1\) as .*before"):
        dataset[2]


def test_numbers_of_numpy_are_numbers():
    dataset = make(
        batch_size=np.int64(4),
        num_images=np.int32(10),
        seed=np.uint8(0),
        flip=np.False_,
        shard=[np.int64(0), np.int64(1)],
        class_names=np.array([*"abcdefghij"]),
    )
    kept = (dataset.batch_size, dataset.num_images, dataset.seed, dataset.flip)
    assert [type(value) for value in kept] == [int, int, int, bool]
    assert dataset.shard == (0, 1)
    assert dataset.class_names == [*"abcdefghij"]
    assert order(dataset) == order(make())


def test_importing_the_loaders_imports_nothing_optional():
    code = """if True:
        import keras, sys
        before = set(sys.modules)
        import keras_mscm.datasets
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(*new & {"PIL", "tensorflow", "tensorflow_datasets"})
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
