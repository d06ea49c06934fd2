"""Diffusion training against NumPy, and what a trained model samples."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, losses, samplers, schedules

PATTERN = np.where(np.indices((4, 4)).sum(0) % 2, 0.8, -0.8)[..., None]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


def to_numpy(*tensors):
    arrays = [ops.convert_to_numpy(t).astype("float64") for t in tensors]
    return arrays if len(arrays) > 1 else arrays[0]


@pytest.mark.parametrize(
    "weighting", [losses.snr_plus_one, losses.sqrt_snr_plus_one]
)
def test_the_example(weighting, make_teacher, toy_images):
    schedule = schedules.CosineSchedule(logsnr_min=-6.0, logsnr_max=4.0)
    model = make_teacher(
        model_with={"schedule": schedule, "weighting": weighting}
    )
    images = toy_images(512)
    inputs, target, weight = model.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    assert set(inputs) == {"z", "logsnr"}
    np.testing.assert_array_equal(ops.convert_to_numpy(target), images)
    z, logsnr, weight = to_numpy(inputs["z"], inputs["logsnr"], weight)

    # Times are uniform in [0, 1]: alpha^2 = cos^2 of an angle uniform too.
    assert logsnr.shape == (512,)
    assert np.all((logsnr >= -6) & (logsnr <= 4))
    angle = np.arctan(np.exp(-logsnr / 2))
    low, high = np.arctan(np.exp([-2.0, 3.0]))
    time = (angle - low) / (high - low)
    np.testing.assert_allclose(
        np.quantile(time, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.06
    )
    # z_t = alpha x + sigma epsilon, with standard normal noise.
    alpha = np.sqrt(sigmoid(logsnr))[:, None, None, None]
    sigma = np.sqrt(sigmoid(-logsnr))[:, None, None, None]
    epsilon = (z - alpha * images) / sigma
    assert abs(epsilon.mean()) < 0.03
    assert abs(epsilon.std() - 1) < 0.03
    assert abs((epsilon**4).mean() - 3) < 0.3
    correlation = np.corrcoef(epsilon.ravel(), images.ravel())[0, 1]
    assert abs(correlation) < 0.04

    expected = np.exp(logsnr) + 1
    if weighting is losses.sqrt_snr_plus_one:
        expected = np.sqrt(expected)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_the_noise_is_new_at_every_step(make_teacher, toy_images):
    model, images = make_teacher(), ops.convert_to_tensor(toy_images(4))
    draws = [model.training_example(images, {}, True)[0] for _ in range(2)]
    for name in ("z", "logsnr"):
        a, b = to_numpy(draws[0][name], draws[1][name])
        assert np.all(np.abs(a - b).reshape(4, -1).max(-1) > 1e-4)


def test_the_loss_is_the_numpy_loss(make_teacher, toy_images):
    model = make_teacher(
        compile_with={"loss": losses.PseudoHuber(0.1)},
        model_with={"weighting": losses.snr_plus_one},
    )
    images = toy_images(8)
    state = ops.copy(model.seed_generator.state.value)
    loss = model.evaluate(images, batch_size=8, verbose=0)
    model.seed_generator.state.assign(state)
    inputs, _, _ = model.training_example(
        ops.convert_to_tensor(images), {}, False
    )
    v, z, logsnr = to_numpy(
        model.ema_network(inputs), inputs["z"], inputs["logsnr"]
    )
    rate = logsnr[:, None, None, None]
    x = np.sqrt(sigmoid(rate)) * z - np.sqrt(sigmoid(-rate)) * v
    square = np.mean((x - images) ** 2, axis=(1, 2, 3))
    expected = np.mean((np.exp(logsnr) + 1) * (np.sqrt(square + 0.01) - 0.1))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_it_learns_what_it_samples(dense_network):
    # Two classes, each of one image: a trained model has but one answer.
    images = np.stack([PATTERN, -PATTERN] * 640).astype("float32")
    labels = np.array([0, 1] * 640)
    model = DiffusionModel(
        dense_network(num_classes=2),
        image_shape=(4, 4, 1),
        num_classes=2,
        ema_decay=0.9,
        seed=1,
    )
    model.compile(keras.optimizers.Adam(1e-2))
    noise = np.random.default_rng(0).standard_normal((8, 4, 4, 1))
    wanted = [0, 1, 1, 0, 0, 1, 0, 1]
    target = np.stack([PATTERN, -PATTERN])[wanted]

    def error(sampler):
        got = model.generate(
            noise=noise, labels=wanted, sampler=sampler, num_steps=16
        )
        return np.mean(np.abs(got - target))

    assert error(samplers.DDIM()) > 0.5
    history = model.fit(images, labels, batch_size=128, epochs=20, verbose=0)
    assert history.history["loss"][-1] < 0.4 * history.history["loss"][0]
    assert error(samplers.DDIM()) < 0.3
    assert error(samplers.ADDIM()) < 0.3
