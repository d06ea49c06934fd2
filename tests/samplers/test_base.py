"""One list of samplers, one suite; against the exact flow and exact laws."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

from keras_mscm import backend, samplers
from keras_mscm.schedules import NoiseSchedule
from tests.samplers.problems import (
    MANY,
    MEAN,
    MEANS,
    NOISE,
    ONE_STEP,
    SCHEDULES,
    VARIANCE,
    VARIANCES,
    VARIANTS,
    WEIGHTS,
    D,
    denoise_gaussian,
    denoise_mixture,
    every_grid,
    every_sampler,
    every_singlestep,
    every_stochastic,
    numpy_step,
    numpy_x_var,
    over,
    probability_flow,
    rates,
    sample,
    sample_eagerly,
    some_x_var,
)


def test_the_flow_is_known_for_a_gaussian():
    # It keeps the quantile of z, which moves from one normal to another.
    (alpha_1, sigma_1), (alpha_0, sigma_0) = rates(-15.0), rates(15.0)
    stretch = (alpha_0**2 * VARIANCE + sigma_0**2) ** 0.5
    stretch /= (alpha_1**2 * VARIANCE + sigma_1**2) ** 0.5
    expected = alpha_0 * MEAN + stretch * (NOISE - alpha_1 * MEAN)
    got = probability_flow(denoise_gaussian, NOISE, -15.0, 15.0)
    np.testing.assert_allclose(got, expected, atol=1e-8)


# What every sampler is.


@every_sampler
def test_the_number_of_steps_may_be_a_tensor(sampler):
    expected = sample_eagerly(sampler, 4)
    got = sample_eagerly(sampler, ops.convert_to_tensor(4, "int32"))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    if sampler.stochastic and backend.NAME == "tensorflow":
        return  # where XLA draws other random numbers
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(sample(sampler, 4), expected, atol=1e-5 * scale)


@every_sampler
def test_the_loop_is_compiled_once(sampler):
    traces, evaluations = [], []

    def denoise(z, logsnr):
        evaluations.append(logsnr)
        return 0.5 * z

    def generate(noise, num_steps, seed):
        traces.append(num_steps)
        schedule = SCHEDULES["karras"]
        return sampler(denoise, noise, schedule, num_steps, seed)

    run = backend.compile_inference(generate, [])
    ends = [run(NOISE, np.int32(n), backend.random_state(1)) for n in (1, 3, 8)]
    assert np.ptp([ops.convert_to_numpy(end)[0, 0] for end in ends]) > 1e-3
    per_step = 2 if isinstance(sampler, samplers.Heun) else 1
    if backend.NAME == "torch":  # the only one that runs Python in each step
        assert len(evaluations) == per_step * (1 + 3 + 8)
    else:
        assert len(traces) == 1


@every_sampler
def test_images_keep_their_shape_and_to_themselves(sampler):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, 4, 4, 2), "float32")

    def denoise(z, logsnr):
        assert tuple(logsnr.shape) == (3,)
        return 0.5 * z

    def end(noise):
        schedule = SCHEDULES["karras"]
        got = sampler(denoise, noise, schedule, ops.convert_to_tensor(2), 7)
        return ops.convert_to_numpy(got)

    got = end(noise)
    assert got.shape == (3, 4, 4, 2)
    noise[1] = rng.standard_normal((4, 4, 2))
    changed = end(noise)
    np.testing.assert_array_equal(changed[[0, 2]], got[[0, 2]])
    assert np.abs(changed[1] - got[1]).max() > 0.01


def test_equal_arguments_make_equal_samplers():
    for i, sampler in enumerate(VARIANTS):
        for j, other in enumerate(VARIANTS):
            again = type(other)(**vars(other))
            assert (sampler == again) == (i == j)
            if i == j:
                assert hash(sampler) == hash(again)
    with pytest.raises(AttributeError):
        samplers.ADDIM().x_var = some_x_var


@over(VARIANTS)
def test_a_sampler_survives_serialisation(sampler):
    stored = keras.saving.serialize_keras_object(sampler)
    loaded = keras.saving.deserialize_keras_object(stored)
    assert type(loaded) is type(sampler)
    assert loaded == sampler


# Sampling may start anywhere in time.


class Rest(NoiseSchedule):
    """What a schedule has from `start` on, as a schedule of its own."""

    def __init__(self, schedule, start):
        self.schedule, self.start = schedule, start

    def __call__(self, t):
        return self.schedule(self.start * t)


@pytest.mark.parametrize("start", [1.0, 0.5, 0.3])
@every_sampler
def test_steps_from_a_start_divide_what_is_left_of_time(sampler, start):
    schedule, noise = SCHEDULES["karras"], ops.convert_to_tensor(NOISE)
    got = sampler(denoise_mixture, noise, schedule, 3, 1, start=start)
    rest = Rest(schedule, start)
    expected = sampler(denoise_mixture, noise, rest, 3, 1)
    got, expected = map(ops.convert_to_numpy, (got, expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@every_sampler
def test_a_start_may_be_a_tensor(sampler):
    traces = []

    def generate(noise, num_steps, seed, start):
        traces.append(start)
        schedule = SCHEDULES["karras"]
        return sampler(denoise_mixture, noise, schedule, num_steps, seed, start)

    run = backend.compile_inference(generate, [])
    state = backend.random_state(1)
    for steps, start in ((2, 0.7), (4, 0.7), (4, 0.2)):
        got = run(NOISE, np.int32(steps), state, np.float32(start))
        expected = sampler(
            denoise_mixture,
            NOISE,
            Rest(SCHEDULES["karras"], start),
            steps,
            ops.convert_to_tensor(state),
        )
        got, expected = map(ops.convert_to_numpy, (got, expected))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert len(traces) == (3 if backend.NAME == "torch" else 1)


@pytest.mark.parametrize("start", [0, -0.1, 1.1, np.nan, "noise", None, True])
def test_a_start_is_a_time_after_the_end(start):
    with pytest.raises(ValueError, match="`start` must be a number in"):
        samplers.DDIM()(
            denoise_mixture, NOISE, SCHEDULES["cosine"], 2, start=start
        )


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_a_noisy_image_leads_to_one_that_may_have_been_it(start):
    """What comes of noisy data at any time are samples of the data."""
    rng = np.random.default_rng(3)
    modes = rng.choice(2, len(MANY), p=WEIGHTS)
    x = MEANS[modes] + VARIANCES[modes, None] ** 0.5 * rng.standard_normal(
        MANY.shape
    )
    schedule = SCHEDULES["karras"]
    alpha, sigma = rates(float(schedule(np.float32(start))))
    noisy = (alpha * x + sigma * MANY).astype("float32")
    sampler = samplers.DPMSolverMultistep()
    got = sampler(denoise_mixture, noisy, schedule, 48, start=start)
    error, excess, distance = off_the_law(ops.convert_to_numpy(got))
    assert error < 4
    assert abs(excess) < 0.05
    assert distance < 1.95 / len(MANY) ** 0.5


# A step may remember those before.


class Memory(samplers.Sampler):
    """Ends at the mean of all predictions, evaluating as often as it likes."""

    def init(self, z, num_steps):
        return {"sum": ops.zeros_like(z), "steps": (ops.zeros((), "int32"),)}

    def advance(self, z_t, state, logsnr_t, logsnr_s, denoise, seed):
        early, late = denoise(z_t, logsnr_t), denoise(z_t, logsnr_s)
        total = state["sum"] + (early + late) / 2
        steps = state["steps"][0] + 1
        mean = total / ops.cast(steps, "float32")
        return mean, {"sum": total, "steps": (steps,)}


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_sampler_of_ones_own_may_carry_state(num_steps):
    def denoise(z, logsnr):
        return ops.ones_like(z) * logsnr[:, None]

    schedule = SCHEDULES["cosine"]
    levels = ops.convert_to_numpy(
        schedule(np.arange(num_steps + 1, dtype="float32") / num_steps)
    )
    expected = np.mean((levels[1:] + levels[:-1]) / 2)
    got = sample(Memory(), num_steps, denoise=denoise)
    np.testing.assert_allclose(got, np.full(NOISE.shape, expected), atol=1e-5)


# One step is what the paper says.


@over(ONE_STEP)
def test_a_step_is_its_equation(sampler):
    t = np.float32([1, 0.7, 0.5, 0.2, 0.01, 0.5])
    s = np.float32([0.9, 0.6, 0.499, 0, 0, 0.1])
    logsnr_t, logsnr_s = (
        ops.convert_to_numpy(SCHEDULES["karras"](x)) for x in (t, s)
    )
    exact = [x.astype("float64") for x in (logsnr_t, logsnr_s)]
    z = NOISE
    x = denoise_mixture(z.astype("float64"), exact[0], np)
    seed = samplers.StepSeed(backend.random_state(3), 0)
    noise = seed.normal(NOISE)
    got = sampler.step(
        *(ops.convert_to_tensor(a, "float32") for a in (x, z)),
        *(ops.convert_to_tensor(a, "float32") for a in exact),
        denoise_mixture,
        seed,
    )
    expected = numpy_step(
        sampler,
        x.astype("float32").astype("float64"),
        z.astype("float64"),
        *exact,
        denoise_mixture,
        ops.convert_to_numpy(noise).astype("float64"),
        numpy_x_var(sampler),
    )
    # Heun's x is as far from x_t as x_s, half of tau_t / tau_s times over.
    scale = 1 + np.exp((exact[1] - exact[0]) / 2)[:, None]
    if not isinstance(sampler, samplers.Heun):
        scale = 1.0
    error = np.abs(ops.convert_to_numpy(got) - expected)
    assert np.all(error <= 2e-5 * scale)


@every_grid
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@every_singlestep
def test_samples_are_the_algorithms(sampler, num_steps, grid):
    schedule, z, stretch = SCHEDULES[grid], NOISE.astype("float64"), 1.0
    for i in range(num_steps, 0, -1):
        logsnr_t, logsnr_s = (
            np.full(len(z), float(schedule(np.float32(j / num_steps))))
            for j in (i, i - 1)
        )
        x = denoise_mixture(z, logsnr_t, np)
        x_var = numpy_x_var(sampler)
        step = logsnr_t, logsnr_s, denoise_mixture, None, x_var
        z = numpy_step(sampler, x, z, *step)
        if isinstance(sampler, samplers.Heun):
            # Which multiplies what x changes by, and its rounding, with this.
            ratio = np.exp((logsnr_s - logsnr_t)[0] / 2) / 2
            stretch = max(stretch, ratio)
    got = sample(sampler, num_steps, grid)
    np.testing.assert_allclose(got, z, atol=4e-5 * stretch)


# What all samplers draw are samples of the data.


def off_the_law(samples):
    """How far samples are from the mixture.

    The mean's distance in standard errors, the relative error of the mean
    square, and the Kolmogorov-Smirnov distance along the line through the
    modes.
    """
    mean = WEIGHTS @ MEANS
    error = np.abs(samples.mean(axis=0) - mean)
    error /= samples.std(axis=0) / len(samples) ** 0.5
    power = WEIGHTS @ (np.sum(MEANS**2, axis=1) + D * VARIANCES)
    excess = np.sum(samples**2, axis=1).mean() / power - 1
    along = (MEANS[0] - MEANS[1]) / np.linalg.norm(MEANS[0] - MEANS[1])
    normals = stats.norm(MEANS @ along, VARIANCES**0.5)
    distance = stats.kstest(
        samples @ along, lambda u: normals.cdf(u[:, None]) @ WEIGHTS
    )
    return error.max(), excess, distance.statistic


@every_grid
@every_sampler
def test_samples_tend_to_the_data(sampler, grid):
    error, excess, distance = zip(
        *(
            off_the_law(sample(sampler, n, grid, noise=MANY))
            for n in (4, 16, 128)
        )
    )
    # With 128 steps all that is left is chance, and 1 / N of DDPM.
    assert error[-1] < 4
    assert abs(excess[-1]) < 0.07
    assert distance[-1] < 1.95 / len(MANY) ** 0.5  # p = 0.001
    # With 4 steps the same numbers say no.
    assert distance[0] > 0.07
    assert abs(excess[0]) > 0.1
    assert distance[1] < 0.7 * distance[0]


# On one Gaussian a stochastic sampler's law is known for any number of steps:
# z_0 is A z_1 + B, and normal noise of a variance F.


def gaussian_law(sampler, num_steps, x_var):
    schedule, a, b, f = SCHEDULES["karras"], 1.0, np.zeros(D), 0.0
    for i in range(num_steps, 0, -1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            rates(float(schedule(np.float32(j / num_steps))))
            for j in (i, i - 1)
        )
        gain = alpha_t * VARIANCE / (alpha_t**2 * VARIANCE + sigma_t**2)
        if isinstance(sampler, samplers.DDPM):  # eq. 1
            alpha_ts = alpha_t / alpha_s
            sigma2_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
            fresh = 1 / (1 / sigma_s**2 + alpha_ts**2 / sigma2_ts)
            of_z = fresh * alpha_ts / sigma2_ts
            of_x = fresh * alpha_s / sigma_s**2
        else:  # eq. 10
            of_z = sigma_s / sigma_t
            of_x = alpha_s - alpha_t * of_z
            fresh = of_x**2 * x_var(alpha_t**2 / sigma_t**2)
        # x = MEAN + gain (z - alpha_t MEAN)
        kept = of_z + of_x * gain
        a, f = kept * a, kept**2 * f + fresh
        b = kept * b + of_x * (1 - gain * alpha_t) * MEAN
    return a, b, f


def fresh_noise(sampler, num_steps, x_var, seed=0):
    """What a sampler adds to what it was given; and its exact variance."""
    a, b, f = gaussian_law(sampler, num_steps, x_var)
    got = sample(
        sampler,
        num_steps,
        "karras",
        noise=MANY,
        denoise=denoise_gaussian,
        seed=seed,
    )
    return got - a * MANY - b, f


@pytest.mark.parametrize("num_steps", [1, 2, 8])
@every_stochastic
def test_a_stochastic_sampler_has_the_law_of_its_equation(sampler, num_steps):
    noise, variance = fresh_noise(
        sampler, num_steps, lambda snr: 0.1 / (2 + snr)
    )
    count = noise.size
    assert abs(noise.mean()) < 4 * (variance / count) ** 0.5
    # Right to 4 %, also for 8 steps: were any two steps' noise the same, it
    # would be far more.
    assert abs(noise.var() / variance - 1) < 4 * (2 / count) ** 0.5
    # It is new in each image and at each place, and not the one given.
    pairs = [(noise[:-1], noise[1:]), (noise[:, 1:], noise[:, :-1])]
    for one, other in [*pairs, (noise, MANY)]:
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 4 / count**0.5


@every_stochastic
def test_a_seed_is_a_sample(sampler):
    x_var, tolerance = (lambda snr: 0.1 / (2 + snr)), 4 / MANY.size**0.5
    first, again, second = (
        fresh_noise(sampler, 8, x_var, seed)[0].ravel() for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    # Neighbouring seeds' steps are no neighbours.
    assert abs(np.corrcoef(first, second)[0, 1]) < tolerance


class Walk(samplers.Sampler):
    """Ends at the sum of all the noise that it drew."""

    stochastic = True

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        return z_t + keras.random.normal(ops.shape(z_t), seed=seed)


def test_what_may_be_a_seed():
    def draw(seed):
        return sample_eagerly(Walk(), 2, lambda z, logsnr: z, seed)

    state = keras.random.SeedGenerator(3).state
    for one, other in ((5, np.int64(5)), (state, state.value)):
        np.testing.assert_array_equal(draw(one), draw(other))
    draws = [draw(seed) for seed in (5, 6, state, None, None)]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert np.abs(one - other).max() > 0.1
    # Without one, random numbers are Keras': `set_random_seed` rules them.
    keras.utils.set_random_seed(0)
    first = draw(None)
    keras.utils.set_random_seed(0)
    np.testing.assert_array_equal(draw(None), first)
