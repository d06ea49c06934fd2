"""TRACT against its formulas in float64."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import TractModel, backend, samplers


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def logsnr_at(t):
    """The cosine schedule from 15 to -15, in float64."""
    low, high = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    return -2 * np.log(np.tan(low + np.asarray(t) * (high - low)))


def times_of(logsnr):
    low, high = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    return (np.arctan(np.exp(-to_numpy(logsnr) / 2)) - low) / (high - low)


def rates(logsnr):
    alpha = np.sqrt(1 / (1 + np.exp(-logsnr)))
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))
    return alpha[:, None, None, None], sigma[:, None, None, None]


@keras.saving.register_keras_serializable(package="test_tract")
class ClosedForm(keras.layers.Layer):
    """Says `x = a tanh(z) + logsnr / 50`; `a` is trained."""

    def build(self, shape):
        self.a = self.add_weight(shape=(), initializer="ones", name="a")

    def call(self, inputs, training=False):
        level = inputs["logsnr"][:, None, None, None] / 50
        return self.a * ops.tanh(inputs["z"]) + level


def make_model(**kwargs):
    """32 -> 8 -> 2 steps, 2 updates per stage."""
    model = TractModel(
        ClosedForm(),
        image_shape=(4, 4, 1),
        prediction_type="x",
        seed=1,
        **{"steps": (32, 8, 2), "iterations_per_stage": 2, **kwargs},
    )
    for network, a in (
        (model.network, 0.9),
        (model.ema_network, 0.5),
        (model.teacher.network, 0.7),
        (model.self_teacher.network, 0.3),
    ):
        network.a.assign(a)
    return model


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_example_is_the_papers(stage, toy_images):
    model, images = make_model(), toy_images(256)
    model.iteration.assign(2 * stage)
    teachers, students = ((32, 8), (8, 2))[min(stage, 1)]
    assert model.trained_steps() == students
    inputs, target, weight = model.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    n = np.round(times_of(inputs["logsnr"]) * teachers)
    assert set(n) == set(range(1, teachers + 1))
    t, s = n / teachers, (n - 1) / teachers
    end = np.floor(s * students + 1e-9) / students
    levels = l_t, _, l_end = [logsnr_at(at) for at in (t, s, end)]
    np.testing.assert_allclose(to_numpy(inputs["logsnr"]), l_t, atol=1e-4)
    np.testing.assert_allclose(to_numpy(weight), np.exp(l_t) + 1, rtol=1e-4)

    # A step of the teacher, and one of the self-teacher to the group's end,
    # through z.
    z = z_t = to_numpy(inputs["z"])
    for a, (l_a, l_b) in zip((0.7, 0.3), itertools.pairwise(levels)):
        (alpha_a, sigma_a), (alpha_b, sigma_b) = rates(l_a), rates(l_b)
        x = a * np.tanh(z) + l_a[:, None, None, None] / 50
        z = alpha_b * x + sigma_b / sigma_a * (z - alpha_a * x)
    (alpha_t, sigma_t), (alpha_e, sigma_e) = rates(l_t), rates(l_end)
    kept = sigma_e / sigma_t
    expected = (z - kept * z_t) / (alpha_e - alpha_t * kept)
    np.testing.assert_allclose(to_numpy(target), expected, atol=2e-5)


def test_it_takes_two_evaluations_besides_the_students(toy_images):
    model, evaluations = make_model(), []
    call = ClosedForm.call

    class Counting(ClosedForm):
        def call(self, inputs, training=False):
            evaluations.append(float(self.a))
            return call(self, inputs, training)

    for network in (
        model.network,
        model.ema_network,
        model.teacher.network,
        model.self_teacher.network,
    ):
        network.__class__ = Counting
    images = ops.convert_to_tensor(toy_images(8))
    model.training_example(images, {}, True)
    np.testing.assert_allclose(evaluations, [0.7, 0.3], rtol=1e-6)


def test_stages_follow_each_other_in_one_fit(toy_images, count_calls):
    model = make_model(steps=(16, 4, 2, 1), self_decay=0.25)
    model.compile(keras.optimizers.Adam(1e-2))
    calls, seen = count_calls(model), []
    networks = (
        model.network,
        model.ema_network,
        model.teacher.network,
        model.self_teacher.network,
    )
    before = [float(network.a) for network in networks]

    class See(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps = self.model.trained_steps()
            seen.append(
                (steps, *(float(ops.convert_to_numpy(n.a)) for n in networks))
            )

    model.fit(toy_images(32), batch_size=4, callbacks=[See()], verbose=0)
    assert [at[0] for at in seen] == [4, 2, 2, 1, 1, 1, 1, 1]
    assert len(calls) == (8 if backend.NAME == "torch" else 1)
    last = before
    for i, (_, *now) in enumerate(seen):
        network, ema, teacher, own = now
        if i in (1, 3):  # the average takes all their places
            assert network == teacher == own == ema
            assert teacher != last[2]
        else:
            assert teacher == last[2]
            expected = 0.25 * last[3] + 0.75 * network
            np.testing.assert_allclose(own, expected, rtol=1e-5)
        last = now


def test_updates_count_not_batches(toy_images):
    model = make_model()
    model.compile(keras.optimizers.Adam(1e-2, gradient_accumulation_steps=3))
    seen, own = [], model.self_teacher.network
    for _ in range(8):
        before = float(own.a)
        model.fit(toy_images(4), batch_size=4, verbose=0)
        seen.append((model.trained_steps(), before == float(own.a)))
    assert seen == [(8, i not in (2, 5)) for i in range(5)] + [
        (2, i not in (2, 5)) for i in range(5, 8)
    ]


def test_a_loaded_model_goes_on(make_teacher, toy_images, weights_of, tmp_path):
    teacher = make_teacher(dropout=0.2, num_classes=3)
    model = TractModel.from_teacher(
        teacher, steps=(8, 4, 2), iterations_per_stage=4, seed=2
    )
    average = teacher.ema_network.get_weights()
    for network in (
        model.network,
        model.teacher.network,
        model.self_teacher.network,
    ):
        for ours, theirs in zip(network.get_weights(), average):
            np.testing.assert_array_equal(ours, theirs)
        assert network.trainable is (network is model.network)
    noise = toy_images(3)
    np.testing.assert_allclose(
        model.generate(noise=noise, num_steps=4),
        teacher.generate(noise=noise, num_steps=4, sampler=samplers.DDIM()),
        atol=1e-5,
    )
    model.compile(keras.optimizers.Adam(1e-3))
    data = dict(x=toy_images(12), y=np.arange(12) % 3)
    common = dict(batch_size=4, shuffle=False, verbose=0)
    model.fit(**data, **common)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.steps == (8, 4, 2)
    for name in ("network", "ema_network", "teacher", "self_teacher"):
        theirs, ours = (weights_of(getattr(m, name)) for m in (loaded, model))
        for one, other in zip(theirs, ours, strict=True):
            np.testing.assert_array_equal(one, other)
    for each in (model, loaded):
        each.fit(**data, **common)
    for theirs, ours in zip(weights_of(loaded), weights_of(model), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    assert loaded.trained_steps() == 2
    with pytest.raises(ValueError, match=r"`num_steps`.*student_steps=2"):
        loaded.generate(noise=noise, num_steps=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 8}, "`steps` must be two or more integers"),
        ({"steps": (8,)}, "`steps` must be two or more integers"),
        ({"steps": (8, 8)}, "`steps` must be two or more integers"),
        ({"steps": (8, 3)}, "`steps` must be two or more.*8, 3"),
        ({"steps": (8, 2.5)}, "`steps` must be an integer"),
        ({"iterations_per_stage": 0}, "`iterations_per_stage` must be an int"),
        ({"self_decay": 1.0}, r"`self_decay` must be in \[0, 1\)"),
        ({"guidance_scale": 2.0}, "`guidance_scale` must be 1"),
        ({"ema": None}, "`ema` must be one of"),
        ({"lora_rank": 2}, "`lora_rank` must be None"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)
