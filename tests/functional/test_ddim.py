import itertools

import numpy as np
import pytest
from keras import ops
from scipy.optimize import brentq

from keras_mscm import backend
from keras_mscm import functional as F


def tensors(*arrays):
    return [ops.convert_to_tensor(array, "float32") for array in arrays]


def rates(logsnr):
    """Signal and noise rates in float64, for images of rank 2."""
    snr = np.exp(np.asarray(logsnr, "float64"))[:, None]
    return np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))


def x_coefficient(logsnr_t, logsnr_s):
    """`alpha_s - alpha_t sigma_s / sigma_t`, as the paper writes it."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    return alpha_s - alpha_t * sigma_s / sigma_t


def paper_ddim(x, z_t, logsnr_t, logsnr_s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    return alpha_s * x + sigma_s / sigma_t * (z_t - alpha_t * x)


def paper_inverse_ddim(z_s, z_t, logsnr_t, logsnr_s):
    (_, sigma_t), (_, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    kept = sigma_s / sigma_t
    return (z_s - kept * z_t) / x_coefficient(logsnr_t, logsnr_s)


def paper_addim(x, z_t, logsnr_t, logsnr_s, x_var):
    """Algorithm 3, line by line."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    d = x.shape[1]
    epsilon = (z_t - alpha_t * x) / sigma_t
    z_var = x_coefficient(logsnr_t, logsnr_s) ** 2 * x_var[:, None]
    norm = np.sum(epsilon**2, axis=1, keepdims=True)
    return alpha_s * x + np.sqrt(sigma_s**2 + d / norm * z_var) * epsilon


def cosine(t):
    low, high = np.arctan(np.exp([-7.5, 7.5]))
    return -2 * np.log(np.tan(low + t * (high - low)))


def steps_in_time():
    """Log-SNR at t and s: all of 1280 steps, both ends, and long strides."""
    grid = np.linspace(0, 1, 1281)
    pairs = [
        *zip(grid[1:], grid[:-1]),
        *[(1, 0), (1, 0.5), (0.5, 0), (1, 1e-3), (0.999, 0), (0.75, 0.25)],
    ]
    t, s = np.transpose(pairs)
    return cosine(t).astype("float32"), cosine(s).astype("float32")


LOGSNR_T, LOGSNR_S = steps_in_time()


@pytest.fixture(params=["eager", "compiled"])
def run(request):
    """Calls a function on arrays. A compiler must not undo careful forms."""

    def call(function, *arrays):
        if request.param == "compiled":
            function = backend.compile_inference(function, [])
        return ops.convert_to_numpy(function(*tensors(*arrays)))

    return call


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, len(LOGSNR_T), 6)
    return rng.standard_normal(shape).astype("float32")


def test_ddim_is_equation_4(run):
    x, z_t = images(2)
    got = run(F.ddim, x, z_t, LOGSNR_T, LOGSNR_S)
    expected = paper_ddim(x, z_t, LOGSNR_T, LOGSNR_S)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-6)


def test_what_x_adds_in_a_step_keeps_its_digits(run):
    # c is 1e-3 and less in a teacher's step, and right to 1e-6 of itself.
    x = np.ones((len(LOGSNR_T), 1))
    got = run(F.ddim, x, 0 * x, LOGSNR_T, LOGSNR_S)
    expected = x_coefficient(LOGSNR_T, LOGSNR_S)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_ddim_stays_where_s_equals_t():
    x, z_t = tensors(*images(2))
    (logsnr,) = tensors(LOGSNR_T)
    np.testing.assert_array_equal(F.ddim(x, z_t, logsnr, logsnr), z_t)


def test_ddim_from_noise_to_data_is_the_prediction():
    x, z_t = images(2)
    ends = np.full(len(x), -15.0), np.full(len(x), 15.0)
    got = F.ddim(*tensors(x, z_t, *ends))
    # sigma_0 is 5.5e-4: that much noise is left.
    np.testing.assert_allclose(got, x, atol=6e-4 * np.abs(z_t).max())


def test_inverse_ddim_is_equation_5(run):
    z_s, z_t = images(2)
    got = run(F.inverse_ddim, z_s, z_t, LOGSNR_T, LOGSNR_S)
    expected = paper_inverse_ddim(z_s, z_t, LOGSNR_T, LOGSNR_S)
    # Eq. 5 divides by c: the rounding of its numerator grows by 1 / c.
    size = np.abs(z_s) + np.abs(z_t)
    c = x_coefficient(LOGSNR_T, LOGSNR_S)
    assert np.all(np.abs(got - expected) <= 5e-7 * size / c)


def test_inverse_ddim_undoes_ddim():
    x, z_t, *logsnr = tensors(*images(2), LOGSNR_T, LOGSNR_S)
    z_s = F.ddim(x, z_t, *logsnr)
    back = F.inverse_ddim(z_s, z_t, *logsnr)
    error = ops.convert_to_numpy(ops.abs(back - x))
    size = ops.convert_to_numpy(ops.abs(z_s) + ops.abs(z_t))
    c = x_coefficient(LOGSNR_T, LOGSNR_S)
    assert np.all(error <= 5e-7 * size / c)

    far = c[:, 0] > 0.1
    assert far.sum() >= 5
    assert np.all(error[far] <= 1e-5)


def test_ddim_undoes_inverse_ddim():
    z_s, z_t, *logsnr = tensors(*images(2), LOGSNR_T, LOGSNR_S)
    x = F.inverse_ddim(z_s, z_t, *logsnr)
    back = F.ddim(x, z_t, *logsnr)
    np.testing.assert_allclose(back, z_s, atol=2e-6)


def test_ddim_with_one_prediction_composes():
    x, z_t = tensors(*images(2))
    logsnr = [
        ops.full((len(LOGSNR_T),), value) for value in (-15.0, -1.0, 2.0, 15.0)
    ]
    z = z_t
    for start, end in itertools.pairwise(logsnr):
        z = F.ddim(x, z, start, end)
    direct = F.ddim(x, z_t, logsnr[0], logsnr[-1])
    np.testing.assert_allclose(z, direct, atol=2e-6)


def predictions_and_noise(seed=0):
    """`x`, a `z_t` that it explains by moderate noise, and `x_var`."""
    x, epsilon = images(2, seed)
    alpha_t, sigma_t = rates(LOGSNR_T)
    z_t = (alpha_t * x + sigma_t * epsilon).astype("float32")
    x_var = np.random.default_rng(seed).uniform(0, 0.5, len(x))
    return x, z_t, x_var.astype("float32")


def test_addim_is_equation_14_and_algorithm_3(run):
    x, z_t, x_var = predictions_and_noise()
    arguments = x, z_t, LOGSNR_T, LOGSNR_S, x_var
    got = run(F.addim, *arguments)
    expected = paper_addim(*arguments)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=4e-6)


def test_addim_x_is_the_inverse_ddim_of_addim(run):
    x, z_t, x_var = predictions_and_noise()
    arguments = x, z_t, LOGSNR_T, LOGSNR_S, x_var
    got = run(F.addim_x, *arguments)
    z_s = paper_addim(*arguments)
    expected = paper_inverse_ddim(z_s, z_t, LOGSNR_T, LOGSNR_S)
    # No 1 / c here: that is what `addim_x` is for. What is left is the
    # rounding of alpha_t x in epsilon = (z_t - alpha_t x) / sigma_t.
    alpha_t, _ = rates(LOGSNR_T)
    gain = (expected - x) / (z_t - alpha_t * x)
    error = np.abs(got - expected)
    assert np.all(error <= 1e-6 * (1 + gain * (1 + np.abs(x))))
    # The route through float32 images loses far more.
    route = run(F.inverse_ddim, z_s, z_t, LOGSNR_T, LOGSNR_S)
    assert error.mean() < 0.01 * np.abs(route - expected).mean()


def test_addim_without_variance_is_ddim():
    x, z_t, x_var = predictions_and_noise()
    arguments = tensors(x, z_t, LOGSNR_T, LOGSNR_S)
    (none,) = tensors(0 * x_var)
    np.testing.assert_array_equal(F.addim_x(*arguments, none), x)
    np.testing.assert_array_equal(F.addim(*arguments, none), F.ddim(*arguments))


def test_addim_is_finite_where_the_predicted_noise_is_zero():
    x = np.zeros((1, 6))
    got = F.addim(*tensors(x, x, [-1.0], [1.0], [0.3]))
    np.testing.assert_array_equal(got, x)


def test_analytic_x_var():
    # Section 3.2, at both ends of time too: 0.05 at t = 1.
    logsnr = np.linspace(-20, 20, 81).astype("float32")
    got = F.analytic_x_var(*tensors(logsnr))
    expected = 0.1 / (2 + np.exp(logsnr.astype("float64")))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def paper_heun(x, x_s, z_t, logsnr_t, logsnr_s):
    """Karras et al. (2022), algorithm 1, for y = z / alpha."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr_t), rates(logsnr_s)
    tau_t, tau_s = sigma_t / alpha_t, sigma_s / alpha_s
    y_t = z_t / alpha_t
    slope_t = (y_t - x) / tau_t
    y_s = y_t + (tau_s - tau_t) * slope_t
    slope_s = (y_s - x_s) / tau_s
    return alpha_s * (y_t + (tau_s - tau_t) * (slope_t + slope_s) / 2)


def test_heun_x_takes_the_step_of_heun(run):
    x, x_s, epsilon = images(3)
    alpha_t, sigma_t = rates(LOGSNR_T)
    z_t = (alpha_t * x + sigma_t * epsilon).astype("float32")

    def heun(x, x_s, z_t, logsnr_t, logsnr_s):
        x = F.heun_x(x, x_s, logsnr_t, logsnr_s)
        return F.ddim(x, z_t, logsnr_t, logsnr_s)

    arguments = x, x_s, z_t, LOGSNR_T, LOGSNR_S
    got = run(heun, *arguments)
    expected = paper_heun(*arguments)
    # A long step in tau multiplies x_s - x_t, and its rounding, by half of
    # tau_t / tau_s.
    ratio = np.exp((LOGSNR_S - LOGSNR_T.astype("float64")) / 2)[:, None]
    scale = np.abs(z_t) + np.abs(x) + ratio * np.abs(x_s - x)
    assert np.all(np.abs(got - expected) <= 2e-6 * scale)


def test_heun_x_is_the_inverse_ddim_of_its_step(run):
    x, x_s, z_t = images(3)
    arguments = x, x_s, LOGSNR_T, LOGSNR_S
    got = run(F.heun_x, *arguments)
    z_s = paper_heun(x, x_s, z_t, LOGSNR_T, LOGSNR_S)
    expected = paper_inverse_ddim(z_s, z_t, LOGSNR_T, LOGSNR_S)
    # No small denominator, and so the digits that eq. 5 loses are all there.
    ratio = np.exp((LOGSNR_S - LOGSNR_T.astype("float64")) / 2)[:, None]
    scale = np.abs(x) + ratio * (np.abs(x_s) + np.abs(x))
    assert np.all(np.abs(got - expected) <= 1e-6 * scale)


def test_heun_where_the_prediction_stays_is_ddim():
    (x, logsnr_t, logsnr_s) = tensors(images(1)[0], LOGSNR_T, LOGSNR_S)
    np.testing.assert_array_equal(F.heun_x(x, x, logsnr_t, logsnr_s), x)


# Against the truth: data from a Gaussian mixture, whose E[x | z_t] and
# Var[x | z_t] are known.

D = 8
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.random.default_rng(3).normal(0, 0.6, (3, D))
VARIANCES = np.array([0.02, 0.1, 0.05])


def sample_mixture(n, rng):
    k = rng.choice(3, n, p=WEIGHTS)
    noise = rng.standard_normal((n, D))
    return MEANS[k] + np.sqrt(VARIANCES[k])[:, None] * noise


def mixture_posterior(z, logsnr):
    """Weights (n, 3), means (n, 3, D) and variances (3,) of p(x | z_t)."""
    snr = np.exp(logsnr)
    alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
    total = alpha**2 * VARIANCES + sigma**2
    off = z[:, None] - alpha * MEANS
    log_density = (
        np.log(WEIGHTS)
        - D / 2 * np.log(total)
        - np.sum(off**2, axis=-1) / (2 * total)
    )
    weights = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    means = MEANS + (alpha * VARIANCES / total)[:, None] * off
    return weights, means, VARIANCES * sigma**2 / total


def posterior_moments(z, logsnr):
    """E[x | z_t], (n, D), and trace(Var[x | z_t]), (n,)."""
    weights, means, variances = mixture_posterior(z, logsnr)
    mean = np.einsum("nk,nkd->nd", weights, means)
    square = weights @ (D * variances)
    square += np.einsum("nk,nkd->n", weights, means**2)
    return mean, square - np.sum(mean**2, axis=1)


def step(function, x, z_t, logsnr_t, logsnr_s, *x_var):
    n = len(x)
    logsnr = np.full(n, logsnr_t), np.full(n, logsnr_s)
    got = function(*tensors(x, z_t, *logsnr, *x_var))
    return ops.convert_to_numpy(got).astype("float64")


def square_norm(z):
    return np.sum(z**2, axis=1)


TIMES = [(-6.0, -4.5), (-2.0, 0.0), (0.0, 1.0), (1.0, 6.0)]


@pytest.mark.parametrize(
    ("logsnr_t", "logsnr_s"), [*TIMES, (0.0, 0.1), (-15.0, 15.0)]
)
def test_equations_12_and_13_at_one_z_exactly(logsnr_t, logsnr_s):
    # The perfect sampler (eq. 10) is DDIM with x* from p(x | z_t). Sigma
    # points at each mode integrate its second moments without error.
    z_t = np.random.default_rng(0).standard_normal((1, D))
    weights, means, variances = mixture_posterior(z_t, logsnr_t)
    corners = np.sqrt(D) * np.concatenate([np.eye(D), -np.eye(D)])
    x_star = means[0, :, None] + np.sqrt(variances)[:, None, None] * corners
    x_star = x_star.reshape(-1, D)
    p = np.repeat(weights[0] / (2 * D), 2 * D)

    z_star = step(F.ddim, x_star, np.repeat(z_t, len(p), 0), logsnr_t, logsnr_s)
    x_hat, x_trace = posterior_moments(z_t, logsnr_t)
    z_ddim = step(F.ddim, x_hat, z_t, logsnr_t, logsnr_s)

    c = x_coefficient([logsnr_t], [logsnr_s])[0, 0]
    off = z_star - p @ z_star
    trace = p @ square_norm(off)
    np.testing.assert_allclose(trace, c**2 * x_trace[0], rtol=1e-5)
    # Eq. 12 is a small difference of norms: its rounding is relative to them.
    missing = p @ square_norm(z_star) - square_norm(z_ddim)[0]
    np.testing.assert_allclose(missing, trace, atol=1e-6 * D)


@pytest.mark.parametrize(("logsnr_t", "logsnr_s"), TIMES)
def test_equations_12_and_13_over_the_data(logsnr_t, logsnr_s):
    # x is itself a sample of p(x | z_t), so DDIM with x is the perfect sampler
    # and what it reaches has the law of z_s.
    rng = np.random.default_rng(1)
    n = 40_000
    x, epsilon = sample_mixture(n, rng), rng.standard_normal((n, D))
    z_t = F.add_noise(*tensors(x, epsilon, np.full(n, logsnr_t)))
    z_s = F.add_noise(*tensors(x, epsilon, np.full(n, logsnr_s)))
    z_t, z_s = (ops.convert_to_numpy(z).astype("float64") for z in (z_t, z_s))
    z_star = step(F.ddim, x, z_t, logsnr_t, logsnr_s)
    np.testing.assert_allclose(z_star, z_s, atol=5e-6)

    x_hat, x_trace = posterior_moments(z_t, logsnr_t)
    z_ddim = step(F.ddim, x_hat, z_t, logsnr_t, logsnr_s)
    c = x_coefficient([logsnr_t], [logsnr_s])[0, 0]
    missing = square_norm(z_star) - square_norm(z_ddim)
    excess = missing - c**2 * x_trace
    assert abs(excess.mean()) < 4 * excess.std() / np.sqrt(n)
    # The test can see what it tests.
    assert c**2 * x_trace.mean() > 10 * excess.std() / np.sqrt(n)


def orthogonal_z(logsnr):
    """A z_t at which `x_hat` and `epsilon_hat` are orthogonal."""
    alpha = rates([logsnr])[0]

    def product(z):
        x_hat, _ = posterior_moments(z, logsnr)
        return np.sum(x_hat * (z - alpha * x_hat), axis=1)

    z = np.random.default_rng(4).standard_normal((1000, D))
    low, high = z[[product(z).argmin()]], z[[product(z).argmax()]]
    share = brentq(
        lambda share: product(low + share * (high - low)).item(),
        *(0, 1),
        xtol=1e-14,
    )
    return low + share * (high - low)


@pytest.mark.parametrize(("logsnr_t", "logsnr_s"), TIMES)
def test_addim_has_the_perfect_norm_where_its_assumption_holds(
    logsnr_t, logsnr_s
):
    z_t = orthogonal_z(logsnr_t)
    x_hat, x_trace = posterior_moments(z_t, logsnr_t)
    c = x_coefficient([logsnr_t], [logsnr_s])[0, 0]
    z_ddim = step(F.ddim, x_hat, z_t, logsnr_t, logsnr_s)
    z_addim = step(F.addim, x_hat, z_t, logsnr_t, logsnr_s, x_trace / D)
    # E||z*||^2, by the mean and the variance of z* = c x* + kept z_t.
    kept = np.sqrt((1 + np.exp(logsnr_t)) / (1 + np.exp(logsnr_s)))
    perfect = square_norm(c * x_hat + kept * z_t) + c**2 * x_trace
    np.testing.assert_allclose(square_norm(z_addim), perfect, rtol=2e-6)
    assert np.all(
        np.abs(square_norm(z_ddim) - perfect)
        > 20 * np.abs(square_norm(z_addim) - perfect)
    )


def test_addim_comes_nearer_to_the_perfect_norm_over_the_data():
    # Over the data x_hat and epsilon_hat are only nearly orthogonal: their
    # mean product is (alpha_t / sigma_t) trace(Var[x | z_t]). So aDDIM
    # overshoots, by much less than DDIM falls short.
    rng = np.random.default_rng(2)
    n, logsnr_t, logsnr_s = 40_000, -3.0, -1.0
    x, epsilon = sample_mixture(n, rng), rng.standard_normal((n, D))
    alpha_t, sigma_t = rates([logsnr_t])
    z_t = alpha_t * x + sigma_t * epsilon
    x_hat, x_trace = posterior_moments(z_t, logsnr_t)
    perfect = square_norm(step(F.ddim, x, z_t, logsnr_t, logsnr_s)).mean()
    z_ddim = step(F.ddim, x_hat, z_t, logsnr_t, logsnr_s)
    z_addim = step(F.addim, x_hat, z_t, logsnr_t, logsnr_s, x_trace / D)
    short = perfect - square_norm(z_ddim).mean()
    over = square_norm(z_addim).mean() - perfect
    assert abs(over) < 0.2 * short
