import math

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_mscm import MultistepConsistencyModel, backend
from keras_mscm.adapters.keras_io import from_keras_io_ddim, offset_cosine
from tests.adapters.tiny import (
    check_several_steps,
    check_student,
    difference,
    perturb,
    sampled,
)

SHAPE = (8, 8, 3)
NOISE = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype("float32")


@keras.saving.register_keras_serializable(package="tests")
def sinusoidal_embedding(x):
    frequencies = ops.exp(ops.linspace(math.log(1.0), math.log(1000.0), 8))
    angular_speeds = ops.cast(2.0 * math.pi * frequencies, "float32")
    x = ops.cast(x, "float32")
    return ops.concatenate(
        [ops.sin(angular_speeds * x), ops.cos(angular_speeds * x)], axis=3
    )


def get_network():
    """The example's, of one residual block a stage."""

    def residual(width):
        def apply(x):
            skip = x if x.shape[3] == width else layers.Conv2D(width, 1)(x)
            x = layers.BatchNormalization(center=False, scale=False)(x)
            x = layers.Conv2D(width, 3, padding="same", activation="swish")(x)
            x = layers.Conv2D(width, 3, padding="same")(x)
            return layers.Add()([x, skip])

        return apply

    noisy_images = keras.Input(SHAPE)
    noise_variances = keras.Input((1, 1, 1))
    e = layers.Lambda(sinusoidal_embedding, output_shape=(1, 1, 16))(
        noise_variances
    )
    e = layers.UpSampling2D(size=8, interpolation="nearest")(e)
    x = layers.Conv2D(8, kernel_size=1)(noisy_images)
    x = layers.Concatenate()([x, e])
    x = skip = residual(8)(x)
    x = layers.AveragePooling2D(pool_size=2)(x)
    x = residual(12)(x)
    x = layers.UpSampling2D(size=2, interpolation="bilinear")(x)
    x = layers.Concatenate()([x, skip])
    x = residual(8)(x)
    x = layers.Conv2D(3, kernel_size=1)(x)
    return keras.Model([noisy_images, noise_variances], x)


@pytest.fixture(scope="module")
def network():
    network = get_network()
    perturb(network)
    return network


@pytest.fixture(scope="module")
def normalizer():
    normalizer = layers.Normalization()
    images = np.random.default_rng(1).uniform(0.2, 0.9, (16, *SHAPE))
    normalizer.adapt(images * [1.0, 0.7, 0.4])
    return normalizer


def reverse_diffusion(network, initial_noise, diffusion_steps):
    """The example's sampler, line by line."""
    said = backend.compile_inference(
        lambda *inputs: network([*inputs]), network.variables
    )

    def diffusion_schedule(diffusion_times):
        start_angle = np.arccos(0.95)
        end_angle = np.arccos(0.02)
        diffusion_angles = start_angle + diffusion_times * (
            end_angle - start_angle
        )
        return np.sin(diffusion_angles), np.cos(diffusion_angles)

    num_images = len(initial_noise)
    step_size = 1.0 / diffusion_steps
    next_noisy_images = initial_noise.astype("float64")
    for step in range(diffusion_steps):
        noisy_images = next_noisy_images
        diffusion_times = np.ones((num_images, 1, 1, 1)) - step * step_size
        noise_rates, signal_rates = diffusion_schedule(diffusion_times)
        inputs = [noisy_images, noise_rates**2]
        inputs = [ops.convert_to_tensor(value, "float32") for value in inputs]
        pred_noises = ops.convert_to_numpy(said(*inputs)).astype("float64")
        pred_images = (noisy_images - noise_rates * pred_noises) / signal_rates
        next_diffusion_times = diffusion_times - step_size
        next_noise_rates, next_signal_rates = diffusion_schedule(
            next_diffusion_times
        )
        next_noisy_images = (
            next_signal_rates * pred_images + next_noise_rates * pred_noises
        )
    return pred_images


@pytest.mark.parametrize("num_steps", [4, 50])
def test_its_images_are_the_examples(network, num_steps):
    model = from_keras_io_ddim(network)
    expected = reverse_diffusion(network, NOISE, num_steps)
    assert difference(sampled(model, NOISE, num_steps), expected) < 1e-4


def test_a_number_of_steps_that_does_not_divide_has_a_schedule(network):
    model = from_keras_io_ddim(network)
    ours = sampled(model, NOISE, 7, offset_cosine(num_steps=7))
    expected = reverse_diffusion(network, NOISE, 7)
    assert difference(ours, expected) < 1e-4


def test_a_normalizers_images_are_its_own(network, normalizer):
    model = from_keras_io_ddim(network, normalizer=normalizer)
    images = np.random.default_rng(2).uniform(0, 1, (2, *SHAPE))
    normalised = normalizer(ops.convert_to_tensor(images, "float32"))
    pictures = ops.convert_to_tensor(2 * images - 1, "float32")
    assert difference(model.space.encode(pictures), normalised) < 1e-5
    mean, variance = (
        ops.convert_to_numpy(v) for v in (normalizer.mean, normalizer.variance)
    )
    x = sampled(model, NOISE, 4)
    expected = np.clip(mean + np.sqrt(variance) * x, 0, 1)  # the example's
    drawn = ops.convert_to_numpy(model.space.decode(ops.convert_to_tensor(x)))
    np.testing.assert_allclose((drawn + 1) / 2, expected, atol=1e-5)


def test_a_student_begins_with_its_weights_and_learns(network, normalizer):
    model = from_keras_io_ddim(network, normalizer=normalizer)
    student = MultistepConsistencyModel.from_teacher(model, student_steps=2)
    inputs = {
        "z": ops.convert_to_tensor(NOISE),
        "logsnr": ops.convert_to_tensor([-3.0, 2.0]),
    }
    assert difference(student.network(inputs), model.network(inputs)) == 0
    check_student(student, np.clip(NOISE, -1, 1), None)


def test_a_student_of_several_numbers_of_steps(network, tmp_path):
    model = from_keras_io_ddim(network)
    check_several_steps(model, np.clip(NOISE, -1, 1), None, tmp_path)
    embeds = network.get_layer(model.network.time_embedding)
    assert isinstance(embeds, layers.Lambda)


def test_saved_and_loaded_it_samples_the_same(network, normalizer, tmp_path):
    model = from_keras_io_ddim(network, normalizer=normalizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    drawn = [sampled(m, NOISE, 4) for m in (model, loaded)]
    np.testing.assert_allclose(*drawn, rtol=1e-5, atol=1e-5)


def test_what_is_lacking_is_said():
    z, time = keras.Input((None, None, 3)), keras.Input((1, 1, 1))
    open_network = keras.Model([z, time], layers.Conv2D(3, 1)(z) + time)
    with pytest.raises(ValueError, match="`image_shape` must be given"):
        from_keras_io_ddim(open_network)
    with pytest.raises(ValueError, match="`min_signal_rate` must be in"):
        offset_cosine(min_signal_rate=0.0)
    with pytest.raises(ValueError, match="`alphas_cumprod` must be"):
        offset_cosine(0.9, 0.5)
