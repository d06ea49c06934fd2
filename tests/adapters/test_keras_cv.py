import sys

import keras
import keras_cv
import numpy as np
import pytest
from keras import layers, ops
from keras_cv.src.models.stable_diffusion import (
    decoder,
    diffusion_model,
)

from keras_mscm.adapters.keras_cv import from_keras_cv, stable_diffusion_grid
from keras_mscm.adapters.prompts import encode_prompts
from tests.adapters.tiny import (
    check_several_steps,
    difference,
    perturb,
    sampled,
)

RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((2, 16, 16, 4)).astype("float32")
CONTEXT = RNG.standard_normal((2, 77, 8)).astype("float32")


def tiny_network():
    """Of Stable Diffusion's own blocks: its widths can't be chosen."""
    latent = keras.Input((16, 16, 4), name="latent")
    time = keras.Input((320,), name="timestep_embedding")
    context = keras.Input((77, 8), name="context")
    embedded = layers.Activation("swish")(layers.Dense(64)(time))
    # Twice as wide as the normalisation has groups, which takes off what time
    # adds to a channel that is alone in its group.
    x = diffusion_model.PaddedConv2D(64, kernel_size=3, padding=1)(latent)
    x = diffusion_model.ResBlock(64)([x, embedded])
    x = diffusion_model.SpatialTransformer(2, 32, fully_connected=False)(
        [x, context]
    )
    x = layers.Activation("swish")(layers.GroupNormalization(epsilon=1e-5)(x))
    x = diffusion_model.PaddedConv2D(4, kernel_size=3, padding=1)(x)
    network = keras.Model([latent, time, context], x)
    perturb(network, 0.1)
    return network


class StableDiffusion(keras_cv.models.StableDiffusion):
    """keras-cv's, with small parts."""

    def __init__(self):
        super().__init__(128, 128, jit_compile=False)
        self._diffusion_model = tiny_network()
        self._decoder = keras.Sequential(
            [
                keras.Input((16, 16, 4)),
                layers.Rescaling(1.0 / 0.18215),
                decoder.PaddedConv2D(32, 3, padding=1),
                decoder.ResnetBlock(32),
                layers.UpSampling2D(8),
                decoder.PaddedConv2D(3, 3, padding=1),
            ]
        )
        self._image_encoder = keras.Sequential(
            [
                keras.Input((None, None, 3)),
                layers.AveragePooling2D(8),
                decoder.PaddedConv2D(8, 1),
                layers.Lambda(lambda x: x[..., :4] * 0.18215),
            ]
        )
        tokens = keras.Input((77,), dtype="int32", name="tokens")
        positions = keras.Input((77,), dtype="int32", name="positions")
        embedded = layers.Embedding(49408, 8)(tokens)
        embedded += layers.Embedding(77, 8)(positions)
        self._text_encoder = keras.Model([tokens, positions], embedded)

    @property
    def diffusion_model(self):
        return self._diffusion_model

    @property
    def text_encoder(self):
        return self._text_encoder

    @property
    def tokenizer(self):
        # The real one downloads its vocabulary.
        class Tokenizer:
            def encode(self, prompt):
                return [49406, *map(ord, prompt), 49407]

        return Tokenizer()

    def latents(self, noise, context, num_steps, guidance_scale):
        """What its sampler hands to the decoder."""
        made, seen = self._decoder, []

        class Decoder:
            def predict_on_batch(self, latent):
                seen.append(ops.convert_to_numpy(latent))
                return np.zeros((len(latent), 8, 8, 3))

        self._decoder = Decoder()
        try:
            self.generate_image(
                context,
                batch_size=len(noise),
                num_steps=num_steps,
                unconditional_guidance_scale=guidance_scale,
                diffusion_noise=noise,
            )
        finally:
            self._decoder = made
        return seen[0]


@pytest.fixture(scope="module")
def stable_diffusion():
    return StableDiffusion()


@pytest.fixture(scope="module")
def model(stable_diffusion):
    return from_keras_cv(stable_diffusion, encoder=True)


@pytest.mark.parametrize("num_steps", [4, 50])
def test_it_is_keras_cvs(stable_diffusion, model, num_steps):
    ours = sampled(
        model,
        NOISE,
        num_steps,
        stable_diffusion_grid(num_steps),
        guidance_scale=7.5,
        conditioning={"context": CONTEXT},
    )
    expected = stable_diffusion.latents(NOISE, CONTEXT, num_steps, 7.5)
    assert difference(ours, expected) < 1e-4


def test_pictures_and_prompts_are_keras_cvs(stable_diffusion, model):
    sd, latents = stable_diffusion, ops.convert_to_tensor(NOISE)
    expected = ops.clip(sd.decoder(latents), -1, 1)
    assert difference(model.space.decode(latents), expected) < 1e-5
    pictures = RNG.uniform(-1, 1, (2, 128, 128, 3)).astype("float32")
    pictures = ops.convert_to_tensor(pictures)
    expected = sd.image_encoder(pictures)
    assert difference(model.space.encode(pictures), expected) < 1e-5
    encoded = encode_prompts(sd, ["a", "bc"])["context"]
    assert encoded.shape == (2, 77, 8)
    assert difference(encoded[:1], sd.encode_text("a")) == 0


def test_a_student_of_several_numbers_of_steps(model):
    y = {"context": CONTEXT}
    check_several_steps(model, NOISE, y, guidance_scale=3.0)


def test_saved_and_loaded_it_samples_the_same(model, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    drawn = [
        sampled(m, NOISE, 2, conditioning={"context": CONTEXT})
        for m in (model, loaded)
    ]
    np.testing.assert_allclose(*drawn, rtol=1e-5, atol=1e-5)


def test_what_is_no_model_of_keras_cv_is_refused(stable_diffusion):
    with pytest.raises(ValueError, match="`model` must be StableDiffusion of"):
        from_keras_cv(stable_diffusion.diffusion_model)


def test_without_keras_cv_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_cv", None)
    path = "keras_cv.src.models.stable_diffusion"
    monkeypatch.setitem(sys.modules, path, None)
    with pytest.raises(ImportError, match=r"pip install 'keras-mscm\[keras-cv"):
        stable_diffusion_grid(4)
