"""Training algorithms, each a `keras.Model`."""

from keras_mscm.models.base import DenoisingModel
from keras_mscm.models.consistency_tuning import ConsistencyTuningModel
from keras_mscm.models.continuous_consistency import (
    ContinuousConsistencyModel,
)
from keras_mscm.models.diffusion import DiffusionModel
from keras_mscm.models.guidance_distillation import GuidanceDistillationModel
from keras_mscm.models.mean_flow import MeanFlowModel
from keras_mscm.models.multistep_consistency import MultistepConsistencyModel
from keras_mscm.models.perflow import PeRFlowModel
from keras_mscm.models.progressive_distillation import (
    ProgressiveDistillationModel,
)
from keras_mscm.models.shortcut import ShortcutModel
from keras_mscm.models.tract import TractModel

__all__ = [
    "ConsistencyTuningModel",
    "ContinuousConsistencyModel",
    "DenoisingModel",
    "DiffusionModel",
    "GuidanceDistillationModel",
    "MeanFlowModel",
    "MultistepConsistencyModel",
    "PeRFlowModel",
    "ProgressiveDistillationModel",
    "ShortcutModel",
    "TractModel",
]
