"""Good arguments of the adapters, around networks of a few weights."""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from benchmarks.bad_arguments.public_api import Entry, entry_of, here
from benchmarks.bad_arguments.world import IMAGES, LEVELS, World
from keras_mscm import DiffusionModel, adapters

layers = keras.layers
SHAPE = (4, 4, 1)


def all_adapters(w: World) -> Iterator[Entry]:
    """Those that run on this backend."""
    foreign = Foreign()
    # Made now, because it takes long to import the libraries.
    _ = foreign.flux, foreign.scheduler
    adapters.stable_diffusion_grid(2)
    entry = functools.partial(_of_model, foreign)
    yield entry_of(
        "adapters.AdaptedNetwork",
        adapters.AdaptedNetwork,
        lambda: {"network": w.plain_network, "image_shape": SHAPE},
    )
    yield entry(
        "from_edm",
        lambda: {"network": foreign.listed, "image_shape": SHAPE},
    )
    yield entry("from_keras_io_ddim", lambda: {"network": foreign.keras_io})
    yield entry("from_keras_cv", lambda: {"model": foreign.keras_cv})
    yield entry(
        "from_keras_hub", lambda: {"model": foreign.flux, "guidance": 1.0}
    )
    for name, good in {
        "edm_grid": {"num_steps": 4},
        "offset_cosine": {},
        "stable_diffusion_grid": {"num_steps": 4},
        "stable_diffusion_3_grid": {
            "model": SimpleNamespace(
                scheduler=SimpleNamespace(num_train_timesteps=1000, shift=3.0)
            ),
            "num_steps": 4,
        },
        "encode_prompts": {"model": foreign.keras_cv, "prompts": ["a"]},
        "scheduler_grid": {"scheduler": foreign.scheduler},
    }.items():
        good = functools.partial(dict, good)
        yield entry_of(f"adapters.{name}", getattr(adapters, name), good)
    if here("adapters.TorchModule"):
        yield entry_of(
            "adapters.TorchModule",
            adapters.TorchModule,
            lambda: {"module": foreign.linear},
        )
        yield entry(
            "from_diffusers",
            lambda: {"network": foreign.unet, "scheduler": foreign.scheduler},
        )
    if here("adapters.from_flax_nnx"):
        named = {"image_shape": SHAPE, "names": {"z": "x", "logsnr": "t"}}
        more = adapters.AdaptedNetwork, DiffusionModel
        yield entry(
            "from_flax_linen",
            lambda: {**foreign.linen, **named},
            more=more,
        )
        yield entry(
            "from_flax_nnx",
            lambda: {"module": foreign.nnx, **named},
            more=more,
        )


def _of_model(
    foreign: "Foreign", name: str, good: Any, more: Any = (DiffusionModel,)
) -> Entry:
    """Of a function that makes a model, and takes its arguments besides."""
    made = entry_of(
        f"adapters.{name}",
        getattr(adapters, name),
        good,
        more=more,
        # What the adapter says of the network.
        without=("prediction_type", "float32_layers", "end_width"),
    )
    if name not in ("from_flax_linen", "from_flax_nnx", "from_edm"):
        made.domains.pop("conditioning", None)
    if "model" in made.domains or "module" in made.domains:
        made.domains.pop("network", None)
    if "model" in made.domains:
        made.domains.pop("image_shape", None)
    made.every = 9
    return made


class Foreign:
    """Networks of others, each made once."""

    @functools.cached_property
    def listed(self):
        """A network that takes a list of images and times."""
        z, time = keras.Input(SHAPE), keras.Input(())
        level = layers.Reshape((1, 1, 1))(time)
        return keras.Model([z, time], layers.Dense(1)(z) + level)

    @functools.cached_property
    def keras_io(self):
        """Of images and noise variances."""
        z, variance = keras.Input(SHAPE), keras.Input((1, 1, 1))
        return keras.Model([z, variance], layers.Dense(1)(z) + variance)

    @functools.cached_property
    def keras_cv(self):
        """What is read of `StableDiffusion`, which downloads its weights."""
        z, time = keras.Input((4, 4, 4)), keras.Input((8,))
        context = keras.Input((3, 2))
        told = layers.Dense(4)(time) + layers.Dense(4)(context)[:, 0]
        output = layers.Dense(4)(z) + layers.Reshape((1, 1, 4))(told)
        first = layers.Rescaling(1.0)
        decoder = keras.Sequential(
            [
                keras.Input((4, 4, 4)),
                first,
                layers.UpSampling2D(8, data_format="channels_last"),
                layers.Dense(3),
            ]
        )
        encoder = keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                layers.AveragePooling2D(8, data_format="channels_last"),
                layers.Dense(4),
                layers.Rescaling(1.0),
            ]
        )
        return SimpleNamespace(
            diffusion_model=keras.Model([z, time, context], output),
            decoder=decoder,
            image_encoder=encoder,
            img_height=32,
            img_width=32,
            _get_unconditional_context=lambda: np.zeros((1, 3, 2), "float32"),
            encode_text=lambda prompt: np.zeros((1, 3, 2), "float32"),
        )

    @functools.cached_property
    def flux(self):
        """KerasHub's, of one layer."""
        import keras_hub

        return keras_hub.models.FluxBackbone(
            input_channels=4,
            hidden_size=12,
            mlp_ratio=1.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[2, 2, 2],
            theta=10_000,
            use_bias=True,
            guidance_embed=True,
            image_shape=(4, 4),
            text_shape=(3, 4),
            image_ids_shape=(4, 3),
            text_ids_shape=(3, 3),
            y_shape=(5,),
        )

    @functools.cached_property
    def scheduler(self):
        import diffusers

        return diffusers.DDIMScheduler(num_train_timesteps=20)

    @functools.cached_property
    def unet(self):
        """Of diffusers."""
        import diffusers

        return diffusers.UNet2DModel(
            sample_size=4,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
        )

    @functools.cached_property
    def linear(self):
        import torch

        return torch.nn.Linear(2, 2)

    @functools.cached_property
    def linen(self):
        """A module of linen, and its parameters."""
        import jax
        from flax import linen as nn

        class Linen(nn.Module):
            @nn.compact
            def __call__(self, x, t):
                return nn.Dense(1)(x) + t[:, None, None, None]

        module = Linen()
        params = module.init(jax.random.key(0), IMAGES, LEVELS)
        return {"module": module, "params": params}

    @functools.cached_property
    def nnx(self):
        from flax import nnx

        class Nnx(nnx.Module):
            def __init__(self):
                self.dense = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

            def __call__(self, x, t):
                return self.dense(x) + t[:, None, None, None]

        return Nnx()
