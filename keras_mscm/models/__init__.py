"""Training algorithms, each a `keras.Model`."""

from keras_mscm.models.base import DenoisingModel
from keras_mscm.models.diffusion import DiffusionModel
from keras_mscm.models.multistep_consistency import MultistepConsistencyModel

__all__ = ["DenoisingModel", "DiffusionModel", "MultistepConsistencyModel"]
