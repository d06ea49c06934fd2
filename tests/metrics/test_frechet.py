"""The Fréchet distance against three libraries and closed forms."""

import keras
import numpy as np
import pytest
import scipy.linalg
import torch

from keras_mscm.metrics import FrechetDistance, Reference, frechet_distance
from keras_mscm.metrics.moments import Moments

pytestmark = pytest.mark.once


def moments_of(features):
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def by_singular_values(x, y):
    """tr (C_x C_y)^(1/2) from the features themselves, without covariances."""
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    step = x.mean(0) - y.mean(0)
    return step @ step + np.square(a).sum() + np.square(b).sum() - 2 * cross


def test_agrees_with_torchmetrics(features, make_reference, peers):
    samples, real = features
    mine = FrechetDistance(make_reference(real))
    mine.update_features(samples)
    arguments = [torch.from_numpy(x) for z in features for x in moments_of(z)]
    theirs = float(peers.torchmetrics_fid._compute_fid(*arguments))
    np.testing.assert_allclose(mine.result()["value"], theirs, rtol=1e-4)


def test_agrees_with_torch_fidelity(features, make_reference, peers):
    samples, real = features
    mine = FrechetDistance(make_reference(real))
    mine.update_features(samples)
    statistics = [
        dict(zip(("mu", "sigma"), moments_of(z))) for z in (samples, real)
    ]
    theirs = peers.fidelity_fid.fid_statistics_to_metric(*statistics, False)
    np.testing.assert_allclose(
        mine.result()["value"], theirs["frechet_inception_distance"], rtol=1e-4
    )


def test_agrees_with_clean_fid(features, make_reference, peers, monkeypatch):
    # clean-fid asks for two values, which newer versions of SciPy don't give.
    root = scipy.linalg.sqrtm
    monkeypatch.setattr(
        peers.cleanfid.linalg, "sqrtm", lambda x, disp: (root(x), None)
    )
    samples, real = features
    mine = FrechetDistance(make_reference(real))
    mine.update_features(samples)
    theirs = peers.cleanfid.frechet_distance(
        *moments_of(samples), *moments_of(real)
    )
    np.testing.assert_allclose(mine.result()["value"], theirs, rtol=1e-4)


def test_agrees_with_singular_values_of_the_features(features, make_reference):
    samples, real = features
    mine = FrechetDistance(make_reference(real))
    for batch in np.array_split(samples, 3):
        mine.update_features(batch)
    np.testing.assert_allclose(
        mine.result()["value"], by_singular_values(samples, real), rtol=1e-9
    )


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_diagonal_covariances(rank):
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.1, 3, (2, 8)) * (np.arange(8) < rank)
    means = rng.standard_normal((2, 8))
    np.testing.assert_allclose(
        frechet_distance(
            means[0], np.diag(scales[0] ** 2), means[1], np.diag(scales[1] ** 2)
        ),
        np.square(means[0] - means[1]).sum()
        + np.square(scales[0] - scales[1]).sum(),
        rtol=1e-12,
    )


def test_zero_covariances_and_equal_sets(features):
    zero = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), zero, np.ones(3), zero) == 3.0
    mean, covariance = moments_of(features[0])
    distance = frechet_distance(mean, covariance, mean, covariance)
    assert 0 <= distance < 1e-12 * np.trace(covariance)


def test_singular_covariances_cost_no_precision():
    # Of 40 samples in 256 dimensions, with themselves a little off: the root
    # of a product's eigenvalues is wrong by about 1e-8 for each of 216.
    rng = np.random.default_rng(0)
    real = rng.standard_normal((40, 256))
    samples = real + 1e-5 * rng.standard_normal(real.shape)
    distance = frechet_distance(*moments_of(samples), *moments_of(real))
    np.testing.assert_allclose(
        distance, by_singular_values(samples, real), rtol=1e-3
    )


def test_streaming_moments_far_from_zero():
    # In float32, or by sums of squares, nothing would be left.
    features = 1e6 + np.random.default_rng(0).standard_normal((1000, 5))
    moments = Moments()
    for batch in np.split(features, [1, 10, 500]):
        moments.add(batch)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        moments.covariance, np.cov(features, rowvar=False), rtol=1e-8
    )
    assert moments.count == 1000


def test_result_says_what_it_was_measured_on(make_reference):
    reference = make_reference(np.eye(5), keep_features=False)
    metric = FrechetDistance(reference, name="distance")
    assert isinstance(metric, keras.metrics.Metric)
    metric.update_features(np.eye(5)[:3])
    result = metric.result()
    assert result == {
        "value": result["value"],
        "num_samples": 3,
        "reference": "given",
        "reference_hash": reference.hash,
        "num_reference": 5,
        "extractor": "given",
        "resize": "none",
    }
    assert isinstance(result["value"], float)
    metric.reset_state()
    with pytest.raises(ValueError, match=r"at least 2 samples.*Received: 0"):
        metric.result()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("mean_1", np.zeros((2, 2)), r"`mean_1`.*\(2, 2\)"),
        ("mean_2", np.zeros(3), r"`mean_2`.*\(3,\)"),
        ("covariance_1", np.eye(3), r"`covariance_1`.*\(3, 3\)"),
        ("covariance_2", np.full((2, 2), np.nan), "`covariance_2`.*False"),
        ("mean_1", "mean", "`mean_1` must be an array of numbers"),
        ("mean_1", np.zeros(0), "`mean_1` must be of at least one"),
        ("covariance_1", None, "`covariance_1` must be an array of numbers"),
        ("covariance_2", np.eye(2) * 1j, "`covariance_2`.*complex"),
        ("covariance_1", -np.eye(2), "`covariance_1`.*least eigenvalue -1"),
        (
            "covariance_2",
            [[1, 2], [2, 1]],
            "`covariance_2`.*eigenvalue -1, .*3",
        ),
        ("covariance_2", np.diag([1, -1e-3]), "`covariance_2`.*-0.001"),
        ("covariance_1", [[1, 0], [0.5, 1]], "`covariance_1`.*up to 0.5"),
        ("covariance_2", [[0, 1], [-1, 0]], "`covariance_2`.*up to 2"),
    ],
)
def test_bad_input(argument, value, message):
    arguments = {
        "mean_1": np.zeros(2),
        "covariance_1": np.eye(2),
        "mean_2": np.zeros(2),
        "covariance_2": np.eye(2),
    }
    with pytest.raises(ValueError, match=message):
        frechet_distance(**{**arguments, argument: value})


def test_covariances_by_float32_are_semi_definite_but_for_rounding():
    # Singular ones, and not symmetric: what rounding leaves is no fault.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 64, 512)).astype("float32")
    x = x * np.logspace(0, -3, 512, dtype="float32")
    exact, rounded = [], []
    for features in x:
        centred = features - features.mean(0)
        covariance = centred.T @ centred / np.float32(63)
        noise = rng.uniform(-1, 1, covariance.shape).astype("float32")
        rounded += [features.mean(0), covariance * (1 + 1e-7 * noise)]
        exact += moments_of(features.astype("float64"))
    assert np.linalg.eigvalsh(rounded[1])[0] < 0
    assert np.any(rounded[1] != rounded[1].T)
    np.testing.assert_allclose(
        frechet_distance(*rounded), frechet_distance(*exact), rtol=1e-3
    )


@pytest.mark.parametrize(
    "features",
    [
        *["features", None, [["a"] * 5], np.full((2, 5), None), [[1], [1, 2]]],
        np.zeros((2, 5), "complex64"),
    ],
)
def test_what_are_no_features(make_reference, features):
    metric = FrechetDistance(make_reference(np.eye(5)))
    with pytest.raises(ValueError, match="`features` must be numbers of shape"):
        metric.update_features(features)
    assert metric.num_samples == 0


@pytest.mark.parametrize(
    "features", [np.zeros((2, 4)), np.zeros(5), np.zeros((0, 5))]
)
def test_bad_features(make_reference, features):
    metric = FrechetDistance(make_reference(np.eye(5)))
    with pytest.raises(ValueError, match=r"`features`.*\(batch, 5\)"):
        metric.update_features(features)


def test_bad_reference():
    for reference in (np.zeros((3, 3)), None, Reference, "train"):
        with pytest.raises(ValueError, match="`reference` must be"):
            FrechetDistance(reference)


@pytest.mark.parametrize("name", ["", None, 3])
def test_bad_names(make_reference, name):
    with pytest.raises(ValueError, match="`name` must be a string"):
        FrechetDistance(make_reference(np.eye(5)), name=name)


def test_without_scipy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    with pytest.raises(ImportError, match=r"keras-mscm\[metrics\]"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2))
