"""Features of a small classifier that is trained on the data at hand."""

from typing import Any

import keras
import numpy as np

from keras_mscm import checks
from keras_mscm.metrics.extractors import (
    FeatureExtractor,
    as_images,
    as_numbers,
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
    nonnegative: bool = False,
) -> FeatureExtractor:
    """Trains a classifier and takes its last hidden layer for features.

    For data that no pretrained network knows, such as 8x8 digits. Its numbers
    compare samples of one data set by one such classifier, which the hash in
    its name tells; another seed or backend makes another one.

    Args:
        images: `(num, height, width, channels)`, floats in [-1, 1].
        labels: Their classes, integers from 0, `(num,)`; two or more.
        body: Keras layer or model of the images that returns the features,
            `(batch, features)`. It is trained in place. By default two dense
            layers of 128 and 32 units with bounded activation, which suit
            images of up to about 28x28.
        epochs: Passes over the images.
        batch_size: Images per update.
        learning_rate: Of Adam, above 0.
        seed: Seed of the default body, the head and the order of the images,
            an integer in 0..2**31 - 3.
        name: What it is called in results.
        nonnegative: Whether it is meant that no image goes below 0. Else such
            images are refused, as they look like [0, 1].

    Returns:
        A `FeatureExtractor`.

    Raises:
        ValueError: If an argument is out of its range, or `body` takes no such
            images or returns no such features; before anything is trained.

    Example:

    >>> images = np.linspace(-1, 1, 64, dtype="float32").reshape(4, 4, 4, 1)
    >>> extractor = classifier_features(images, np.array([0, 0, 1, 1]))
    >>> extractor(images).shape
    (4, 32)
    """
    epochs = checks.check_positive_integer("epochs", epochs)
    batch_size = checks.check_positive_integer("batch_size", batch_size)
    # An integer becomes a float, because Keras takes no integer for it.
    rate = float(checks.check_positive_number("learning_rate", learning_rate))
    seed = checks.check_integer("seed", seed, 0, checks.SEED_END - 1)
    checks.check_string("name", name)
    checks.check_boolean("nonnegative", nonnegative)
    if body is not None and not isinstance(body, keras.Layer):
        raise checks.invalid("body", "a Keras layer or model, or None", body)
    images = as_images("images", images)
    if not nonnegative:
        checks.check_signed("images", images)
    labels, num_classes = _classes(labels)
    if len(labels) != len(images):
        raise ValueError(
            "`labels` must have one entry per image. Received: "
            f"{len(images)} images, {len(labels)} labels"
        )
    if num_classes == 1:
        raise ValueError(
            "`labels` must be of at least 2 classes, as there is nothing to "
            "learn of one. Received: all 0"
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
    try:
        features = body(inputs)
    except Exception as error:  # because a layer raises what it likes
        raise ValueError(
            f"`body` must take images of shape {images.shape[1:]}. Received: "
            f"{checks.describe(body)}, which says: {error}"
        ) from error
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 2 or shape[1] is None:
        came = shape or type(features).__name__
        raise ValueError(
            f"`body` must return (batch, features). Received: shape {came}"
        )
    model = keras.Model(inputs, _dense(num_classes, None, seed + 2)(features))
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    # The order is drawn here, because Keras' depends on global seeds.
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


def _classes(labels: Any) -> tuple[np.ndarray, int]:
    """Labels as an array, checked, and how many classes they are of."""
    array = as_numbers(labels)
    if array is None:
        raise checks.invalid("labels", "integers of shape (num,)", labels)
    integers = array.dtype.kind in "iu" and array.size
    num_classes = max(int(array.max()) + 1, 1) if integers else 1
    checks.check_labels("labels", array, num_classes)
    return array, num_classes


def _dense(units: int, activation: str | None, seed: int) -> keras.Layer:
    kernel = keras.initializers.GlorotUniform(seed=seed)
    return keras.layers.Dense(units, activation, kernel_initializer=kernel)
