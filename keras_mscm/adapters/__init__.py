"""Adapters: other libraries' diffusion models as teachers and students.

Each `from_...` gives a `DiffusionModel` that samples at once and is a teacher;
`MultistepConsistencyModel.from_teacher` makes a student with its weights. Where
a foreign sampler spaces its steps in its own way, a `..._grid` is its schedule.
"""

from keras_mscm.adapters.diffusers import from_diffusers
from keras_mscm.adapters.diffusers_scheduler import scheduler_grid
from keras_mscm.adapters.edm import edm_grid, from_edm
from keras_mscm.adapters.flax import from_flax_linen, from_flax_nnx
from keras_mscm.adapters.keras_cv import from_keras_cv, stable_diffusion_grid
from keras_mscm.adapters.keras_hub import (
    from_keras_hub,
    stable_diffusion_3_grid,
)
from keras_mscm.adapters.keras_io import from_keras_io_ddim, offset_cosine
from keras_mscm.adapters.network import AdaptedNetwork
from keras_mscm.adapters.prompts import encode_prompts
from keras_mscm.adapters.torch_module import TorchModule

__all__ = [
    "AdaptedNetwork",
    "TorchModule",
    "edm_grid",
    "encode_prompts",
    "from_diffusers",
    "from_edm",
    "from_flax_linen",
    "from_flax_nnx",
    "from_keras_cv",
    "from_keras_hub",
    "from_keras_io_ddim",
    "offset_cosine",
    "scheduler_grid",
    "stable_diffusion_3_grid",
    "stable_diffusion_grid",
]
