"""Spaces: what is a batch, how it is encoded, and how samples come out."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import spaces
from tests.dense import array, numbers

PICTURES = (4, 4, 3)


@keras.saving.register_keras_serializable(package="tests_spaces")
class Moments(keras.layers.Layer):
    """An encoder that says mean and log-variance of every second pixel."""

    def __init__(self, log_variance=-1.0, **kwargs):
        super().__init__(**kwargs)
        self.log_variance = log_variance

    def call(self, pictures):
        mean = pictures[:, ::2, ::2]
        log_variance = ops.full_like(mean, self.log_variance)
        return ops.concatenate([mean, log_variance], -1)

    def get_config(self):
        return {**super().get_config(), "log_variance": self.log_variance}


def latents(**kw):
    return spaces.Latents((2, 2, 3), image_shape=PICTURES, **kw)


def half():
    return keras.layers.AveragePooling2D(2)


def double():
    return keras.layers.UpSampling2D(2)


# What there is.

SPACES = {
    "pixels": spaces.Pixels((4, 4, 1)),
    "number": spaces.Box((1,)),
    "signal": spaces.Box((5, 2), low=-2.0),
    "volume": spaces.Box((2, 3, 2, 1), low=-2, high=2.5, variance=0.25),
    "latents": spaces.Latents((2, 2, 3), scale=0.18, shift=[0.1, 0.2, 0.3]),
}


@pytest.mark.once
@pytest.mark.parametrize("kind", SPACES)
def test_comes_back_from_its_configuration(kind):
    space = SPACES[kind]
    config = keras.saving.serialize_keras_object(space)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == space.get_config()
    for other, theirs in SPACES.items():
        assert (again == theirs) == (other == kind)


@pytest.mark.parametrize("kind", SPACES)
def test_a_batch_is_what_it_says(kind):
    space = SPACES[kind]
    good = numbers(3, space.shape)
    space.check("x", good)
    space.check("x", ops.convert_to_tensor(good))
    np.testing.assert_array_equal(array(space.encode(good)), good)
    for bad in (
        good[0],
        good[..., None],
        good[:0],
        np.concatenate([good, good], -1),
        "x",
        None,
        np.zeros((3, *space.shape), "int32"),
        np.full_like(good, np.nan),
        np.full_like(good, np.inf),
    ):
        with pytest.raises(ValueError, match="`x`"):
            space.check("x", bad)
    # Without its values, which may lie on a device, the shape alone counts.
    space.check("x", np.full_like(good, np.nan), False)


@pytest.mark.once
@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        (spaces.Pixels((4, 4, 1)), -1, 1),
        (spaces.Box((3,), low=0.0), 0, None),
        (spaces.Box((3,), high=0.5), None, 0.5),
        (spaces.Box((3,), -2, 3), -2, 3),
        (spaces.Box((3,)), None, None),
    ],
)
def test_data_are_checked_and_samples_clipped(space, low, high):
    x = 9 * numbers(50, space.shape)
    expected = np.clip(x, low, high) if (low, high) != (None, None) else x
    np.testing.assert_allclose(
        array(space.decode(ops.convert_to_tensor(x))), expected
    )
    space.check("x", expected)
    if low is not None or high is not None:
        with pytest.raises(ValueError, match=r"`x` must be .*in \["):
            space.check("x", x)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: spaces.Pixels((4, 4)), "shape"),
        (lambda: spaces.Pixels((4, 0, 1)), "shape"),
        (lambda: spaces.Box(()), "shape"),
        (lambda: spaces.Box(3), "shape"),
        (lambda: spaces.Box((None, 2)), "shape"),
        (lambda: spaces.Box((2.5,)), "shape"),
        (lambda: spaces.Box((3,), low=1, high=1), "low"),
        (lambda: spaces.Box((3,), low=np.nan), "low"),
        (lambda: spaces.Box((3,), high=np.inf), "high"),
        (lambda: spaces.Box((3,), variance=0), "variance"),
        (lambda: spaces.Latents((2, 2, 3), scale=0), "scale"),
        (lambda: spaces.Latents((2, 2, 3), scale=[1, 2]), "scale"),
        (lambda: spaces.Latents((2, 2, 3), scale=[1, 2, -3]), "scale"),
        (lambda: spaces.Latents((2, 2, 3), shift="a"), "shift"),
        (lambda: spaces.Latents((2, 2, 3), shift=np.nan), "shift"),
        (lambda: spaces.Latents((2, 2, 3), encoder=len), "encoder"),
        (lambda: spaces.Latents((2, 2, 3), decoder=half), "decoder"),
        (lambda: spaces.Latents((2, 2, 3), encoder=half()), "image_shape"),
        (lambda: latents(), "image_shape"),
        (
            lambda: spaces.Latents((2, 2, 3), half(), image_shape=(4, 4)),
            "image_shape",
        ),
        # A batch's shape says what it is made of.
        (
            lambda: spaces.Latents(PICTURES, half(), image_shape=PICTURES),
            "image_shape",
        ),
    ],
)
def test_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must"):
        make()


# Latents.


@pytest.mark.parametrize(
    ("scale", "shift"),
    [(1.0, 0.0), (0.5, 0.25), ([1.0, 2.0, 3.0], [0.1, -0.2, 0.3])],
    ids=str,
)
def test_scale_and_shift(scale, shift):
    space = latents(encoder=half(), decoder=double(), scale=scale, shift=shift)
    pictures = numbers(3, PICTURES)
    pooled = pictures.astype("float64").reshape(3, 2, 2, 2, 2, 3).mean((2, 4))
    expected = (pooled - np.asarray(shift)) * np.asarray(scale)
    got = space.encode(ops.convert_to_tensor(pictures))
    np.testing.assert_allclose(array(got), expected, atol=1e-6)
    # And back; what decodes to more than a picture can hold is clipped.
    back = array(space.decode(got))
    np.testing.assert_allclose(
        back, pooled.repeat(2, 1).repeat(2, 2), atol=1e-6
    )
    far = array(space.decode(100 * got))
    assert np.abs(far).max() <= 1
    # Latents pass as they are.
    np.testing.assert_array_equal(array(space.encode(got)), array(got))


def test_moments_are_drawn_from():
    space = latents(encoder=Moments(-1.0), scale=2.0, shift=[0.1, 0.2, 0.3])
    picture = numbers(1, PICTURES)
    mean = (picture[:, ::2, ::2] - np.array([0.1, 0.2, 0.3])) * 2.0
    pictures = ops.convert_to_tensor(np.repeat(picture, 4000, 0))
    np.testing.assert_allclose(
        array(space.encode(pictures))[:1], mean, atol=1e-5
    )
    rng = np.random.default_rng(0)

    def draw(shape):
        shape = [int(size) for size in shape]
        return ops.convert_to_tensor(rng.standard_normal(shape, "float32"))

    drawn = array(space.encode(pictures, draw))
    deviation = 2 * np.exp(-0.5)
    np.testing.assert_allclose(
        drawn.mean(0), mean[0], atol=5 * deviation / 4000**0.5
    )
    np.testing.assert_allclose(drawn.std(0), deviation, rtol=0.06)


@pytest.mark.parametrize(("said", "taken"), [(-1000.0, -30.0), (1000.0, 20.0)])
def test_a_log_variance_is_bounded(said, taken):
    space = latents(encoder=Moments(said))
    pictures = ops.zeros((2, *PICTURES))
    drawn = array(space.encode(pictures, lambda shape: ops.ones(shape)))
    np.testing.assert_allclose(drawn, np.exp(taken / 2), rtol=1e-5)


def test_pictures_and_latents_are_told_apart():
    space = latents(encoder=half())
    pictures, small = numbers(2, PICTURES), 5 * numbers(2, (2, 2, 3))
    for x, are in ((pictures, True), (small, False)):
        space.check("x", x)
        assert space.takes_pictures(x) == are
    assert not latents(decoder=double()).takes_pictures(pictures)
    with pytest.raises(ValueError, match=r"`x` must be floats in \[-1, 1\]"):
        space.check("x", 3 * pictures)
    with pytest.raises(ValueError, match="Move the channels last"):
        space.check("x", np.moveaxis(pictures, -1, 1))
    with pytest.raises(ValueError, match=r"`x` must be .*batch, 2, 2, 3"):
        latents(decoder=double()).check("x", pictures)
    assert space.looks_unsigned(np.abs(pictures))
    assert not space.looks_unsigned(np.abs(small))


@pytest.mark.once
def test_what_comes_out_are_pictures_with_a_decoder():
    assert latents(decoder=double()).image_shape == PICTURES
    assert latents(encoder=half()).image_shape is None
    assert spaces.Pixels(PICTURES).image_shape == PICTURES
    assert spaces.Box(PICTURES).image_shape is None
