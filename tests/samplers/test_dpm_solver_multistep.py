"""DPM-Solver++(2M), against NumPy, the exact flow and diffusers."""

import numpy as np
import pytest
from keras import ops

from keras_mscm import samplers
from tests.samplers.problems import (
    MEAN,
    NOISE,
    SCHEDULES,
    VARIANCE,
    denoise_gaussian,
    denoise_mixture,
    ends,
    every_grid,
    rates,
    sample,
)

every_end = pytest.mark.parametrize("lower_order_final", [True, False])


def numpy_samples(denoise, logsnrs, z, lower_order_final):
    """Algorithm 2 of Lu et al. (2022), in its letters, in float64."""
    lambdas = np.asarray(logsnrs) / 2
    alphas, sigmas = rates(2 * lambdas)
    h = np.diff(lambdas)
    x_before, last = None, len(h)
    for i in range(1, len(lambdas)):
        x = denoise(z, np.full(len(z), 2 * lambdas[i - 1]), np)
        if i == 1 or (lower_order_final and i == last):
            d = x
        else:
            r = h[i - 2] / h[i - 1]
            d = (1 + 1 / (2 * r)) * x - 1 / (2 * r) * x_before
        kept = sigmas[i] / sigmas[i - 1]
        z = kept * z - alphas[i] * (np.exp(-h[i - 1]) - 1) * d
        x_before = x
    return z


@every_end
@every_grid
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
def test_samples_are_algorithm_2s(num_steps, grid, lower_order_final):
    times = np.arange(num_steps, -1, -1, dtype="float32") / num_steps
    expected = numpy_samples(
        denoise_mixture,
        ops.convert_to_numpy(SCHEDULES[grid](times)).astype("float64"),
        NOISE.astype("float64"),
        lower_order_final,
    )
    sampler = samplers.DPMSolverMultistep(lower_order_final=lower_order_final)
    got = sample(sampler, num_steps, grid)
    # Extrapolation into a long step multiplies rounding, as it does the rest.
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(got, expected, atol=2e-5 * scale)


def gaussian_flow(grid):
    """`z_0`, known: it keeps the quantile of z."""
    (alpha_1, sigma_1), (alpha_0, sigma_0) = map(rates, ends(grid))
    stretch = (alpha_0**2 * VARIANCE + sigma_0**2) ** 0.5
    stretch /= (alpha_1**2 * VARIANCE + sigma_1**2) ** 0.5
    return alpha_0 * MEAN + stretch * (NOISE - alpha_1 * MEAN)


def errors(sampler, grid, steps):
    goal = gaussian_flow(grid)
    return np.array(
        [
            np.abs(sample(sampler, n, grid, denoise=denoise_gaussian) - goal)
            for n in steps
        ]
    ).max(axis=(1, 2))


@every_end
def test_it_is_of_second_order(lower_order_final):
    sampler = samplers.DPMSolverMultistep(lower_order_final=lower_order_final)
    error = errors(sampler, "karras", (16, 32, 64, 128))
    ratios = error[:-1] / error[1:]
    assert np.all((ratios > 3.5) & (ratios < 4.5))


def test_with_as_many_evaluations_it_is_nearer_than_the_others():
    for evaluations in (8, 16, 32):
        ddim = min(
            errors(samplers.DDIM(), grid, [evaluations])[0]
            for grid in ("karras", "cosine")
        )
        heun = errors(samplers.Heun(), "karras", [evaluations // 2])[0]
        error = errors(samplers.DPMSolverMultistep(), "karras", [evaluations])
        assert error[0] < 0.7 * min(heun, ddim)


def test_the_last_step_of_a_cosine_schedule_is_too_long_to_extrapolate():
    first, second = (
        errors(samplers.DPMSolverMultistep(end), "cosine", [8])[0]
        for end in (True, False)
    )
    assert second > 2 * first


@pytest.mark.parametrize("value", [1, None, "no"])
def test_the_end_is_a_choice_of_two(value):
    with pytest.raises(ValueError, match="`lower_order_final` must be"):
        samplers.DPMSolverMultistep(lower_order_final=value)


class Levels:
    """A schedule of given noise-to-signal ratios, one for each step's end."""

    def __init__(self, sigmas):
        self.logsnrs = -2 * np.log(np.float32(sigmas[::-1]))

    def __call__(self, t):
        steps = len(self.logsnrs) - 1
        number = ops.cast(ops.round(ops.multiply(t, steps)), "int32")
        return ops.take(ops.convert_to_tensor(self.logsnrs), number)


DIFFUSERS = {
    "as it comes": {},
    "second order": {
        "final_sigmas_type": "sigma_min",
        "lower_order_final": False,
    },
    "first order": {"final_sigmas_type": "sigma_min", "euler_at_final": True},
}


@pytest.mark.parametrize("num_steps", [4, 10, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", DIFFUSERS)
def test_it_is_the_scheduler_of_diffusers(name, prediction_type, num_steps):
    """On Stable Diffusion's noise levels."""
    import diffusers
    import torch

    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        **DIFFUSERS[name],
    )
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.numpy()
    z = torch.tensor(NOISE, dtype=torch.float64)
    for i, timestep in enumerate(scheduler.timesteps):
        logsnr = np.full(len(z), -2 * np.log(sigmas[i].astype("float64")))
        alpha, sigma = (rate[:, None] for rate in rates(logsnr))
        x = denoise_mixture(z.numpy(), logsnr, np)
        epsilon = (z.numpy() - alpha * x) / sigma
        said = {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x}
        output = torch.tensor(said[prediction_type])
        z = scheduler.step(output, timestep, z).prev_sample
    sampler = samplers.DPMSolverMultistep(
        lower_order_final=name != "second order"
    )
    # Where diffusers ends without noise, we end with a billionth.
    schedule = Levels(np.maximum(sigmas, 1e-9))
    got = sampler(denoise_mixture, NOISE, schedule, num_steps)
    np.testing.assert_allclose(
        ops.convert_to_numpy(got), z.numpy(), atol=1e-5, rtol=0
    )
