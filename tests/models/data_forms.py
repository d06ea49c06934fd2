"""One data set in the forms that Keras takes."""

import keras
import pytest


class Batches(keras.utils.PyDataset):
    """Batches that are there already."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def together(images, y):
    return images if y is None else (images, y)


def in_batches(images, y=None, size=4):
    """A generator of batches, of which the last may be smaller."""
    for i in range(0, len(images), size):
        yield keras.tree.map_structure(
            lambda array, i=i: array[i : i + size], together(images, y)
        )


def as_py_dataset(images, y=None):
    return Batches(list(in_batches(images, y)))


def as_tf_data(images, y=None):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(together(images, y)).batch(4)
