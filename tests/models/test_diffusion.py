"""Diffusion training against NumPy, and what a trained model samples."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, functional, losses, samplers, schedules
from tests.models.data_forms import as_py_dataset, as_tf_data, in_batches

EAGER = keras.backend.backend() == "torch"
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


# The empirical posterior variance (algorithm 3).


@pytest.fixture
def label_model():
    """Predicts one grey for each of three classes, whatever it sees."""
    z = keras.Input((4, 4, 1), name="z")
    labels = keras.Input((), dtype="int32", name="labels")
    logsnr = keras.Input((), name="logsnr")
    grey = keras.layers.Embedding(4, 1)(labels)
    output = keras.layers.RepeatVector(16)(grey)
    output = keras.layers.Reshape((4, 4, 1))(output)
    model = DiffusionModel(
        keras.Model({"z": z, "logsnr": logsnr, "labels": labels}, output),
        image_shape=(4, 4, 1),
        num_classes=3,
        prediction_type="x",
    )
    model.network.set_weights([np.full((4, 1), 7.0)])  # not this one
    model.ema_network.set_weights([GREYS[:, None]])
    return model


GREYS = np.array([-0.5, 0.1, 0.4, 9.0])
LABELS = np.arange(10) % 3

# Where x_var is measured: evenly in the time of the cosine schedule.
LEVELS = -2 * np.log(np.tan((np.arange(64) + 0.5) / 64 * np.pi / 2))


@pytest.mark.parametrize(
    "data",
    [
        lambda images, labels: (images, labels),
        lambda images, labels: (images, {"labels": labels}),
        lambda images, labels: (in_batches(images, labels),),
        lambda images, labels: (as_py_dataset(images, labels),),
        lambda images, labels: (as_tf_data(images, labels),),
    ],
    ids=["arrays", "dictionary", "generator", "py_dataset", "tf_data"],
)
def test_x_var_is_the_share_of_the_squared_error(data, label_model, toy_images):
    # Whose mean is over all images, also where the last batch is smaller.
    images = toy_images(10)
    off = images - GREYS[LABELS, None, None, None]
    label_model.measure_x_var(*data(images, LABELS), eta=0.6, batch_size=4)
    logsnr = ops.convert_to_tensor(LEVELS, "float32")
    expected = np.full(64, np.mean(off**2))
    got = to_numpy(label_model.x_var(logsnr))
    np.testing.assert_allclose(got, 0.6 * expected, rtol=1e-3)
    label_model.measure_x_var(images, LABELS)  # the paper's 0.75
    got = to_numpy(label_model.x_var(logsnr))
    np.testing.assert_allclose(got, 0.75 * expected, rtol=1e-3)


@keras.saving.register_keras_serializable(package="test_diffusion")
class GaussianDenoiser(keras.layers.Layer):
    """`E[x | z_t]` for pixels that are independently normal."""

    variance = 0.05

    def call(self, inputs):
        snr = ops.exp(inputs["logsnr"])[:, None, None, None]
        alpha = ops.sqrt(snr / (1 + snr))
        gain = alpha * self.variance / (alpha**2 * self.variance + 1 - alpha**2)
        return gain * inputs["z"]

    def compute_output_shape(self, shapes):
        return shapes["z"]


@pytest.fixture
def gaussian_model():
    return DiffusionModel(
        GaussianDenoiser(), image_shape=(4, 4, 1), prediction_type="x", seed=1
    )


def gaussian_images(num):
    images = np.random.default_rng(0).standard_normal((num, 4, 4, 1))
    return np.clip(0.05**0.5 * images, -1, 1).astype("float32")


def test_x_var_is_the_posterior_variance(gaussian_model):
    # Of a normal prior and exact predictions: v / (1 + v SNR), at every level.
    gaussian_model.measure_x_var(gaussian_images(600), eta=1.0, seed=0)
    logsnr = np.linspace(-15, 15, 61).astype("float32")
    got = to_numpy(gaussian_model.x_var(ops.convert_to_tensor(logsnr)))
    expected = 0.05 / (1 + 0.05 * np.exp(logsnr.astype("float64")))
    # 9600 pixels, each squared; and lines between the levels, and at the ends.
    np.testing.assert_allclose(got, expected, rtol=4 * (2 / 9600) ** 0.5 + 0.02)


def test_x_var_is_linear_between_its_levels(gaussian_model):
    table = np.random.default_rng(0).uniform(0.1, 1, 64)
    gaussian_model.x_var_table.assign(table)
    logsnr = np.linspace(-30, 30, 1001)
    got = gaussian_model.x_var(ops.convert_to_tensor(logsnr, "float32"))
    time = np.arctan(np.exp(-logsnr / 2)) * 2 / np.pi
    scaled = np.interp(time, (np.arange(64) + 0.5) / 64, table)
    expected = scaled / (1 + np.exp(logsnr))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_x_var_must_be_measured(label_model, toy_images):
    with pytest.raises(ValueError, match=r"`x_var` .*measure_x_var"):
        _ = label_model.x_var
    images = toy_images(10)
    for eta in (-0.1, 1.1, "most", None):
        with pytest.raises(ValueError, match=r"`eta` .*\[0, 1\]"):
            label_model.measure_x_var(images, LABELS, eta=eta)
    for data in ((images,), (images, LABELS + 1), (images[:, :2], LABELS)):
        with pytest.raises(ValueError, match="`x "):
            label_model.measure_x_var(*data)


def test_x_var_is_saved_with_the_model(gaussian_model, tmp_path):
    gaussian_model.measure_x_var(gaussian_images(20), seed=0)
    gaussian_model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    logsnr = ops.linspace(-9.0, 9.0, 7)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(loaded.x_var(logsnr)),
        ops.convert_to_numpy(gaussian_model.x_var(logsnr)),
    )
    assert np.ptp(ops.convert_to_numpy(loaded.x_var(logsnr))) > 0.01


def numpy_addim(noise, num_steps, x_var):
    """Algorithm 3 with the Gaussian's `E[x | z_t]`, in float64."""
    z, low = noise.astype("float64"), np.arctan(np.exp(-7.5))
    for i in range(num_steps, 0, -1):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            (np.cos(angle), np.sin(angle))
            for angle in (
                low + j / num_steps * (np.pi / 2 - 2 * low) for j in (i, i - 1)
            )
        )
        x = alpha_t * 0.05 / (alpha_t**2 * 0.05 + sigma_t**2) * z
        epsilon = (z - alpha_t * x) / sigma_t
        power = np.mean(epsilon**2, axis=(1, 2, 3), keepdims=True)
        z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var(sigma_t)
        z = alpha_s * x + np.sqrt(sigma_s**2 + z_var / power) * epsilon
    return np.clip(z, -1, 1)


def test_a_sampler_takes_what_was_measured(gaussian_model, count_calls):
    model = gaussian_model
    noise = np.random.default_rng(1).standard_normal((3, 4, 4, 1)) / 2
    calls = count_calls(model, "denoise")
    ends = []

    def of(value):
        return lambda sigma: value * sigma**2

    for value in (0.3, 0.02, 0.3):
        model.x_var_table.assign(np.full(64, value))  # of x_var (1 + SNR)
        sampler = samplers.ADDIM(x_var=model.x_var)
        ends.append(model.generate(noise=noise, num_steps=3, sampler=sampler))
        expected = numpy_addim(noise, 3, of(value))
        np.testing.assert_allclose(ends[-1], expected, atol=1e-4)
    assert np.abs(ends[0] - ends[1]).max() > 0.01
    np.testing.assert_array_equal(ends[0], ends[2])
    # Equal ones share what was compiled.
    assert len(calls) <= (9 if EAGER else 4)
    # What was measured since is another one; the sampler keeps its own.
    model.measure_x_var(gaussian_images(100), eta=1.0, seed=0)
    again = model.generate(noise=noise, num_steps=3, sampler=sampler)
    np.testing.assert_array_equal(again, ends[2])
    sampler = samplers.ADDIM(x_var=model.x_var)
    again = model.generate(noise=noise, num_steps=3, sampler=sampler)
    assert np.abs(again - ends[2]).max() > 0.01


# Time grids.


def test_generate_on_another_time_grid(gaussian_model, count_calls):
    model, calls = gaussian_model, count_calls(gaussian_model, "denoise")
    noise = np.random.default_rng(1).standard_normal((3, 4, 4, 1)) / 2

    def generate(schedule):
        arguments = {"noise": noise, "num_steps": 4, "schedule": schedule}
        return model.generate(sampler=samplers.DDIM(), **arguments)

    ends = []
    for schedule in (
        schedules.KarrasSchedule(),
        schedules.CosineSchedule(logsnr_min=-5.0, logsnr_max=3.0),
        None,
    ):
        got, z = generate(schedule), noise
        for i in range(4, 0, -1):
            logsnr = (schedule or model.schedule)([i / 4, (i - 1) / 4])
            (alpha_t, alpha_s), (sigma_t, sigma_s) = (
                np.sqrt(sigmoid(sign * to_numpy(logsnr))) for sign in (1, -1)
            )
            x = alpha_t * 0.05 / (alpha_t**2 * 0.05 + sigma_t**2) * z
            z = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
        np.testing.assert_allclose(got, np.clip(z, -1, 1), atol=1e-5)
        ends.append(got)
    assert np.abs(ends[0] - ends[1]).max() > 0.01
    assert np.abs(ends[1] - ends[2]).max() > 0.01
    # One equal to one that has been compiled is not compiled again.
    before = len(calls)
    again = generate(schedules.KarrasSchedule())
    np.testing.assert_array_equal(again, ends[0])
    assert len(calls) == before + (4 if EAGER else 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", "karras"),
        ("schedule", lambda t: -t),
        ("schedule", schedules.KarrasSchedule),
        ("sampler", samplers.DDIM),
        ("sampler", samplers.DDPM),
    ],
    ids=["word", "function", "schedule class", "sampler class", "DDPM"],
)
def test_samplers_and_schedules_are_objects(name, value, gaussian_model):
    with pytest.raises(ValueError, match=rf"`{name}` must be one of"):
        gaussian_model.generate(2, num_steps=2, **{name: value})


# Stochastic samplers.


@pytest.mark.parametrize(
    "sampler", [samplers.NoisyDDIM(), samplers.DDPM()], ids=["noisy", "DDPM"]
)
def test_a_seed_is_a_sample(sampler, make_teacher, toy_images):
    model = make_teacher()
    noise = np.concatenate([toy_images(2)] * 3)  # thrice the same two

    def generate(**kw):
        return model.generate(
            noise=noise, num_steps=3, sampler=sampler, batch_size=2, **kw
        )

    def apart(one, other):
        return np.abs(one - other).max(axis=(1, 2, 3)).min()

    first = generate(seed=3)
    np.testing.assert_array_equal(generate(seed=3), first)
    assert apart(generate(seed=4), first) > 1e-3
    assert apart(generate(), generate()) > 1e-3
    # Each batch of one call has noise of its own.
    for i, j in ((0, 2), (0, 4), (2, 4)):
        assert apart(first[i : i + 2], first[j : j + 2]) > 1e-3
    # What is given to a deterministic sampler is all there is.
    sampler = samplers.DDIM()
    one = generate(seed=3)
    np.testing.assert_array_equal(one[:2], one[2:4])
    np.testing.assert_array_equal(one, generate(seed=4))


def test_a_sampler_may_be_a_function(make_teacher):
    model, noise = make_teacher(), np.zeros((2, 4, 4, 1))

    def sampler(denoise, noise, schedule, num_steps, seed):
        logsnr = schedule(ops.ones((2,)))
        x = denoise(noise, logsnr)
        x_var = functional.analytic_x_var(logsnr)
        end = schedule(ops.zeros((2,)))
        return functional.addim(x, noise, logsnr, end, x_var)

    np.testing.assert_allclose(
        model.generate(noise=noise, num_steps=1, sampler=sampler),
        model.generate(noise=noise, num_steps=1),
        atol=1e-6,
    )
