"""Diffusion models of KerasHub: Stable Diffusion 3, and Flux's transformer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_mscm import checks, spaces
from keras_mscm.adapters.arguments import check_nulls, missing
from keras_mscm.adapters.network import AdaptedNetwork
from keras_mscm.adapters.prompts import encode_prompts, has_preprocessor
from keras_mscm.conditioning import Condition
from keras_mscm.models import DiffusionModel
from keras_mscm.schedules import DiscreteSchedule, RectifiedFlowSchedule

# Flow time 3e-7 from either end: a float32 has no digits beyond.
_ENDS = {"logsnr_min": -30.0, "logsnr_max": 30.0}


def from_keras_hub(
    model: keras.Model,
    *,
    null_conditioning: Mapping[str, Any] | None = None,
    shift: float | None = None,
    guidance: float | None = None,
    grid: Sequence[int] | None = None,
    **kwargs: Any,
) -> DiffusionModel:
    """A diffusion model of KerasHub, to sample from and to distil.

    You want it for Stable Diffusion 3 and 3.5: prompts go through
    `encode_prompts`, `generate` decodes, `fit` takes images or latents. The
    network is the very one of `model`, not a copy, and there is no average of
    it. It is conditioned on `"context"` and `"pooled"`; an empty prompt says
    nothing. Its embedding of time runs in float32 whatever its policy, because
    bfloat16 can't tell 997 from 996 of 1000.

    Of Flux, KerasHub has the transformer alone, without text encoders and
    autoencoder. The model then works on sequences of packed latents, `(height
    width / 256, 64)`, and what it is conditioned on must come from elsewhere.

    Args:
        model: `StableDiffusion3TextToImage` (or another task with such a
            backbone), `StableDiffusion3Backbone` or `FluxBackbone`.
        null_conditioning: `"context"` and `"pooled"` of an empty prompt,
            without the batch's axis. By default Stable Diffusion's, if `model`
            has a preprocessor; else guidance can't be had.
        shift: Shift of the schedule; by default that of the model's scheduler,
            and 1 for Flux.
        guidance: For Flux with `guidance_embed`: the scale it is told.
        grid: For Flux: height and width of the latents in packed places; by
            default they are square.
        **kwargs: As for `DiffusionModel`.

    Returns:
        The model.

    Raises:
        ValueError: If something isn't as above, or is lacking.
        ImportError: If KerasHub isn't installed.

    Example:

    ```python
    sd3 = keras_hub.models.StableDiffusion3TextToImage.from_preset(
        "stable_diffusion_3_medium"
    )
    teacher = from_keras_hub(sd3)
    images = teacher.generate(
        1, num_steps=28, guidance_scale=7.0, sampler=samplers.DDIM(),
        conditioning=encode_prompts(sd3, ["a tortoise"]),
    )
    ```
    """
    keras_hub = _imported()
    core = getattr(model, "backbone", model)
    if isinstance(core, keras_hub.models.FluxBackbone):
        network = _flux(core, null_conditioning, guidance, grid)
        shift = 1.0 if shift is None else shift
        space: spaces.Space = spaces.Box(network.image_shape)
    elif isinstance(core, keras_hub.models.StableDiffusion3Backbone):
        if guidance is not None or grid is not None:
            raise ValueError(
                "`guidance` and `grid` must not be given: they are Flux's. "
                f"Received: guidance={guidance}, grid={grid}"
            )
        if null_conditioning is None and has_preprocessor(model):
            nulls = encode_prompts(model, [""])
            null_conditioning = {name: nulls[name][0] for name in nulls}
        network = _stable_diffusion_3(core, null_conditioning)
        shift = core.scheduler.shift if shift is None else shift
        space = spaces.Latents(
            network.image_shape,
            core.vae.encoder,
            core.vae.decoder,
            scale=core.vae.scale,
            shift=core.vae.shift,
            image_shape=tuple(core.image_shape),
        )
    else:
        raise checks.invalid(
            "model", "StableDiffusion3 or Flux of KerasHub", model
        )
    kwargs = {
        "ema": None,
        "guidable": all(
            condition.can_be_absent
            for condition in network.conditioning.values()
        ),
        "schedule": RectifiedFlowSchedule(shift=shift, **_ENDS),
        "space": space,
        **kwargs,
    }
    return DiffusionModel(network, **kwargs)


def stable_diffusion_3_grid(model: Any, num_steps: int) -> DiscreteSchedule:
    """The noise levels that KerasHub's Stable Diffusion 3 visits.

    Its scheduler runs evenly through its sigmas of training, which have the
    shift, and shifts once more.

    Args:
        model: As for `from_keras_hub`.
        num_steps: Number of steps, for which alone it is made.

    Returns:
        The schedule, for `generate(num_steps=..., schedule=...)`.

    Raises:
        ValueError: If an argument isn't as above.
    """
    core = getattr(model, "backbone", model)
    scheduler: Any = getattr(core, "scheduler", None)
    if not hasattr(scheduler, "num_train_timesteps"):
        raise checks.invalid("model", "StableDiffusion3 of KerasHub", model)
    n = checks.check_positive_integer("num_steps", num_steps)

    def shifted(time):
        shift = scheduler.shift
        return shift * time / (1 + (shift - 1) * time)

    least = shifted(1 / scheduler.num_train_timesteps)
    time = shifted(np.linspace(1.0, least, n))[::-1]
    signal = (1 - time) ** 2
    return DiscreteSchedule([1.0, *(signal / (signal + time**2))])


def _imported() -> Any:
    """KerasHub, or an error that says how to install it."""
    try:
        import keras_hub
    except ImportError as error:
        raise missing("KerasHub", "keras-hub") from error
    return keras_hub


def _stable_diffusion_3(
    core: Any, null_conditioning: Mapping[str, Any] | None
) -> AdaptedNetwork:
    nulls = check_nulls(null_conditioning, ("context", "pooled"))
    # Without a mask, what says nothing has the length of every prompt.
    length = np.shape(nulls["context"])[0] if nulls else None
    return AdaptedNetwork(
        core.diffuser,
        tuple(core.latent_shape[1:]),
        process="rectified_flow",
        time="flow_time",
        output="flow",
        time_scale=float(core.scheduler.num_train_timesteps),
        time_axes=1,
        names={
            "z": "latent",
            "logsnr": "timestep",
            "pooled": "pooled_projection",
        },
        conditioning={
            "context": Condition(
                (length, core.t5_hidden_dim), null=nulls.get("context")
            ),
            "pooled": Condition(
                (core.clip_hidden_dim,), null=nulls.get("pooled")
            ),
        },
        float32_layers=("timestep_embedding",),
        time_embedding="timestep_embedding",
    )


def _flux(
    core: Any,
    null_conditioning: Mapping[str, Any] | None,
    guidance: float | None,
    grid: Sequence[int] | None,
) -> AdaptedNetwork:
    nulls = check_nulls(null_conditioning, ("context", "pooled"))
    shapes = {
        "image_shape": core.image_shape,
        "text_shape": core.text_shape,
        "y_shape": core.y_shape,
    }
    if any(None in shape for shape in shapes.values()):
        raise ValueError(
            "`model` must be a FluxBackbone that was made with the shapes of "
            f"its inputs. Received: {shapes}"
        )
    length = core.image_shape[0]
    if grid is None:
        grid = (math.isqrt(length), math.isqrt(length))
    height, width = checks.check_shape("grid", grid, ("height", "width"))
    if height * width != length:
        raise ValueError(
            f"`grid` must have {length} places, as the model's image_shape "
            f"has. Received: grid={(height, width)}"
        )
    if guidance is None and core.guidance_embed:
        raise ValueError(
            "`guidance` must be given for a model with guidance_embed. "
            "Received: None"
        )
    guidance = 1.0 if guidance is None else guidance
    guidance = checks.check_finite_number("guidance", guidance)
    rows, columns = np.indices((height, width), "float32").reshape(2, -1)
    ids = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    return AdaptedNetwork(
        core,
        tuple(core.image_shape),
        process="rectified_flow",
        time="flow_time",
        output="flow",
        names={
            "z": "image",
            "logsnr": "timesteps",
            "context": "text",
            "pooled": "y",
        },
        conditioning={
            "context": Condition(core.text_shape, null=nulls.get("context")),
            "pooled": Condition(core.y_shape, null=nulls.get("pooled")),
        },
        constants={
            "image_ids": ids,
            "text_ids": np.zeros((core.text_shape[0], 3), "float32"),
            "guidance": np.float32(guidance),
        },
        float32_layers=("timestep_embedding",),
        time_embedding="time_input_embedder",
    )
