"""What `ImageBatches` says of Grain: it reads ahead, and `fit` takes it."""

import grain
import numpy as np
import pytest

from keras_mscm.datasets import from_arrays


@pytest.fixture
def batches(pictures):
    return from_arrays(
        pictures(20, 8, 8, 1),
        np.arange(20) % 3,
        batch_size=3,
        seed=0,
        flip=True,
        repeat=True,
        shard=(1, 2),
    )


@pytest.fixture
def ahead(batches):
    dataset = grain.MapDataset.range(1000).map(batches.__getitem__)
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    )


def test_batches_are_the_same_and_in_order(batches, ahead):
    for i, (images, labels) in zip(range(9), ahead):
        expected = batches[i]
        np.testing.assert_array_equal(images, expected[0])
        np.testing.assert_array_equal(labels, expected[1])


def test_reading_goes_on_where_it_was(ahead):
    one = iter(ahead)
    for _ in range(4):
        next(one)
    other = iter(ahead)
    other.set_state(one.get_state())
    np.testing.assert_array_equal(next(one)[0], next(other)[0])


@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_a_model_trains(train, ahead):
    train(ahead, (8, 8, 1), 3)
