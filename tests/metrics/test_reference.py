"""The real images' statistics, their hash and their file."""

import hashlib

import numpy as np
import pytest

from keras_mscm.metrics import (
    FeatureExtractor,
    FrechetDistance,
    ImprovedPrecision,
    ImprovedRecall,
    KernelDistance,
    Reference,
)

pytestmark = pytest.mark.once

IMAGES = np.random.default_rng(0).uniform(-1, 1, (10, 4, 4, 1)).astype("f4")


def pixels(images):
    return images.reshape(len(images), -1)[:, :3]


def test_statistics_and_hash():
    reference = Reference(IMAGES, pixels, name="noise")
    features = pixels(IMAGES).astype("float64")
    np.testing.assert_array_equal(reference.features, features)
    np.testing.assert_allclose(reference.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        reference.covariance, np.cov(features, rowvar=False), rtol=1e-12
    )
    expected = hashlib.sha256(IMAGES.tobytes() + b"(10, 4, 4, 1)").hexdigest()
    assert reference.description == {
        "reference": "noise",
        "reference_hash": expected,
        "num_reference": 10,
        "extractor": "pixels",
        "resize": "none",
    }


def test_batches_make_the_same_reference():
    whole = Reference(IMAGES, pixels, name="noise")
    extractor = FeatureExtractor(pixels, name="pixels", batch_size=3)
    for images in (
        IMAGES.astype("float64"),
        iter([IMAGES[:1], IMAGES[1:]]),
        ((batch, np.zeros(len(batch))) for batch in np.split(IMAGES, [5, 6])),
    ):
        other = Reference(images, extractor, name="noise")
        assert other.description == whole.description
        np.testing.assert_array_equal(other.features, whole.features)
        np.testing.assert_allclose(other.covariance, whole.covariance)


def test_the_hash_tells_sets_apart():
    sets = [IMAGES, IMAGES[::-1], IMAGES[:9], IMAGES.reshape(10, 2, 8, 1)]
    hashes = {Reference(x, pixels, name="noise").hash for x in sets}
    assert len(hashes) == 4


@pytest.mark.parametrize("keep_features", [True, False])
def test_save_and_load(tmp_path, keep_features):
    reference = Reference(
        IMAGES, pixels, name="noise", keep_features=keep_features
    )
    path = tmp_path / "reference.npz"
    reference.save(path)
    loaded = Reference.load(path, pixels)
    assert [x.name for x in tmp_path.iterdir()] == ["reference.npz"]
    assert loaded.description == reference.description
    assert loaded.image_shape == reference.image_shape == (4, 4, 1)
    for name in ("mean", "covariance", "features"):
        mine, theirs = getattr(loaded, name), getattr(reference, name)
        if name == "features" and not keep_features:
            assert mine is theirs is None
        else:
            np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ValueError, match=r"`extractor` must be .*pixels"):
        Reference.load(path, FeatureExtractor(pixels, name="others"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:1], "at least 2.*Received: 1"),
        ([], "at least 2.*Received: 0"),
        (IMAGES * 127, r"floats in \[-1, 1\]"),
        (IMAGES[0], r"\(batch, height, width, channels\).*\(4, 4, 1\)"),
        ([IMAGES, IMAGES[:, :2]], "one image shape"),
        (7, "an array or an iterable.*int"),
        ("images", "`images` must be an array of shape.*'i'"),
        ([()], r"`images` must be an array of shape.*\(\)"),
        (IMAGES.tolist(), "`images` must be an array of shape"),
        ((IMAGES + 1) / 2, r"\[0, 1\], as none is below 0.*nonnegative=True"),
        (np.ones_like(IMAGES), "as none is below 0"),
        ((IMAGES * 127).astype("uint8"), r"`images / 127\.5 - 1`"),
        (np.full_like(IMAGES, np.nan), "NaN"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        Reference(images, pixels, name="noise")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("name", ""), ("name", 3), ("name", None)],
        *[("keep_features", "no"), ("keep_features", 1), ("nonnegative", None)],
        *[("extractor", None), ("extractor", "pixels")],
        ("extractor", FeatureExtractor),
    ],
)
def test_bad_arguments_extract_nothing(name, value):
    def never(images):
        raise AssertionError

    given = {"images": IMAGES, "extractor": never, "name": "noise"}
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: "):
        Reference(**{**given, name: value})


@pytest.mark.filterwarnings("error")
def test_images_in_0_1_in_batches_are_warned_of_once_unless_meant():
    images = (IMAGES + 1) / 2
    batches = np.split(images, 2)
    with pytest.warns(UserWarning, match="nonnegative=True") as caught:
        Reference(iter(batches), pixels, name="noise")
    assert [warning.filename for warning in caught] == [__file__]
    made = [
        Reference(x, pixels, name="noise", nonnegative=True)
        for x in (images, batches)
    ]
    assert made[0].hash == made[1].hash
    # Black images are of either range; so may be a batch after others.
    Reference(np.zeros_like(IMAGES), pixels, name="black")
    Reference([IMAGES, images], pixels, name="noise")


METRICS = {
    FrechetDistance: {},
    KernelDistance: {"subset_size": 4},
    ImprovedPrecision: {},
    ImprovedRecall: {},
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:, :3], r"the image shape of the reference, \(4, 4, 1\).*3, 4"),
        (np.repeat(IMAGES, 3, axis=3), "the image shape of the reference"),
        (IMAGES[0], r"\(batch, height, width, channels\)"),
        (IMAGES[:0], "has no images"),
        (IMAGES * np.nan, "must be finite"),
        (np.full(IMAGES.shape, 200, "uint8"), r"`images / 127\.5 - 1`"),
        (IMAGES * 2, r"\[-1, 1\]"),
        (IMAGES.tolist(), "an array of shape.*list"),
        (None, "an array of shape.*None"),
    ],
)
def test_bad_samples_change_nothing(metric, images, message):
    made = metric(Reference(IMAGES, pixels, name="noise"), **METRICS[metric])
    before = made(IMAGES[:5])
    for give in (made, made.update_state):
        with pytest.raises(ValueError, match=f"`images`.*{message}"):
            give(images)
    assert made.result() == before


def test_samples_of_another_size_by_their_features():
    reference = Reference(IMAGES, pixels, name="noise")
    metric = FrechetDistance(reference)
    metric.update_features(reference.extractor(IMAGES[:, :2]))
    assert metric.result()["num_samples"] == 10


def test_a_file_of_before_without_an_image_shape(tmp_path):
    path = tmp_path / "reference.npz"
    reference = Reference(IMAGES, pixels, name="noise")
    reference.save(path)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file if name != "image_shape"}
    np.savez(path, **arrays)
    loaded = Reference.load(path, pixels)
    assert loaded.image_shape is None
    assert loaded.description == reference.description
    metrics = [FrechetDistance(r)(IMAGES[:5]) for r in (loaded, reference)]
    assert metrics[0] == metrics[1]
    loaded.save(path)
    assert Reference.load(path, pixels).image_shape is None


@pytest.mark.parametrize("shape", [np.zeros(2, int), np.zeros(3)])
def test_a_file_with_another_image_shape(tmp_path, shape):
    path = tmp_path / "reference.npz"
    Reference(IMAGES, pixels, name="noise").save(path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "image_shape": shape})
    with pytest.raises(ValueError, match="its image_shape must be integers"):
        Reference.load(path, pixels)
