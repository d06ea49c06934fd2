"""Networks of other libraries that can be planned, by name.

They are made from their published sizes, because a plan needs no weights, and
so nothing is loaded.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_mscm.adapters import from_keras_hub
from keras_mscm.adapters.arguments import missing
from keras_mscm.models.diffusion import DiffusionModel

#: Of KerasHub's preset `stable_diffusion_3_medium`, which has no T5: arguments
#: of its parts, and the length of its prompts.
STABLE_DIFFUSION_3_MEDIUM: Mapping[str, Any] = {
    "backbone": {
        "mmdit_patch_size": 2,
        "mmdit_hidden_dim": 1536,
        "mmdit_num_layers": 24,
        "mmdit_num_heads": 24,
        "mmdit_position_size": 192,
        "mmdit_qk_norm": None,
        "mmdit_dual_attention_indices": None,
        "image_shape": (1024, 1024, 3),
    },
    "vae": {
        "encoder_num_filters": [128, 256, 512, 512],
        "encoder_num_blocks": [2, 2, 2, 2],
        "decoder_num_filters": [512, 512, 256, 128],
        "decoder_num_blocks": [3, 3, 3, 3],
    },
    "clip_l": {
        "vocabulary_size": 49408,
        "embedding_dim": 768,
        "hidden_dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "intermediate_dim": 3072,
        "intermediate_activation": "quick_gelu",
        "intermediate_output_index": -2,
    },
    "clip_g": {
        "vocabulary_size": 49408,
        "embedding_dim": 1280,
        "hidden_dim": 1280,
        "num_layers": 32,
        "num_heads": 20,
        "intermediate_dim": 5120,
        "intermediate_activation": "gelu",
        "intermediate_output_index": -2,
    },
    "context_length": 154,
}


def stable_diffusion_3_backbone(
    sizes: Mapping[str, Any], dtype: str, remat: bool = False
) -> Any:
    """KerasHub's Stable Diffusion 3, with random weights.

    Args:
        sizes: As `STABLE_DIFFUSION_3_MEDIUM`.
        dtype: Policy of all its parts.
        remat: Whether the transformer's blocks are computed again for the
            gradient, and not kept.

    Raises:
        ImportError: If KerasHub isn't installed.
    """
    try:
        from keras_hub.models import CLIPTextEncoder, StableDiffusion3Backbone
        from keras_hub.src.models.vae.vae_backbone import VAEBackbone
    except ImportError as error:
        raise missing("KerasHub", "keras-hub") from error
    blocks = range(sizes["backbone"]["mmdit_num_layers"])
    # KerasHub has no argument for it, but Keras heeds this as layers are made.
    scope = keras.RematScope(
        mode="list_of_layers",
        layer_names=[f"joint_block_{i}" for i in blocks],
    )
    with scope if remat else contextlib.nullcontext():
        return StableDiffusion3Backbone(
            vae=VAEBackbone(**sizes["vae"], dtype=dtype),
            **{
                name: CLIPTextEncoder(**sizes[name], name=name, dtype=dtype)
                for name in ("clip_l", "clip_g")
            },
            **sizes["backbone"],
            dtype=dtype,
        )


def stable_diffusion_3(
    sizes: Mapping[str, Any], dtype: str, remat: bool = False
) -> DiffusionModel:
    """A teacher as `from_keras_hub` makes it, with random weights.

    Its text encoders aren't part of it: prompts are encoded beforehand.

    Args:
        sizes: As `STABLE_DIFFUSION_3_MEDIUM`.
        dtype: Policy.
        remat: As for `stable_diffusion_3_backbone`.
    """
    core = stable_diffusion_3_backbone(sizes, dtype, remat)
    context = (sizes["context_length"], core.t5_hidden_dim)
    teacher = from_keras_hub(
        core,
        null_conditioning={
            "context": np.zeros(context, "float32"),
            "pooled": np.zeros(core.clip_hidden_dim, "float32"),
        },
    )
    # A copy is made like the first, because where weights have no values
    # there are none to be copied.
    teacher.network.clone = lambda: (
        stable_diffusion_3(sizes, dtype, remat).network
    )
    return teacher


#: Functions of a policy and whether to compute blocks twice.
FOREIGN: dict[str, Callable[[str, bool], DiffusionModel]] = {
    "stable_diffusion_3_medium": functools.partial(
        stable_diffusion_3, STABLE_DIFFUSION_3_MEDIUM
    ),
}


def is_foreign(preset: Any) -> bool:
    """Whether a preset is the name of one of these networks."""
    return isinstance(preset, str) and preset in FOREIGN
