"""The kernel distance against three libraries and a double loop."""

import numpy as np
import pytest
import torch

from keras_mscm.metrics import KernelDistance
from keras_mscm.metrics.kernel import subset_estimates

pytestmark = pytest.mark.once


def equal_numbers(features):
    num = min(map(len, features))
    return [z[:num] for z in features]


def test_agrees_with_torchmetrics(features, make_reference, peers):
    # With subsets of all there is, chance has no say.
    samples, real = equal_numbers(features)
    mine = KernelDistance(
        make_reference(real), num_subsets=2, subset_size=len(real)
    )
    mine.update_features(samples)
    theirs = peers.torchmetrics_kid.poly_mmd(
        torch.from_numpy(real), torch.from_numpy(samples)
    )
    result = mine.result()
    np.testing.assert_allclose(result["value"], float(theirs), rtol=1e-4)
    assert result["std"] < 1e-6 * abs(result["value"])


def test_agrees_with_clean_fid(features, make_reference, peers):
    samples, real = equal_numbers(features)
    mine = KernelDistance(
        make_reference(real), num_subsets=1, subset_size=len(real)
    )
    mine.update_features(samples)
    theirs = peers.cleanfid.kernel_distance(real, samples, num_subsets=1)
    np.testing.assert_allclose(mine.result()["value"], theirs, rtol=1e-4)


def test_agrees_with_torch_fidelity(features, peers):
    # The same subsets: drawn in the same order, from the same generator.
    settings = {"num_subsets": 20, "subset_size": 10}
    mine = subset_estimates(
        *features,
        **settings,
        rng=np.random.RandomState(7),
    )
    theirs = peers.fidelity_kid.kid_features_to_metric(
        *map(torch.from_numpy, features),
        kid_subsets=20,
        kid_subset_size=10,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1.0,
        rng_seed=7,
        verbose=False,
    )
    np.testing.assert_allclose(
        [mine.mean(), mine.std()], [*theirs.values()], rtol=1e-4
    )


def test_a_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4, 3))

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(4) for j in range(4)]
    within = [
        np.mean([k(z[i], z[j]) for i, j in pairs if i != j]) for z in (x, y)
    ]
    expected = sum(within) - 2 * np.mean([k(x[i], y[j]) for i, j in pairs])
    estimate = subset_estimates(x, y, num_subsets=1, subset_size=4, rng=rng)
    np.testing.assert_allclose(estimate, [expected], rtol=1e-12)


def test_unbiased(make_reference):
    # Samples of the same distribution: 0 on average, whatever the number.
    rng = np.random.default_rng(0)
    values = []
    for _ in range(300):
        x, y = rng.standard_normal((2, 8, 2))
        values.append(
            subset_estimates(x, y, num_subsets=1, subset_size=8, rng=rng)[0]
        )
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error


def test_batches_and_seeds(make_reference):
    rng = np.random.default_rng(0)
    samples, real = rng.standard_normal((2, 40, 3))

    def value(pieces, **kw):
        metric = KernelDistance(
            make_reference(real), num_subsets=5, subset_size=20, **kw
        )
        for batch in np.array_split(samples, pieces):
            metric.update_features(batch)
        # Asking for it changes nothing.
        assert metric.result() == metric.result()
        return metric.result()["value"]

    assert value(1) == value(7) != value(1, seed=1)


def test_bad_input(make_reference):
    reference = make_reference(np.eye(5))
    for size in (1, 6, True, 3.0, "3", None):
        with pytest.raises(ValueError, match="`subset_size` must be"):
            KernelDistance(reference, subset_size=size)
    for name, value in [
        *[("num_subsets", value) for value in (0, True, 2.0, "2")],
        *[("seed", value) for value in (None, -1, 2**31 - 2, True, 0.5)],
        *[("name", value) for value in ("", None, 3)],
    ]:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            KernelDistance(reference, **{"subset_size": 3, name: value})
    metric = KernelDistance(reference, subset_size=4)
    metric.update_features(np.eye(5)[:3])
    with pytest.raises(ValueError, match=r"at least 4 samples.*Received: 3"):
        metric.result()
    without = make_reference(np.eye(5), keep_features=False)
    with pytest.raises(ValueError, match="keep_features=False"):
        KernelDistance(without, subset_size=4)
