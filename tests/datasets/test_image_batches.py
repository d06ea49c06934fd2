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
    return ImageBatches(
        images.__getitem__,
        num,
        np.arange(num),
        batch_size=batch_size,
        seed=seed,
        **kwargs,
    )


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
        ({"num": 0}, "`num_images` must be at least 1. Received: num_images=0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": 2.0}, "`batch_size` must be an integer"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, or None"),
        ({"seed": "a"}, "Received: seed='a'"),
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
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    "labels", [np.arange(9), np.arange(10.0), -np.arange(10), np.eye(10, 10)]
)
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="`labels` must be an integer of"):
        ImageBatches(lambda i: i, 10, labels, batch_size=2)


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
