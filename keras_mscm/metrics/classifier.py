"""Features of a small classifier that is trained on the data at hand."""

from typing import Any

import keras
import numpy as np

from keras_mscm import checks
from keras_mscm.metrics.extractors import (
    FeatureExtractor,
    as_images,
    keras_features,
)


def classifier_features(
    images: Any,
    labels: Any,
    *,
    body: keras.Layer | None = None,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    name: str = "classifier",
) -> FeatureExtractor:
    """Trains a classifier and takes its last hidden layer for features.

    For data that no pretrained network knows, such as 8x8 digits. Its numbers
    compare samples of one data set by one such classifier, which the hash in
    its name tells; another seed or backend makes another one.

    Args:
        images: `(num, height, width, channels)`, floats in [-1, 1].
        labels: Their classes, integers from 0, `(num,)`.
        body: Keras layer or model of the images that returns the features,
            `(batch, features)`. It is trained in place. By default two dense
            layers of 128 and 32 units with bounded activation, which suit
            images of up to about 28x28.
        epochs: Passes over the images.
        batch_size: Images per update.
        learning_rate: Of Adam.
        seed: Seed of the default body, the head and the order of the images.
        name: What it is called in results.

    Returns:
        A `FeatureExtractor`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> images = np.linspace(-1, 1, 64, dtype="float32").reshape(4, 4, 4, 1)
    >>> extractor = classifier_features(images, np.array([0, 0, 1, 1]))
    >>> extractor(images).shape
    (4, 32)
    """
    images = as_images("images", images)
    labels = np.asarray(labels)
    checks.check_positive_integer("epochs", epochs)
    checks.check_positive_integer("batch_size", batch_size)
    num_classes = int(labels.max()) + 1 if labels.size else 0
    checks.check_labels("labels", labels, num_classes)
    if len(labels) != len(images):
        raise ValueError(
            "`labels` must have one entry per image. Received: "
            f"{len(images)} images, {len(labels)} labels"
        )
    if body is None:
        body = keras.Sequential(
            [
                keras.layers.Flatten(data_format="channels_last"),
                _dense(128, "sigmoid", seed),
                _dense(32, "sigmoid", seed + 1),
            ]
        )
    inputs = keras.Input(images.shape[1:])
    features = body(inputs)
    if len(features.shape) != 2:
        raise ValueError(
            "`body` must return (batch, features). Received: shape "
            f"{tuple(features.shape)}"
        )
    model = keras.Model(inputs, _dense(num_classes, None, seed + 2)(features))
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    # An order of our own: Keras' depends on global seeds.
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        model.fit(
            images[order],
            labels[order],
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
        )
    return keras_features(
        keras.Model(inputs, features), name=name, batch_size=1024
    )


def _dense(units: int, activation: str | None, seed: int) -> keras.Layer:
    kernel = keras.initializers.GlorotUniform(seed=seed)
    return keras.layers.Dense(units, activation, kernel_initializer=kernel)
