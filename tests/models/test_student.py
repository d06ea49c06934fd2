"""The teacher's step: integrators, posterior variance, guidance."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import MultistepConsistencyModel, samplers
from keras_mscm import functional as F


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def logsnr_at(t):
    """The cosine schedule from 15 to -15."""
    low = np.arctan(np.exp(-7.5))
    return -2 * np.log(np.tan(low + t * (np.pi / 2 - 2 * low)))


def times_of(logsnr):
    low = np.arctan(np.exp(-7.5))
    angle = np.arctan(np.exp(-to_numpy(logsnr) / 2))
    return (angle - low) / (np.pi / 2 - 2 * low)


def rates(logsnr):
    alpha = np.sqrt(1 / (1 + np.exp(-logsnr)))
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))
    return alpha[:, None, None, None], sigma[:, None, None, None]


LABELS = np.arange(48, dtype="int32") % 3


@pytest.fixture
def make_pair(make_teacher, make_student):
    """A factory of a teacher with three classes and a student of 4 x 2 steps.

    The student's network is no longer the teacher's, and its average neither's.
    """

    def make(**student_with):
        teacher = make_teacher(num_classes=3, model_with={"label_dropout": 0.1})
        student = make_student(
            teacher=teacher,
            student_with={
                "student_steps": 4,
                "teacher_steps": 8,
                **student_with,
            },
        )
        for weight in student.network.weights:
            weight.assign(1.5 * weight)
        for weight in student.ema_network.weights:
            weight.assign(0.5 * weight)
        return teacher, student

    return make


def example_of(student, images):
    labels = ops.convert_to_tensor(LABELS[: len(images)])
    images = ops.convert_to_tensor(images)
    inputs, target, _ = student.training_example(
        images, {"labels": labels}, True
    )
    return inputs, to_numpy(target)


class Reference:
    """Algorithm 1 in float64, through z, for any teacher's step."""

    def __init__(self, teacher, student, scale=1.0):
        self.teacher, self.student, self.scale = teacher, student, scale

    def call(self, network, z, t, labels):
        x = self.student.denoise(
            network,
            ops.convert_to_tensor(z, "float32"),
            ops.convert_to_tensor(logsnr_at(t), "float32"),
            {"labels": ops.convert_to_tensor(labels, "int32")},
        )
        return to_numpy(x)

    def teach(self, z, t, labels):
        """The teacher's prediction, guided, and the conditional one."""
        network = self.teacher.ema_network
        with_label = self.call(network, z, t, labels)
        without = self.call(network, z, t, np.full_like(labels, 3))
        return without + self.scale * (with_label - without), with_label

    def target(self, inputs, images, step, total=8):
        labels = ops.convert_to_numpy(inputs["labels"])
        k = self.student.student_steps
        t = np.round(times_of(inputs["logsnr"]) * total) / total
        s, z_t = t - 1 / total, to_numpy(inputs["z"])
        t_step = np.floor(s * k + 1e-6) / k
        z_s = step(self, z_t, t, s, labels, images)
        (alpha_s, sigma_s), (alpha_step, sigma_step), (alpha_t, sigma_t) = (
            rates(logsnr_at(at)) for at in (s, t_step, t)
        )
        x_ref = self.call(self.student.network, z_s, s, labels)
        z_ref = alpha_step * x_ref
        z_ref += sigma_step / sigma_s * (z_s - alpha_s * x_ref)
        kept = sigma_step / sigma_t
        return (z_ref - kept * z_t) / (alpha_step - alpha_t * kept)


def ddim(x, z_t, t, s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        rates(logsnr_at(at)) for at in (t, s)
    )
    return alpha_s * x + sigma_s / sigma_t * (z_t - alpha_t * x)


def ddim_step(reference, z_t, t, s, labels, images):
    return ddim(reference.teach(z_t, t, labels)[0], z_t, t, s)


def addim_step(x_var):
    """Algorithm 3, with a variance of (squared error, log-SNR)."""

    def step(reference, z_t, t, s, labels, images):
        x, conditional = reference.teach(z_t, t, labels)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            rates(logsnr_at(at)) for at in (t, s)
        )
        error = np.mean((conditional - images) ** 2, (1, 2, 3))
        variance = x_var(error, logsnr_at(t))[:, None, None, None]
        z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * variance
        epsilon = (z_t - alpha_t * x) / sigma_t
        power = np.mean(epsilon**2, (1, 2, 3), keepdims=True)
        return alpha_s * x + np.sqrt(sigma_s**2 + z_var / power) * epsilon

    return step


def heun_step(reference, z_t, t, s, labels, images):
    """Karras et al. (2022), algorithm 1, for y = z / alpha."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        rates(logsnr_at(at)) for at in (t, s)
    )
    tau_t, tau_s, y = sigma_t / alpha_t, sigma_s / alpha_s, z_t / alpha_t
    slope = (y - reference.teach(z_t, t, labels)[0]) / tau_t
    y_s = y + (tau_s - tau_t) * slope
    slope_s = (y_s - reference.teach(alpha_s * y_s, s, labels)[0]) / tau_s
    return alpha_s * (y + (tau_s - tau_t) * (slope + slope_s) / 2)


@keras.saving.register_keras_serializable(package="test_student")
def two_halves(x, z_t, logsnr_t, logsnr_s, x_var, denoise):
    """A user's integrator: DDIM to the middle, and on from there."""
    middle = (logsnr_t + logsnr_s) / 2
    z = F.ddim(x, z_t, logsnr_t, middle)
    z_s = F.ddim(denoise(z, middle), z, middle, logsnr_s)
    return F.inverse_ddim(z_s, z_t, logsnr_t, logsnr_s)


def two_halves_step(reference, z_t, t, s, labels, images):
    middle = (logsnr_at(t) + logsnr_at(s)) / 2
    low = np.arctan(np.exp(-7.5))
    angle = np.arctan(np.exp(-middle / 2))
    half = (angle - low) / (np.pi / 2 - 2 * low)
    z = ddim(reference.teach(z_t, t, labels)[0], z_t, t, half)
    return ddim(reference.teach(z, half, labels)[0], z, half, s)


def share(eta):
    return addim_step(lambda error, logsnr: eta * error)


STEPS = {
    "aDDIM": ({}, share(0.75)),
    "aDDIM, eta": ({"eta": 0.3}, share(0.3)),
    "aDDIM, analytic": (
        {"x_var": F.analytic_x_var},
        addim_step(lambda error, logsnr: 0.1 / (2 + np.exp(logsnr))),
    ),
    "DDIM": ({"integrator": samplers.DDIM()}, ddim_step),
    "Heun": ({"integrator": samplers.Heun()}, heun_step),
    "a function": ({"integrator": two_halves}, two_halves_step),
}


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", STEPS)
def test_target_is_the_numpy_target(kind, scale, make_pair, toy_images):
    # With guidance x_var is the conditional prediction's (appendix A.1).
    arguments, step = STEPS[kind]
    teacher, student = make_pair(guidance_scale=scale, **arguments)
    images = toy_images(48)
    inputs, target = example_of(student, images)
    reference = Reference(teacher, student, scale)
    expected = reference.target(inputs, images, step)
    # Heun's first step is a long one in sigma / alpha: half of tau_t / tau_s
    # is 180, and as many times the rounding of the teacher's x.
    t = times_of(inputs["logsnr"])
    stretch = np.exp((logsnr_at(t - 1 / 8) - logsnr_at(t)) / 2) / 2
    atol = 2e-4 * (np.maximum(stretch, 1) if kind == "Heun" else 1 + 0 * t)
    error = np.abs(target - expected).max(axis=(1, 2, 3))
    assert np.all(error <= atol)
    # The test sees the guidance, and each step from the others.
    others = {
        name: reference.target(inputs, images, other)
        for name, (_, other) in STEPS.items()
        if name != kind
    }
    if scale != 1:
        others["no guidance"] = Reference(teacher, student).target(
            inputs, images, step
        )
    for name, other in others.items():
        assert np.any(
            np.abs(other - expected).max(axis=(1, 2, 3)) > 2 * atol
        ), name


def test_x_var_is_not_the_guided_predictions(make_pair, toy_images):
    teacher, student = make_pair(guidance_scale=4.0)
    images = toy_images(48)
    inputs, target = example_of(student, images)

    class OfTheGuided(Reference):
        def teach(self, *args):
            x, _ = super().teach(*args)
            return x, x

    wrong = OfTheGuided(teacher, student, 4.0)
    wrong = wrong.target(inputs, images, share(0.75))
    right = Reference(teacher, student, 4.0)
    right = right.target(inputs, images, share(0.75))
    np.testing.assert_allclose(target, right, atol=2e-4)
    assert np.abs(target - wrong).max() > 2e-3


def test_ddim_is_addim_with_no_share(make_pair, toy_images):
    images, targets = toy_images(16), []
    for arguments in ({"integrator": samplers.DDIM()}, {"eta": 0.0}, {}):
        keras.utils.set_random_seed(0)
        _, student = make_pair(**arguments)
        targets.append(example_of(student, images)[1])
    np.testing.assert_array_equal(targets[0], targets[1])
    assert np.abs(targets[0] - targets[2]).max() > 1e-3


@pytest.mark.parametrize(
    ("integrator", "evaluations"),
    [(samplers.ADDIM(), 1), (samplers.DDIM(), 1), (samplers.Heun(), 2)],
    ids=["aDDIM", "DDIM", "Heun"],
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_evaluations_of_the_teacher(
    integrator, evaluations, scale, make_pair, toy_images
):
    _, student = make_pair(integrator=integrator, guidance_scale=scale)
    calls, predict = [], student.teacher.predict

    def counting(z, *args):
        calls.append(len(z))
        return predict(z, *args)

    student.teacher.predict = counting
    example_of(student, toy_images(6))
    # Guided, in one batch of twice the size.
    assert calls == [6 if scale == 1 else 12] * evaluations


@pytest.mark.parametrize("kind", STEPS)
def test_a_student_trains_is_saved_and_loaded(
    kind, make_pair, toy_images, tmp_path
):
    arguments, _ = STEPS[kind]
    teacher, student = make_pair(guidance_scale=2.0, **arguments)
    images, labels = toy_images(8), LABELS[:8]
    history = student.fit(
        images, labels, validation_data=(images, labels), verbose=0
    ).history
    assert np.all(np.isfinite([*history.values()]))
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    for name in ("integrator", "eta", "x_var", "guidance_scale"):
        assert getattr(loaded, name) == getattr(student, name)
    loaded.attach_teacher(teacher)
    losses = [
        model.evaluate(images, labels, verbose=0) for model in (loaded, student)
    ]
    assert losses[0] == losses[1]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"integrator": samplers.DDPM()},
            r"`integrator` must be deterministic: .* blurred mean.*DDPM",
        ),
        (
            {"integrator": samplers.NoisyDDIM()},
            r"`integrator` must be deterministic: .* blurred mean.*NoisyDDIM",
        ),
        ({"integrator": "heun"}, r"`integrator` must be a function.*'heun'"),
        ({"integrator": samplers.Heun}, r"`integrator` must be a function"),
        ({"integrator": samplers.DDPM}, r"`integrator` must be a function"),
        ({"x_var": 0.1}, r"`x_var` must be a function.*0\.1"),
        ({"eta": -0.1}, r"`eta` must be in \[0, 1\].*-0\.1"),
        ({"guidance_scale": -1.0}, r"`guidance_scale` .*at least 0"),
        ({"guidance_scale": np.nan}, r"`guidance_scale` .*at least 0"),
    ],
)
def test_bad_arguments(arguments, message, make_pair):
    with pytest.raises(ValueError, match=message):
        make_pair(**arguments)


def test_guidance_needs_a_teacher_that_can(make_teacher, make_student):
    for teacher in (make_teacher(), make_teacher(num_classes=3)):
        with pytest.raises(ValueError, match=r"`guidance_scale` .*dropout"):
            make_student(teacher=teacher, student_with={"guidance_scale": 2.0})
    # A student of no teacher can't be guided by it later either.
    teacher = make_teacher(num_classes=3)
    student = MultistepConsistencyModel(
        teacher.network,
        image_shape=(4, 4, 1),
        num_classes=3,
        student_steps=2,
        guidance_scale=2.0,
    )
    with pytest.raises(ValueError, match=r"`guidance_scale` .*dropout"):
        student.attach_teacher(teacher)
