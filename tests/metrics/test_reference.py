"""The real images' statistics, their hash and their file."""

import hashlib

import numpy as np
import pytest

from keras_mscm.metrics import FeatureExtractor, Reference

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
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        Reference(images, pixels, name="noise")
