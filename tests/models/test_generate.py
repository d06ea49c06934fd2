"""What `generate` draws depends on the seed and the image's number alone."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, backend, samplers
from keras_mscm import functional as F
from keras_mscm.checks import SEED_END

STOCHASTIC = {"ddpm": samplers.DDPM(), "noisy": samplers.NoisyDDIM()}


@pytest.fixture
def model(make_teacher):
    return make_teacher()


@pytest.mark.parametrize("name", ["ddim", *STOCHASTIC])
def test_batch_size_and_number_have_no_say(name, model):
    arguments = {"num_steps": 3, "sampler": samplers.DDIM(), "seed": 5}
    if name in STOCHASTIC:
        arguments["sampler"] = STOCHASTIC[name]
    whole = model.generate(7, **arguments)
    for num, batch_size in ((7, 3), (7, 1), (4, 4)):
        images = model.generate(num, batch_size=batch_size, **arguments)
        np.testing.assert_allclose(images, whole[:num], atol=1e-5)
    # No two images and no two seeds share theirs.
    other = model.generate(7, **{**arguments, "seed": 6})
    drawn = [*whole, *other]
    for i, one in enumerate(drawn):
        for another in drawn[:i]:
            assert np.abs(one - another).max() > 0.01


def test_the_noise_is_the_same_on_every_backend(model):
    noise = F.normal(backend.random_state(5)[0], np.arange(3), 0, (4, 4, 1))
    np.testing.assert_allclose(
        model.generate(3, seed=5, num_steps=2),
        model.generate(noise=ops.convert_to_numpy(noise), num_steps=2),
        atol=1e-5,
    )
    # As PyTorch drew it; the others must draw the same.
    expected = [-0.7226554, 0.2356168, -0.8620217]
    got = ops.convert_to_numpy(noise).ravel()[:3]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 3, SEED_END - 1])
def test_what_may_be_a_seed(seed, model):
    images = model.generate(2, num_steps=1, seed=seed)
    for same in (np.int64(seed), np.uint32(seed)):
        np.testing.assert_array_equal(
            model.generate(2, num_steps=1, seed=same), images
        )


@pytest.mark.parametrize(
    "seed", [-1, SEED_END, 2**32, 2**40, 0.5, True, "3", np.nan, [3]]
)
def test_what_may_not(seed, model, dense_network):
    for run in (
        lambda: model.generate(2, num_steps=1, seed=seed),
        lambda: DiffusionModel(
            dense_network(), image_shape=(4, 4, 1), seed=seed
        ),
        lambda: model.measure_x_var(np.zeros((2, 4, 4, 1)), seed=seed),
        lambda: samplers.DDPM()(
            lambda z, logsnr: z, np.zeros((1, 2)), model.schedule, 1, seed=seed
        ),
    ):
        with pytest.raises(ValueError, match=r"`seed` must be an integer in 0"):
            run()


def test_without_one_set_random_seed_rules(model):
    draws = []
    for number in (1, 1, 2):
        keras.utils.set_random_seed(number)
        draws.append(model.generate(2, num_steps=1))
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 0.01


def test_neighbouring_seeds_share_no_training_noise():
    streams = []
    for seed in (0, 1, 2):
        generator = backend.seed_generator(seed)
        streams += [
            ops.convert_to_numpy(keras.random.normal((8,), seed=generator))
            for _ in range(5)
        ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert np.abs(one - other).max() > 0.1


def test_noise_that_is_not_finite_is_refused(model):
    for value in (np.nan, np.inf):
        noise = np.zeros((2, 4, 4, 1))
        noise[1, 2, 3, 0] = value
        for given in (noise, ops.convert_to_tensor(noise, "float32")):
            with pytest.raises(ValueError, match="`noise` must be finite"):
                model.generate(noise=given, num_steps=1)


def test_checking_draws_nothing(model, make_student, count_calls):
    student = make_student()
    calls = [count_calls(model, "denoise"), count_calls(student, "denoise")]
    model.check_generate(3, num_steps=2, sampler=samplers.Heun(), seed=1)
    student.check_generate(num_images=3, num_steps=2)
    for check, error, text in (
        (lambda: student.check_generate(num_steps=3), ValueError, "num_steps"),
        (lambda: model.check_generate(num_steps=0), ValueError, "num_steps"),
        (lambda: model.check_generate(sampler="ddim"), ValueError, "sampler"),
        (lambda: model.check_generate(schedule="cos"), ValueError, "schedule"),
        (lambda: model.check_generate(labels=[1]), ValueError, "labels"),
        (lambda: model.check_generate(steps=3), TypeError, "steps"),
        (
            lambda: model.check_generate(guidance_scale=np.nan),
            ValueError,
            "guidance_scale",
        ),
    ):
        with pytest.raises(error, match=f"['`]{text}['`]"):
            check()
    assert calls == [[], []]
