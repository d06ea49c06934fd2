"""sCD and sCT, against the paper's algorithm 1 in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import ContinuousConsistencyModel, DiffusionModel, backend
from keras_mscm.schedules import CosineSchedule
from tests.models.toy_flow import (
    DEVIATION,
    Gain,
    ToyFlow,
    as_float64,
    column,
    gain_of,
    gaussian,
    half,
    learn_gaussian,
    toy,
    trained_by,
)

SHAPE = (4, 4, 1)
# Settings of the derivative, and the tolerance of what is made of it.
EXACT = {"derivative": "forward_mode"}, 1e-5
NARROW = {"derivative": "finite_difference", "difference_step": 0.001}, 3e-3
both_methods = pytest.mark.parametrize("method", ["training", "distillation"])


def make(**kwargs):
    given = {
        "method": "training",
        "image_shape": SHAPE,
        "seed": 1,
        "noise_mean": -1.0,
        "noise_std": 1.0,
        "derivative": "forward_mode",
        "warmup_iterations": 4,
        **kwargs,
    }
    if given["method"] == "distillation":
        given["teacher"] = half
    given.setdefault("prediction_type", "x")
    return ContinuousConsistencyModel(ToyFlow(), **given)


def example_of(model, images, training=True):
    """What the next update will be trained on."""
    with backend.rewound([model.seed_generator.state]):
        return model.training_example(
            ops.convert_to_tensor(images), {}, training
        )


def reference(inputs, images, method, warmup):
    """F, the tangent, dF / dfactor and the angle, in float64."""
    level, z = column(inputs["logsnr"]), as_float64(inputs["z"])
    t = np.arctan(np.exp(-level / 2))
    cos, sin = np.cos(t), np.sin(t)
    x = 0.5 * z if method == "distillation" else images
    velocity = (cos * z - x) / sin

    value, by_z, by_level, by_factor = toy(z, level)
    # F = (cos z - x) / sin; dl/dt of l = -2 log tan t.
    f = (cos * z - value) / sin
    d_value = by_z * velocity + by_level * -2 / (sin * cos)
    d_f = (cos * velocity - sin * z - d_value) / sin - f * cos / sin
    tangent = -(cos**2) * (f - velocity) - warmup * cos * sin * (z + d_f)
    norm = np.sqrt(np.sum(tangent**2, (1, 2, 3), keepdims=True))
    return f, tangent / (norm + 0.1), -by_factor / sin, t, z


@both_methods
@pytest.mark.parametrize(("derivative", "tolerance"), [EXACT, NARROW])
@pytest.mark.parametrize("iteration", [1, 9])
def test_target_and_weight_are_the_papers(
    method, derivative, tolerance, iteration, toy_images
):
    images = toy_images(64)
    model = make(method=method, **derivative)
    model.iteration.assign(iteration)
    inputs, target, weight = example_of(model, images)
    warmup = min(1, iteration / 4)
    f, tangent, _, t, z = reference(inputs, images, method, warmup)
    np.testing.assert_allclose(
        as_float64(target),
        np.cos(t) * z - np.sin(t) * (f + tangent),
        atol=tolerance,
    )
    # The error of F is that of x over sin t.
    np.testing.assert_allclose(
        as_float64(weight), 1 / np.sin(t[:, 0, 0, 0]) ** 2, rtol=1e-5
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_update_follows_the_papers_gradient(adaptive, toy_images):
    images = toy_images(16)
    model = make(adaptive_weighting=adaptive)
    model.iteration.assign(9)
    learnt = 0.3
    if adaptive:
        model.exit_weight.bias.assign([learnt])
    inputs, _, _ = example_of(model, images)
    _, tangent, by_factor, *_ = reference(inputs, images, "training", 1)
    # Of exp(w) / D |F - sg(F) - g|^2 - w, by F and by w.
    scale = np.exp(learnt) if adaptive else 1.0
    expected = scale * np.mean(-2 * tangent * by_factor)
    moved = trained_by(model, images)
    np.testing.assert_allclose(-moved, expected, rtol=2e-4)
    if adaptive:
        by_w = scale * np.mean(tangent**2) - 1
        after = as_float64(model.exit_weight.bias)[0]
        np.testing.assert_allclose(learnt - after, by_w, rtol=1e-4)


def test_loss_and_evaluation_are_the_papers(toy_images):
    """exp(w) / D |g|^2 - w, also where the network is the average."""
    images = toy_images(8)
    model = make()
    model.iteration.assign(9)
    model.exit_weight.bias.assign([0.3])
    model.compile()
    inputs, _, _ = example_of(model, images, training=False)
    _, tangent, *_ = reference(inputs, images, "training", 1)
    got = model.evaluate(images, batch_size=8, verbose=0)
    expected = np.exp(0.3) * np.mean(tangent**2) - 0.3
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_times_are_the_papers(toy_images):
    model = make(noise_mean=-1.0, noise_std=1.4)
    inputs, *_ = example_of(model, toy_images(2000))
    log_ratio = -as_float64(inputs["logsnr"]) / 2
    np.testing.assert_allclose(np.mean(log_ratio), -1.0, atol=0.1)
    np.testing.assert_allclose(np.std(log_ratio), 1.4, atol=0.1)


def test_times_are_even_by_default(toy_images):
    model = make(noise_mean=None, noise_std=None)
    inputs, *_ = example_of(model, toy_images(2000))
    # The cosine schedule's time is the angle.
    angle = np.arctan(np.exp(-as_float64(inputs["logsnr"]) / 2)) * 2 / np.pi
    np.testing.assert_allclose(angle.mean(), 1 / 2, atol=0.02)
    np.testing.assert_allclose(angle.std(), np.sqrt(1 / 12), atol=0.02)


@both_methods
@pytest.mark.parametrize(
    ("derivative", "calls"), [("forward_mode", 1), ("finite_difference", 2)]
)
def test_evaluations(method, derivative, calls, toy_images):
    model = make(method=method, derivative=derivative, ema=None)
    before, asked = model.network.calls, []

    def counted(*args):
        asked.append(args)
        return half(*args)

    if method == "distillation":
        model.teacher.hold(None, conditioning={}, closed_form=counted)
    example_of(model, toy_images(4))
    assert model.network.calls - before == calls
    assert len(asked) == (method == "distillation")


def test_two_steps_are_two_predictions_with_fresh_noise(toy_images):
    """The second is of the first prediction, noised at the middle."""
    model = make()
    noise = toy_images(64)
    one = model.generate(noise=noise, seed=3, decode=False)
    two = model.generate(noise=noise, num_steps=2, seed=3, decode=False)
    # At either end of the cosine schedule, and in its middle, log-SNR is 15, 0.
    first = toy(noise.astype("float64"), -15.0)[0]
    np.testing.assert_allclose(one, first, atol=5e-3)
    # sin(z) / 2 * 0.8 of z = (first + epsilon) / sqrt(2), whose mean over
    # epsilon is sin(first / sqrt(2)) exp(-1/4).
    expected = 0.4 * np.sin(first / np.sqrt(2)) * np.exp(-0.25)
    expected = expected * 2 * (1 / (1 + np.exp(0.0)))
    assert np.std(two - expected) > 0.1
    np.testing.assert_allclose(np.mean(two - expected), 0, atol=0.03)
    again = model.generate(noise=noise, num_steps=2, seed=3, decode=False)
    np.testing.assert_array_equal(two, again)


def test_a_student_learns_the_way_to_a_gaussian():
    """Where the teacher's one step leads nowhere, its way to `DEVIATION`."""
    model = ContinuousConsistencyModel(
        Gain(),
        CosineSchedule(logsnr_min=-9),
        prediction_type="v",
        image_shape=SHAPE,
        teacher=gaussian,
        warmup_iterations=50,
        seed=1,
    )
    assert abs(gain_of(model, 1) - DEVIATION) > 0.1
    learn_gaussian(model)
    np.testing.assert_allclose(gain_of(model, 1), DEVIATION, atol=0.1)


def test_it_trains_samples_saves_and_goes_on(
    tiny_uvit, tmp_path, weights_of, toy_images
):
    teacher = DiffusionModel(tiny_uvit(dropout=0.1), seed=1)
    model = ContinuousConsistencyModel.from_teacher(
        teacher, warmup_iterations=3, seed=2
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    images = toy_images(16, (8, 8, 1))
    model.fit(images, batch_size=8, verbose=0)
    model.evaluate(images, batch_size=8, verbose=0)
    assert int(model.iteration) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    for steps in (None, 2):
        np.testing.assert_allclose(
            loaded.generate(2, num_steps=steps, seed=0),
            model.generate(2, num_steps=steps, seed=0),
            atol=1e-5,
        )
    loaded.attach_teacher(teacher)
    for each in (model, loaded):
        each.fit(images, batch_size=8, shuffle=False, verbose=0)
    for one, other in zip(weights_of(model), weights_of(loaded)):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "online"),
        ("noise_mean", float("nan")),
        ("noise_std", 0),
        ("warmup_iterations", 0),
        ("tangent_constant", 0),
        ("adaptive_weighting", "yes"),
        ("noise_mean", None),
        ("derivative", "reverse_mode"),
        ("difference_step", 0.5),
        ("difference_step", 0.01),  # with a forward-mode derivative
        ("guidance_scale", 2),
        ("teacher", half),
    ],
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must.*Received: "):
        make(**{name: value})


@pytest.mark.once
def test_settings_of_sampling_are_refused():
    model = make()
    with pytest.raises(ValueError, match="`sampler` must not be given"):
        model.generate(2, sampler=print)
    assert model.generate(2, times=[1, 0.7, 0], seed=0).shape == (2, *SHAPE)
