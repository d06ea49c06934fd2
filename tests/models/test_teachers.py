"""Students of networks and of closed forms, against float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    GuidanceDistillationModel,
    MultistepConsistencyModel,
    ProgressiveDistillationModel,
    samplers,
    spaces,
)
from keras_mscm.conditioning import Condition
from tests.dense import array, dense_network, logsnr_at, numbers, rates, x_of

SHAPE = (3,)
CLASSES = {"labels": Condition((), "int32", null=2, num_classes=2)}
MEANS = np.array([-1.0, 0.5, 0.0])  # of each class, and of all
VARIANCES = np.array([0.2, 0.4, 0.9])
LABELS = np.arange(16, dtype="int32") % 2


def exact(z, logsnr, conditioning):
    """`E[x | z]` of each class, a normal distribution, in `keras.ops`."""
    logsnr = ops.expand_dims(logsnr, -1)
    alpha, sigma2 = ops.sqrt(ops.sigmoid(logsnr)), ops.sigmoid(-logsnr)
    mean, variance = (
        ops.expand_dims(
            ops.take(
                ops.convert_to_tensor(table, "float32"),
                conditioning["labels"],
            ),
            -1,
        )
        for table in (MEANS, VARIANCES)
    )
    gain = alpha * variance / (alpha**2 * variance + sigma2)
    return mean + gain * (z - alpha * mean)


def exact_in_numpy(z, logsnr, labels):
    alpha, sigma = rates(logsnr, 2)
    mean, variance = MEANS[labels][:, None], VARIANCES[labels][:, None]
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    return mean + gain * (z - alpha * mean)


def student_of(teacher, **kw):
    student = MultistepConsistencyModel(
        dense_network(SHAPE, CLASSES, name="student"),
        space=spaces.Box(SHAPE),
        conditioning=CLASSES,
        teacher=teacher,
        seed=3,
        **{"student_steps": 2, "teacher_steps": 8, **kw},
    )
    student.compile(keras.optimizers.Adam(1e-2))
    return student


def teacher_of(**kw):
    declared = kw.pop("declared", CLASSES)
    teacher = DiffusionModel(
        dense_network(SHAPE, declared),
        space=spaces.Box(SHAPE),
        conditioning=declared,
        **{"label_dropout": 0.1 if declared else 0.0, "seed": 1, **kw},
    )
    teacher.compile(keras.optimizers.Adam(1e-2))
    return teacher


def ddim(x, z, at, to):
    (alpha, sigma), (alpha_s, sigma_s) = rates(at, 2), rates(to, 2)
    return alpha_s * x + sigma_s / sigma * (z - alpha * x)


def expected_target(student, x, draws, epsilon, teach, prediction_type="v"):
    """Algorithm 1 in float64, but for the student's own word at s."""
    step, n_rel = np.floor(2 * draws[0]), 1 + np.floor(4 * draws[1])
    t, s, end = (
        logsnr_at(time)
        for time in (
            (step + n_rel / 4) / 2,
            (step + (n_rel - 1) / 4) / 2,
            step / 2,
        )
    )
    alpha, sigma = rates(t, 2)
    z_t = alpha * x + sigma * epsilon
    z_s = ddim(teach(z_t, t), z_t, t, s)
    inputs = {"z": np.float32(z_s), "logsnr": np.float32(s), "labels": LABELS}
    inputs = {k: ops.convert_to_tensor(v) for k, v in inputs.items()}
    output = array(student.network(inputs))
    z_end = ddim(x_of(output, z_s, s, prediction_type), z_s, s, end)
    # The x with which DDIM leads from z_t to the same place.
    ratio = rates(end, 2)[1] / rates(t, 2)[1]
    return (z_end - ratio * z_t) / (rates(end, 2)[0] - ratio * alpha)


def target_of(student, x, draws, epsilon):
    draws = iter(draws)
    student.draw_uniform = lambda shape: ops.convert_to_tensor(
        np.float32(next(draws))
    )
    student.draw_normal = lambda shape: ops.convert_to_tensor(epsilon)
    given = {"labels": ops.convert_to_tensor(LABELS)}
    _, target, _ = student.training_example(
        ops.convert_to_tensor(x), given, True
    )
    return array(target)


RNG = np.random.default_rng(0)
X, EPSILON = RNG.standard_normal((2, 16, 3)).astype("float32")
DRAWS = np.linspace(0.02, 0.98, 16), RNG.permutation(16) / 16 + 0.03


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("prediction_type", ["v", "x"])
def test_a_closed_forms_student(scale, prediction_type):
    student = student_of(
        exact,
        guidance_scale=scale,
        integrator=samplers.DDIM(),
        prediction_type=prediction_type,
    )

    def teach(z, logsnr):
        x = exact_in_numpy(z, logsnr, LABELS)
        without = exact_in_numpy(z, logsnr, np.full(16, 2))
        return without + scale * (x - without)

    got = target_of(student, X, DRAWS, EPSILON)
    want = expected_target(student, X, DRAWS, EPSILON, teach, prediction_type)
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=2e-4)
    # A file holds no teacher, but the student trains and samples.
    student = student_of(exact, guidance_scale=scale)
    history = student.fit(X, LABELS, verbose=0, epochs=2).history["loss"]
    assert np.all(np.isfinite(history))
    assert student.generate(3).shape == (3, 3)


@pytest.mark.parametrize("theirs", ["v", "x", "epsilon"])
@pytest.mark.parametrize("ours", ["v", "epsilon"])
def test_prediction_types_need_not_agree(theirs, ours):
    teacher = teacher_of(prediction_type=theirs)
    student = student_of(
        teacher, integrator=samplers.DDIM(), prediction_type=ours
    )
    # At log-SNR -15 a prediction of noise has next to no x to tell.
    draws = (DRAWS[0], np.minimum(DRAWS[1], 0.7))

    def teach(z, logsnr):
        entries = {"z": z, "logsnr": logsnr}
        inputs = {
            k: ops.convert_to_tensor(np.float32(v)) for k, v in entries.items()
        }
        inputs["labels"] = ops.convert_to_tensor(LABELS)
        return x_of(array(teacher.ema_network(inputs)), z, logsnr, theirs)

    got = target_of(student, X, draws, EPSILON)
    want = expected_target(student, X, draws, EPSILON, teach, ours)
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("cls", "kw"),
    [
        (MultistepConsistencyModel, {"student_steps": 2}),
        (GuidanceDistillationModel, {"guidance_scale": 2.0}),
    ],
)
def test_without_a_copy_the_network_is_held_once(cls, kw, weights_of):
    counts = {}
    for copy in (True, False):
        teacher = teacher_of()
        student = cls.from_teacher(teacher, copy=copy, seed=0, **kw)
        student.compile(keras.optimizers.Adam(1e-2))
        own = {id(v) for v in student.variables}
        theirs = {id(v) for v in teacher.ema_network.variables}
        assert (theirs <= own) == (not copy)
        assert not own & {id(v) for v in teacher.network.variables}
        counts[copy] = len(student.variables)
        assert len(student.trainable_variables) == len(
            student.network.trainable_weights
        )
        before, trained = weights_of(teacher), weights_of(student.network)
        student.fit(X, LABELS, verbose=0)
        for a, b in zip(before, weights_of(teacher), strict=True):
            np.testing.assert_array_equal(a, b)
        assert any(
            np.any(a != b) for a, b in zip(trained, weights_of(student.network))
        )
    assert counts[True] == counts[False]
    # A teacher without an average lends its only network, which is frozen.
    teacher = teacher_of(ema=None)
    student = cls.from_teacher(teacher, copy=False, **kw)
    assert teacher.trainable_variables == []
    held = {id(v) for v in student.teacher.variables}
    assert held == {id(v) for v in teacher.network.variables}
    with pytest.raises(ValueError, match="none of its layers is trainable"):
        teacher.fit(X, LABELS, verbose=0)


def test_a_student_in_a_file_has_its_teacher_attached(tmp_path, weights_of):
    teacher = teacher_of()
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=2, guidance_scale=2.0, seed=0
    )
    student.compile(keras.optimizers.Adam(1e-2))
    student.fit(X, LABELS, verbose=0)
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    noise = numbers(2, SHAPE)
    np.testing.assert_array_equal(
        loaded.generate(noise=noise), student.generate(noise=noise)
    )
    with pytest.raises(ValueError, match="`teacher` must be attached"):
        loaded.fit(X, LABELS, verbose=0)
    loaded.attach_teacher(teacher, copy=False)
    for model in (loaded, student):
        model.fit(X, LABELS, shuffle=False, verbose=0)
    for a, b in zip(
        weights_of(loaded.network), weights_of(student.network), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    # And another one later, a closed form.
    loaded.attach_teacher(exact)
    loaded.fit(X, LABELS, verbose=0)


@pytest.mark.parametrize(
    ("teacher", "part"),
    [
        (3, "`teacher` must be a DiffusionModel"),
        (DiffusionModel, "`teacher` must be a DiffusionModel"),
        (lambda z: z, r"`teacher` must be a function of \(z, logsnr, cond"),
        (lambda z, logsnr, given: z[:, :2], r"shape of z, \(2, 3\).*\(2, 2\)"),
        (
            lambda z, logsnr, given: given["text"],
            "`teacher` must be a function",
        ),
    ],
    ids=range(5),
)
def test_no_teacher(teacher, part):
    with pytest.raises(ValueError, match=part):
        student_of(teacher)


def test_what_is_no_teacher_of_this_student():
    with pytest.raises(ValueError, match="a network becomes the one by"):
        student_of(dense_network(SHAPE, CLASSES))
    with pytest.raises(ValueError, match="the student's num_classes, 2"):
        student_of(teacher_of(declared={}))
    other = {"pooled": Condition((2,), null=0.0)}
    with pytest.raises(ValueError, match="`teacher` must have the student's"):
        student_of(teacher_of(declared=other))
    with pytest.raises(ValueError, match="`guidance_scale` must not be given"):
        student_of(teacher_of(label_dropout=0.0), guidance_scale=2.0)
    student_of(teacher_of(label_dropout=0.0, guidable=True), guidance_scale=2.0)
    for cls, kw in (
        (MultistepConsistencyModel, {"student_steps": 1}),
        (GuidanceDistillationModel, {}),
        (
            ProgressiveDistillationModel,
            {"student_steps": 1, "teacher_steps": 2, "iterations_per_stage": 1},
        ),
    ):
        with pytest.raises(ValueError, match="`teacher` must be a Diffusion"):
            cls.from_teacher(exact, **kw)


def test_guidance_distilled_of_a_closed_form():
    model = GuidanceDistillationModel(
        dense_network(SHAPE, CLASSES),
        space=spaces.Box(SHAPE),
        conditioning=CLASSES,
        guidance_scale=3.0,
        seed=0,
    )
    model.attach_teacher(exact)
    given = {"labels": ops.convert_to_tensor(LABELS)}
    inputs, target, _ = model.training_example(
        ops.convert_to_tensor(X), given, True
    )
    z, logsnr = array(inputs["z"]), array(inputs["logsnr"])
    x = exact_in_numpy(z, logsnr, LABELS)
    without = exact_in_numpy(z, logsnr, np.full(16, 2))
    want = without + 3.0 * (x - without)
    np.testing.assert_allclose(array(target), want, atol=1e-4)
