"""One list of samplers, one suite; against the exact flow and exact laws."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats
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
every_deterministic = over([s for s in ALL if not s.stochastic])
every_stochastic = over([s for s in ALL if s.stochastic])
every_grid = pytest.mark.parametrize("grid", SCHEDULES)

# Data from two Gaussians.
D = 8
WEIGHTS = np.array([0.6, 0.4])
MEANS = np.random.default_rng(1).normal(0, 0.7, (2, D))
VARIANCES = np.array([0.1, 0.2])

NOISE = np.random.default_rng(0).standard_normal((6, D)).astype("float32")


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


def test_the_flow_is_known_for_a_gaussian():
    # It keeps the quantile of z, which moves from one normal to another.
    (alpha_1, sigma_1), (alpha_0, sigma_0) = rates(-15.0), rates(15.0)
    stretch = (alpha_0**2 * VARIANCE + sigma_0**2) ** 0.5
    stretch /= (alpha_1**2 * VARIANCE + sigma_1**2) ** 0.5
    expected = alpha_0 * MEAN + stretch * (NOISE - alpha_1 * MEAN)
    got = probability_flow(denoise_gaussian, NOISE, -15.0, 15.0)
    np.testing.assert_allclose(got, expected, atol=1e-8)


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


@keras.saving.register_keras_serializable(package="test_samplers")
def some_x_var(logsnr):
    return 0.03 / (3.0 + ops.exp(logsnr))


VARIANTS = (
    *ALL,
    samplers.ADDIM(x_var=some_x_var),
    samplers.NoisyDDIM(x_var=some_x_var),
)


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


# One step is what the paper says.


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


@over(VARIANTS)
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
@every_deterministic
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


# Deterministic samplers are integrators of the probability flow.


def errors(sampler, grid, steps):
    goal = flow_end(grid)
    return np.array(
        [np.abs(sample(sampler, n, grid) - goal).max() for n in steps]
    )


@every_grid
def test_ddim_is_of_first_order(grid):
    error = errors(samplers.DDIM(), grid, (32, 64, 128, 256))
    ratios = error[:-1] / error[1:]
    assert np.all((ratios > 1.9) & (ratios < 2.1))
    assert error[-1] < 0.02


@every_grid
def test_heun_is_of_second_order(grid):
    error = errors(samplers.Heun(), grid, (16, 32, 64, 128, 256))
    ratios = error[:-1] / error[1:]
    # On the cosine grids the error falls by 8 before it falls by 4: the first
    # step carries it (see below), and is multiplied by 1 / N.
    assert np.all((ratios > 3.8) & (ratios < (4.5 if grid == "karras" else 9)))
    assert error[-1] < 3e-4


def test_heun_wants_the_grid_of_karras():
    # Appendix A.4. Heun's step changes x by tau_t / (2 tau_s) (x_s - x_t), and
    # the cosine grid's first step is a long one in tau = sigma / alpha: from
    # 1808 to 2 N / pi. With as many evaluations DDIM is better there.
    for evaluations in (16, 32):
        heun, ddim = (
            {grid: errors(sampler, grid, [steps])[0] for grid in SCHEDULES}
            for sampler, steps in (
                (samplers.Heun(), evaluations // 2),
                (samplers.DDIM(), evaluations),
            )
        )
        assert heun["cosine"] > 5 * ddim["cosine"]
        assert heun["cosine"] > 5 * heun["karras"]
    assert heun["karras"] < ddim["karras"]
    assert errors(samplers.Heun(), "cosine", [4]) > 10


@every_grid
def test_addim_tends_to_ddim_and_to_the_flow(grid):
    # On the cosine grids by half for four times the steps, not by a quarter:
    # these data fill space, so epsilon_hat goes to 0 with sigma, and in the
    # last sqrt(N) steps what aDDIM adds is no longer small beside it. The grid
    # of Karras has smaller steps there.
    steps = (16, 64, 256)
    addim, ddim = (
        [sample(sampler, n, grid) for n in steps]
        for sampler in (samplers.ADDIM(), samplers.DDIM())
    )
    apart = np.array([np.abs(a - b).max() for a, b in zip(addim, ddim)])
    ratios = apart[:-1] / apart[1:]
    assert np.all((ratios > 1.7) & (ratios < 4))
    assert np.abs(addim[-1] - flow_end(grid)).max() < 0.04


@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_ddim_with_a_prediction_that_stays_ends_there(num_steps):
    x = ops.full(NOISE.shape, 0.7)
    got = sample_eagerly(samplers.DDIM(), num_steps, lambda z, logsnr: x)
    # alpha_0 x, and of the noise as much as sigma_0 = 5.5e-4.
    alpha_0, sigma_0 = rates(15.0)
    expected = alpha_0 * 0.7 + sigma_0 * (NOISE - sigma_0 * 0.7)
    np.testing.assert_allclose(got, expected, atol=2e-6)


# What all samplers draw are samples of the data.

MANY = np.random.default_rng(5).standard_normal((1024, D)).astype("float32")


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
