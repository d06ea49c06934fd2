import numpy as np
import pytest
from keras import ops

from keras_mscm.functional import parameterizations as P

# The reference sees the same float32 inputs, in float64.
LOGSNR = np.linspace(-30, 30, 121).astype("float32")
SIGMA_DATA = 0.5


def tensors(*arrays):
    return [ops.convert_to_tensor(array, "float32") for array in arrays]


def draws():
    """Data, noise, and our noisy images and `v` of them, in float64."""
    rng = np.random.default_rng(0)
    x, epsilon = rng.standard_normal((2, len(LOGSNR), 6))
    level = LOGSNR.astype("float64")[:, None]
    alpha, sigma = (
        np.sqrt(1 / (1 + np.exp(-level))),
        np.sqrt(1 / (1 + np.exp(level))),
    )
    z, v = alpha * x + sigma * epsilon, alpha * epsilon - sigma * x
    return x, epsilon, z, v, alpha, sigma


def test_rectified_flow():
    x, epsilon, z, v, alpha, sigma = draws()
    t = sigma / (alpha + sigma)
    z32, v32, u32, logsnr = tensors(z, v, epsilon - x, LOGSNR)
    np.testing.assert_allclose(P.flow_time(logsnr), t[:, 0], rtol=2e-6)
    np.testing.assert_allclose(
        P.flow_input(z32, logsnr), (1 - t) * x + t * epsilon, atol=2e-6
    )
    np.testing.assert_allclose(P.v_from_flow(u32, z32, logsnr), v, atol=2e-6)
    np.testing.assert_allclose(
        P.flow_from_v(v32, z32, logsnr), epsilon - x, atol=3e-6
    )


def test_edm():
    x, epsilon, z, v, alpha, sigma = draws()
    level = sigma / alpha
    noisy = x + level * epsilon
    total = np.sqrt(level**2 + SIGMA_DATA**2)
    # Table 1 of Karras et al. (2022), solved for F with D = x.
    c_skip = SIGMA_DATA**2 / total**2
    c_out = level * SIGMA_DATA / total
    output = (x - c_skip * noisy) / c_out
    z32, output32, logsnr = tensors(z, output, LOGSNR)
    np.testing.assert_allclose(
        P.noise_to_signal(logsnr), level[:, 0], rtol=2e-6
    )
    np.testing.assert_allclose(
        P.edm_time(logsnr), np.log(level[:, 0]) / 4, rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        P.exploding_input(z32, logsnr), noisy, rtol=3e-6, atol=2e-6
    )
    np.testing.assert_allclose(
        P.edm_input(z32, logsnr, SIGMA_DATA), noisy / total, atol=3e-6
    )
    got = ops.convert_to_numpy(P.v_from_edm(output32, z32, logsnr, SIGMA_DATA))
    # F itself is rounded, and what it is solved from cancels.
    np.testing.assert_allclose(got, v, atol=3e-6)


def test_edm_of_data_of_deviation_one_is_minus_v():
    rng = np.random.default_rng(0)
    output, z = rng.standard_normal((2, len(LOGSNR), 3))
    output, z, logsnr = tensors(output, z, LOGSNR)
    np.testing.assert_allclose(
        P.v_from_edm(output, z, logsnr, 1.0), -output, rtol=1e-6, atol=1e-6
    )


# Stable Diffusion's table (CONVENTIONS.md): scaled linear.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHAS = np.cumprod(1 - BETAS)


def test_steps_of_a_table_are_numbers_of_its_entries():
    table = P.logsnr_table(ALPHAS)
    np.testing.assert_allclose(table[[0, -1]], [7.069, -5.364], atol=1e-3)
    (logsnr,) = tensors(table)
    got = ops.convert_to_numpy(P.discrete_step(logsnr, table))
    np.testing.assert_allclose(got, np.arange(1000), atol=1e-4)
    np.testing.assert_allclose(P.level_of_step(got, table), table, atol=1e-6)


def test_between_two_steps_it_is_linear_and_beyond_them_it_is_the_end():
    table = np.array([3.0, 2.0, 0.0, -4.0])
    (logsnr,) = tensors([9.0, 3.0, 2.25, 1.0, -1.0, -4.0, -9.0])
    np.testing.assert_allclose(
        P.discrete_step(logsnr, table), [0, 0, 0.75, 1.5, 2.25, 3, 3], rtol=1e-6
    )
    (step,) = tensors([0.0, 0.75, 2.25, 3.0])
    np.testing.assert_allclose(
        P.level_of_step(step, table), [3, 2.25, -1, -4], rtol=1e-6
    )


def test_no_signal_and_no_noise_are_within_a_float32s_range():
    table = P.logsnr_table([1.0, 0.5, 0.0])
    np.testing.assert_array_equal(table, [30, 0, -30])


def test_sinusoids():
    (values,) = tensors([0.0, 1.0, 501.0, 999.0])
    half = np.exp(-np.log(10000) * np.arange(160) / 160)
    angles = np.array([0.0, 1.0, 501.0, 999.0])[:, None] * half
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    # An angle of 999 has 6e-5 between its neighbours in float32.
    np.testing.assert_allclose(P.sinusoids(values, 320), expected, atol=1e-4)


@pytest.mark.parametrize(
    "bad",
    [None, 1.0, [0.5], [0.5, 0.5], [0.2, 0.5], [2.0, 1.0], "a", [[0.9, 0.1]]],
)
def test_what_is_no_table_is_refused(bad):
    with pytest.raises(ValueError, match="`alphas_cumprod` must be 2 or more"):
        P.check_alphas_cumprod(bad)
    with pytest.raises(ValueError, match="`alphas_cumprod` must be 2 or more"):
        P.check_alphas_cumprod([0.9, float("nan")])
