"""Few-step diffusion for Keras 3: multistep consistency models."""

from keras_mscm import callbacks, functional, losses, samplers, schedules
from keras_mscm.models.base import DenoisingModel
from keras_mscm.models.diffusion import DiffusionModel
from keras_mscm.models.multistep_consistency import MultistepConsistencyModel
from keras_mscm.networks.uvit import UViT

__version__ = "0.1.0"

__all__ = [
    "DenoisingModel",
    "DiffusionModel",
    "MultistepConsistencyModel",
    "UViT",
    "callbacks",
    "functional",
    "losses",
    "samplers",
    "schedules",
]
