"""The real images of the experiments, and how samples of them are judged."""

from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from keras_mscm import datasets, metrics
from keras_mscm.atomic_file import write_atomically

HELD_OUT = 8  # one in so many emoji


class Data(NamedTuple):
    """uint8 images and int32 labels, for training and held out."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def num_classes(self):
        return int(self.labels.max()) + 1


def load(name):
    """One of `fashion_mnist` (28x28, 70,000) and `emoji` (64x64, 3,655)."""
    return {"fashion_mnist": fashion_mnist, "emoji": emoji}[name]()


def fashion_mnist():
    """As published: 60,000 images to train on, 10,000 held out."""
    splits = []
    for split in ("train", "test"):
        batches = datasets.from_keras(
            "fashion_mnist", split, batch_size=10_000, shuffle=False
        )
        images, labels = zip(*(batches[i] for i in range(batches.num_batches)))
        images = np.concatenate(images)
        splits += [_uint8(images), np.concatenate(labels)]
    return Data(*splits)


def emoji():
    """Every eighth picture is held out; many have a sibling of another skin."""
    pictures = datasets.emoji(64, sequences=True)
    held_out = np.arange(len(pictures.labels)) % HELD_OUT == 0
    images, labels = pictures.images, pictures.labels
    return Data(
        images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    )


class Judge:
    """Metrics of samples, in the features of a classifier of the data set.

    The classifier is trained once and kept, as its numbers compare only with
    each other.
    """

    def __init__(self, name, data, folder: Path, *, epochs):
        path = folder / f"{name}_judge.keras"
        if not path.is_file():
            body = _body(data.images.shape[1:])
            metrics.classifier_features(
                as_floats(data.images),
                data.labels,
                body=body,
                epochs=epochs,
                batch_size=256,
            )
            write_atomically(path, body.save, ".keras")
        extractor = metrics.keras_features(
            keras.saving.load_model(path),
            name=f"{name} classifier",
            batch_size=1024,
        )
        self.train, self.test = (
            metrics.Reference(as_floats(images), extractor, name=part)
            for images, part in (
                (data.images, f"{name}, train"),
                (data.test_images, f"{name}, test"),
            )
        )

    def judge(self, images):
        """Every number of these samples, and what it was measured on."""
        features = self.train.extractor(images)
        size = min(1000, len(images), self.test.num_images)
        measured = {
            "frechet_distance": metrics.FrechetDistance(self.train),
            "frechet_distance_test": metrics.FrechetDistance(self.test),
            "kernel_distance": metrics.KernelDistance(
                self.train, subset_size=size
            ),
            "precision": metrics.ImprovedPrecision(self.test),
            "recall": metrics.ImprovedRecall(self.test),
        }
        numbers = {}
        for name, metric in measured.items():
            metric.update_features(features)
            numbers[name] = metric.result()["value"]
        return {
            **numbers,
            "num_samples": len(images),
            **self.train.description,
            "test_reference_hash": self.test.hash,
        }


def as_floats(images):
    """uint8 0..255 as float32 in [-1, 1]."""
    return images.astype("float32") / 127.5 - 1


def _uint8(images):
    return np.rint((images + 1) * 127.5).astype("uint8")


def _body(shape):
    """A small convolutional classifier without its last layer.

    Its features are bounded: those of a ReLU grow with the confidence in
    images that it was trained on, which samples are not.
    """
    layers = keras.layers
    strides = 2 if shape[0] < 64 else 4
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(32, 5, strides, "same", activation="relu"),
            layers.Conv2D(64, 3, 2, "same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.3, seed=0),
            layers.Dense(64, "sigmoid"),
        ]
    )
