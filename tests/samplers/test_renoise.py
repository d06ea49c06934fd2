"""Renoise: a prediction, and fresh noise of the next level."""

import numpy as np
from keras import ops

from keras_mscm import samplers
from tests.samplers.problems import MANY, SCHEDULES, rates

SCHEDULE = SCHEDULES["cosine"]
PICTURE = np.linspace(-1, 1, MANY.shape[1]).astype("float32")


def after(num_steps, seed=0):
    """What the last of several steps was told, and what it returned."""
    told = []

    def denoise(z, logsnr):
        told.append((ops.convert_to_numpy(z), ops.convert_to_numpy(logsnr)))
        return ops.zeros_like(z) + PICTURE

    # A loop of one step, run step by step, since a compiled one hides z.
    times = np.linspace(1, 0, num_steps + 1).astype("float32")
    z = ops.convert_to_tensor(MANY)
    for i in range(num_steps):
        seed_of_step = samplers.StepSeed(np.int32([seed, 0]), i)
        logsnr_t, logsnr_s = (
            ops.broadcast_to(SCHEDULE(t), (len(MANY),))
            for t in times[i : i + 2]
        )
        z, _ = samplers.Renoise().advance(
            z, (), logsnr_t, logsnr_s, denoise, seed_of_step
        )
    return told, ops.convert_to_numpy(z)


def test_a_step_keeps_nothing_but_the_prediction():
    told, last = after(2)
    middle, logsnr = told[1]
    alpha, sigma = rates(logsnr.astype("float64"))
    noise = (middle - alpha[:, None] * PICTURE) / sigma[:, None]
    np.testing.assert_allclose(np.mean(noise), 0, atol=0.03)
    np.testing.assert_allclose(np.std(noise), 1, atol=0.03)
    # It is fresh: neither what sampling began with, nor its mirror image.
    assert np.abs(np.corrcoef(noise.ravel(), MANY.ravel())[0, 1]) < 0.05
    np.testing.assert_allclose(
        last, np.tile(PICTURE, (len(MANY), 1)), atol=0.01
    )


def test_an_image_has_its_own_noise():
    sampler = samplers.Renoise()

    def denoise(z, logsnr):
        return 0.5 * z

    def sample(noise, seed):
        got = sampler(denoise, noise, SCHEDULE, 3, seed)
        return ops.convert_to_numpy(got)

    whole = sample(MANY[:4], 1)
    np.testing.assert_allclose(whole[:2], sample(MANY[:2], 1), atol=1e-6)
    assert np.abs(whole - sample(MANY[:4], 2)).max() > 0.1
