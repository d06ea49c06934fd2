"""Stable Diffusion 1 and 2 of keras-cv, the library before KerasHub."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mscm import checks, spaces
from keras_mscm.adapters.arguments import missing
from keras_mscm.adapters.network import AdaptedNetwork
from keras_mscm.conditioning import Condition
from keras_mscm.models import DiffusionModel
from keras_mscm.schedules import DiscreteSchedule

_SCALE = 0.18215


def from_keras_cv(
    model: Any, *, encoder: bool = False, **kwargs: Any
) -> DiffusionModel:
    """Stable Diffusion of keras-cv, to sample from and to distil.

    You want it for `keras_cv.models.StableDiffusion` (1.4) and
    `StableDiffusionV2` (2.1-base). keras-cv ended with 0.9.0; its work goes on
    in KerasHub, see `from_keras_hub`. Prompts go through the same object,
    `encode_prompts(model, prompts)`, and `generate` decodes. The network is
    conditioned on `"context"`; an empty prompt says nothing. Its layers are
    the very ones of `model`, and there is no average of them.

    The schedule has the table's noise levels. keras-cv's sampler spaces its
    steps otherwise: `stable_diffusion_grid(num_steps)` is its grid.

    Args:
        model: `StableDiffusion` or `StableDiffusionV2`.
        encoder: Whether to take its image encoder, so that `fit` takes
            pictures; without, it takes latents.
        **kwargs: As for `DiffusionModel`.

    Returns:
        The model.

    Raises:
        ValueError: If `model` isn't as above.
        ImportError: If keras-cv isn't installed.

    Example:

    ```python
    sd = keras_cv.models.StableDiffusion(512, 512)
    teacher = from_keras_cv(sd)
    images = teacher.generate(
        1, num_steps=50, guidance_scale=7.5, sampler=samplers.DDIM(),
        schedule=stable_diffusion_grid(50),
        conditioning=encode_prompts(sd, ["a tortoise"]),
    )
    ```
    """
    table = _table()
    if not hasattr(model, "diffusion_model") or not hasattr(model, "decoder"):
        raise checks.invalid("model", "StableDiffusion of keras-cv", model)
    checks.check_boolean("encoder", encoder)
    foreign = model.diffusion_model
    # A plain functional model can be made from its configuration, and then
    # downloads nothing.
    foreign = keras.Model(foreign.inputs, foreign.outputs[0], name=foreign.name)
    null = ops.convert_to_numpy(model._get_unconditional_context())[0]
    network = AdaptedNetwork(
        foreign,
        tuple(foreign.inputs[0].shape[1:]),
        time="discrete_step",
        output="epsilon",
        alphas_cumprod=table,
        time_width=foreign.inputs[1].shape[-1],
        names=["z", "logsnr", "context"],
        conditioning={"context": Condition(null.shape, null=null)},
    )
    space = spaces.Latents(
        network.image_shape,
        # The last layer of theirs scales means; the first one, back.
        _chained(model.image_encoder.layers[:-1]) if encoder else None,
        _chained(model.decoder.layers[1:]),
        scale=_SCALE,
        image_shape=(model.img_height, model.img_width, 3),
    )
    kwargs = {
        "prediction_type": network.prediction_type,
        "ema": None,
        "guidable": True,
        "schedule": DiscreteSchedule.of_steps(table),
        "space": space,
        **kwargs,
    }
    return DiffusionModel(network, **kwargs)


def stable_diffusion_grid(num_steps: int) -> DiscreteSchedule:
    """The noise levels that keras-cv's Stable Diffusion visits.

    Args:
        num_steps: Number of steps, for which alone it is made.

    Returns:
        The schedule, for `generate(num_steps=..., schedule=...)`.

    Raises:
        ValueError: If `num_steps` is out of its range.
        ImportError: If keras-cv isn't installed.
    """
    table = _table()
    n = checks.check_positive_integer("num_steps", num_steps, len(table))
    return DiscreteSchedule.of_steps(table, n, spacing="linspace")


def _table() -> tuple[float, ...]:
    """keras-cv's table of `alpha^2`."""
    try:
        from keras_cv.src.models.stable_diffusion import constants
    except ImportError as error:
        raise missing("keras-cv", "keras-cv") from error
    return tuple(constants._ALPHAS_CUMPROD)


def _chained(layers: Sequence[keras.Layer]) -> keras.Model:
    """A model of these layers, which keep their weights."""
    return keras.Sequential([keras.Input(layers[0].input.shape[1:]), *layers])
