"""Diffusion networks of Flax, linen and nnx, on the jax backend."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_mscm.adapters.linen_module import LinenModule
from keras_mscm.adapters.network import AdaptedNetwork
from keras_mscm.adapters.nnx_module import NnxModule
from keras_mscm.models import DiffusionModel
from keras_mscm.schedules import NoiseSchedule

# What belongs to the network, of the arguments of `from_flax_*`.
ADAPTED = (
    "alphas_cumprod",
    "conditioning",
    "constants",
    "names",
    "output",
    "process",
    "sigma_data",
    "time",
    "time_axes",
    "time_embedding",
    "time_scale",
    "time_width",
)


def from_flax_linen(
    module: Any,
    params: Mapping[str, Any],
    image_shape: Sequence[int],
    schedule: NoiseSchedule | None = None,
    *,
    builder: Callable[..., Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> DiffusionModel:
    """A diffusion model of a `flax.linen.Module`, to sample from and distil.

    You want it for a network that was trained with Flax's linen. It is to be
    called as `module.apply(variables, z, logsnr, ...)` by the names of its
    arguments, which `names` gives: `{"z": "x", "logsnr": "t"}`.

    Args:
        module: The module.
        params: Its variables: what `module.init` returns, or the collection
            `"params"` of it alone.
        image_shape: Shape of one example.
        schedule: Noise schedule, as for `DiffusionModel`.
        builder: Function that makes the module, for files; see `LinenModule`.
        arguments: Keyword arguments of `builder`.
        seed: Seed of dropout.
        **kwargs: As for `AdaptedNetwork` (`process`, `time`, `output`, `names`,
            `conditioning`, ...; `time_embedding` for a student of several
            numbers of steps); all others as for `DiffusionModel`.

    Returns:
        The model.

    Raises:
        ValueError: If an argument isn't as above or is lacking.
    """
    layer = LinenModule(
        module, params, builder=builder, arguments=arguments, seed=seed
    )
    return _model(layer, image_shape, schedule, kwargs)


def from_flax_nnx(
    module: Any,
    image_shape: Sequence[int],
    schedule: NoiseSchedule | None = None,
    *,
    builder: Callable[..., Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> DiffusionModel:
    """A diffusion model of a `flax.nnx.Module`, to sample from and distil.

    You want it for a network that was trained with Flax's nnx. The module that
    is given stays as it is: the model has copies of its values.

    Args:
        module: The module, called by the names of its arguments.
        image_shape: As for `from_flax_linen`.
        schedule: As there.
        builder: Function that makes such a module, for files; see `NnxModule`.
        arguments: Keyword arguments of `builder`.
        seed: Seed of dropout.
        **kwargs: As for `from_flax_linen`.

    Returns:
        The model.

    Raises:
        ValueError: If an argument isn't as above or is lacking.
    """
    layer = NnxModule(module, builder=builder, arguments=arguments, seed=seed)
    return _model(layer, image_shape, schedule, kwargs)


def _model(
    layer: keras.Layer, image_shape: Any, schedule: Any, kwargs: dict[str, Any]
) -> DiffusionModel:
    adapted = {name: kwargs.pop(name) for name in ADAPTED if name in kwargs}
    network = AdaptedNetwork(layer, image_shape, **adapted)
    declared = network.conditioning.values()
    if declared and all(condition.can_be_absent for condition in declared):
        kwargs.setdefault("guidable", True)
    return DiffusionModel(
        network,
        schedule,
        prediction_type=network.prediction_type,
        **kwargs,
    )
