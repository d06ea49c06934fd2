"""Algorithms 1 and 2: consistency training and distillation."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    callbacks,
    losses,
    samplers,
)


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def times_of(logsnr):
    """The inverse of the cosine schedule from 15 to -15."""
    low = np.arctan(np.exp(-7.5))
    angle = np.arctan(np.exp(-to_numpy(logsnr) / 2))
    return (angle - low) / (np.pi / 2 - 2 * low)


def logsnr_at(t):
    low = np.arctan(np.exp(-7.5))
    return -2 * np.log(np.tan(low + t * (np.pi / 2 - 2 * low)))


def rates(logsnr):
    alpha = np.sqrt(1 / (1 + np.exp(-logsnr)))
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))
    return alpha[:, None, None, None], sigma[:, None, None, None]


def make_pair(make_teacher, make_student, **student_with):
    teacher = make_teacher()
    return teacher, make_student(teacher=teacher, student_with=student_with)


# Algorithm 1.


@pytest.mark.parametrize("steps", [(1, 8), (2, 8), (8, 8), (4, 10)])
def test_times_are_whole_steps_of_one_grid(steps, make_student, toy_images):
    # 10 / 4 rounds to 2 per segment, so that T is 8 and s can meet t_step.
    student_steps, teacher_steps = steps
    student = make_student(
        student_with={
            "student_steps": student_steps,
            "teacher_steps": teacher_steps,
            "method": "training",
        }
    )
    inputs, _, _ = student.training_example(
        ops.convert_to_tensor(toy_images(256)), {}, True
    )
    t = times_of(inputs["logsnr"])
    np.testing.assert_allclose(t * 8, np.round(t * 8), atol=1e-3)
    # Every step of every segment, and each as often as the others.
    values, counts = np.unique(np.round(t * 8), return_counts=True)
    np.testing.assert_array_equal(values, np.arange(1, 9))
    assert np.min(counts) > 12


def numpy_target(student, teacher, inputs, images, total, reference=None):
    """Algorithm 1 in float64, through z as the paper has it (eq. 4, 5, 14)."""
    reference = reference or student.network
    t = np.round(times_of(inputs["logsnr"]) * total) / total
    s = t - 1 / total
    k = student.student_steps
    t_step = np.floor(s * k + 1e-6) / k
    alpha_t, sigma_t = rates(logsnr_at(t))
    alpha_s, sigma_s = rates(logsnr_at(s))
    alpha_step, sigma_step = rates(logsnr_at(t_step))
    z_t = to_numpy(inputs["z"])

    def call(network, z, at):
        at = ops.convert_to_tensor(logsnr_at(at), "float32")
        z = ops.convert_to_tensor(z, "float32")
        return to_numpy(student.denoise(network, z, at))

    x = images if teacher is None else call(teacher.ema_network, z_t, t)
    x_var = student.eta * np.mean((x - images) ** 2, (1, 2, 3), keepdims=True)
    epsilon = (z_t - alpha_t * x) / sigma_t
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    power = np.mean(epsilon**2, (1, 2, 3), keepdims=True)
    z_s = alpha_s * x + np.sqrt(sigma_s**2 + z_var / power) * epsilon
    x_ref = call(reference, z_s, s)
    z_ref = alpha_step * x_ref + sigma_step / sigma_s * (z_s - alpha_s * x_ref)
    kept = sigma_step / sigma_t
    return (z_ref - kept * z_t) / (alpha_step - alpha_t * kept)


@pytest.mark.parametrize("method", ["training", "distillation"])
@pytest.mark.parametrize("student_steps", [1, 2])
def test_target_is_the_numpy_target(
    method, student_steps, make_teacher, make_student, toy_images
):
    teacher, student = make_pair(
        make_teacher, make_student, method=method, student_steps=student_steps
    )
    for weight in student.network.weights:  # student, EMA, teacher differ
        weight.assign(1.5 * weight)
    images = toy_images(64)
    inputs, target, weight = student.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    expected = numpy_target(
        student,
        teacher if method == "distillation" else None,
        inputs,
        images,
        8,
    )
    np.testing.assert_allclose(to_numpy(target), expected, atol=2e-4)
    np.testing.assert_allclose(
        to_numpy(weight), to_numpy(student.weighting(inputs["logsnr"]))
    )


@pytest.mark.parametrize("method", ["training", "distillation"])
@pytest.mark.parametrize("reference", ["online", "ema"])
def test_the_reference_is_the_network_or_its_average(
    reference, method, make_teacher, make_student, toy_images
):
    teacher, student = make_pair(
        make_teacher, make_student, method=method, reference=reference
    )
    for weight in student.network.weights:
        weight.assign(1.5 * weight)
    images = toy_images(64)
    inputs, target, _ = student.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    teacher = teacher if method == "distillation" else None
    networks = {"online": student.network, "ema": student.ema_network}
    expected = {
        name: numpy_target(student, teacher, inputs, images, 8, network)
        for name, network in networks.items()
    }
    np.testing.assert_allclose(
        to_numpy(target), expected.pop(reference), atol=2e-4
    )
    ((_, other),) = expected.items()
    assert np.abs(to_numpy(target) - other).max() > 1e-2


def test_the_average_has_no_dropout(make_student, toy_images):
    # Nor has what it says for one seed anything of another.
    targets = []
    for seed in (5, 6):
        keras.utils.set_random_seed(0)
        student = make_student(
            dropout=0.5,
            dropout_seed=seed,
            student_with={"reference": "ema", "method": "training"},
        )
        images = ops.convert_to_tensor(toy_images(16))
        targets.append(to_numpy(student.training_example(images, {}, True)[1]))
    np.testing.assert_array_equal(*targets)


def test_one_step_is_the_original_consistency_model(
    make_teacher, make_student, toy_images
):
    # Eq. 2: what it says at t is to be what it says at s. (The target is that
    # all the more, the less noise there is at t = 0: up to w, see
    # `functional.consistency_target`.)
    teacher, student = make_pair(
        make_teacher,
        make_student,
        student_steps=1,
        teacher_steps=16,
        integrator=samplers.DDIM(),
    )
    images = toy_images(256)
    inputs, target, _ = student.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    t = times_of(inputs["logsnr"])
    steps = np.round(16 * t)
    assert set(steps) == set(range(1, 17))
    s = (steps - 1) / 16
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        rates(logsnr_at(at)) for at in (t, s)
    )
    x = to_numpy(
        student.denoise(teacher.ema_network, inputs["z"], inputs["logsnr"])
    )
    z_s = alpha_s * x + sigma_s / sigma_t * (
        to_numpy(inputs["z"]) - alpha_t * x
    )
    at_s = to_numpy(
        student.denoise(
            student.network,
            ops.convert_to_tensor(z_s, "float32"),
            ops.convert_to_tensor(logsnr_at(s), "float32"),
        )
    )
    target = to_numpy(target)
    late = steps > 1
    np.testing.assert_allclose(target[late], at_s[late], atol=0.02)
    # At s = 0 the last word is the teacher's.
    np.testing.assert_allclose(target[~late], x[~late], atol=1e-5)
    assert np.abs(x - at_s)[late].max() > 0.1


# The number of teacher steps.


@keras.saving.register_keras_serializable(package="test_multistep")
def doubling(iteration):
    """4, 4, 8, 8, 16, 16, ..."""
    return 4.0 * 2.0 ** ops.cast(iteration // 2, "float32")


TEACHER_STEPS = {
    "function": (doubling, lambda i: 4 * 2 ** (i // 2)),
    "polynomial": (
        keras.optimizers.schedules.PolynomialDecay(4.0, 5, 24.0),
        lambda i: 4 + 20 * min(i / 5, 1),
    ),
    "piecewise": (
        keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [4, 9, 32]),
        lambda i: 4 if i <= 1 else 9 if i <= 3 else 32,
    ),
}


@pytest.mark.parametrize("kind", TEACHER_STEPS)
def test_teacher_steps_as_a_function(
    kind, make_teacher, make_student, toy_images, count_calls, tmp_path
):
    function, expected = TEACHER_STEPS[kind]
    teacher = make_teacher()
    student = make_student(
        teacher=teacher, student_with={"teacher_steps": function}
    )
    calls, seen = count_calls(student), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(float(self.model.steps_per_segment()))

    images = toy_images(24)
    arguments = dict(batch_size=4, shuffle=False, verbose=0)
    student.fit(images, callbacks=[Watch()], **arguments)
    want = [round(expected(i) / 2) for i in range(6)]
    np.testing.assert_array_equal(seen, want)
    assert len(calls) == (6 if keras.backend.backend() == "torch" else 1)

    # The times are those of so many steps, also in a file.
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    loaded.attach_teacher(teacher)
    total = 2 * round(expected(6) / 2)
    inputs, _, _ = loaded.training_example(
        ops.convert_to_tensor(toy_images(256)), {}, True
    )
    steps = times_of(inputs["logsnr"]) * total
    np.testing.assert_allclose(steps, np.round(steps), atol=0.01)
    assert set(np.round(steps)) == set(range(1, total + 1))


def test_the_compiled_step_takes_as_many_teacher_steps(toy_images):
    # A network that says the time at which it is asked, and a loss that hands
    # it on: of n teacher steps the mean time is (n + 1) / 2n.
    z = keras.Input((4, 4, 1), name="z")
    logsnr = keras.Input((), name="logsnr")
    said = keras.layers.Reshape((1, 1, 1))(logsnr)
    said = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")(
        said
    )
    said = keras.layers.UpSampling2D(4)(said)

    class Said(keras.losses.Loss):
        def call(self, target, predicted):
            angle = ops.arctan(ops.exp(-predicted / 2)) / (np.pi / 2)
            return ops.mean(angle, axis=(1, 2, 3))

    student = MultistepConsistencyModel(
        keras.Model({"z": z, "logsnr": logsnr}, said),
        image_shape=(4, 4, 1),
        prediction_type="x",
        student_steps=1,
        teacher_steps=one_then_many,
        method="training",
        weighting=ops.ones_like,
        seed=0,
    )
    student.compile(keras.optimizers.SGD(0.0), Said())
    history = student.fit(
        toy_images(4000), batch_size=2000, epochs=2, verbose=0
    ).history["loss"]
    np.testing.assert_allclose(history[0], 1.0, atol=1e-3)
    np.testing.assert_allclose(history[1], 0.5, atol=4 * (1 / 12 / 4000) ** 0.5)


@keras.saving.register_keras_serializable(package="test_multistep")
def one_then_many(iteration):
    return ops.where(iteration < 2, 1.0, 1000.0)


@pytest.mark.parametrize("function", [doubling, lambda iteration: 1.5])
def test_teacher_steps_that_cannot_be(function, make_student, toy_images):
    if function is doubling:
        student = make_student(student_with={"teacher_steps": function})
        anneal = callbacks.TeacherStepAnneal(4, 8, 10)
        with pytest.raises(ValueError, match=r"`teacher_steps`.*doubling"):
            student.fit(toy_images(4), callbacks=[anneal], verbose=0)
        assert int(student.iteration) == 0
    else:
        with pytest.raises(ValueError, match=r"student_steps=2.*1\.5"):
            make_student(student_with={"teacher_steps": function})


@keras.saving.register_keras_serializable(package="test_multistep")
class GridDiffusion(DiffusionModel):
    """Diffusion training at the times, and with the noise, of 8-step CT."""

    def training_example(self, images, labels, training):
        seed, batch = self.seed_generator, ops.shape(images)[:1]
        epsilon = keras.random.normal(ops.shape(images), seed=seed)
        step = ops.floor(keras.random.uniform(batch, 0, 8, seed=seed))
        keras.random.uniform(batch, seed=seed)
        logsnr = self.schedule((step + 1) / 8)
        alpha, sigma = (
            ops.reshape(ops.sqrt(ops.sigmoid(sign * logsnr)), (-1, 1, 1, 1))
            for sign in (1, -1)
        )
        inputs = {"z": alpha * images + sigma * epsilon, "logsnr": logsnr}
        return inputs, images, self.weighting(logsnr)


def test_many_step_training_is_diffusion_training(
    dense_network, toy_images, weights_of
):
    # Eq. 9: with as many student as teacher steps the losses are the same,
    # and so is all that follows from them.
    images, ends = toy_images(64), []
    for steps in (8, None):
        keras.utils.set_random_seed(0)
        common = dict(
            image_shape=(4, 4, 1), weighting=losses.snr_plus_one, seed=3
        )
        if steps:
            model = MultistepConsistencyModel(
                dense_network(),
                student_steps=steps,
                teacher_steps=steps,
                method="training",
                **common,
            )
        else:
            model = GridDiffusion(dense_network(), **common)
        model.compile(keras.optimizers.Adam(1e-3), losses.PseudoHuber())
        history = model.fit(
            images,
            batch_size=32,
            epochs=3,
            shuffle=False,
            validation_data=images,
            verbose=0,
        ).history
        weights = weights_of(model.network) + weights_of(model.ema_network)
        ends.append((history["loss"], history["val_loss"], weights))
    consistency, diffusion = ends
    np.testing.assert_allclose(consistency[0], diffusion[0], rtol=1e-5)
    np.testing.assert_allclose(consistency[1], diffusion[1], rtol=1e-5)
    for ours, theirs in zip(consistency[2], diffusion[2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


# Synchronised dropout.


@pytest.fixture
def mask_student():
    """A factory of students whose network says nothing but its dropout mask.

    That is 0 or 2 at each pixel, and 1 without dropout.
    """

    def make(dropout_seed, teacher_steps):
        layers = keras.layers
        z = keras.Input((4, 4, 1), name="z")
        logsnr = keras.Input((), name="logsnr")
        ones = layers.Rescaling(0.0, 1.0)(z)
        ones = layers.Dense(1, use_bias=False, kernel_initializer="ones")(ones)
        mask = layers.Dropout(0.5, seed=dropout_seed)(ones)
        student = MultistepConsistencyModel(
            keras.Model({"z": z, "logsnr": logsnr}, mask),
            image_shape=(4, 4, 1),
            prediction_type="x",
            student_steps=1,
            teacher_steps=teacher_steps,
            method="training",
            weighting=ops.ones_like,
            seed=0,
        )
        student.compile(keras.optimizers.SGD(0.0), losses.SquaredL2())
        return student

    return make


@pytest.mark.parametrize("dropout_seed", [5, None])
def test_dropout_is_synchronised(dropout_seed, mask_student, toy_images):
    student, images = mask_student(dropout_seed, 16), toy_images(32)
    masks = []
    for _ in range(2):
        inputs, target, _ = student.training_example(
            ops.convert_to_tensor(images), {}, True
        )
        # In consistency training the target is x + w (x_ref - x).
        t = times_of(inputs["logsnr"])
        late = t > 1.5 / 16  # w is 0 at the first step
        w = np.expm1((logsnr_at(t - 1 / 16) - 15) / 2) / np.expm1(
            (logsnr_at(t) - 15) / 2
        )
        w = w[late, None, None, None]
        reference = (to_numpy(target) - images)[late] / w + images[late]
        mask = to_numpy(student(inputs, training=True))[late]
        np.testing.assert_allclose(reference, mask, atol=1e-2)
        assert set(np.unique(mask)) == {0, 2}
        masks.append(mask[:8])
    # The next step draws another.
    assert 0.2 < np.mean(masks[0] != masks[1]) < 0.8


@pytest.mark.parametrize("dropout_seed", [5, None])
def test_dropout_is_synchronised_in_the_compiled_step(
    dropout_seed, mask_student, toy_images
):
    # With so many teacher steps the target is the reference's mask. Two
    # masks that are not the same one differ by 2 in the mean square.
    student = mask_student(dropout_seed, 10**6)
    images = toy_images(32)
    history = student.fit(
        images, epochs=2, validation_data=images, verbose=0
    ).history
    np.testing.assert_allclose(history["loss"], 0, atol=1e-3)
    np.testing.assert_allclose(history["val_loss"], 0, atol=1e-3)


# The teacher.


def test_the_teacher_does_not_change(
    make_teacher, make_student, toy_images, weights_of
):
    teacher = make_teacher(dropout=0.2)
    teacher.fit(toy_images(8), verbose=0)  # so that EMA and network differ
    student = make_student(teacher=teacher)
    whole = weights_of(teacher)
    copied = student.teacher.network.get_weights()
    for ours, theirs in zip(copied, teacher.ema_network.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    start = student.network.get_weights()
    student.fit(toy_images(8), batch_size=4, epochs=2, verbose=0)
    for before, after in zip(whole, weights_of(teacher)):
        np.testing.assert_array_equal(before, after)
    for before, after in zip(copied, student.teacher.network.get_weights()):
        np.testing.assert_array_equal(before, after)
    for before, after in zip(start, student.network.get_weights()):
        assert np.any(before != after)
    # The optimizer holds two moments per trained weight, and no more.
    slots = [v for v in student.optimizer.variables if v.shape != ()]
    assert len(slots) == 2 * len(student.network.trainable_weights)
    # And training the teacher on changes nothing of the student's copy.
    teacher.fit(toy_images(8), verbose=0)
    for before, after in zip(copied, student.teacher.network.get_weights()):
        np.testing.assert_array_equal(before, after)


def test_the_student_begins_as_the_average(make_teacher, toy_images):
    teacher = make_teacher(num_classes=3, prediction_type="epsilon")
    teacher.fit(toy_images(8), np.arange(8) % 3, verbose=0)
    student = MultistepConsistencyModel.from_teacher(teacher, student_steps=4)
    assert (student.student_steps, student.method) == (4, "distillation")
    assert student.schedule is teacher.schedule
    assert student.prediction_type == "epsilon"
    assert student.image_shape == teacher.image_shape
    assert student.num_classes == 3
    average = teacher.ema_network.get_weights()
    for network in (student.network, student.ema_network):
        for ours, theirs in zip(network.get_weights(), average):
            np.testing.assert_array_equal(ours, theirs)
    noise = toy_images(3)
    np.testing.assert_allclose(
        student.generate(noise=noise),
        teacher.generate(noise=noise, num_steps=4, sampler=samplers.DDIM()),
        atol=1e-5,
    )


def test_what_is_trainable_stays_trainable(make_teacher):
    # Also where the network is frozen with its teacher: its layers' own
    # `trainable` is in the configuration of a functional model.
    teacher = make_teacher()
    names = [layer.name for layer in teacher.network.layers]
    student = MultistepConsistencyModel.from_teacher(teacher, student_steps=2)
    assert len(student.trainable_weights) == 6
    assert [layer.name for layer in student.network.layers] == names
    teacher.network.layers[-2].trainable = False
    student = MultistepConsistencyModel.from_teacher(teacher, student_steps=2)
    assert len(student.trainable_weights) == 4
    teacher.trainable = False
    student = MultistepConsistencyModel.from_teacher(teacher, student_steps=2)
    assert len(student.trainable_weights) == 6
    assert not student.teacher.trainable_weights
    assert not student.ema_network.trainable_weights


def test_a_second_teacher_replaces_the_first(
    make_teacher, make_student, toy_images
):
    first, second = make_teacher(), make_teacher()
    student = make_student(teacher=first)
    before = len(student.variables)
    student.fit(toy_images(4), verbose=0)
    student.attach_teacher(second)
    assert len(student.variables) == before
    for ours, theirs in zip(
        student.teacher.network.get_weights(),
        second.ema_network.get_weights(),
    ):
        np.testing.assert_array_equal(ours, theirs)
    student.fit(toy_images(4), verbose=0)
    assert int(student.iteration) == 2


def test_training_needs_no_teacher(make_teacher):
    student = MultistepConsistencyModel.from_teacher(
        make_teacher(), student_steps=2, method="training"
    )
    assert student.teacher.network is None
    assert student.teacher.variables == []


# What it is all for.


@pytest.mark.parametrize("method", ["training", "distillation"])
@pytest.mark.parametrize("student_steps", [1, 2, 8])
def test_trains_and_samples(method, student_steps, make_student, toy_images):
    student = make_student(
        dropout=0.1,
        student_with={"student_steps": student_steps, "method": method},
    )
    evaluations = []
    denoise = student.denoise
    images = toy_images(8)
    history = student.fit(images, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    student.denoise = lambda *args: evaluations.append(1) or denoise(*args)
    sampled = student.generate(4, num_steps=student_steps, seed=0)
    assert sampled.shape == (4, 4, 4, 1)
    assert np.all(np.abs(sampled) <= 1)
    if keras.backend.backend() == "torch":  # the only one without a trace
        assert len(evaluations) == student_steps
    np.testing.assert_array_equal(sampled, student.generate(4, seed=0))


def test_generate_is_algorithm_2(make_student, toy_images):
    student, z = make_student(student_with={"student_steps": 3}), toy_images(4)
    sampled = student.generate(noise=z)
    for t in (1.0, 2 / 3, 1 / 3):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            rates(np.full(4, logsnr_at(at))) for at in (t, t - 1 / 3)
        )
        logsnr = np.full(4, logsnr_at(t), "float32")
        inputs = {"z": np.float32(z), "logsnr": logsnr}
        v = to_numpy(
            student.ema_network(
                {k: ops.convert_to_tensor(x) for k, x in inputs.items()}
            )
        )
        x = alpha_t * z - sigma_t * v
        z = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
    np.testing.assert_allclose(sampled, np.clip(z, -1, 1), atol=1e-4)


def test_distillation_brings_the_student_to_the_teacher(dense_network):
    # Four images. A teacher that has learnt them well takes 64 steps; in two
    # it misses its own samples. A student has to make up for that.
    rng = np.random.default_rng(0)
    images = np.sign(rng.standard_normal((4, 4, 4, 1))).astype("float32")
    images = np.tile(0.8 * images, (640, 1, 1, 1))
    teacher = DiffusionModel(
        dense_network(width=64), image_shape=(4, 4, 1), ema_decay=0.98, seed=1
    )
    teacher.compile(keras.optimizers.Adam(5e-3))
    teacher.fit(images, batch_size=256, epochs=25, verbose=0)
    student = MultistepConsistencyModel.from_teacher(
        teacher,
        student_steps=2,
        teacher_steps=32,
        eta=0.0,
        ema_decay=0.98,
        seed=2,
    )
    student.compile(keras.optimizers.Adam(2e-3))
    noise = rng.standard_normal((256, 4, 4, 1)).astype("float32")
    goal = teacher.generate(
        noise=noise, num_steps=64, sampler=samplers.DDIM(), batch_size=256
    )

    def distance():
        got = student.generate(noise=noise, batch_size=256)
        return np.mean((got - goal) ** 2)

    before = distance()
    student.fit(images, batch_size=256, epochs=15, verbose=0)
    print(before, distance())
    assert distance() < 0.5 * before
