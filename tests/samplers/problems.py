"""Data whose denoiser and flow are known, and all samplers to try on them."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from scipy.integrate import solve_ivp

from keras_mscm import backend, samplers
from keras_mscm.schedules import (
    CosineSchedule,
    InterpolatedCosineSchedule,
    KarrasSchedule,
    ShiftedCosineSchedule,
)

ALL = (
    samplers.DDIM(),
    samplers.ADDIM(),
    samplers.Heun(),
    samplers.NoisyDDIM(),
    samplers.DDPM(),
    samplers.DPMSolverMultistep(),
)
SCHEDULES = {
    "cosine": CosineSchedule(),
    "shifted": ShiftedCosineSchedule(image_resolution=64, noise_resolution=32),
    "interpolated": InterpolatedCosineSchedule(
        image_resolution=64, noise_resolution_low=16, noise_resolution_high=64
    ),
    "karras": KarrasSchedule(),
}


def over(samplers):
    names = [type(sampler).__name__ for sampler in samplers]
    return pytest.mark.parametrize("sampler", samplers, ids=names)


every_sampler = over(ALL)
every_singlestep = over(
    [s for s in ALL if isinstance(s, samplers.SinglestepSampler)]
)
every_stochastic = over([s for s in ALL if s.stochastic])
every_grid = pytest.mark.parametrize("grid", SCHEDULES)

# Data from two Gaussians.
D = 8
WEIGHTS = np.array([0.6, 0.4])
MEANS = np.random.default_rng(1).normal(0, 0.7, (2, D))
VARIANCES = np.array([0.1, 0.2])

NOISE = np.random.default_rng(0).standard_normal((6, D)).astype("float32")
MANY = np.random.default_rng(5).standard_normal((1024, D)).astype("float32")


def rates(logsnr):
    """Signal and noise rates in float64."""
    return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5


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
    score = xp.log(weights) - D / 2 * xp.log(total) - power / (2 * total)
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
        alpha, _ = rates(logsnr)
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


# One Gaussian, of which everything is known.
MEAN, VARIANCE = MEANS[0], 0.1


def denoise_gaussian(z, logsnr, xp=ops):
    logsnr = logsnr[:, None]
    alpha = (1 + xp.exp(-logsnr)) ** -0.5
    sigma = (1 + xp.exp(logsnr)) ** -0.5
    mean = ops.convert_to_tensor(MEAN, "float32") if xp is ops else MEAN
    gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    return mean + gain * (z - alpha * mean)


def ends(grid):
    """Log-SNR at t = 1 and at t = 0."""
    return tuple(float(SCHEDULES[grid](np.float32(t))) for t in (1, 0))


@functools.cache
def flow_end(grid):
    return probability_flow(denoise_mixture, NOISE, *ends(grid))


@functools.cache
def compiled(sampler, grid, denoise):
    def generate(noise, num_steps, seed):
        return sampler(denoise, noise, SCHEDULES[grid], num_steps, seed)

    return backend.compile_inference(generate, [])


def sample(
    sampler,
    num_steps,
    grid="cosine",
    *,
    noise=NOISE,
    seed=0,
    denoise=denoise_mixture,
):
    """One compiled loop serves every number of steps and every seed."""
    run = compiled(sampler, grid, denoise)
    got = run(noise, np.int32(num_steps), backend.random_state(seed))
    return ops.convert_to_numpy(got).astype("float64")


def sample_eagerly(sampler, num_steps, denoise=denoise_mixture, seed=0):
    noise = ops.convert_to_tensor(NOISE)
    got = sampler(denoise, noise, SCHEDULES["cosine"], num_steps, seed)
    return ops.convert_to_numpy(got)


@keras.saving.register_keras_serializable(package="test_samplers")
def some_x_var(logsnr):
    return 0.03 / (3.0 + ops.exp(logsnr))


VARIANTS = (
    *ALL,
    samplers.ADDIM(x_var=some_x_var),
    samplers.NoisyDDIM(x_var=some_x_var),
    samplers.DPMSolverMultistep(lower_order_final=False),
)
# Those whose step from t to s depends on no step before.
ONE_STEP = [
    sampler
    for sampler in VARIANTS
    if not isinstance(sampler, samplers.DPMSolverMultistep)
]


def errors(sampler, grid, steps):
    goal = flow_end(grid)
    return np.array(
        [np.abs(sample(sampler, n, grid) - goal).max() for n in steps]
    )


def numpy_step(sampler, x, z, logsnr_t, logsnr_s, denoise, noise, x_var):
    """In float64, `(batch, d)`, through z, sigma and alpha."""
    d = z.shape[1]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (alpha[:, None], sigma[:, None])
        for alpha, sigma in (rates(logsnr_t), rates(logsnr_s))
    )
    epsilon = (z - alpha_t * x) / sigma_t
    x_var = x_var(logsnr_t)[:, None]
    match sampler:
        case samplers.Heun():
            # Karras et al. (2022), algorithm 1, with y = z / alpha.
            tau_t, tau_s = sigma_t / alpha_t, sigma_s / alpha_s
            y = z / alpha_t
            slope = (y - x) / tau_t
            y_s = y + (tau_s - tau_t) * slope
            slope_s = (y_s - denoise(alpha_s * y_s, logsnr_s, np)) / tau_s
            return alpha_s * (y + (tau_s - tau_t) * (slope + slope_s) / 2)
        case samplers.ADDIM():  # algorithm 3
            norm = np.sum(epsilon**2, axis=1, keepdims=True)
            z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
            return alpha_s * x + np.sqrt(sigma_s**2 + d / norm * z_var) * (
                epsilon
            )
        case samplers.DDIM():  # eq. 4
            return alpha_s * x + sigma_s * epsilon
        case samplers.NoisyDDIM():  # eq. 10, with x* about x
            x = x + np.sqrt(x_var) * noise
            return alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
        case samplers.DDPM():  # eq. 1
            alpha_ts = alpha_t / alpha_s
            sigma2_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
            variance = 1 / (1 / sigma_s**2 + alpha_ts**2 / sigma2_ts)
            mean = alpha_ts / sigma2_ts * z + alpha_s / sigma_s**2 * x
            return variance * mean + np.sqrt(variance) * noise
    raise AssertionError


def numpy_x_var(sampler):
    if getattr(sampler, "x_var", None) is some_x_var:
        return lambda logsnr: 0.03 / (3 + np.exp(logsnr))
    return lambda logsnr: 0.1 / (2 + np.exp(logsnr))
