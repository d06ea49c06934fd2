import itertools

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import ProgressiveDistillationModel, backend, samplers


def to_numpy(x):
    return ops.convert_to_numpy(x).astype("float64")


def rates(logsnr):
    """alpha and sigma, shaped to go with images."""
    logsnr = np.asarray(logsnr, "float64")[:, None, None, None]
    return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5


def logsnr_at(t):
    """The cosine schedule of log-SNR 15 to -15, in float64."""
    low, high = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    return -2 * np.log(np.tan(low + np.asarray(t, "float64") * (high - low)))


def times_of(logsnr):
    low, high = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    return (np.arctan(np.exp(-to_numpy(logsnr) / 2)) - low) / (high - low)


@pytest.fixture
def make_model(make_teacher):
    """A factory of compiled models, 8 -> 4 -> 2 steps, 2 updates per stage."""

    def make(*, compile_with=None, teacher=None, **kwargs):
        model = ProgressiveDistillationModel.from_teacher(
            teacher or make_teacher(),
            **{
                "student_steps": 2,
                "teacher_steps": 8,
                "iterations_per_stage": 2,
                "seed": 2,
                **kwargs,
            },
        )
        optimizer = keras.optimizers.Adam(1e-2)
        model.compile(**{"optimizer": optimizer, **(compile_with or {})})
        return model

    return make


def step_to(x, z_t, l_t, l_s, x_var=0.0):
    """DDIM, or with a variance aDDIM, from t to s (eq. 4 and 14)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(l_t), rates(l_s)
    epsilon = (z_t - alpha_t * x) / sigma_t
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    power = np.mean(epsilon**2, (1, 2, 3), keepdims=True)
    return alpha_s * x + np.sqrt(sigma_s**2 + z_var / power) * epsilon


@pytest.mark.parametrize("stage", [0, 1])
def test_the_target_is_two_steps_of_the_teacher(stage, make_model, toy_images):
    # Algorithm 2 of Salimans & Ho (2022), through z. In the first stage the
    # steps are aDDIM's, later those of a student, which are DDIM's.
    model = make_model()
    model.iteration.assign(2 * stage)
    steps = 4 // 2**stage
    images = toy_images(32)
    inputs, target, weight = model.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    t = np.round(times_of(inputs["logsnr"]) * steps) / steps
    assert set(t * steps) == set(range(1, steps + 1))
    np.testing.assert_allclose(times_of(inputs["logsnr"]), t, atol=1e-4)
    logsnr = [logsnr_at(t - part / steps) for part in (0, 0.5, 1)]

    def teacher(z, at):
        x = model.denoise(
            model.teacher.network,
            ops.convert_to_tensor(z, "float32"),
            ops.convert_to_tensor(at, "float32"),
        )
        return to_numpy(x)

    z_t = z = to_numpy(inputs["z"])
    for l_t, l_s in itertools.pairwise(logsnr):
        x = teacher(z, l_t)
        error = np.mean((x - images) ** 2, (1, 2, 3), keepdims=True)
        z = step_to(x, z, l_t, l_s, 0.75 * error if stage == 0 else 0.0)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(logsnr[0]), rates(logsnr[2])
    kept = sigma_s / sigma_t
    expected = (z - kept * z_t) / (alpha_s - kept * alpha_t)
    np.testing.assert_allclose(to_numpy(target), expected, atol=2e-4)
    np.testing.assert_allclose(
        to_numpy(weight), np.exp(to_numpy(inputs["logsnr"])) + 1, rtol=1e-5
    )


def test_stages_follow_each_other_in_one_fit(
    make_model, toy_images, weights_of, count_calls
):
    model = make_model(student_steps=1)  # 4, 2, 1
    calls, seen = count_calls(model), []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            model = self.model
            seen.append(
                {
                    "steps": model.trained_steps(),
                    "teacher": weights_of(model.teacher.network),
                    "network": weights_of(model.network),
                    "ema": weights_of(model.ema_network),
                }
            )

    first = weights_of(model.teacher.network)
    model.fit(toy_images(32), batch_size=4, callbacks=[Watch()], verbose=0)
    # After 1, 2, ..., 8 updates; beyond the last stage it stays.
    assert [at["steps"] for at in seen] == [4, 2, 2, 1, 1, 1, 1, 1]
    assert len(calls) == (8 if backend.NAME == "torch" else 1)

    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b))

    teachers = [first, *(at["teacher"] for at in seen)]
    changes = [not same(a, b) for a, b in itertools.pairwise(teachers)]
    assert changes == [False, True, False, True, False, False, False, False]
    for i, at in enumerate(seen):
        # The teacher is the average there was, and so is the network.
        at_boundary = i in (1, 3)
        assert same(at["teacher"], at["ema"]) == at_boundary
        assert same(at["network"], at["ema"]) == at_boundary


def test_updates_count_not_batches(make_model, toy_images):
    optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=3)
    model = make_model(compile_with={"optimizer": optimizer})
    first = ops.convert_to_numpy(model.teacher.network.weights[0])
    steps = []
    for _ in range(8):
        model.fit(toy_images(4), batch_size=4, verbose=0)
        last = ops.convert_to_numpy(model.teacher.network.weights[0])
        steps.append((model.trained_steps(), np.array_equal(first, last)))
    assert steps == [(4, True)] * 5 + [(2, False)] * 3


def test_generate_takes_the_steps_of_the_stage(make_model, toy_images):
    model, noise = make_model(), toy_images(3)
    for steps in (4, 2):
        assert model.trained_steps() == steps
        images = model.generate(noise=noise)
        np.testing.assert_array_equal(
            images, model.generate(noise=noise, num_steps=steps)
        )
        with pytest.raises(ValueError, match=f"student_steps={steps}"):
            model.generate(noise=noise, num_steps=6)
        model.fit(toy_images(8), batch_size=4, verbose=0)
    assert model.trained_steps() == 2


@pytest.mark.parametrize(
    "updates", [pytest.param(1, marks=pytest.mark.slow), 3]
)
def test_a_loaded_model_goes_on(
    updates, make_model, toy_images, weights_of, tmp_path
):
    # Its teacher is a student, which is nowhere else.
    model = make_model()
    images = toy_images(4 * updates)
    model.fit(images, batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for theirs, ours in zip(
        weights_of(loaded.teacher), weights_of(model.teacher), strict=True
    ):
        np.testing.assert_array_equal(theirs, ours)
    for each in (model, loaded):
        each.fit(toy_images(12), batch_size=4, shuffle=False, verbose=0)
    for theirs, ours in zip(weights_of(loaded), weights_of(model), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    assert int(loaded.iteration) == updates + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_steps": 6}, "`teacher_steps` must be student_steps=2 times"),
        ({"teacher_steps": 2}, "`teacher_steps`.*Received: teacher_steps=2"),
        ({"teacher_steps": 8.0}, "`teacher_steps` must be an integer"),
        ({"iterations_per_stage": 0}, "`iterations_per_stage` must be an int"),
        ({"guidance_scale": 2.0}, "`guidance_scale` must be 1"),
        ({"integrator": samplers.DDPM()}, "`integrator` must be deterministic"),
    ],
)
def test_bad_arguments(arguments, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_it_learns_its_teachers_steps(make_teacher):
    # Images that are one of two: the teacher's path bends where it chooses.
    rng = np.random.default_rng(0)
    pair = np.sign(rng.standard_normal((2, 4, 4, 1))).astype("float32")
    images = np.tile(0.8 * pair, (640, 1, 1, 1))
    teacher = make_teacher(
        width=64,
        compile_with={"optimizer": keras.optimizers.Adam(5e-3)},
        model_with={"ema_decay": 0.98},
    )
    teacher.fit(images, batch_size=256, epochs=25, verbose=0)
    model = ProgressiveDistillationModel.from_teacher(
        teacher,
        student_steps=2,
        teacher_steps=16,
        iterations_per_stage=25,
        eta=0.0,
        ema_decay=0.9,
        seed=2,
    )
    model.compile(keras.optimizers.Adam(2e-3))
    noise = rng.standard_normal((256, 4, 4, 1)).astype("float32")
    common = dict(noise=noise, sampler=samplers.DDIM(), batch_size=256)
    goal = teacher.generate(num_steps=16, **common)
    before = np.mean((teacher.generate(num_steps=2, **common) - goal) ** 2)
    model.fit(images, batch_size=256, epochs=15, verbose=0)
    got = model.generate(noise=noise, num_steps=2, batch_size=256)
    assert np.mean((got - goal) ** 2) < 0.5 * before


def test_its_file_has_the_teacher_where_version_0_1_has_it(
    make_teacher, tmp_path
):
    model = ProgressiveDistillationModel.from_teacher(
        make_teacher(), student_steps=2, teacher_steps=8
    )
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        assert "layers/frozen_network/network" in file
