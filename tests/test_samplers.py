import functools

import numpy as np
import pytest
from keras import ops
from scipy.integrate import solve_ivp

from keras_mscm import backend, samplers
from keras_mscm.schedules import CosineSchedule, KarrasSchedule

# Data from two Gaussians.
D = 8
WEIGHTS = np.array([0.6, 0.4])
MEANS = np.random.default_rng(1).normal(0, 0.7, (2, D))
VARIANCES = np.array([0.1, 0.2])

SCHEDULE = CosineSchedule()
NOISE = np.random.default_rng(0).standard_normal((6, D)).astype("float32")


def denoise_mixture(z, logsnr, xp=ops):
    """`E[x | z_t]`, exact; in NumPy float64 or in tensors."""
    logsnr = logsnr[:, None, None]
    alpha = (1 + xp.exp(-logsnr)) ** -0.5
    sigma = (1 + xp.exp(logsnr)) ** -0.5
    means, variances, weights = MEANS, VARIANCES[:, None], WEIGHTS[:, None]
    if xp is ops:
        means, variances, weights = (
            ops.convert_to_tensor(x, "float32")
            for x in (means, variances, weights)
        )
    total = alpha**2 * variances + sigma**2
    off = z[:, None] - alpha * means
    power = xp.sum(off**2, axis=-1, keepdims=True)
    score = xp.log(weights) - xp.log(total) - power / (2 * total)
    share = xp.exp(score - xp.max(score, axis=1, keepdims=True))
    share = share / xp.sum(share, axis=1, keepdims=True)
    return xp.sum(
        share * (means + alpha * variances / total * off),
        axis=1,
    )


def probability_flow(denoise, noise, logsnr_1, logsnr_0):
    """z_0 by the probability flow ODE, to nine digits.

    With log-SNR as its time: dz / dlogsnr = alpha (E[x | z] - alpha z) / 2.
    """

    def flow(logsnr, z):
        z = z.reshape(noise.shape)
        alpha = (1 + np.exp(-logsnr)) ** -0.5
        x = denoise(z, np.full(len(z), logsnr), np)
        return (alpha / 2 * (x - alpha * z)).ravel()

    solution = solve_ivp(
        flow,
        (logsnr_1, logsnr_0),
        noise.astype("float64").ravel(),
        method="DOP853",
        rtol=1e-10,
        atol=1e-10,
    )
    return solution.y[:, -1].reshape(noise.shape)


def test_the_flow_is_known_for_a_gaussian():
    # It keeps the quantile of z, which moves from one normal to another.
    mean, variance = MEANS[0], VARIANCES[0]

    def rates(logsnr):
        return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5

    def denoise(z, logsnr, xp):
        alpha, sigma = (rate[:, None] for rate in rates(logsnr))
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return mean + gain * (z - alpha * mean)

    (alpha_1, sigma_1), (alpha_0, sigma_0) = rates(-15.0), rates(15.0)
    stretch = (alpha_0**2 * variance + sigma_0**2) ** 0.5
    stretch /= (alpha_1**2 * variance + sigma_1**2) ** 0.5
    expected = alpha_0 * mean + stretch * (NOISE - alpha_1 * mean)
    got = probability_flow(denoise, NOISE, -15.0, 15.0)
    np.testing.assert_allclose(got, expected, atol=1e-8)


@functools.cache
def compiled(sampler, schedule):
    def generate(noise, num_steps):
        return sampler(denoise_mixture, noise, schedule, num_steps)

    return backend.compile_inference(generate, [])


def sample(sampler, num_steps, schedule=SCHEDULE):
    """One compiled loop serves every number of steps."""
    got = compiled(sampler, schedule)(NOISE, np.int32(num_steps))
    return ops.convert_to_numpy(got).astype("float64")


def sample_eagerly(sampler, num_steps, denoise=denoise_mixture):
    noise = ops.convert_to_tensor(NOISE)
    return ops.convert_to_numpy(sampler(denoise, noise, SCHEDULE, num_steps))


@pytest.fixture(scope="module")
def flow_end():
    return probability_flow(denoise_mixture, NOISE, -15.0, 15.0)


def test_ddim_solves_the_probability_flow_to_first_order(flow_end):
    error = [
        np.abs(sample(samplers.DDIM(), n) - flow_end).max()
        for n in (32, 64, 128, 256)
    ]
    ratios = np.divide(error[:-1], error[1:])
    assert np.all((ratios > 1.9) & (ratios < 2.1))
    assert error[-1] < 0.01


def test_addim_tends_to_ddim_and_to_the_flow(flow_end):
    # By half for four times the steps, not by a quarter: these data fill
    # space, so epsilon_hat goes to 0 with sigma, and in the last sqrt(N) steps
    # what aDDIM adds is no longer small beside it.
    addim = [sample(samplers.ADDIM(), n) for n in (16, 64, 256, 1024)]
    ddim = [sample(samplers.DDIM(), n) for n in (16, 64, 256, 1024)]
    apart = np.array([np.abs(a - b).max() for a, b in zip(addim, ddim)])
    ratios = apart[:-1] / apart[1:]
    assert np.all((ratios > 1.8) & (ratios < 2.2))
    assert np.abs(addim[-1] - flow_end).max() < 0.02


def paper_sample(num_steps, schedule, x_var):
    """Algorithm 3 in float64, with all times in numbers."""
    z, d = NOISE.astype("float64"), NOISE.shape[1]
    for i in range(num_steps, 0, -1):
        l_t, l_s = (
            float(schedule(np.float32(j / num_steps))) for j in (i, i - 1)
        )
        alpha_t, alpha_s = (1 + np.exp([-l_t, -l_s])) ** -0.5
        sigma_t, sigma_s = (1 + np.exp([l_t, l_s])) ** -0.5
        x = denoise_mixture(z, np.full(len(z), l_t), np)
        epsilon = (z - alpha_t * x) / sigma_t
        norm = np.sum(epsilon**2, axis=1, keepdims=True)
        z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var(l_t)
        z = alpha_s * x + np.sqrt(sigma_s**2 + d / norm * z_var) * epsilon
    return z


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, KarrasSchedule()], ids=["cosine", "karras"]
)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_samplers_are_their_algorithms(num_steps, schedule):
    # Algorithm 2 is algorithm 3 without the variance.
    variances = {
        samplers.DDIM(): lambda logsnr: 0.0,
        samplers.ADDIM(): lambda logsnr: 0.1 / (2 + np.exp(logsnr)),
    }
    for sampler, x_var in variances.items():
        got = sample(sampler, num_steps, schedule)
        expected = paper_sample(num_steps, schedule, x_var)
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("sampler", [samplers.DDIM(), samplers.ADDIM()])
def test_the_number_of_steps_may_be_a_tensor(sampler):
    expected = sample_eagerly(sampler, 4)
    got = sample_eagerly(sampler, ops.convert_to_tensor(4, "int32"))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(sample(sampler, 4), expected, atol=1e-5)


def test_the_loop_is_compiled_once():
    traces = []

    def generate(noise, num_steps):
        traces.append(num_steps)
        return samplers.DDIM()(lambda z, _: z, noise, SCHEDULE, num_steps)

    compiled = backend.compile_inference(generate, [])
    for num_steps in (1, 3, 8):
        compiled(NOISE, np.int32(num_steps))
    assert len(traces) == (3 if backend.NAME == "torch" else 1)


@pytest.mark.parametrize("sampler", [samplers.DDIM(), samplers.ADDIM()])
def test_samplers_keep_shape_and_take_images(sampler):
    noise = np.random.default_rng(0).standard_normal((3, 4, 4, 1), "float32")
    noise = ops.convert_to_tensor(noise)

    def denoise(z, logsnr):
        assert tuple(logsnr.shape) == (3,)
        return 0.5 * z

    got = sampler(denoise, noise, SCHEDULE, 2)
    assert tuple(got.shape) == (3, 4, 4, 1)
    # Nothing leaks from one image to another.
    flipped = sampler(denoise, ops.flip(noise, axis=0), SCHEDULE, 2)
    np.testing.assert_allclose(flipped, ops.flip(got, axis=0), rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_ddim_with_a_prediction_that_stays_ends_there(num_steps):
    x = ops.full(NOISE.shape, 0.7)
    got = sample_eagerly(samplers.DDIM(), num_steps, lambda z, logsnr: x)
    # alpha_0 x, and of the noise as much as sigma_0 = 5.5e-4.
    alpha_0, sigma_0 = (1 + np.exp(-15)) ** -0.5, (1 + np.exp(15)) ** -0.5
    expected = alpha_0 * 0.7 + sigma_0 * (NOISE - sigma_0 * 0.7)
    np.testing.assert_allclose(got, expected, atol=2e-6)
