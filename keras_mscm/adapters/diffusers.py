"""Diffusion models of Hugging Face's diffusers, on the torch backend."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_mscm import checks, spaces
from keras_mscm.adapters.diffusers_module import (
    CALLED,
    EMBED_TIME,
    DiffusersModule,
    described,
)
from keras_mscm.adapters.diffusers_scheduler import (
    check_scheduler,
    coordinates,
    scheduler_grid,
)
from keras_mscm.adapters.foreign import check_backend
from keras_mscm.adapters.network import AdaptedNetwork
from keras_mscm.conditioning import Condition
from keras_mscm.models import DiffusionModel
from keras_mscm.schedules import NoiseSchedule


def from_diffusers(
    network: Any,
    scheduler: Any,
    *,
    vae: Any = None,
    image_shape: Sequence[int] | None = None,
    num_steps: int | None = None,
    null_conditioning: Mapping[str, Any] | None = None,
    space: spaces.Space | None = None,
    schedule: NoiseSchedule | None = None,
    shift: float | None = None,
    copied: bool = True,
    **kwargs: Any,
) -> DiffusionModel:
    """A diffusion model of diffusers, to sample from and to distil.

    You want it for any checkpoint that `diffusers` loads: give the parts of
    its pipeline, `pipe.unet` or `pipe.transformer`, `pipe.scheduler` and
    `pipe.vae`. Images, latents and noise are channels last, as everywhere
    here. What the network is conditioned on are arrays that its pipeline's
    encoders made: `"labels"`; `"context"`, the sequence of a prompt's
    embeddings; `"pooled"`, its pooled embedding.

    The schedule has the noise levels of the scheduler. Its grid of a few steps
    equals the scheduler's at `num_steps` steps; without, it is that of
    `timestep_spacing="trailing"`, whatever the scheduler's, because that alone
    begins with pure noise and is the same grid for every number of steps.
    `scheduler_grid` gives that of another number, for `generate(schedule=...)`.
    Predictions are not clipped on the way (`clip_sample`, `thresholding`), as
    a probability flow has none of that.

    Args:
        network: A `UNet2DModel`, `UNet2DConditionModel`,
            `DiTTransformer2DModel` or `SD3Transformer2DModel`.
        scheduler: One with a table of noise levels, such as `DDPMScheduler`,
            `DDIMScheduler`, `EulerDiscreteScheduler`, or one of flow matching,
            `FlowMatchEulerDiscreteScheduler`.
        vae: `AutoencoderKL` of the latents: `generate` then returns images,
            and `fit` takes them. Without, both are of latents.
        image_shape: Shape of what the network works on, channels last;
            `sample_size` and `in_channels` of its configuration by default.
        num_steps: Number of steps at which the schedule's grid is to equal
            the scheduler's.
        null_conditioning: By name, what says nothing, for guidance: for
            `"context"` and `"pooled"` the embedding of an empty prompt,
            without the batch's axis, for `"labels"` a class. DiT's is known.
        space: What the network works on, instead of what follows from `vae`
            and the number of channels (`Pixels` for 1 or 3, else `Box`).
        schedule: Schedule of the model, instead of the scheduler's.
        shift: Shift of a scheduler's flow time that depends on the image
            (`use_dynamic_shifting`): `exp(mu)`.
        copied: Whether the model has a copy of the network, and not the very
            module that was given.
        **kwargs: As for `DiffusionModel`.

    Returns:
        The model. Under the global policy `"mixed_bfloat16"` it computes in
        that; a network in half precision does so anyway.

    Raises:
        ValueError: If something isn't as above or is lacking. It names the
            argument to give.

    Example:

    ```python
    pipe = DiffusionPipeline.from_pretrained(...)
    empty = pipe.encode_prompt([""], "cpu", 1, False)[0][0]
    teacher = from_diffusers(
        pipe.unet, pipe.scheduler, vae=pipe.vae,
        null_conditioning={"context": empty.detach().cpu().numpy()},
    )
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=4, guidance_scale=7.5
    )
    ```
    """
    check_backend("from_diffusers", "torch")
    described(network, "network")
    checks.check_boolean("copied", copied)
    check_scheduler(scheduler)
    process = coordinates(scheduler)
    layer = DiffusersModule(
        copy.deepcopy(network) if copied else network,
        whole_steps=process["time"] == "discrete_step",
    )
    config = layer.library_config
    shape = _image_shape(config, image_shape)
    declared, constants = _conditioning(layer, null_conditioning, shape)
    adapted = AdaptedNetwork(
        layer,
        shape,
        names={
            "logsnr": "timestep",
            **{
                ours: theirs
                for ours, theirs in CALLED[layer.library_class].items()
                if ours == "z" or ours in declared
            },
        },
        conditioning=declared,
        constants=constants,
        time_embedding=EMBED_TIME[layer.library_class],
        **process,
    )
    if schedule is None:
        schedule = scheduler_grid(scheduler, num_steps, shift=shift)
    if space is None:
        space = _space(shape, vae)
    if all(condition.can_be_absent for condition in declared.values()):
        kwargs.setdefault("guidable", bool(declared))
    return DiffusionModel(
        adapted,
        schedule,
        prediction_type=adapted.prediction_type,
        space=space,
        **kwargs,
    )


def _conditioning(
    layer: DiffusersModule,
    null: Mapping[str, Any] | None,
    shape: tuple[int, ...],
) -> tuple[dict[str, Condition], dict[str, Any]]:
    """What a model is conditioned on, and what it takes besides."""
    name, config = layer.library_class, layer.library_config
    null = {} if null is None else null
    if not isinstance(null, Mapping):
        raise checks.invalid("null_conditioning", "a dictionary", null)
    kinds: dict[str, dict[str, Any]] = {}
    constants = {}
    classes, nothing = config.get("num_class_embeds"), null.get("labels")
    if name == "DiTTransformer2DModel":
        classes = config["num_embeds_ada_norm"]
        # Its table has a row more, which is trained on no class.
        nothing = classes if nothing is None else nothing
    if classes is not None:
        kinds["labels"] = {
            "shape": (),
            "dtype": "int32",
            "num_classes": classes,
            "null": nothing,
        }
    width = config.get("joint_attention_dim", config.get("cross_attention_dim"))
    if "context" in CALLED[name]:
        if isinstance(width, (list, tuple)) or config.get("encoder_hid_dim"):
            raise checks.invalid(
                "network", "one of one width of cross-attention", config
            )
        kinds["context"] = {"shape": (None, width)}
    pooled = config.get("pooled_projection_dim")
    added = config.get("addition_embed_type")
    if added == "text_time":  # Stable Diffusion XL
        pooled = (
            config["projection_class_embeddings_input_dim"]
            - 6 * config["addition_time_embed_dim"]
        )
        pixels = [8 * size for size in shape[:2]]
        sizes = [*pixels, 0, 0, *pixels]
        constants["time_ids"] = np.asarray(sizes, "float32")
    elif added is not None or config.get("class_embed_type") is not None:
        raise checks.invalid(
            "network", "one without embeddings of images or other times", config
        )
    if "pooled" in CALLED[name] and pooled:
        kinds["pooled"] = {"shape": (pooled,)}
    if unknown := sorted({*null} - {*kinds}):
        raise ValueError(
            "`null_conditioning` must be of what the network is conditioned "
            f"on, {[*kinds]}. Received: {unknown}"
        )
    declared = {}
    for key, kind in kinds.items():
        try:
            declared[key] = Condition(**{"null": null.get(key), **kind})
        except ValueError as error:
            raise ValueError(f"`null_conditioning[{key!r}]`: {error}") from None
    return declared, constants


def _image_shape(
    config: Mapping[str, Any], image_shape: Sequence[int] | None
) -> tuple[int, ...]:
    channels = config["in_channels"]
    if image_shape is None:
        size = config.get("sample_size")
        if size is None:
            raise ValueError(
                "`image_shape` must be given, because the network has no "
                "sample_size. Received: None"
            )
        size = (size, size) if isinstance(size, int) else tuple(size)
        image_shape = (*size, channels)
    axes = "height", "width", "channels"
    shape = checks.check_shape("image_shape", image_shape, axes)
    if shape[-1] != channels or config.get("out_channels") not in (
        None,
        channels,
        2 * channels,
    ):
        raise ValueError(
            f"`image_shape` must have the network's channels, {channels}, and "
            "the network must return as many. Received: image_shape="
            f"{shape}, out_channels={config.get('out_channels')}"
        )
    return shape


def _space(shape: tuple[int, ...], vae: Any) -> spaces.Space:
    """What the network works on."""
    if vae is None:
        pixels = shape[-1] in (1, 3)
        return spaces.Pixels(shape) if pixels else spaces.Box(shape)
    name, config = described(vae, "vae")
    checks.check_choice("vae", name, ("AutoencoderKL",))
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    latents = config["latent_channels"]
    if latents != shape[-1]:
        raise ValueError(
            f"`vae` must have the network's number of channels, {shape[-1]}. "
            f"Received: latent_channels={latents}"
        )
    if config.get("latents_mean") or config.get("latents_std"):
        scale = [1 / deviation for deviation in config["latents_std"]]
        shift: Any = list(config["latents_mean"])
    else:
        scale = config["scaling_factor"]
        shift = config.get("shift_factor") or 0.0
    return spaces.Latents(
        shape,
        encoder=DiffusersModule(vae, part="encoder", trainable=False),
        decoder=DiffusersModule(vae, part="decoder", trainable=False),
        scale=scale,
        shift=shift,
        image_shape=(
            shape[0] * factor,
            shape[1] * factor,
            config["out_channels"],
        ),
    )
