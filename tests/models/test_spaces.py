"""Every algorithm in every space: training, sampling, files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    GuidanceDistillationModel,
    MultistepConsistencyModel,
    ProgressiveDistillationModel,
    callbacks,
    losses,
    samplers,
    spaces,
)
from keras_mscm.conditioning import Condition
from keras_mscm.variance import AnalyticVariance
from tests.dense import array, dense_network, numbers
from tests.test_spaces import Moments

PICTURES = (4, 4, 3)


def half():
    return keras.layers.AveragePooling2D(2)


def double():
    return keras.layers.UpSampling2D(2)


def latents(**kw):
    return spaces.Latents((2, 2, 3), image_shape=PICTURES, **kw)


SPACES = {
    "number": lambda: spaces.Box((1,)),
    "signal": lambda: spaces.Box((5, 2)),
    "volume": lambda: spaces.Box((2, 3, 2, 1), low=-1.0),
    "latents": lambda: latents(encoder=half(), decoder=double(), scale=2.0),
}
every_space = pytest.mark.parametrize("kind", SPACES)


def data(space, num=8):
    return numbers(num, space.picture_shape or space.shape)


def make(cls=DiffusionModel, space=None, **kw):
    model = cls(dense_network(space.shape), space=space, seed=1, **kw)
    model.compile(keras.optimizers.Adam(1e-2))
    return model


def fit(model, x, **kw):
    return model.fit(x, verbose=0, **kw).history["loss"]


def pinned(model, *uniform):
    """A model whose uniform draws are these, in turn; its noise is fixed."""
    draws = iter(uniform)
    model.draw_uniform = lambda shape: ops.full(shape, next(draws))
    model.draw_normal = lambda shape: ops.convert_to_tensor(
        numbers(int(shape[0]), model.space.shape, 7) * 2
    )
    return model


# Any rank.


ALGORITHMS = {
    "training": (
        MultistepConsistencyModel,
        {"student_steps": 2, "method": "training"},
    ),
    "distillation": (MultistepConsistencyModel, {"student_steps": 2}),
    "halving": (
        ProgressiveDistillationModel,
        {"student_steps": 1, "teacher_steps": 2, "iterations_per_stage": 1},
    ),
    "guidance": (GuidanceDistillationModel, {}),
}


# Each algorithm in one space or two, because compiling takes its time.
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("number", ["distillation"]),
        ("signal", ["halving"]),
        ("volume", ["training", "guidance"]),
        ("latents", ["distillation"]),
    ],
)
def test_diffusion_and_distillations(kind, names):
    space = SPACES[kind]()
    x, teacher = data(space), make(space=space)
    assert np.isfinite(fit(teacher, x)).all()
    teacher.measure_x_var(x)
    assert np.all(np.isfinite(teacher.x_var.table))
    shape = space.image_shape or space.shape
    assert teacher.generate(3, num_steps=2).shape == (3, *shape)
    for cls, kw in (ALGORITHMS[name] for name in names):
        model = cls.from_teacher(teacher, seed=0, **kw)
        assert model.space is space
        model.compile()
        assert np.isfinite(fit(model, x, epochs=2)).all()
        assert np.isfinite(model.evaluate(x, verbose=0))
        assert int(model.iteration) == 2
        samples = model.generate(3, num_steps=kw.get("student_steps", 2))
        assert samples.shape == (3, *shape)
        assert np.all(np.isfinite(samples))


@every_space
def test_where_s_is_the_segments_end_the_teacher_is_the_target(kind):
    # Eq. 8: n_rel = 1, the first of a segment's steps.
    space = SPACES[kind]()
    x = ops.convert_to_tensor(numbers(6, space.shape))
    teacher = make(space=space)
    for method, step in (("training", 0.1), ("distillation", 0.9)):
        student = MultistepConsistencyModel.from_teacher(
            teacher,
            student_steps=2,
            teacher_steps=32,
            method=method,
            **({"eta": 0.0} if method == "distillation" else {}),
        )
        pinned(student, step, 0.0)
        inputs, target, _ = student.training_example(x, {}, False)
        want = x
        if method == "distillation":
            want = teacher(inputs)
        np.testing.assert_allclose(array(target), array(want), atol=1e-6)
        # Elsewhere it isn't.
        pinned(student, step, 0.99)
        inputs, target, _ = student.training_example(x, {}, False)
        want = x if method == "training" else teacher(inputs)
        assert np.abs(array(target) - array(want)).max() > 1e-3


@every_space
def test_with_as_many_steps_training_is_diffusion(kind):
    # Eq. 9, whatever is drawn.
    space = SPACES[kind]()
    student = make(
        MultistepConsistencyModel,
        space,
        student_steps=8,
        teacher_steps=8,
        method="training",
    )
    x = ops.convert_to_tensor(numbers(64, space.shape))
    inputs, target, _ = student.training_example(x, {}, True)
    np.testing.assert_array_equal(array(target), array(x))
    assert len(np.unique(array(inputs["logsnr"]))) == 8


@every_space
def test_saved_and_loaded(kind, tmp_path):
    space, noise = SPACES[kind](), None
    model, x = make(space=space), data(space)
    fit(model, x)
    noise = numbers(3, space.shape, 4)
    expected = model.generate(noise=noise, num_steps=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    preset = DiffusionModel.from_preset(tmp_path / "preset")
    for other in (loaded, preset):
        assert other.space.get_config().keys() == space.get_config().keys()
        assert (other.space.shape, other.space.variance) == (
            space.shape,
            space.variance,
        )
        got = other.generate(noise=noise, num_steps=2)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert fit(loaded, x, shuffle=False) == fit(model, x, shuffle=False)


def test_a_space_and_a_shape_must_agree():
    for kw in ({"image_shape": (2, 2, 1)}, {"space": (3,)}):
        with pytest.raises(ValueError, match="`space` must be"):
            DiffusionModel(
                dense_network((3,)), **{"space": spaces.Box((3,)), **kw}
            )
    with pytest.raises(ValueError, match=r"`network` must return .*\(3,\)"):
        DiffusionModel(_Cut(dense_network((3,))), space=spaces.Box((3,)))
    with pytest.raises(ValueError, match="`image_shape` must be"):
        DiffusionModel(dense_network((3,)))


class _Cut(keras.layers.Layer):
    """A network that returns less than it was given."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def call(self, inputs, training=None):
        return self.network(inputs)[..., :2]


def test_data_of_another_space_are_refused():
    model = make(space=spaces.Box((5, 2), high=1.0))
    for bad in (
        numbers(4, (5, 3)),
        numbers(4, (5,)),
        2 + numbers(4, (5, 2)),
        np.zeros((4, 5, 2), "int32"),
    ):
        for run in (
            lambda bad=bad: model.fit(bad),
            lambda bad=bad: model.evaluate(bad),
            lambda bad=bad: model.fit(iter([bad])),
        ):
            with pytest.raises(ValueError, match="`x"):
                run()
    with pytest.raises(ValueError, match=r"`noise` must be of shape \(num_im"):
        model.generate(noise=numbers(2, (5, 3)), num_steps=1)
    # Nothing is said of data that are nowhere negative, as pixels would be.
    fit(model, np.abs(numbers(4, (5, 2))))


@pytest.mark.parametrize("shape", [(1,), (5, 2), (2, 2, 2, 1)])
def test_losses_of_any_rank(shape):
    model = DiffusionModel(dense_network(shape), space=spaces.Box(shape))
    for loss in (losses.SquaredL2(), losses.L2(), losses.PseudoHuber()):
        model.compile(loss=loss)
    with pytest.raises(ValueError, match="must be images"):
        model.compile(loss=losses.Multiscale(losses.SquaredL2()))


@pytest.mark.parametrize("kind", ["number", "signal", "volume"])
def test_no_pictures_make_no_grid(kind, tmp_path):
    space = SPACES[kind]()
    model = make(space=space)
    grid = callbacks.SampleGrid(tmp_path, every=1, num_images=2, num_steps=1)
    with pytest.raises(ValueError, match="`SampleGrid` must be used with"):
        fit(model, data(space), callbacks=[grid])
    assert int(model.iteration) == 0
    assert not [*tmp_path.iterdir()]


# Latents.


def test_latents_are_encoded_in_the_step_and_drawn_anew():
    space = latents(encoder=Moments(-2.0), decoder=double(), shift=0.5)
    model = make(space=space, prediction_type="x")
    picture = np.repeat(numbers(1, PICTURES), 2000, 0)
    mean = picture[:1, ::2, ::2] - 0.5

    def seen(training):
        _, target, _ = model._example((picture,), training)
        return array(target)

    drawn, again = seen(True), seen(True)
    np.testing.assert_allclose(
        drawn.mean(0), mean[0], atol=5 * np.exp(-1) / 2000**0.5
    )
    np.testing.assert_allclose(drawn.std(0), np.exp(-1), rtol=0.1)
    assert np.abs(drawn - again).max() > 1e-2
    # Evaluation takes the mean.
    np.testing.assert_allclose(seen(False)[:1], mean, atol=1e-6)
    assert np.isfinite(model.evaluate(picture[:8], verbose=0))
    fit(model, picture[:8], validation_data=picture[:8])
    model.measure_x_var(picture[:8])
    fit(model, space.encode(ops.convert_to_tensor(picture[:8])))


def test_samples_are_decoded():
    space = latents(decoder=double(), scale=[1, 2, 4], shift=[0, 0.1, 0.2])
    model, noise = make(space=space), numbers(5, (2, 2, 3))
    arguments = {"noise": noise, "num_steps": 2}
    small = model.generate(decode=False, **arguments)
    assert small.shape == (5, 2, 2, 3)
    expected = small / np.array([1, 2, 4]) + np.array([0, 0.1, 0.2])
    expected = np.clip(expected.repeat(2, 1).repeat(2, 2), -1, 1)
    for size in (None, 2):
        got = model.generate(batch_size=size, **arguments)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    # Without an encoder it learns latents.
    fit(model, 3 * numbers(4, (2, 2, 3)))
    with pytest.raises(ValueError, match=r"\(batch, 2, 2, 3\)"):
        fit(model, numbers(4, PICTURES))
    for bad in (1, "no", None):
        with pytest.raises(ValueError, match="`decode` must be"):
            model.generate(decode=bad, **arguments)


def codec():
    layers = keras.layers
    encoder = keras.Sequential([layers.Conv2D(3, 2, 2), layers.Dropout(0.5)])
    decoder = keras.Sequential([layers.Conv2DTranspose(3, 2, 2)])
    return encoder, decoder


def test_a_codec_is_of_the_model_and_is_not_trained(tmp_path, weights_of):
    encoder, decoder = codec()
    model = make(space=latents(encoder=encoder, decoder=decoder))
    assert len(model.trainable_variables) == len(model.network.weights)
    before = weights_of(encoder), weights_of(decoder)
    x, noise = numbers(8, PICTURES), numbers(2, (2, 2, 3))
    fit(model, x, epochs=2)
    for ours, theirs in zip(before, (encoder, decoder)):
        for a, b in zip(ours, weights_of(theirs), strict=True):
            np.testing.assert_array_equal(a, b)
    expected = model.generate(noise=noise, num_steps=2)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    got = loaded.generate(noise=noise, num_steps=2)
    np.testing.assert_array_equal(got, expected)
    assert loaded.evaluate(x, verbose=0) == model.evaluate(x, verbose=0)
    # What is loaded later counts in what is compiled already.
    other = make(space=latents(**dict(zip(("encoder", "decoder"), codec()))))
    fit(other, x)
    assert np.abs(other.generate(noise=noise, num_steps=2) - expected).max() > (
        1e-3
    )
    other.load_weights(tmp_path / "model.weights.h5")
    got = other.generate(noise=noise, num_steps=2)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # A student shares it.
    student = MultistepConsistencyModel.from_teacher(model, student_steps=1)
    student.compile()
    assert student.encoder is encoder
    fit(student, x)
    for a, b in zip(before[0], weights_of(encoder), strict=True):
        np.testing.assert_array_equal(a, b)


class Liar(keras.layers.Layer):
    """Says that it halves, and doesn't."""

    def call(self, x):
        return x

    def compute_output_shape(self, shape):
        return (shape[0], 2, 2, shape[-1])


@pytest.mark.parametrize(
    ("name", "layer", "came"),
    [
        ("encoder", lambda: keras.layers.AveragePooling2D(4), r"\(1, 1, 3\)"),
        ("encoder", lambda: keras.layers.Conv2D(4, 2, 2), r"\(2, 2, 4\)"),
        ("encoder", Liar, r"\(4, 4, 3\)"),
        ("decoder", lambda: keras.layers.UpSampling2D(4), r"\(8, 8, 3\)"),
        ("decoder", lambda: keras.layers.Conv2DTranspose(1, 2, 2), r"4, 1\)"),
        ("decoder", lambda: keras.layers.Flatten(), r"\(12,\)"),
    ],
)
def test_a_codec_that_does_not_suit_is_refused(name, layer, came):
    with pytest.raises(ValueError, match=f"`{name}` must return .*{came}"):
        make(space=latents(**{name: layer()}))


@pytest.mark.parametrize("variance", [0.5, 1.0, 4.0])
def test_addims_variance_is_the_spaces(variance):
    model = make(space=spaces.Box((3,), variance=variance))
    noise = numbers(4, (3,))

    def generate(sampler=None):
        return model.generate(noise=noise, num_steps=4, sampler=sampler)

    expected = generate(samplers.ADDIM(x_var=AnalyticVariance(variance)))
    np.testing.assert_allclose(generate(), expected, atol=1e-6)
    # As it is by default, and not as the paper's pixels have it.
    np.testing.assert_allclose(generate(samplers.ADDIM()), expected, atol=1e-6)
    paper = samplers.ADDIM(x_var=AnalyticVariance(0.5))
    apart = np.abs(generate(paper) - expected).max()
    assert apart < 1e-5 if variance == 0.5 else apart > 1e-3


# Configurations.


def test_a_configuration_of_pixels_is_one_of_version_0_1():
    model = DiffusionModel(
        dense_network((4, 4, 1)), image_shape=(4, 4, 1), seed=1
    )
    config = model.get_config()
    assert not {"space", "conditioning", "ema", "guidable"} & {*config}
    assert config["image_shape"] == (4, 4, 1)
    again = DiffusionModel.from_config(config)
    assert again.space == model.space


@pytest.mark.parametrize(
    ("kw", "key"),
    [
        ({"space": spaces.Box((3,), -2, 2, 0.3)}, "space"),
        ({"ema": None}, "ema"),
        ({"guidable": True}, "guidable"),
    ],
)
def test_each_argument_comes_back(kw, key):
    declared = {"pooled": Condition((2,), null=[1.0, 2.0])}
    model = DiffusionModel(
        dense_network((3,), declared),
        conditioning=declared,
        **{"space": spaces.Box((3,)), **kw},
    )
    config = model.get_config()
    again = DiffusionModel.from_config(config)
    assert getattr(again, key) == getattr(model, key) == kw[key]
    assert key in config
    assert again.get_config().keys() == config.keys()
