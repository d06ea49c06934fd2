"""Extractors against NumPy and Pillow."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

from keras_mscm.metrics import (
    FeatureExtractor,
    FrechetDistance,
    ImprovedPrecision,
    KernelDistance,
    Reference,
    classifier_features,
    inception_v3,
    keras_features,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1, 1, (7, 8, 8, 1)).astype("float32")


@keras.saving.register_keras_serializable(package="test_extractors")
class Tokens(keras.layers.Layer):
    """Rows of pixels, as if they were tokens."""

    def call(self, images):
        shape = ops.shape(images)
        return ops.reshape(images, (shape[0], shape[1], -1))


def flat(size, channels=1):
    inputs = keras.Input((*size, channels))
    return keras.Model(inputs, keras.layers.Flatten()(inputs), name="flat")


def test_any_callable_in_batches_of_one_shape():
    shapes = []

    def function(images):
        shapes.append(images.shape)
        return ops.convert_to_tensor(images[:, 0, :3, 0])

    extractor = FeatureExtractor(function, name="corner", batch_size=3)
    np.testing.assert_array_equal(extractor(IMAGES), IMAGES[:, 0, :3, 0])
    assert shapes == [(3, 8, 8, 1)] * 3
    # Tensors are as good, and what was just seen is known.
    extractor(ops.convert_to_tensor(IMAGES))
    assert len(shapes) == 3
    # Equal places in memory are not equal images.
    images = IMAGES.copy()
    images[0] = 0
    np.testing.assert_array_equal(extractor(images), images[:, 0, :3, 0])


def test_metrics_share_one_evaluation():
    calls = []

    def function(images):
        calls.append(len(images))
        return images[:, 0, :3, 0]

    extractor = FeatureExtractor(function, name="corner")
    reference = Reference(IMAGES, extractor, name="noise")
    other = Reference(IMAGES[:5], extractor, name="less noise")
    metrics = [
        FrechetDistance(reference),
        FrechetDistance(other, name="other"),
        KernelDistance(reference, subset_size=4),
        ImprovedPrecision(reference),
    ]
    for batch in (IMAGES[:4], IMAGES[4:]):
        for metric in metrics:
            metric.update_state(batch)
    assert calls == [7, 5, 4, 3]
    assert {metric.result()["num_samples"] for metric in metrics} == {7}


@pytest.mark.parametrize(
    ("kw", "low", "high"),
    [
        ({}, -1, 1),
        ({"mean": 0, "std": 1}, 0, 1),
        ({"mean": 0, "std": 1 / 255}, 0, 255),
        ({"mean": 0.4, "std": 0.2}, -2, 3),
    ],
)
def test_normalisation(kw, low, high):
    extractor = keras_features(flat((8, 8)), **kw)
    expected = low + (IMAGES + 1) / 2 * (high - low)
    np.testing.assert_allclose(
        extractor(IMAGES), expected.reshape(7, -1), rtol=1e-5, atol=1e-4
    )


def test_grey_as_colour():
    mean, std = (0.1, 0.2, 0.3), (1, 2, 3)
    extractor = keras_features(flat((8, 8), 3), mean=mean, std=std)
    expected = ((np.repeat(IMAGES, 3, axis=3) + 1) / 2 - mean) / std
    np.testing.assert_allclose(
        extractor(IMAGES), expected.reshape(7, -1), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"3 that the extractor takes.*2 chan"):
        extractor(np.repeat(IMAGES, 2, axis=3))


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (16, 20)])
def test_resizing_is_pillow_s(size):
    # Antialiased where images become smaller: what clean-fid is about.
    extractor = keras_features(flat(size))
    expected = [
        np.asarray(
            Image.fromarray(image[:, :, 0], "F").resize(
                size[::-1], Image.Resampling.BILINEAR
            )
        ).ravel()
        for image in IMAGES
    ]
    np.testing.assert_allclose(extractor(IMAGES), expected, atol=1e-5)
    assert extractor.description["resize"] == (
        f"bilinear, antialias, to {size[0]}x{size[1]} (keras.ops.image.resize)"
    )


def test_a_backbone_of_dictionaries_and_tokens():
    # As KerasHub's DINOv2 and CLIP are.
    inputs = keras.Input((8, 8, 1), name="images")
    backbone = keras.Model({"images": inputs}, Tokens()(inputs), name="vit")
    extractor = keras_features(backbone, pool=lambda tokens: tokens[:, 0])
    np.testing.assert_allclose(extractor(IMAGES), IMAGES[:, 0, :, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"`pool` must be given.*8, 8"):
        keras_features(backbone)(IMAGES)


def test_maps_are_averaged():
    inputs = keras.Input((None, None, 1))
    model = keras.Model(inputs, keras.layers.Rescaling(2.0)(inputs))
    extractor = keras_features(model)
    np.testing.assert_allclose(
        extractor(IMAGES), 2 * IMAGES.mean(axis=(1, 2)), atol=1e-6
    )
    assert extractor.description["resize"] == "none"


def test_the_name_tells_weights_apart():
    def name(seed):
        kernel = keras.initializers.GlorotUniform(seed=seed)
        layer = keras.layers.Dense(2, kernel_initializer=kernel)
        model = keras.Sequential(
            [keras.Input((8, 8, 1)), keras.layers.Flatten(), layer]
        )
        return keras_features(model, name="dense").description["extractor"]

    assert name(0) == name(0) != name(1)
    assert name(0).startswith("dense, weights ")


def test_inception_v3(monkeypatch):
    # JAX compiles a draw for each of the 94 kernels' shapes: 40 s.
    def draw(self, shape, dtype=None):
        scale = np.sqrt(6 / np.prod(shape[:-1]))
        return ops.convert_to_tensor(RNG.uniform(-scale, scale, shape), dtype)

    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", draw)
    extractor = inception_v3(weights=None, size=(75, 75), batch_size=2)
    features = extractor(IMAGES[:2])
    assert features.shape == (2, 2048)
    assert features.std() > 0
    description = extractor.description
    assert "InceptionV3 (keras.applications, random" in description["extractor"]
    assert "not comparable" in description["extractor"]
    assert "75x75" in description["resize"]
    with pytest.raises(ValueError, match=r"at least 75.*64"):
        inception_v3(weights=None, size=(64, 64))


def test_classifier_features_tell_classes_apart():
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).normal(0, 0.2, (60, 4, 4, 1))
    images = np.clip(noise + (labels[:, None, None, None] - 1) / 2, -1, 1)
    extractor = classifier_features(images, labels, epochs=30)
    features = extractor(images)
    assert features.shape == (60, 32)
    centres = np.stack([features[labels == i].mean(0) for i in range(3)])
    nearest = np.square(features[:, None] - centres).sum(-1).argmin(1)
    assert np.mean(nearest == labels) > 0.95
    # The same once more, whatever the global seeds.
    keras.utils.set_random_seed(7)
    again = classifier_features(images, labels, epochs=30)
    np.testing.assert_allclose(again(images), features, atol=1e-5)
    assert again.description == extractor.description


def test_a_body_of_one_s_own():
    body = keras.Sequential(
        [
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    labels = np.arange(7) % 2
    extractor = classifier_features(IMAGES, labels, body=body, epochs=1)
    np.testing.assert_allclose(
        extractor(IMAGES), ops.convert_to_numpy(body(IMAGES)), atol=1e-5
    )
    with pytest.raises(ValueError, match=r"`body` must return.*8, 8"):
        classifier_features(
            IMAGES, labels, body=keras.layers.Conv2D(4, 3, padding="same")
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(5, int), "`labels` must have one entry.*7 images, 5"),
        (np.zeros(7), "`labels` must be an array of integers"),
        (np.arange(7) - 1, "`labels` must be in 0"),
        (-np.ones(7, int), "`labels` must be in 0"),
        (np.array(3), "`labels` must be an array of integers"),
        (3, "`labels` must be an array of integers"),
        (np.zeros((7, 1), int), "`labels` must be an array of integers"),
        (np.zeros(0, int), "`labels` must be an array of integers"),
        (list("abcdefg"), "`labels` must be integers"),
        ([[0], [1, 2]], "`labels` must be integers"),
        (None, "`labels` must be integers"),
        (np.zeros(7, int), "`labels` must be of at least 2 classes"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        classifier_features(IMAGES, labels)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epochs", 0), ("epochs", True), ("epochs", 1.5)],
        *[("batch_size", 0), ("batch_size", True), ("batch_size", "all")],
        *[("learning_rate", value) for value in (0, -1, np.nan, "fast")],
        *[("seed", value) for value in (None, -1, 2**31 - 2, True, 0.5)],
        *[("name", ""), ("name", 3), ("nonnegative", "no")],
        *[("body", "dense"), ("body", Tokens), ("body", lambda x: x)],
        ("body", keras.layers.LSTM(3)),  # takes no images
        ("images", (IMAGES + 1) / 2),
        ("images", IMAGES.tolist()),
    ],
)
def test_bad_arguments_train_nothing(name, value, monkeypatch):
    monkeypatch.setattr(keras.Model, "fit", None)
    given = {"images": IMAGES, "labels": np.arange(7), name: value}
    with pytest.raises(ValueError, match=f"`{name}` must .*Received: "):
        classifier_features(**given)


def test_a_classifier_takes_numbers_of_numpy():
    extractor = classifier_features(
        IMAGES,
        np.arange(7) % 2,
        epochs=np.int64(1),
        batch_size=np.int32(4),
        learning_rate=np.float32(1e-3),
        seed=np.uint8(1),
    )
    assert extractor(IMAGES).shape == (7, 32)


def test_nonnegative_images_that_are_meant():
    images = (IMAGES + 1) / 2
    extractor = classifier_features(
        images, np.arange(7) % 2, epochs=1, nonnegative=True
    )
    assert extractor(images).shape == (7, 32)


def test_bad_models():
    with pytest.raises(ValueError, match="`model` must be a built"):
        keras_features(keras.layers.Dense(2))
    a, b = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    with pytest.raises(ValueError, match=r"nothing else.*2 inputs"):
        keras_features(keras.Model([a, b], a + b))
    model = flat((8, 8))
    for kw, message in [
        ({"std": 0}, "`std` must be a positive number"),
        ({"mean": np.nan}, "`mean` must be a finite number"),
        ({"size": (8,)}, "`size` must be"),
        ({"size": 5}, r"`size` must be \(height, width\)"),
        ({"size": "ab"}, r"`size` must be \(height, width\)"),
        ({"size": (8, 0)}, "`size` must be .*integers of at least 1"),
        ({"size": (8, 8.0)}, "`size` must be .*integers of at least 1"),
        ({"interpolation": "best"}, "`interpolation` must be one of"),
        ({"interpolation": 3}, "`interpolation` must be one of"),
        ({"antialias": "no"}, "`antialias` must be True or False"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"batch_size": True}, "`batch_size` must be an integer"),
        ({"name": ""}, "`name` must be a string"),
        ({"name": 3}, "`name` must be a string"),
        ({"std": np.nan}, "`std` must be a positive number"),
        ({"std": -1}, "`std` must be a positive number"),
        ({"std": 1e-300}, "`std` must be a positive number"),
        ({"std": "one"}, "`std` must be a positive number"),
        (
            {"std": (1, 1)},
            "`std` must be a positive number.*one per channel of 1",
        ),
        ({"std": ()}, "`std` must be a positive number"),
        ({"mean": "half"}, "`mean` must be a finite number"),
        ({"mean": True}, "`mean` must be a finite number"),
        ({"mean": 1e300}, "`mean` must be a finite number"),
        ({"mean": -1e30}, "`mean` must be a finite number"),
        ({"std": 1e30}, "`std` must be a positive number"),
        ({"mean": np.zeros((2, 2))}, "`mean` must be a finite number"),
        ({"mean": (0.5, 0.5, 0.5)}, "`mean` must .* one per channel of 1"),
        ({"pool": "mean"}, "`pool` must be a function"),
        ({"pool": Tokens}, "`pool` must be a function"),
    ]:
        with pytest.raises(ValueError, match=f"{message}.*Received: "):
            keras_features(model, **kw)


def test_means_of_other_channels_than_the_images():
    # Of any number of channels: they would be broadcast.
    inputs = keras.Input((8, 8, None))
    model = keras.Model(inputs, keras.layers.Rescaling(2.0)(inputs))
    extractor = keras_features(model, mean=np.full(3, 0.5), std=(0.5, 1, 2))
    assert extractor(np.repeat(IMAGES, 3, axis=3)).shape == (7, 3)
    with pytest.raises(ValueError, match=r"3 channels of `mean`.*: 1 channels"):
        extractor(IMAGES)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"weights": True}, "`weights` must be"),
        ({"weights": ""}, "`weights` must be"),
        ({"weights": np.zeros(3)}, "`weights` must be"),
        ({"weights": "nowhere.weights.h5"}, "`weights` must be"),
        ({"weights": Path(__file__).parent}, "`weights` must be"),
        ({"size": 299}, "`size` must be"),
        ({"size": "big"}, "`size` must be"),
        ({"size": (299, True)}, "`size` must be"),
        ({"batch_size": 0}, "`batch_size` must be"),
    ],
)
def test_bad_arguments_of_inception_make_no_network(kw, message, monkeypatch):
    monkeypatch.setattr(keras.applications, "InceptionV3", None)
    with pytest.raises(ValueError, match=message):
        inception_v3(**{"weights": None, **kw})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"\(batch, features\).*\(7, 8, 8, 1\)"),
        (lambda x: x[:1, 0, :, 0], r"\(1, 8\).* for a batch of 7"),
        (lambda x: None, r"\(batch, features\).*None of type NoneType"),
        (lambda x: ["a"] * len(x), r"\(batch, features\).*of type list"),
        (lambda x: x[:, 0, :, 0].astype("complex64"), "complex64"),
        (lambda x: [[0], [1, 2]], r"numbers of shape .*\[\[0\]"),
        (lambda x: x[:, 0, :, 0] / 0, "finite.*56 of 56"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_features(function, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(function, name="bad")(IMAGES)


def test_not_a_function():
    for function in (3, None, Tokens):
        with pytest.raises(ValueError, match="`function` must be a function"):
            FeatureExtractor(function, name="three")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("name", ""), ("name", 3), ("name", None), ("resize", None)],
        *[("batch_size", 0), ("batch_size", True), ("batch_size", 2.0)],
    ],
)
def test_bad_arguments_of_an_extractor(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: "):
        FeatureExtractor(Tokens(), **{"name": "tokens", name: value})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.tolist(), "an array of shape.*list"),
        (IMAGES[0], r"\(batch, height, width, channels\).*\(8, 8, 1\)"),
        (np.full_like(IMAGES, np.nan), "finite.*448 NaN of 448"),
        (np.full(IMAGES.shape, 200, "uint8"), "`images / 127.5 - 1`"),
        (IMAGES.astype(str), r"an array of shape .*dtype <U"),
        (IMAGES.astype(object), r"an array of shape .*dtype object"),
        (IMAGES.astype("complex64"), r"an array of shape .*complex64"),
        (keras.KerasTensor((None, 8, 8, 1)), "an array of shape"),
        (None, "an array of shape.*None"),
    ],
)
def test_what_are_no_images(images, message):
    extractor = FeatureExtractor(Tokens(), name="tokens")
    with pytest.raises(ValueError, match=f"`images` must be .*{message}"):
        extractor(images)
