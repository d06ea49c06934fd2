"""One student for several numbers of steps, or for any."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    samplers,
)
from keras_mscm.models import student_steps
from tests.dense import array, logsnr_at, numbers, rates

SHAPE = 4, 4, 1
EVERY = 1, 2, 4, 8


@keras.saving.register_keras_serializable(package="tests_student_steps")
class Affine(keras.layers.Layer):
    """A network in closed form: of z, log-SNR and the end, each by a factor."""

    takes_logsnr_end = True

    def build(self, input_shape):
        self.factors = self.add_weight(shape=(3,), name="factors")
        self.factors.assign([0.6, 0.02, -0.03])

    def call(self, inputs, training=None):
        a, b, c = (self.factors[i] for i in range(3))
        level = b * inputs["logsnr"] + c * inputs["logsnr_end"]
        return a * inputs["z"] + level[:, None, None, None]


def affine(z, logsnr, logsnr_end):
    """What `Affine` says of x, in float64."""
    level = 0.02 * logsnr - 0.03 * logsnr_end
    return 0.6 * z + np.reshape(level, (-1, 1, 1, 1))


def white(z, logsnr, conditioning):
    """A teacher in closed form."""
    return 0.3 * z


def make_student(steps, *, method="distillation", **kwargs):
    teacher = {"teacher": white} if method == "distillation" else {}
    return MultistepConsistencyModel(
        Affine(),
        image_shape=SHAPE,
        prediction_type="x",
        student_steps=steps,
        method=method,
        seed=0,
        **{"teacher_steps": 16, **teacher, **kwargs},
    )


def tiny_uvit(seed=0, **kwargs):
    keras.utils.set_random_seed(seed)
    return UViT(
        SHAPE,
        widths=(8,),
        depths=(1,),
        attention=True,
        patch_size=2,
        head_width=8,
        embedding_width=8,
        **kwargs,
    )


def moved(network):
    """The network with all its weights a little away from where they begin."""
    rng = np.random.default_rng(1)
    for weight in network.weights:
        if str(weight.dtype) == "float32":
            noise = rng.normal(size=weight.shape)
            weight.assign(weight + 0.1 * noise.astype("float32"))
    return network


def times_of(logsnr):
    """The inverse of the cosine schedule from 15 to -15."""
    low = np.arctan(np.exp(-7.5))
    return (np.arctan(np.exp(-logsnr / 2)) - low) / (np.pi / 2 - 2 * low)


def drawn(student, num=2000):
    """Times t and t_step of an example, its target and inputs, in float64."""
    x = numbers(num, SHAPE)
    inputs, target, _ = student.training_example(
        ops.convert_to_tensor(x), {}, True
    )
    t, end = (
        times_of(array(inputs[name])) for name in ("logsnr", "logsnr_end")
    )
    return x, t, end, array(inputs["z"]), array(target)


# Drawing.


@pytest.mark.parametrize("weights", [None, (8, 4, 2, 1)])
def test_each_number_of_steps_is_drawn_by_its_weight(weights):
    student = make_student(EVERY, step_weights=weights)
    _, t, end, _, _ = drawn(student, 8000)
    n, m = t * 16, end * 16
    np.testing.assert_allclose(n, np.round(n), atol=5e-3)
    np.testing.assert_allclose(m, np.round(m), atol=5e-3)
    n, m = np.round(n), np.round(m)
    # Where a segment may be of which student: the float64 law of the pairs.
    shares = np.ones(4) if weights is None else np.asarray(weights, "float64")
    expected = np.zeros((17, 17))
    for k, share in zip(EVERY, shares / shares.sum()):
        length = 16 // k
        for step in range(k):
            for i in range(1, length + 1):
                expected[step * length + i, step * length] += share / 16
    found = np.zeros((17, 17))
    np.add.at(found, (n.astype(int), m.astype(int)), 1 / len(n))
    assert not np.any(found[expected == 0])
    deviation = np.sqrt(expected * (1 - expected) / len(n))
    assert np.all(np.abs(found - expected) <= 5 * deviation + 1e-12)


def test_teacher_steps_are_a_multiple_of_each():
    # 10 / 4 rounds to 2 per segment, 10 / 8 to 1: T is 10, 10, 8 and 8.
    student = make_student(EVERY, teacher_steps=10)
    _, t, _, _, _ = drawn(student)
    whole = [np.abs(t * n - np.round(t * n)) < 2e-3 for n in (10, 8)]
    assert np.all(whole[0] | whole[1])
    assert np.any(~whole[0])
    assert np.any(~whole[1])


def test_any_ends_anywhere_on_the_grid():
    student = make_student("any")
    _, t, end, _, _ = drawn(student, 20_000)
    n, m = np.round(t * 16), np.round(end * 16)
    np.testing.assert_allclose(t * 16, n, atol=5e-3)
    np.testing.assert_allclose(end * 16, m, atol=5e-3)
    assert np.all(m < n)
    pairs = {*zip(n, m)}
    assert pairs == {(a, b) for a in range(1, 17) for b in range(a)}
    np.testing.assert_allclose(
        np.bincount(n.astype(int)), [0] + 16 * [1250], atol=190
    )
    # P(n_rel > d) of the log-uniform law of lengths, where none is cut off.
    late = n == 16
    rel = (n - m)[late]
    lengths = np.exp(np.linspace(0, np.log(64), 100_001))
    for d in (1, 4, 8, 15):
        law = np.mean(np.maximum(0, 1 - d / lengths))
        assert abs(np.mean(rel > d) - law) < 5 * np.sqrt(law / len(rel))


# The target.


@pytest.mark.parametrize("method", ["training", "distillation"])
@pytest.mark.parametrize("steps", [EVERY, "any"])
def test_target_is_the_numpy_target(steps, method):
    student = make_student(steps, method=method)
    x, t, end, z_t, target = drawn(student, 256)
    t, end = np.round(t * 16) / 16, np.round(end * 16) / 16
    s = t - 1 / 16
    (alpha_t, sigma_t), (alpha_s, sigma_s), (alpha_r, sigma_r) = (
        rates(logsnr_at(at), 4) for at in (t, s, end)
    )
    teacher = x if method == "training" else 0.3 * z_t
    error = np.mean((teacher - x) ** 2, (1, 2, 3), keepdims=True)
    epsilon = (z_t - alpha_t * teacher) / sigma_t
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * 0.75 * error
    power = np.mean(epsilon**2, (1, 2, 3), keepdims=True)
    z_s = alpha_s * teacher + np.sqrt(sigma_s**2 + z_var / power) * epsilon
    x_ref = affine(z_s, logsnr_at(s), logsnr_at(end))
    z_r = alpha_r * x_ref + sigma_r / sigma_s * (z_s - alpha_s * x_ref)
    kept = sigma_r / sigma_t
    expected = (z_r - kept * z_t) / (alpha_r - alpha_t * kept)
    np.testing.assert_allclose(target, expected, atol=3e-4)


@pytest.mark.parametrize("steps", [EVERY, "any"])
def test_where_s_is_the_end_the_target_is_the_teachers_word(steps):
    # Eq. 8, for every end.
    student = make_student(steps, integrator=samplers.DDIM())
    _, t, end, z_t, target = drawn(student)
    exact = np.round((t - end) * 16) == 1
    ends = {*np.round(end[exact] * 16)}
    assert len(ends) == (16 if steps == "any" else 8)
    np.testing.assert_allclose(target[exact], 0.3 * z_t[exact], atol=1e-5)
    assert np.abs(target[~exact] - 0.3 * z_t[~exact]).max() > 0.1


def test_with_as_many_student_as_teacher_steps_training_is_diffusion():
    # Eq. 9.
    student = make_student((16,), method="training")
    x, _, _, _, target = drawn(student)
    np.testing.assert_allclose(target, x, atol=1e-6)


# The network.


def test_a_student_begins_as_its_teacher_and_learns_its_ends():
    teacher = DiffusionModel(moved(tiny_uvit()), seed=0)
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=EVERY, seed=0, teacher_steps=16
    )
    noise = numbers(3, SHAPE, 1)
    for k in (1, 8):
        np.testing.assert_array_equal(
            student.generate(noise=noise, num_steps=k),
            teacher.generate(noise=noise, num_steps=k, sampler=samplers.DDIM()),
        )
    assert not teacher.takes_logsnr_end  # the student's network is a copy
    assert student.generate(noise=noise).shape == noise.shape  # 8 steps

    student.compile(keras.optimizers.Adam(0.01))
    student.fit(numbers(32, SHAPE), batch_size=8, verbose=0)
    inputs = {"z": noise, "logsnr": np.zeros(3, "float32")}
    ends = [
        array(student({**inputs, "logsnr_end": np.full(3, end, "float32")}))
        for end in (0.0, 15.0)
    ]
    assert np.abs(ends[0] - ends[1]).max() > 1e-3


@pytest.mark.parametrize("steps", [EVERY, "any"])
def test_saved_in_training_it_goes_on_bit_for_bit(steps, tmp_path):
    weights = {} if steps == "any" else {"step_weights": (4, 3, 2, 1)}
    student = make_student(steps, **weights)
    x = numbers(16, SHAPE)
    student.compile(keras.optimizers.Adam(0.01))
    student.fit(x, batch_size=8, verbose=0, shuffle=False)
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    loaded.attach_teacher(white)
    assert loaded.student_steps == steps
    assert loaded.step_weights == student.step_weights
    for model in (student, loaded):
        model.fit(x, batch_size=8, verbose=0, shuffle=False)
    for ours, theirs in zip(student.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(array(ours), array(theirs))
    noise = numbers(2, SHAPE, 1)
    np.testing.assert_array_equal(
        *(m.generate(noise=noise, num_steps=2) for m in (student, loaded))
    )


def test_adapters_and_the_end_embedding_are_trained(tmp_path):
    teacher = DiffusionModel(moved(tiny_uvit()), seed=0)

    def make():
        return MultistepConsistencyModel.from_teacher(
            teacher, student_steps=(1, 2), lora_rank=2, seed=0, teacher_steps=4
        )

    student = make()
    student.compile(keras.optimizers.Adam(0.01))
    student.fit(numbers(16, SHAPE), batch_size=8, verbose=0)
    kernel = student.network.embed_end.projection.kernel
    assert np.abs(array(kernel)).max() > 0
    student.save_lora(tmp_path / "adapters.npz")
    other = make()
    other.load_lora(tmp_path / "adapters.npz")
    noise = numbers(3, SHAPE, 1)
    drawn = [m.generate(noise=noise, num_steps=2) for m in (student, other)]
    np.testing.assert_allclose(*drawn, atol=1e-5)
    plain = teacher.generate(noise=noise, num_steps=2, sampler=samplers.DDIM())
    assert np.abs(drawn[0] - plain).max() > 1e-3


# Sampling.


def numpy_sample(noise, times):
    """DDIM along times with what `Affine` says, in float64."""
    z = noise.astype("float64")
    for t, s in itertools.pairwise(times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            rates(logsnr_at(np.asarray([at])), 4) for at in (t, s)
        )
        x = affine(z, logsnr_at(t), logsnr_at(s))
        z = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
    return np.clip(z, -1, 1)


@pytest.mark.parametrize("steps", [EVERY, "any"])
def test_each_step_is_told_its_end(steps):
    student, noise = make_student(steps), numbers(3, SHAPE, 1)
    for k in (1, 4):
        images = student.generate(noise=noise, num_steps=k)
        times = np.linspace(1, 0, k + 1)
        np.testing.assert_allclose(
            images, numpy_sample(noise, times), atol=1e-4
        )


def test_uneven_times():
    student, noise = make_student("any"), numbers(3, SHAPE, 1)
    for times in ([1, 0.7, 0.1, 0], (1.0, 0.2, 0.15, 0.0)):
        images = student.generate(noise=noise, times=times)
        expected = numpy_sample(noise, times)
        np.testing.assert_allclose(images, expected, atol=1e-4)
    assert len(student._compiled_samplers) == 1
    np.testing.assert_array_equal(
        student.generate(noise=noise),  # 8 steps
        student.generate(noise=noise, times=np.linspace(1, 0, 9)),
    )


def test_a_diffusion_model_takes_uneven_times(dense_network):
    model = DiffusionModel(dense_network(), image_shape=SHAPE, seed=0)
    noise = numbers(2, SHAPE, 1)
    arguments = dict(noise=noise, sampler=samplers.Heun(), decode=False)
    even = model.generate(times=(1, 0.5, 0), **arguments)
    np.testing.assert_allclose(
        even, model.generate(num_steps=2, **arguments), atol=1e-6
    )
    uneven = model.generate(times=(1, 0.2, 0), **arguments)
    assert np.abs(uneven - even).max() > 1e-3


# Bad input.


@pytest.mark.once
@pytest.mark.parametrize(
    "steps",
    [(), (0, 1), (2, 2), (1, 2.5), "some", {1: 2}, None, -1, (1, 2**21)],
)
def test_student_steps_that_cannot_be(steps):
    with pytest.raises(ValueError, match="`student_steps` must be"):
        student_steps.check(steps)


@pytest.mark.once
@pytest.mark.parametrize(
    ("steps", "weights"),
    [(8, (1,)), ("any", (1, 1)), ((1, 2), (1,)), ((1, 2), (1, 0))],
)
def test_step_weights_that_cannot_be(steps, weights):
    with pytest.raises(ValueError, match="`step_weights` must"):
        make_student(steps, step_weights=weights)


@pytest.mark.once
def test_what_a_student_cannot_be_asked_for():
    several, anything, one = (
        make_student(steps) for steps in ((2, 4), "any", (8,))
    )
    noise = {"noise": numbers(1, SHAPE)}
    cases = [
        (several, {"num_steps": 3}, r"student_steps=\(2, 4\).*num_steps=3"),
        (several, {"times": (1, 0)}, "`times` must not be given.*'any'"),
        (one, {"num_steps": 4}, r"student_steps=\(8,\)"),
        (anything, {"times": (1, 0.5)}, "`times` must be .* from 1 to 0"),
        (anything, {"times": (1, 0.5, 0.5, 0)}, "`times` must be"),
        (anything, {"times": (0.9, 0)}, "`times` must be"),
        (anything, {"times": 3}, "`times` must be"),
        (anything, {"times": (1, 0), "num_steps": 2}, "`num_steps` must be"),
    ]
    for student, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            student.generate(**noise, **arguments)
    with pytest.raises(ValueError, match="at least student_steps=4"):
        several.anneal_teacher_steps(2, 8, 10)


@pytest.mark.once
def test_a_network_that_cannot_be_told_is_refused(dense_network):
    network = dense_network()
    with pytest.raises(ValueError, match=r"`network` must be .*told where"):
        MultistepConsistencyModel(
            network, image_shape=SHAPE, student_steps=(1, 2)
        )
    teacher = DiffusionModel(network, image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"`sampler` must be"):
        teacher.generate(1, num_steps=2, sampler=samplers.FlowMap())


def test_a_functional_network_with_an_input_for_it(tmp_path):
    inputs = {
        "z": keras.Input(SHAPE, name="z"),
        "logsnr": keras.Input((), name="logsnr"),
        "logsnr_end": keras.Input((), name="logsnr_end"),
    }
    level = inputs["logsnr"] - inputs["logsnr_end"]
    level = keras.layers.Reshape((1, 1, 1))(level)
    outputs = keras.layers.Dense(1)(inputs["z"] + 0.01 * level)
    student = MultistepConsistencyModel(
        keras.Model(inputs, outputs),
        image_shape=SHAPE,
        student_steps=(1, 2),
        method="training",
        teacher_steps=4,
    )
    student.compile(keras.optimizers.Adam(0.01))
    student.fit(numbers(8, SHAPE), batch_size=8, verbose=0)
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    noise = numbers(2, SHAPE, 1)
    np.testing.assert_array_equal(
        *(m.generate(noise=noise, num_steps=2) for m in (student, loaded))
    )
