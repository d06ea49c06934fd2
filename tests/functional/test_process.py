import numpy as np
import pytest
from keras import ops

from keras_mscm import functional as F
from keras_mscm.functional.process import PREDICTION_TYPES

# The reference sees the same float32 inputs, in float64.
LOGSNR = np.linspace(-20, 20, 161).astype("float32")


def tensors(*arrays):
    return [ops.convert_to_tensor(array, "float32") for array in arrays]


def rates(logsnr):
    """Signal and noise rates in float64, for images of rank 2."""
    snr = np.exp(logsnr.astype("float64"))[:, None]
    return np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))


def images(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(LOGSNR), 6)).astype("float32")


def test_rates_keep_their_digits_at_both_ends_of_time():
    alpha, sigma = rates(LOGSNR)
    (logsnr,) = tensors(LOGSNR)
    np.testing.assert_allclose(F.alpha(logsnr), alpha[:, 0], rtol=5e-7)
    np.testing.assert_allclose(F.sigma(logsnr), sigma[:, 0], rtol=5e-7)


def test_rates_are_variance_preserving():
    (logsnr,) = tensors(LOGSNR)
    power = F.alpha(logsnr) ** 2 + F.sigma(logsnr) ** 2
    np.testing.assert_allclose(power, np.ones_like(LOGSNR), rtol=5e-7)


def test_add_noise():
    x, epsilon = images(0), images(1)
    alpha, sigma = rates(LOGSNR)
    z = F.add_noise(*tensors(x, epsilon, LOGSNR))
    np.testing.assert_allclose(z, alpha * x + sigma * epsilon, atol=2e-6)


def test_per_example_logsnr_fits_images_of_any_rank():
    x, epsilon = images(0), images(1)
    flat = F.add_noise(*tensors(x, epsilon, LOGSNR))
    shape = (-1, 3, 2, 1)
    deep = F.add_noise(
        *tensors(x.reshape(shape), epsilon.reshape(shape), LOGSNR)
    )
    assert tuple(deep.shape) == (len(LOGSNR), 3, 2, 1)
    np.testing.assert_array_equal(ops.reshape(deep, x.shape), flat)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x_undoes_what_the_network_was_asked_for(prediction_type):
    x, epsilon = (images(i).astype("float64") for i in range(2))
    alpha, sigma = rates(LOGSNR)
    z = alpha * x + sigma * epsilon
    output = {"x": x, "epsilon": epsilon, "v": alpha * epsilon - sigma * x}
    got = F.predict_x(
        *tensors(output[prediction_type], z, LOGSNR), prediction_type
    )
    # From epsilon, x is what is left of z over alpha: the rounding of z and
    # epsilon themselves grows by 1 / alpha.
    scale = 1 / alpha if prediction_type == "epsilon" else 1.0
    error = np.abs(ops.convert_to_numpy(got) - x)
    assert np.all(error <= 1e-6 * scale)


def test_predict_epsilon():
    x, z = images(0), images(1)
    alpha, sigma = rates(LOGSNR)
    got = ops.convert_to_numpy(F.predict_epsilon(*tensors(x, z, LOGSNR)))
    expected = (z - alpha * x) / sigma
    # z - alpha x cancels, so its error is relative to 1 / sigma.
    assert np.all(np.abs(got - expected) <= 1e-6 / sigma)


def close_and_far_pairs():
    """Log-SNR at t and s: less than a teacher's step apart, and far."""
    logsnr_t = np.tile(LOGSNR[:-1], 3)
    gaps = np.repeat([1e-4, 0.05, 5.0], len(LOGSNR) - 1)
    logsnr_s = (logsnr_t + gaps).astype("float32")
    return logsnr_t, logsnr_s


def test_posterior_is_equation_1():
    logsnr_t, logsnr_s = close_and_far_pairs()
    rng = np.random.default_rng(0)
    x, z_t = rng.standard_normal((2, len(logsnr_t), 6)).astype("float32")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    # Literally, with alpha_{t|s} and sigma_{t|s} of Kingma et al. (2021).
    alpha_ts = alpha_t / alpha_s
    sigma2_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + alpha_ts**2 / sigma2_ts)
    mean = variance * (alpha_ts / sigma2_ts * z_t + alpha_s / sigma_s**2 * x)

    got_mean, got_variance = F.posterior(*tensors(x, z_t, logsnr_t, logsnr_s))
    assert tuple(got_variance.shape) == (len(logsnr_t), 1)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-6, atol=1e-6)
    # The literal form loses digits even in float64: at log-SNR -20 and a gap
    # of 1e-4, sigma2_ts is 1e-13 of sigma_t^2. Its error is left out.
    literal = 1e-15 / (sigma2_ts / sigma_t**2)
    error = np.abs(ops.convert_to_numpy(got_variance) / variance - 1)
    assert np.all(error <= 2e-6 + literal)


def test_posterior_agrees_with_bayes_rule():
    # q(z_s | z_t, x) is proportional to q(z_t | z_s) q(z_s | x): on a grid.
    logsnr_t, logsnr_s = np.float32([-0.5]), np.float32([1.5])
    x, z_t = np.float32([[0.7]]), np.float32([[-0.4]])
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    alpha_ts = alpha_t / alpha_s
    sigma2_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    grid = np.linspace(-6, 6, 4001)
    density = np.exp(
        -((z_t - alpha_ts * grid) ** 2) / (2 * sigma2_ts)
        - (grid - alpha_s * x) ** 2 / (2 * sigma_s**2)
    )[0]
    density /= density.sum()
    mean, variance = F.posterior(*tensors(x, z_t, logsnr_t, logsnr_s))
    true_mean = density @ grid
    np.testing.assert_allclose(mean[0, 0], true_mean, rtol=1e-6)
    np.testing.assert_allclose(
        variance[0, 0], density @ (grid - true_mean) ** 2, rtol=1e-6
    )


@pytest.mark.parametrize("bad", ["noise", "", "V", None, 1, ["v"], np.ones(2)])
def test_what_is_no_prediction_type_is_refused(bad):
    z, logsnr = tensors(np.ones((2, 3)), np.zeros(2))
    with pytest.raises(ValueError, match="`prediction_type` must be one of"):
        F.predict_x(z, z, logsnr, bad)
