"""The posterior variances against Bayes' rule and NumPy's interpolation."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import functional, samplers
from keras_mscm.variance import (
    LEVELS,
    AnalyticVariance,
    ErrorShare,
    MeasuredVariance,
    level_logsnr,
)
from tests.dense import array, numbers

LOGSNR = np.linspace(-20, 20, 41).astype("float32")


@pytest.mark.parametrize("variance", [0.01, 0.5, 1.0, 7.0])
def test_analytic_is_a_tenth_of_a_normal_distributions(variance):
    # By drawing: z = alpha x + sigma e, and the variance of x given z is that
    # of the linear regression's residual, sigma^2 V / (alpha^2 V + sigma^2).
    snr = np.exp(LOGSNR.astype("float64"))
    alpha2, sigma2 = snr / (1 + snr), 1 / (1 + snr)
    expected = 0.1 * sigma2 * variance / (alpha2 * variance + sigma2)
    got = array(AnalyticVariance(variance)(ops.convert_to_tensor(LOGSNR)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_default_is_the_papers():
    logsnr = ops.convert_to_tensor(LOGSNR)
    got, papers = AnalyticVariance()(logsnr), functional.analytic_x_var(logsnr)
    np.testing.assert_allclose(array(got), array(papers), rtol=1e-6)
    snr = np.exp(LOGSNR.astype("float64"))
    np.testing.assert_allclose(array(got), 0.1 / (2 + snr), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 2, 2, 1)])
def test_share_of_the_error_of_any_rank(shape):
    said, x = numbers(4, shape, 1), numbers(4, shape, 2)
    got = ErrorShare(0.3)(*map(ops.convert_to_tensor, (said, x)))
    error = (said.astype("float64") - x) ** 2
    expected = 0.3 * error.reshape(4, -1).mean(1)
    assert tuple(got.shape) == (4,)
    np.testing.assert_allclose(array(got), expected, rtol=1e-5)


def test_measured_is_linear_between_levels_and_holds_beyond():
    rng = np.random.default_rng(0)
    table = rng.uniform(0, 2, LEVELS)
    logsnr = np.linspace(-30, 30, 301).astype("float32")
    angle = 2 / np.pi * np.arctan(np.exp(-logsnr.astype("float64") / 2))
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    snr = np.exp(logsnr.astype("float64"))
    expected = np.interp(angle, levels, table) / (1 + snr)
    got = MeasuredVariance(table.tolist())(ops.convert_to_tensor(logsnr))
    np.testing.assert_allclose(array(got), expected, rtol=2e-4)
    at_levels = MeasuredVariance(table.tolist())(
        ops.convert_to_tensor(level_logsnr())
    )
    snr = np.exp(level_logsnr().astype("float64"))
    np.testing.assert_allclose(array(at_levels) * (1 + snr), table, rtol=1e-3)


ALL = [AnalyticVariance(0.3), ErrorShare(0.2), MeasuredVariance([0.5] * LEVELS)]


@pytest.mark.once
@pytest.mark.parametrize("variance", ALL, ids=lambda v: type(v).__name__)
def test_serialised(variance):
    config = keras.saving.serialize_keras_object(variance)
    again = keras.saving.deserialize_keras_object(config)
    assert again == variance
    assert hash(again) == hash(variance)
    assert all(variance != other for other in ALL if other is not variance)
    if not isinstance(variance, ErrorShare):
        # Samplers that are equal are compiled once.
        one, other = (samplers.ADDIM(x_var=v) for v in (variance, again))
        assert one == other
        assert hash(one) == hash(other)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: AnalyticVariance(0), "data_variance"),
        (lambda: AnalyticVariance(np.inf), "data_variance"),
        (lambda: AnalyticVariance("1"), "data_variance"),
        (lambda: ErrorShare(1.5), "eta"),
        (lambda: ErrorShare(-0.1), "eta"),
        (lambda: MeasuredVariance([0.5] * 63), "table"),
        (lambda: MeasuredVariance([-1.0] * LEVELS), "table"),
        (lambda: MeasuredVariance([np.nan] * LEVELS), "table"),
        (lambda: MeasuredVariance(3), "table"),
    ],
)
def test_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        make()
