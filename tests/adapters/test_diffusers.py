import copy
import json
import zipfile

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    backend,
    samplers,
    spaces,
)

if backend.NAME != "torch":
    pytest.skip(
        "diffusers' models run on the torch backend only",
        allow_module_level=True,
    )

import diffusers
import torch

from keras_mscm.adapters.diffusers import from_diffusers
from keras_mscm.adapters.diffusers_module import CALLED, DiffusersModule
from keras_mscm.adapters.diffusers_scheduler import scheduler_grid
from keras_mscm.preset_files import untrusted
from tests.adapters.tiny import check_several_steps

UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    layers_per_block=1,
)
CONFIGS = {
    "UNet2DModel": dict(
        **UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "UNet2DConditionModel": dict(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=12,
    ),
    "DiTTransformer2DModel": dict(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_num_groups=4,
    ),
    "SD3Transformer2DModel": dict(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    ),
}
SDXL = dict(
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=10 + 6 * 4,
)
STABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO = dict(
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
)


def unclipped(**kwargs):
    return diffusers.DDIMScheduler(clip_sample=False, **kwargs)


def network_of(name, **config):
    torch.manual_seed(0)
    network = getattr(diffusers, name)(**CONFIGS[name], **config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            # So that what comes out depends on what goes in.
            if parameter.ndim > 1:
                parameter.mul_(1.5)
            elif not parameter.any():
                parameter.normal_(0, 0.1)
    return network


def given(model, batch=2):
    """Conditioning, ours and by diffusers' names."""
    rng = np.random.default_rng(1)
    ours = {}
    for name, condition in model.conditioning.items():
        shape = [size or 5 for size in condition.shape]
        ours[name] = rng.standard_normal((batch, *shape)).astype("float32")
        if name == "labels":
            ours[name] = rng.integers(0, condition.num_classes, batch)
    return ours


def diffusers_loop(network, scheduler, z, conditioning, num_steps):
    """The loop of diffusers' pipelines, on noise with channels last."""
    if isinstance(scheduler, diffusers.DDPMScheduler):
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps)
    called = CALLED[type(network).__name__]
    named = {
        called[name]: torch.tensor(value)
        for name, value in conditioning.items()
    }
    if "text_embeds" in named:
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(len(z), 6)
        named["added_cond_kwargs"] = {
            "text_embeds": named.pop("text_embeds"),
            "time_ids": sizes,
        }
    z = torch.tensor(z).permute(0, 3, 1, 2)
    first = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if first != 1:  # Euler's z is z / alpha, for which it takes 1 / sigma
        z = z * (1 + float(scheduler.sigmas[0]) ** 2) ** 0.5
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = z
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(z, t)
            out = network(scaled, timestep=t.expand(len(z)), **named).sample
            out = out[:, : z.shape[1]]
            z = scheduler.step(out, t, z, return_dict=False)[0]
    return z.permute(0, 2, 3, 1).numpy()


CASES = {
    "ddim": ("UNet2DModel", {}, unclipped()),
    "ddpm": ("UNet2DModel", {}, diffusers.DDPMScheduler(clip_sample=False)),
    "x": ("UNet2DModel", {}, unclipped(prediction_type="sample")),
    "zero": ("UNet2DModel", {}, unclipped(**ZERO)),
    "classes": ("UNet2DModel", dict(num_class_embeds=4), unclipped()),
    "cosine": (
        "UNet2DModel",
        dict(time_embedding_type="learned", num_train_timesteps=1000),
        unclipped(beta_schedule="squaredcos_cap_v2"),
    ),
    "sd": (
        "UNet2DConditionModel",
        {},
        unclipped(set_alpha_to_one=False, steps_offset=1, **STABLE),
    ),
    "sdxl": (
        "UNet2DConditionModel",
        SDXL,
        diffusers.EulerDiscreteScheduler(
            timestep_spacing="leading", steps_offset=1, **STABLE
        ),
    ),
    "euler": (
        "UNet2DConditionModel",
        {},
        diffusers.EulerDiscreteScheduler(**STABLE),
    ),
    "karras": (
        "UNet2DConditionModel",
        {},
        diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **STABLE),
    ),
    "dit": ("DiTTransformer2DModel", {}, unclipped()),
    "sd3": (
        "SD3Transformer2DModel",
        {},
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
    "flow": (
        "SD3Transformer2DModel",
        {},
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ),
}


@pytest.mark.parametrize("case", [*CASES])
@pytest.mark.parametrize("num_steps", [4, 50])
def test_it_samples_as_diffusers_does(case, num_steps):
    name, config, scheduler = CASES[case]
    network = network_of(name, **config)
    model = from_diffusers(
        network,
        scheduler,
        num_steps=num_steps,
        ema=None,
        space=spaces.Box((8, 8, network.config.in_channels)),
    )
    conditioning = given(model)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, *model.image_shape)).astype("float32")
    expected = diffusers_loop(
        network, scheduler, noise, conditioning, num_steps
    )
    drawn = model.generate(
        num_steps=num_steps,
        sampler=samplers.DDIM(),
        noise=noise,
        conditioning=conditioning,
    )
    error = np.abs(drawn - expected).max() / expected.std()
    # The last step of a table ends at log-SNR 30, where 3e-7 of epsilon is
    # left. That is some hundreds if an untrained network predicts `x`.
    assert error < (2e-4 if case == "x" else 1e-4)


def test_trailing_grid_is_that_of_any_number_of_steps():
    schedule = scheduler_grid(unclipped(timestep_spacing="trailing"))
    for num_steps in (4, 50):
        times = np.arange(1, num_steps + 1) / num_steps
        exact = scheduler_grid(
            unclipped(timestep_spacing="trailing"), num_steps
        )
        np.testing.assert_allclose(
            schedule(times), exact(times), rtol=1e-5, atol=1e-5
        )


def test_grid_of_flow_is_its_shift():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert scheduler_grid(scheduler).shift == 3.0
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True
    )
    assert scheduler_grid(dynamic, shift=2.0).shift == 2.0
    with pytest.raises(ValueError, match="`shift` must be exp"):
        scheduler_grid(dynamic)
    with pytest.raises(ValueError, match="`shift` must be None"):
        scheduler_grid(scheduler, shift=2.0)
    scheduler.set_timesteps(7)
    sigma = scheduler.sigmas.numpy().astype("float64")
    with np.errstate(divide="ignore"):
        expected = np.clip(2 * np.log((1 - sigma) / sigma), -30, 30)
    times = 1 - np.arange(8) / 7
    np.testing.assert_allclose(
        scheduler_grid(scheduler, 7)(times), expected, rtol=1e-4
    )


def weights_of(layer):
    return [np.array(ops.convert_to_numpy(w)) for w in layer.weights]


def latent_model(**kwargs):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    empty = rng.standard_normal((5, 12)).astype("float32")
    model = from_diffusers(
        network_of("UNet2DConditionModel", dropout=0.1),
        unclipped(timestep_spacing="trailing", **STABLE),
        null_conditioning={"context": empty},
        ema_decay=0.0,
        **kwargs,
    )
    model.compile(optimizer="adam")
    return model


def latents():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((4, 8, 8, 4)).astype("float32")
    return x, {"context": rng.standard_normal((4, 5, 12)).astype("float32")}


@pytest.mark.parametrize("method", ["distillation", "training"])
def test_student_of_a_guided_teacher(method, tmp_path):
    teacher = latent_model()
    before = weights_of(teacher.network)
    scale = {"guidance_scale": 3.0} if method == "distillation" else {}
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=2, method=method, ema_decay=0.0, **scale
    )
    for ours, theirs in zip(weights_of(student.network), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    student.compile(optimizer="adam")
    student.fit(*latents(), batch_size=2, verbose=0)
    # The gradients reach the student's copy, and nothing else.
    for weight, old in zip(student.network.weights, before):
        changed = np.any(ops.convert_to_numpy(weight) != old)
        assert changed == weight.trainable or "k-bias" in weight.name
    for old, new in zip(before, weights_of(teacher.network)):
        np.testing.assert_array_equal(old, new)
    for ours, theirs in zip(
        weights_of(student.ema_network), weights_of(student.network)
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    student.save(tmp_path / "student.keras")
    with zipfile.ZipFile(tmp_path / "student.keras") as file:
        names = file.namelist()
        config = json.loads(file.read("config.json"))
        size = file.getinfo("model.weights.h5").file_size
    assert sorted(names) == ["config.json", "metadata.json", "model.weights.h5"]
    assert "pickle" not in json.dumps(config)
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    for ours, theirs in zip(
        weights_of(loaded.network), weights_of(student.network), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    # Network, average and two moments of Adam; a teacher would be a fifth.
    numbers = sum(weight.size for weight in before)
    assert 16 * numbers < size < 18 * numbers + 2**20
    context = latents()[1]
    noise = latents()[0]
    np.testing.assert_array_equal(
        student.generate(conditioning=context, noise=noise, seed=0),
        loaded.generate(conditioning=context, noise=noise, seed=0),
    )
    student.save_to_preset(tmp_path / "preset")
    again = MultistepConsistencyModel.from_preset(tmp_path / "preset")
    np.testing.assert_array_equal(
        student.generate(conditioning=context, noise=noise, seed=0),
        again.generate(conditioning=context, noise=noise, seed=0),
    )


@pytest.mark.parametrize("case", ["classes", "sdxl", "dit", "sd3"])
def test_a_student_of_several_numbers_of_steps(case, tmp_path):
    name, config, scheduler = CASES[case]
    network = network_of(name, **config)
    space = spaces.Box((8, 8, network.config.in_channels))
    model = from_diffusers(network, scheduler, space=space)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, *space.shape)).astype("float32")
    check_several_steps(model, x, given(model), tmp_path)


def test_blocks_of_dit_that_are_computed_again_are_refused():
    network = network_of("DiTTransformer2DModel")
    network.enable_gradient_checkpointing()
    model = from_diffusers(network, unclipped())
    with pytest.raises(ValueError, match="`network` must not compute"):
        model.network.take_logsnr_end()


def test_guidance_is_diffusers():
    model = latent_model()
    x, context = latents()
    logsnr = ops.convert_to_tensor(np.linspace(-4, 4, 4), "float32")
    x = ops.convert_to_tensor(x)
    context = {"context": ops.convert_to_tensor(context["context"])}
    guided, conditional = model.denoise_guided(
        model.network, x, logsnr, context, 3.0
    )
    empty = ops.broadcast_to(
        model.conditioning["context"].null, context["context"].shape
    )
    without = model.denoise(model.network, x, logsnr, {"context": empty})
    np.testing.assert_allclose(
        (without + 3.0 * (conditional - without)).detach(),
        guided.detach(),
        atol=1e-3,
    )


def test_guidance_needs_what_says_nothing():
    model = from_diffusers(
        network_of("UNet2DConditionModel"), unclipped(), ema=None
    )
    with pytest.raises(ValueError, match=r"label_dropout|null_conditioning"):
        model.generate(
            num_steps=2, guidance_scale=3.0, conditioning=latents()[1]
        )


def test_dit_knows_what_says_nothing_and_drops_no_labels():
    network = network_of("DiTTransformer2DModel")
    model = from_diffusers(network, unclipped(), ema=None)
    assert int(model.conditioning["labels"].null) == 5
    z = ops.convert_to_tensor(latents()[0])
    inputs = {
        "z": z,
        "logsnr": ops.zeros(4),
        "labels": ops.convert_to_tensor([0, 1, 2, 3], "int32"),
    }
    expected = model.network(inputs, training=False)
    for _ in range(5):  # a label would be dropped in one of ten cases
        np.testing.assert_array_equal(
            model.network(inputs, training=True).detach(), expected.detach()
        )
    model.generate(
        num_steps=2,
        guidance_scale=2.0,
        conditioning=dict(labels=np.array([1, 2])),
    )


def autoencoder(**config):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        **config,
    ).eval()


@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    ],
)
def test_autoencoder(config, tmp_path):
    vae = autoencoder(**config)
    model = latent_model(vae=vae)
    space = model.space
    assert space.image_shape == (16, 16, 3)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 16, 3)).astype("float32")
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        mean = vae.encode(pixels).latent_dist.mean
        shift = vae.config.shift_factor or 0.0
        mean = (mean - shift) * vae.config.scaling_factor
        decoded = vae.decode(mean / vae.config.scaling_factor + shift).sample
        encoded = space.encode(ops.convert_to_tensor(images))
        np.testing.assert_allclose(encoded, mean.permute(0, 2, 3, 1), atol=1e-5)
        np.testing.assert_allclose(
            space.decode(encoded),
            decoded.permute(0, 2, 3, 1).clamp(-1, 1),
            atol=1e-5,
        )
    context = {"context": latents()[1]["context"][:2]}
    model.fit(images, context, batch_size=2, verbose=0)
    drawn = model.generate(num_steps=2, conditioning=context, seed=0)
    assert drawn.shape == (2, 16, 16, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        drawn, loaded.generate(num_steps=2, conditioning=context, seed=0)
    )


def test_half_precision_keeps_times():
    network = network_of("SD3Transformer2DModel").to(torch.bfloat16)
    seen = []
    network.time_text_embed.time_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    layer = DiffusersModule(network)
    assert layer.variable_dtype == "bfloat16"
    output = layer(
        {
            "hidden_states": ops.ones((1, 8, 8, 4)),
            "timestep": ops.full((1,), 999.45),
            "encoder_hidden_states": ops.ones((1, 5, 12)),
            "pooled_projections": ops.ones((1, 10)),
        }
    )
    assert output.dtype == torch.bfloat16
    assert float(seen[0][0]) == np.float32(999.45)


def test_mixed_bfloat16():
    x, context = latents()
    inputs = {
        "z": ops.convert_to_tensor(x),
        "logsnr": ops.convert_to_tensor(np.linspace(-4, 4, 4), "float32"),
        "context": ops.convert_to_tensor(context["context"]),
    }
    full = latent_model().network(inputs)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = latent_model()
        half = model.network(inputs)
        model.fit(x, context, batch_size=2, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert {w.dtype for w in model.network.trainable_weights} == {"float32"}
    error = ops.std(half - full) / ops.std(full)
    assert 0 < float(error.detach()) < 0.02


def test_what_was_given_stays():
    network = network_of("UNet2DModel")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    model = from_diffusers(network, unclipped())
    model.compile(optimizer="adam")
    model.fit(np.zeros((4, 8, 8, 3), "float32"), batch_size=2, verbose=0)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    own = from_diffusers(network, unclipped(), copied=False, ema=None)
    assert own.network.network.module is network


def test_shape_is_asked_without_computing():
    network = network_of("UNet2DConditionModel")
    calls = []
    network.conv_in.register_forward_pre_hook(
        lambda _, args: calls.append(args[0].device.type)
    )
    from_diffusers(network, unclipped(), copied=False, ema=None)
    assert {*calls} == {"meta"}


def test_file_names_only_known_classes():
    layer = DiffusersModule(network_of("UNet2DModel"))
    config = layer.get_config()
    json.dumps(config)
    again = DiffusersModule.from_config(config)
    assert again.library_config == layer.library_config
    for name in ("StableDiffusionPipeline", "os", 3):
        with pytest.raises(ValueError, match="`network` must be one of"):
            DiffusersModule.from_config({**config, "library_class": name})
    config["library_config"]["block_out_channels"] = [2**20, 2**21]
    with pytest.raises(ValueError, match="must fit"):
        untrusted.check_size(lambda: DiffusersModule.from_config(config), 2**33)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(network=3), "`network` must be a model of diffusers"),
        (dict(scheduler=3), "`scheduler` must be a scheduler"),
        (
            dict(scheduler=diffusers.ScoreSdeVeScheduler()),
            "`scheduler` must be a scheduler",
        ),
        (
            dict(null_conditioning={"pooled": 0.0}),
            "`null_conditioning` must be of what",
        ),
        (
            dict(null_conditioning={"context": np.zeros((5, 3))}),
            r"`null_conditioning\['context'\]`",
        ),
        (dict(image_shape=(8, 8, 3)), "`image_shape` must have"),
        (dict(vae=autoencoder), "`vae` must be a model of diffusers"),
        (dict(num_steps=0), "`num_steps` must be"),
        (dict(shift=2.0), "`shift` must be None"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {
        "network": network_of("UNet2DConditionModel"),
        "scheduler": unclipped(),
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        from_diffusers(**arguments)


def test_network_without_a_size_needs_one():
    network = network_of("UNet2DModel")
    network.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="`image_shape` must be given"):
        from_diffusers(network, unclipped())
    model = from_diffusers(network, unclipped(), image_shape=(8, 16, 3))
    assert isinstance(model, DiffusionModel)
    assert model.generate(2, num_steps=2).shape == (2, 8, 16, 3)
