"""MeanFlow, against the paper's own coordinates in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, MeanFlowModel, backend
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
PAPERS = {
    "noise_mean": -0.4,
    "noise_std": 1.0,
    "instantaneous": 0.75,
    "weight_power": 1.0,
    "derivative": "forward_mode",
}
both_methods = pytest.mark.parametrize("method", ["training", "distillation"])


def make(**kwargs):
    given = {"method": "training", "image_shape": SHAPE, "seed": 1}
    given |= PAPERS | kwargs
    if given["method"] == "distillation":
        given["teacher"] = half
    given.setdefault("prediction_type", "x")
    return MeanFlowModel(ToyFlow(), **given)


def example_of(model, images, training=True):
    """What the next update will be trained on."""
    with backend.rewound([model.seed_generator.state]):
        return model.training_example(
            ops.convert_to_tensor(images), {}, training
        )


def reference(inputs, images, method):
    """u, its target and du / dfactor, with z_flow and t, in float64."""
    level, end = column(inputs["logsnr"]), column(inputs["logsnr_end"])
    t, r = 1 / (1 + np.exp(level / 2)), 1 / (1 + np.exp(end / 2))
    n = np.sqrt((1 - t) ** 2 + t**2)
    z = as_float64(inputs["z"])
    z_flow = n * z
    x = 0.5 * z if method == "distillation" else images
    v = (z_flow - x) / t

    # du/dt = v d_z u + d_t u, of u(z_flow, r, t) = (z_flow - x(z, l)) / t.
    value, by_z, by_level, by_factor = toy(z, level, end)
    dz = v / n - z_flow * (2 * t - 1) / n**3
    dx = by_z * dz + by_level * -2 / (t * (1 - t))
    u = (z_flow - value) / t
    du = (v - dx) / t - (z_flow - value) / t**2
    return u, v - (t - r) * du, -by_factor / t, z_flow, t, r


@both_methods
@pytest.mark.parametrize(("derivative", "tolerance"), [EXACT, NARROW])
def test_target_and_weight_are_the_papers(
    method, derivative, tolerance, toy_images
):
    images = toy_images(64)
    model = make(method=method, **derivative, weight_power=0.75)
    inputs, target, weight = example_of(model, images)
    u, u_target, _, z_flow, t, r = reference(inputs, images, method)
    assert np.abs((t - r) * (u - u_target)).max() > 0.1
    np.testing.assert_allclose(
        as_float64(target), z_flow - t * u_target, atol=tolerance
    )
    square = np.sum((u - u_target) ** 2, (1, 2, 3))
    papers = 1 / (square + 1e-3) ** 0.75
    # The loss is the mean over the pixels, and an error of x is t times u's.
    np.testing.assert_allclose(
        as_float64(weight),
        16 * papers / t[:, 0, 0, 0] ** 2,
        rtol=10 * tolerance,
    )


def test_an_update_follows_the_papers_gradient(toy_images):
    images = toy_images(16)
    model = make(instantaneous=0.0)
    inputs, _, _ = example_of(model, images)
    u, u_target, by_factor, *_ = reference(inputs, images, "training")
    # Of mean_b w sum (u - sg(u_target))^2 with w constant.
    square = np.sum((u - u_target) ** 2, (1, 2, 3), keepdims=True)
    terms = 2 / (square + 1e-3) * (u - u_target) * by_factor
    expected = np.mean(np.sum(terms, (1, 2, 3)))
    moved = trained_by(model, images)
    np.testing.assert_allclose(-moved, expected, rtol=1e-4)


def test_times_are_the_papers(toy_images):
    model = make()
    inputs, target, _ = example_of(model, toy_images(2000))
    level, end = as_float64(inputs["logsnr"]), as_float64(inputs["logsnr_end"])
    same = level == end
    assert 0.7 < np.mean(same) < 0.8
    assert np.all(end >= level)
    # The later of two logits of mean -0.4 and deviation 1.
    np.testing.assert_allclose(
        np.mean(-level / 2), -0.4 + 1 / np.sqrt(np.pi), atol=0.06
    )
    # Where r = t that is flow matching.
    np.testing.assert_allclose(
        as_float64(target)[same], toy_images(2000)[same], atol=1e-6
    )


def test_times_are_even_by_default(toy_images):
    model = make(noise_mean=None, noise_std=None)
    inputs, *_ = example_of(model, toy_images(2000))
    # The cosine schedule's time is the angle, and the later of two has a mean
    # of 2/3.
    angle = np.arctan(np.exp(-as_float64(inputs["logsnr"]) / 2)) * 2 / np.pi
    np.testing.assert_allclose(angle.mean(), 2 / 3, atol=0.02)
    np.testing.assert_allclose(angle.std(), np.sqrt(1 / 18), atol=0.02)


def test_times_end_where_the_schedule_does(toy_images):
    schedule = CosineSchedule(logsnr_min=-3, logsnr_max=4)
    model = make(schedule=schedule, noise_std=40)
    inputs, target, _ = example_of(model, toy_images(64))
    assert np.all(np.isfinite(as_float64(target)))
    np.testing.assert_allclose(as_float64(inputs["logsnr"]).min(), -3, 1e-5)
    np.testing.assert_allclose(as_float64(inputs["logsnr_end"]).max(), 4, 1e-5)


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


def test_a_student_learns_the_way_to_a_gaussian():
    """Where the teacher's one step leads nowhere, its way to `DEVIATION`."""
    model = MeanFlowModel(
        Gain(),
        CosineSchedule(logsnr_min=-9),
        prediction_type="v",
        image_shape=SHAPE,
        teacher=gaussian,
        seed=1,
    )
    for steps in (1, 2):
        assert abs(gain_of(model, steps) - DEVIATION) > 0.1
    learn_gaussian(model)
    for steps in (1, 2):
        np.testing.assert_allclose(gain_of(model, steps), DEVIATION, atol=0.1)


def test_it_trains_samples_saves_and_goes_on(
    tiny_uvit, tmp_path, weights_of, toy_images
):
    teacher = DiffusionModel(tiny_uvit(dropout=0.1), seed=1)
    model = MeanFlowModel.from_teacher(
        teacher, derivative="forward_mode", seed=2
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    images = toy_images(16, (8, 8, 1))
    model.fit(images, batch_size=8, verbose=0)
    model.evaluate(images, batch_size=8, verbose=0)
    assert int(model.iteration) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    for steps in (None, 3):
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


def test_dropout_is_that_of_the_pass_that_is_trained(tiny_uvit, toy_images):
    """With all r = t - and no weight - no error is left of x itself."""
    model = MeanFlowModel(
        tiny_uvit(dropout=0.5),
        method="training",
        derivative="forward_mode",
        seed=1,
    )
    network, seen = model.network, []

    def denoise(*args, **kwargs):
        seen.append(MeanFlowModel.denoise(model, *args, **kwargs))
        return seen[-1]

    model.denoise = denoise
    inputs, *_ = model.training_example(
        ops.convert_to_tensor(toy_images(8, (8, 8, 1))), {}, True
    )
    again = model.call(inputs, training=True)
    without = MeanFlowModel.denoise(
        model,
        network,
        inputs["z"],
        inputs["logsnr"],
        logsnr_end=inputs["logsnr_end"],
    )
    first = backend_value(seen[0])
    np.testing.assert_allclose(first, as_float64(again), atol=1e-4)
    assert np.abs(first - as_float64(without)).max() > 1e-2


def backend_value(tensor):
    """A tensor's value, also of one that carries a derivative."""
    primal = getattr(tensor, "primal", tensor)  # JAX
    return as_float64(primal)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "online"),
        ("noise_mean", float("nan")),
        ("noise_std", 0),
        ("instantaneous", 1),
        ("weight_power", -1),
        ("weight_constant", 0),
        ("noise_mean", None),
        ("derivative", "reverse_mode"),
        ("difference_step", 0.5),
        ("difference_step", 0.01),  # with a forward-mode derivative
        ("guidance_scale", 2),
        ("guidance_scale", 0),
        ("teacher", half),
    ],
)
def test_bad_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must.*Received: "):
        make(**{name: value})


@pytest.mark.once
def test_networks_that_cannot_do_it(dense_network):
    with pytest.raises(ValueError, match=r"`network` must.*Received: "):
        MeanFlowModel(dense_network(), image_shape=SHAPE)
    half_precision = ToyFlow(dtype="mixed_bfloat16")
    with pytest.raises(ValueError, match=r"`difference_step` must.*bfloat16"):
        MeanFlowModel(half_precision, image_shape=SHAPE, difference_step=0.002)


@pytest.mark.once
def test_a_teacher_is_needed_and_settings_of_sampling_are_not(toy_images):
    model = MeanFlowModel(
        ToyFlow(), image_shape=SHAPE, prediction_type="x", seed=1
    )
    model.compile()
    with pytest.raises(ValueError, match="`teacher` must be attached"):
        model.fit(toy_images(4), verbose=0)
    with pytest.raises(ValueError, match="`guidance_scale` must not be given"):
        model.generate(2, guidance_scale=2.0)
    assert model.generate(2, times=[1, 0.3, 0], seed=0).shape == (2, *SHAPE)
