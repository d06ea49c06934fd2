import sys

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

from keras_mscm import DiffusionModel, backend
from keras_mscm.adapters.keras_hub import (
    from_keras_hub,
    stable_diffusion_3_grid,
)
from keras_mscm.adapters.prompts import encode_prompts
from tests.adapters.tiny import (
    check_several_steps,
    difference,
    perturb,
    sampled,
)

RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((2, 8, 8, 16)).astype("float32")


def tokens(num, seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 20, (num, 6)).astype("int32")
        for name in ("clip_l", "clip_g")
    }


PROMPTS, EMPTY = tokens(2, 0), tokens(1, 1)


def stable_diffusion_3(dtype="float32"):
    """KerasHub's own test of it has one of this size."""

    def clip(name, width):
        return keras_hub.models.CLIPTextEncoder(
            20,
            width,
            width,
            2,
            2,
            2 * width,
            intermediate_output_index=-2,
            max_sequence_length=6,
            name=name,
            dtype=dtype,
        )

    vae = VAEBackbone(
        [32] * 4, [1] * 4, [32] * 4, [1] * 4, sampler_method="mode", dtype=dtype
    )
    core = keras_hub.models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=4,
        mmdit_qk_norm="rms_norm",
        mmdit_dual_attention_indices=(0,),
        vae=vae,
        clip_l=clip("clip_l", 8),
        clip_g=clip("clip_g", 12),
        image_shape=(64, 64, 3),
        dtype=dtype,
    )
    perturb(core.diffuser)
    return core


@pytest.fixture(scope="module")
def core():
    keras.utils.set_random_seed(0)
    return stable_diffusion_3()


@pytest.fixture(scope="module")
def model(core):
    nulls = encode_prompts(core, EMPTY)
    return from_keras_hub(
        core, null_conditioning={k: v[0] for k, v in nulls.items()}
    )


def theirs(core, num_steps, guidance_scale):
    """KerasHub's own sampling loop, from `NOISE` to latents."""
    core.configure_scheduler(num_steps)
    empty = {name: np.repeat(EMPTY[name], 2, axis=0) for name in EMPTY}

    def run(noise, prompts, empty):
        embeddings = core.encode_text_step(prompts, empty)
        return ops.fori_loop(
            0,
            num_steps,
            lambda step, latents: core.denoise_step(
                latents, embeddings, step, num_steps, guidance_scale
            ),
            noise,
        )

    compiled = backend.compile_inference(run, core.variables)
    return compiled(*map(as_tensors, (NOISE, PROMPTS, empty)))


def as_tensors(values):
    return keras.tree.map_structure(ops.convert_to_tensor, values)


@pytest.mark.parametrize(
    ("num_steps", "guidance_scale"), [(50, None), (4, 5.0)]
)
def test_stable_diffusion_3_is_kerashubs(
    core, model, num_steps, guidance_scale
):
    ours = sampled(
        model,
        NOISE,
        num_steps,
        stable_diffusion_3_grid(core, num_steps),
        guidance_scale=guidance_scale,
        conditioning=encode_prompts(core, PROMPTS),
    )
    # Times near 1000 have 6e-5 between two neighbours of a float32, and so has
    # the cosine that embeds them; guidance multiplies what comes of it.
    limit = 1e-4 if guidance_scale is None else 3e-4
    assert difference(ours, theirs(core, num_steps, guidance_scale)) < limit


def test_latents_are_decoded_and_encoded_as_kerashub_does(core, model):
    def both(latents, pictures):
        ours = model.space.decode(latents), model.space.encode(pictures)
        theirs = core.decode_step(latents), core.encode_image_step(pictures)
        return ours, theirs

    compiled = backend.compile_inference(both, core.variables)
    pictures = RNG.uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
    (decoded, encoded), (expected, latents) = compiled(
        *as_tensors((NOISE, pictures))
    )
    assert difference(decoded, ops.clip(expected, -1, 1)) < 1e-4
    assert difference(encoded, latents) < 1e-4
    drawn = model.generate(
        2, num_steps=1, conditioning=encode_prompts(core, PROMPTS), seed=0
    )
    assert drawn.shape == (2, 64, 64, 3)


def test_a_student_of_several_numbers_of_steps(core, model):
    y = encode_prompts(core, PROMPTS)
    check_several_steps(model, NOISE, y, guidance_scale=3.0)


def test_saved_and_loaded_it_samples_the_same(core, model, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, DiffusionModel)
    conditioning = encode_prompts(core, PROMPTS)
    drawn = [
        sampled(m, NOISE, 2, conditioning=conditioning, guidance_scale=2.0)
        for m in (model, loaded)
    ]
    np.testing.assert_allclose(*drawn, rtol=1e-5, atol=1e-5)


def test_time_is_embedded_in_float32_whatever_the_policy():
    core = stable_diffusion_3("mixed_bfloat16")
    network = from_keras_hub(core).network
    for each in (network, network.clone()):
        embedding = each.network.get_layer("timestep_embedding")
        seen, create = [], embedding._create_timestep_embedding
        embedding._create_timestep_embedding = lambda inputs: (
            seen.append(inputs) or create(inputs)  # noqa: B023
        )
        # Timesteps 999.45, 997.3 and 513.7, which bfloat16 would have as 1000,
        # 996 and 512.
        times = np.array([0.99945, 0.9973, 0.5137])
        logsnr = (2 * np.log((1 - times) / times)).astype("float32")
        inputs = {
            "z": np.concatenate([NOISE, NOISE[:1]]),
            "logsnr": logsnr,
            "context": np.zeros((3, 12, 4096), "float32"),
            "pooled": np.zeros((3, 20), "float32"),
        }
        compiled = backend.compile_inference(
            lambda given: (each(given), ops.cast(seen[-1], "float32")),  # noqa: B023
            each.variables,
        )
        v, embedded = compiled(as_tensors(inputs))
        got = ops.convert_to_numpy(embedded)[:, 0]
        np.testing.assert_allclose(got, 1000 * times, atol=2e-3)
        assert keras.backend.standardize_dtype(v.dtype) == "float32"
        assert np.all(np.isfinite(ops.convert_to_numpy(v)))


def flux(**arguments):
    return keras_hub.models.FluxBackbone(
        input_channels=64,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[2, 2, 4],
        theta=10_000,
        use_bias=True,
        **{
            "image_shape": (6, 64),
            "text_shape": (5, 8),
            "image_ids_shape": (6, 3),
            "text_ids_shape": (5, 3),
            "y_shape": (7,),
            **arguments,
        },
    )


def test_flux_is_eulers_method_on_its_own_velocity():
    core = flux(guidance_embed=True)
    perturb(core, 0.1)
    model = from_keras_hub(core, guidance=3.5, grid=(2, 3))
    noise, context, pooled = (
        RNG.standard_normal((2, *shape)).astype("float32")
        for shape in ((6, 64), (5, 8), (7,))
    )
    rows, columns = np.indices((2, 3)).reshape(2, -1)
    ids = np.stack([0 * rows, rows, columns], axis=-1).astype("float32")
    fixed = {
        "image_ids": np.tile(ids, (2, 1, 1)),
        "text": context,
        "text_ids": np.zeros((2, 5, 3), "float32"),
        "y": pooled,
        "guidance": np.full(2, 3.5, "float32"),
    }
    velocity = backend.compile_inference(core, core.variables)
    for num_steps in (4, 50):
        z = noise
        for i in range(num_steps, 0, -1):
            timesteps = np.full(2, i / num_steps, "float32")
            inputs = {"image": z, "timesteps": timesteps, **fixed}
            said = ops.convert_to_numpy(velocity(as_tensors(inputs)))
            z = z - said / num_steps
        ours = sampled(
            model,
            noise,
            num_steps,
            conditioning={"context": context, "pooled": pooled},
        )
        assert difference(ours, z) < 1e-4


def test_flux_has_a_student_of_several_numbers_of_steps():
    core = flux(guidance_embed=True)
    perturb(core, 0.1)
    model = from_keras_hub(core, guidance=3.5, grid=(2, 3))
    x, context, pooled = (
        RNG.standard_normal((2, *shape)).astype("float32")
        for shape in ((6, 64), (5, 8), (7,))
    )
    check_several_steps(model, x, {"context": context, "pooled": pooled})


def test_what_is_lacking_is_said(core):
    with pytest.raises(ValueError, match="`model` must be StableDiffusion3 or"):
        from_keras_hub(core.vae)
    with pytest.raises(ValueError, match="`null_conditioning` must be a dict"):
        from_keras_hub(core, null_conditioning={"context": np.zeros((1, 4096))})
    with pytest.raises(ValueError, match="`guidance` and `grid` must not be"):
        from_keras_hub(core, guidance=3.5)
    with pytest.raises(ValueError, match="`model` must have a preprocessor"):
        encode_prompts(core, ["a tortoise"])
    with pytest.raises(ValueError, match="`prompts` must be tokens for"):
        encode_prompts(core, {"clip_l": np.zeros((1, 6), "int32")})
    with pytest.raises(ValueError, match="guid"):
        from_keras_hub(core).generate(
            2, guidance_scale=2.0, conditioning=encode_prompts(core, PROMPTS)
        )
    with pytest.raises(ValueError, match="`guidance` must be given"):
        from_keras_hub(flux(guidance_embed=True), grid=(2, 3))
    with pytest.raises(ValueError, match="`grid` must have 6 places"):
        from_keras_hub(flux())


def test_without_kerashub_the_error_says_how_to_install_it(core, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(
        ImportError, match=r"pip install 'keras-mscm\[keras-hub"
    ):
        from_keras_hub(core)
