"""Consistency tuning (ECT, iCT) against its formulas in float64."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import ConsistencyTuningModel, backend, losses
from keras_mscm.schedules import CosineSchedule

LOW, HIGH = -9.0, 12.0


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def logsnr_at(t):
    """The cosine schedule from `HIGH` to `LOW`, in float64."""
    low, high = np.arctan(np.exp(-HIGH / 2)), np.arctan(np.exp(-LOW / 2))
    return -2 * np.log(np.tan(low + np.asarray(t) * (high - low)))


def rates(logsnr):
    alpha = np.sqrt(1 / (1 + np.exp(-logsnr)))
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))
    return alpha[:, None, None, None], sigma[:, None, None, None]


@keras.saving.register_keras_serializable(package="test_consistency_tuning")
class ClosedForm(keras.layers.Layer):
    """Says `x = a tanh(z) + b logsnr / 10`; `a` and `b` are trained."""

    def build(self, shape):
        self.a = self.add_weight(shape=(), initializer="ones", name="a")
        self.b = self.add_weight(shape=(), initializer="zeros", name="b")

    def call(self, inputs, training=False):
        level = inputs["logsnr"][:, None, None, None] / 10
        return self.a * ops.tanh(inputs["z"]) + self.b * level


def make_model(**kwargs):
    model = ConsistencyTuningModel(
        ClosedForm(),
        CosineSchedule(logsnr_min=LOW, logsnr_max=HIGH),
        image_shape=(4, 4, 1),
        prediction_type="x",
        seed=1,
        **{"iterations_per_stage": 2, **kwargs},
    )
    model.network.a.assign(0.9)
    model.network.b.assign(0.3)
    model.ema_network.a.assign(0.5)
    model.ema_network.b.assign(-0.2)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 3, 6, 8])
@pytest.mark.parametrize("student_steps", [1, 4])
def test_the_example_is_the_papers(student_steps, stage, training, toy_images):
    model = make_model(student_steps=student_steps, gap_divisor=4, stages=6)
    model.iteration.assign(2 * stage + 1)
    images = toy_images(128)
    inputs, target, weight = model.training_example(
        ops.convert_to_tensor(images), {}, training
    )
    logsnr_t = to_numpy(inputs["logsnr"])
    z_t = to_numpy(inputs["z"])
    alpha_t, sigma_t = rates(logsnr_t)
    epsilon = (z_t - alpha_t * images) / sigma_t

    # r / t = 1 - n(t) / q^a, with n(t) = 1 + 8 sigmoid(-t) and r at least the
    # noise at the segment's end.
    t = np.exp(-logsnr_t / 2)
    share = (1 + 8 / (1 + np.exp(t))) / 4.0 ** min(stage, 6)
    r = t * (1 - np.minimum(share, 1))
    bounds = np.exp(-logsnr_at(np.arange(student_steps) / student_steps) / 2)
    end = np.max(np.where(bounds < t[:, None] * (1 - 1e-6), bounds, 0), axis=1)
    gap, at_end = t - r, r <= end
    r = np.maximum(r, end)
    if stage == 0:
        assert np.all(at_end)
    elif stage > 1:
        assert not np.all(at_end)

    # What it says at r, and the x with which DDIM goes from z_t to where that
    # leads, through z.
    logsnr_r, logsnr_end = -2 * np.log(r), -2 * np.log(end)
    (alpha_r, sigma_r), (alpha_e, sigma_e) = map(rates, (logsnr_r, logsnr_end))
    z_r = alpha_r * images + sigma_r * epsilon
    a, b = (0.9, 0.3) if training else (0.5, -0.2)
    x_r = a * np.tanh(z_r) + b * logsnr_r[:, None, None, None] / 10
    z_end = alpha_e * x_r + sigma_e / sigma_r * (z_r - alpha_r * x_r)
    kept = sigma_e / sigma_t
    expected = (z_end - kept * z_t) / (alpha_e - alpha_t * kept)
    # Next to the end what is worked out here through z_t, a float32, is none.
    clear = t - end > 0.1 * t
    np.testing.assert_allclose(
        to_numpy(target)[clear], expected[clear], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(to_numpy(weight), 1 / gap, rtol=1e-5)
    np.testing.assert_array_equal(
        to_numpy(target)[at_end], images[at_end].astype("float64")
    )
    if student_steps == 1:  # and no noise is left: the papers' target
        late = logsnr_t < 0
        np.testing.assert_allclose(
            to_numpy(target)[late & ~at_end], x_r[late & ~at_end], atol=2e-2
        )


def test_times_are_log_normal_within_the_schedule(toy_images):
    model = make_model(noise_mean=-0.8, noise_std=1.6)
    logsnr_t, _, logsnr_end, _ = map(to_numpy, model.draw_times((20000,)))
    assert logsnr_t.min() >= LOW - 1e-4
    assert logsnr_t.max() < HIGH
    np.testing.assert_allclose(logsnr_end, HIGH, rtol=1e-6)
    log_t = -logsnr_t / 2  # of which few lie beyond the schedule
    assert abs(np.median(log_t) + 0.8) < 4 * 1.6 * 1.25 / 20000**0.5
    low, high = np.quantile(log_t, [0.15866, 0.84134])
    assert abs((high - low) / 2 - 1.6) < 0.06


def test_every_segment_has_its_times_and_ends(toy_images):
    model = make_model(student_steps=4, noise_mean=0.0, noise_std=4.0)
    logsnr_t, _, logsnr_end, _ = map(to_numpy, model.draw_times((4000,)))
    bounds = logsnr_at(np.arange(5) / 4)
    for high, low in itertools.pairwise(bounds):
        within = (logsnr_t < high - 1e-4) & (logsnr_t > low + 1e-4)
        assert np.sum(within) > 100
        np.testing.assert_allclose(logsnr_end[within], high, rtol=1e-5)


def test_the_loss_is_of_ict():
    # sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(D), over sqrt(D).
    loss = make_model().default_loss()
    assert isinstance(loss, losses.PseudoHuber)
    off = np.full((1, 4, 4, 1), 0.001, "float32")
    c = 0.00054 * 4
    expected = (np.sqrt(16 * 0.001**2 + c**2) - c) / 4
    given = loss(ops.zeros((1, 4, 4, 1)), ops.convert_to_tensor(off))
    np.testing.assert_allclose(float(given), expected, rtol=1e-4)


def test_stages_follow_each_other_in_one_fit(toy_images, count_calls):
    model = make_model(stages=2)
    model.compile(keras.optimizers.SGD(1e-6))
    calls, seen = count_calls(model), []

    class See(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(int(self.model.stage()))

    model.fit(toy_images(32), batch_size=4, callbacks=[See()], verbose=0)
    assert seen == [0, 1, 1, 2, 2, 2, 2, 2]
    assert len(calls) == (8 if backend.NAME == "torch" else 1)


def test_it_takes_one_evaluation_and_the_students(toy_images):
    model, evaluations = make_model(), []
    call = ClosedForm.call

    class Counting(ClosedForm):
        def call(self, inputs, training=False):
            evaluations.append(tuple(inputs["z"].shape))
            return call(self, inputs, training)

    model.network.__class__ = model.ema_network.__class__ = Counting
    images = ops.convert_to_tensor(toy_images(8))
    inputs, _, _ = model.training_example(images, {}, True)
    assert evaluations == [(8, 4, 4, 1)]
    model(inputs, training=True)
    assert evaluations == [(8, 4, 4, 1)] * 2


def test_dropout_is_synchronised(dense_network, toy_images):
    # With dropout alone between z and x, and hardly a gap, what is said at r
    # is what the same mask lets through at t.
    z, logsnr = keras.Input((4, 4, 1), name="z"), keras.Input((), name="logsnr")
    mask = keras.layers.Dropout(0.5, seed=3)(ops.ones_like(z))
    model = ConsistencyTuningModel(
        keras.Model({"z": z, "logsnr": logsnr}, mask),
        image_shape=(4, 4, 1),
        prediction_type="x",
        iterations_per_stage=1,
        stages=16,
        seed=1,
    )
    model.iteration.assign(16)
    images = ops.convert_to_tensor(toy_images(16))
    inputs, target, _ = model.training_example(images, {}, True)
    said = to_numpy(model(inputs, training=True))
    clear = to_numpy(inputs["logsnr"]) < 5
    np.testing.assert_allclose(to_numpy(target)[clear], said[clear], atol=0.05)
    assert set(np.unique(said)) == {0, 2}


def test_a_loaded_model_goes_on(make_teacher, toy_images, weights_of, tmp_path):
    teacher = make_teacher(dropout=0.2, num_classes=3)
    model = ConsistencyTuningModel.from_teacher(
        teacher, student_steps=2, iterations_per_stage=2, seed=2
    )
    for ours, theirs in zip(
        model.network.get_weights(), teacher.ema_network.get_weights()
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert not model.needs_teacher
    assert model.teacher is None
    model.compile(keras.optimizers.Adam(1e-3))
    data = dict(x=toy_images(12), y=np.arange(12) % 3)
    common = dict(batch_size=4, shuffle=False, verbose=0)
    model.fit(**data, **common)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name in ("student_steps", "iterations_per_stage", "stages"):
        assert getattr(loaded, name) == getattr(model, name)
    for each in (model, loaded):
        each.fit(**data, **common)
    for theirs, ours in zip(weights_of(loaded), weights_of(model), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    noise = toy_images(3)
    np.testing.assert_array_equal(
        loaded.generate(noise=noise), model.generate(noise=noise, num_steps=2)
    )
    with pytest.raises(ValueError, match=r"`num_steps`.*student_steps=2"):
        model.generate(noise=noise, num_steps=3)
    with pytest.raises(ValueError, match="`times` must not be given"):
        model.generate(noise=noise, times=[1, 0.5, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_steps": 0}, "`student_steps` must be an integer"),
        ({"noise_mean": "low"}, "`noise_mean` must be a number in"),
        ({"noise_std": 0.0}, "`noise_std` must be a number in"),
        ({"gap_divisor": 1.0}, "`gap_divisor` must be a number in"),
        ({"iterations_per_stage": 1.5}, "`iterations_per_stage` must be an"),
        ({"stages": -1}, "`stages` must be an integer"),
        ({"gap_divisor": 8, "stages": 8}, r"`gap_divisor`.*stages=8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)
