"""Noisy DDIM, against exact laws."""

import numpy as np
import pytest
from keras import ops

from keras_mscm import backend, samplers
from tests.samplers.problems import (
    MANY,
    MEAN,
    MEANS,
    VARIANCE,
    VARIANCES,
    WEIGHTS,
    D,
    denoise_gaussian,
    denoise_mixture,
    ends,
    rates,
    sample,
)


def exact_gaussian_x_var(logsnr):
    return VARIANCE / (1 + VARIANCE * ops.exp(logsnr))


@pytest.mark.parametrize("num_steps", [1, 3, 32])
def test_noisy_ddim_is_the_perfect_sampler_of_a_gaussian(num_steps):
    # Eq. 10: with the exact variance x is a sample of p(x | z_t), and z_s one
    # of p(z_s), whatever the step.
    sampler = samplers.NoisyDDIM(x_var=exact_gaussian_x_var)
    (alpha_1, sigma_1), (alpha_0, sigma_0) = map(rates, ends("karras"))
    first = alpha_1 * MEAN + (alpha_1**2 * VARIANCE + sigma_1**2) ** 0.5 * MANY
    first, variance = (
        first.astype("float32"),
        alpha_0**2 * VARIANCE + sigma_0**2,
    )

    def off(sampler):
        given = {"noise": first, "denoise": denoise_gaussian}
        return sample(sampler, num_steps, "karras", **given) - alpha_0 * MEAN

    got = off(sampler)
    assert abs(got.mean()) < 4 * (variance / got.size) ** 0.5
    assert abs(got.var() / variance - 1) < 4 * (2 / got.size) ** 0.5
    # DDIM has not, nor noisy DDIM with the paper's tenth of it.
    if num_steps < 32:
        for other in (samplers.DDIM(), samplers.NoisyDDIM()):
            assert off(other).var() < 0.8 * variance


@pytest.mark.parametrize(
    ("logsnr_t", "logsnr_s"), [(-6.0, -1.0), (-2.0, 0.0), (0.0, 6.0)]
)
def test_noisy_ddim_has_the_exact_second_moment(logsnr_t, logsnr_s):
    # Of a mixture p(x | z_t) is not normal; its variance is enough (eq. 13).
    rng, count = np.random.default_rng(0), 8192
    k = rng.choice(2, count, p=WEIGHTS)
    x = MEANS[k] + VARIANCES[k, None] ** 0.5 * rng.standard_normal((count, D))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(rates, (logsnr_t, logsnr_s))
    z_t = alpha_t * x + sigma_t * rng.standard_normal(x.shape)
    x_hat = denoise_mixture(z_t, np.full(count, logsnr_t), np)
    # E||x_hat - x||^2 / d is the variance of p(x | z_t), over the data.
    x_var = np.mean((x_hat - x) ** 2)

    def second_moment(sampler):
        inputs = x_hat, z_t, np.full(count, logsnr_t), np.full(count, logsnr_s)
        z_s = sampler.step(
            *(ops.convert_to_tensor(value, "float32") for value in inputs),
            denoise_mixture,
            samplers.StepSeed(backend.random_state(1), 0),
        )
        square = np.sum(
            ops.convert_to_numpy(z_s).astype("float64") ** 2, axis=1
        )
        return square.mean(), square.std() / count**0.5

    power = WEIGHTS @ (np.sum(MEANS**2, axis=1) + D * VARIANCES)
    expected = alpha_s**2 * power + D * sigma_s**2
    got, error = second_moment(
        samplers.NoisyDDIM(x_var=lambda logsnr: x_var * ops.ones_like(logsnr))
    )
    assert abs(got - expected) < 4 * error
    # DDIM's norm is too small (eq. 12), and the test can see it.
    short, error = second_moment(samplers.DDIM())
    assert expected - short > 6 * error
