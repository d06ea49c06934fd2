"""Shortcut models against their formulas in float64."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, ShortcutModel, UViT

M = 16


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


@keras.saving.register_keras_serializable(package="test_shortcut")
class ClosedForm(keras.layers.Layer):
    """Says `x = a tanh(z + (logsnr + 2 logsnr_end) / 50)`; `a` is trained."""

    takes_logsnr_end = True

    def build(self, shape):
        self.a = self.add_weight(shape=(), initializer="ones", name="a")

    def call(self, inputs, training=False):
        level = (inputs["logsnr"] + 2 * inputs["logsnr_end"]) / 50
        return self.a * ops.tanh(inputs["z"] + level[:, None, None, None])


def closed_form(a, z, logsnr, logsnr_end):
    level = (logsnr + 2 * logsnr_end) / 50
    return a * np.tanh(z + level[:, None, None, None])


def make_model(**kwargs):
    model = ShortcutModel(
        ClosedForm(),
        image_shape=(4, 4, 1),
        prediction_type="x",
        seed=1,
        **{"most_steps": M, **kwargs},
    )
    model.network.a.assign(0.9)
    model.ema_network.a.assign(0.5)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_the_example_is_the_papers(training, toy_images):
    model, images = make_model(), toy_images(512)
    inputs, target, weight = model.training_example(
        ops.convert_to_tensor(images), {}, training
    )
    logsnr_t, logsnr_end = to_numpy(inputs["logsnr"]), inputs["logsnr_end"]
    t, end = times_of(inputs["logsnr"]), times_of(logsnr_end)
    lengths = t - end
    np.testing.assert_allclose(
        to_numpy(weight), np.exp(logsnr_t) + 1, rtol=1e-5
    )

    # Three quarters: the images themselves, for the smallest step.
    np.testing.assert_allclose(lengths[128:], 1 / M, atol=1e-4)
    np.testing.assert_allclose(t[128:] * M, np.round(t[128:] * M), atol=1e-3)
    assert set(np.round(t[128:] * M)) == set(range(1, M + 1))
    np.testing.assert_array_equal(target[128:], images[128:])

    # A quarter: steps of 1 down to 2 / M, each length as often, at its
    # multiples.
    halvings = -np.log2(lengths[:128])
    np.testing.assert_allclose(halvings, np.round(halvings), atol=1e-2)
    values, counts = np.unique(np.round(halvings), return_counts=True)
    np.testing.assert_array_equal(values, [0, 1, 2, 3])
    assert np.min(counts) > 128 / 4 - 4 * (128 * 3 / 16) ** 0.5
    lengths = 2.0 ** -np.round(halvings)
    n = np.round(t[:128] / lengths)
    np.testing.assert_allclose(n, t[:128] / lengths, atol=1e-3)

    # Two DDIM steps of half the length with the average, through z.
    z = z_t = to_numpy(inputs["z"])[:128]
    levels = [logsnr_at((n - part) * lengths) for part in (0, 0.5, 1)]
    for l_t, l_s in itertools.pairwise(levels):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(l_t), rates(l_s)
        x = closed_form(0.5, z, l_t, l_s)
        z = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(levels[0]), rates(levels[2])
    kept = sigma_s / sigma_t
    expected = (z - kept * z_t) / (alpha_s - alpha_t * kept)
    np.testing.assert_allclose(
        to_numpy(target)[:128], expected, rtol=1e-5, atol=1e-5
    )


def test_it_takes_two_evaluations_of_a_part(toy_images):
    model, evaluations = make_model(), []
    call = ClosedForm.call

    class Counting(ClosedForm):
        def call(self, inputs, training=False):
            evaluations.append((self.a is average, inputs["z"].shape[0]))
            return call(self, inputs, training)

    average = model.ema_network.a
    model.network.__class__ = model.ema_network.__class__ = Counting
    images = ops.convert_to_tensor(toy_images(9))
    model.training_example(images, {}, True)
    assert evaluations == [(True, 3)] * 2  # of 9, rounded up


def test_generate_tells_where_each_step_leads(toy_images):
    model, z = make_model(), toy_images(3)
    assert model.student_steps == (1, 2, 4, 8, 16)
    sampled = model.generate(noise=z, num_steps=2)
    for t in (1.0, 0.5):
        l_t, l_s = (np.full(3, logsnr_at(at)) for at in (t, t - 0.5))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(l_t), rates(l_s)
        x = closed_form(0.5, z, l_t, l_s)
        z = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
    np.testing.assert_allclose(sampled, np.clip(z, -1, 1), atol=1e-4)
    with pytest.raises(ValueError, match="`num_steps` must be a number"):
        model.generate(2, num_steps=3)
    with pytest.raises(ValueError, match="`times` must not be given"):
        model.generate(2, times=[1, 0.5, 0])


def test_a_loaded_model_goes_on(toy_images, weights_of, tmp_path):
    network = UViT(
        (4, 4, 1),
        widths=(8,),
        depths=(1,),
        attention=True,
        head_width=8,
        embedding_width=8,
        num_classes=3,
        dropout=0.1,
        seed=3,
    )
    teacher = DiffusionModel(network)
    model = ShortcutModel.from_teacher(teacher, most_steps=8, seed=2)
    assert not teacher.takes_logsnr_end
    assert model.takes_logsnr_end
    assert not model.needs_teacher
    model.compile(keras.optimizers.Adam(1e-3))
    data = dict(x=toy_images(10), y=np.arange(10) % 3)
    common = dict(batch_size=4, shuffle=False, verbose=0)
    history = model.fit(**data, **common).history
    assert np.isfinite(history["loss"][0])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert (loaded.most_steps, loaded.bootstrap_every) == (8, 4)
    for each in (model, loaded):
        each.fit(**data, **common)
    for theirs, ours in zip(weights_of(loaded), weights_of(model), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    noise = toy_images(3)
    for steps in (8,):
        np.testing.assert_array_equal(
            loaded.generate(noise=noise, num_steps=steps),
            model.generate(noise=noise, num_steps=steps),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"most_steps": 12}, "`most_steps` must be a power of 2.*12"),
        ({"most_steps": 1}, "`most_steps` must be an integer"),
        ({"bootstrap_every": 1}, "`bootstrap_every` must be an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_a_network_that_cannot_be_told(dense_network):
    with pytest.raises(ValueError, match="`network` must be one that can be"):
        ShortcutModel(dense_network(), image_shape=(4, 4, 1))
