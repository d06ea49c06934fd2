"""Precision and recall against torch-fidelity and SciPy's distances."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from keras_mscm.metrics import (
    ImprovedPrecision,
    ImprovedRecall,
    precision_recall,
)

pytestmark = pytest.mark.once


def both(reference, samples, **kw):
    metrics = (
        ImprovedPrecision(reference, **kw),
        ImprovedRecall(reference, **kw),
    )
    for metric in metrics:
        for batch in np.array_split(samples, 3):
            metric.update_features(batch)
    return [metric.result()["value"] for metric in metrics]


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_agrees_with_torch_fidelity(
    features, make_reference, peers, neighbours, monkeypatch
):
    monkeypatch.setattr(precision_recall, "CHUNK", 64)
    samples, real = features
    theirs = peers.fidelity_prc.prc_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(real),
        prc_neighborhood=neighbours,
        prc_batch_size=10_000,
        save_cpu_ram=False,
        verbose=False,
    )
    mine = both(make_reference(real), samples, neighbours=neighbours)
    np.testing.assert_allclose(
        mine, [theirs["precision"], theirs["recall"]], rtol=1e-4
    )


def test_agrees_with_scipy_s_distances(features, make_reference):
    samples, real = features

    def coverage(x, y):
        radii = np.sort(cdist(y, y), axis=1)[:, 3]
        return np.mean(np.any(cdist(x, y) <= radii, axis=1))

    mine = both(make_reference(real), samples)
    np.testing.assert_allclose(
        mine, [coverage(samples, real), coverage(real, samples)], rtol=1e-12
    )


def test_one_mode_of_two(make_reference):
    # Samples of one of two equal modes: nearly all good, half of what there is.
    rng = np.random.default_rng(0)
    real = rng.standard_normal((200, 2)) + 100.0 * np.repeat([[0], [1]], 100, 0)
    samples = rng.standard_normal((200, 2)) * 0.5
    precision, recall = both(make_reference(real), samples)
    assert precision > 0.9
    assert 0.3 < recall < 0.5


def test_equal_images_are_within_a_radius_of_0(make_reference):
    # All neighbours of a vector are copies of it: its ball is a point.
    vectors = 1e3 + np.random.default_rng(0).standard_normal((3, 64))
    real = np.repeat(vectors, 5, axis=0)
    assert both(make_reference(real), real[:10]) == [1.0, 2 / 3]
    assert both(make_reference(real), real[:10] + 0.1) == [0.0, 0.0]


def test_bad_input(make_reference):
    reference = make_reference(np.eye(5))
    for metric in (ImprovedPrecision, ImprovedRecall):
        for neighbours in (0, True, 2.0, "3", None):
            with pytest.raises(
                ValueError, match="`neighbours` must be an integer of at least"
            ):
                metric(reference, neighbours=neighbours)
        for name in ("", 3):
            with pytest.raises(ValueError, match="`name` must be a string"):
                metric(reference, name=name)
        with pytest.raises(ValueError, match=r"less than.*5"):
            metric(reference, neighbours=5)
        few = metric(reference)
        few.update_features(np.eye(5)[:3])
        with pytest.raises(ValueError, match="at least 4 samples"):
            few.result()
