"""Few-step diffusion for Keras 3: multistep consistency models."""

from keras_mscm import (
    adapters,
    callbacks,
    datasets,
    distribution,
    functional,
    losses,
    metrics,
    presets,
    samplers,
    schedules,
    spaces,
    variance,
    weightings,
)
from keras_mscm.conditioning import Condition
from keras_mscm.generator import Generator
from keras_mscm.models import (
    ConsistencyTuningModel,
    ContinuousConsistencyModel,
    DenoisingModel,
    DiffusionModel,
    GuidanceDistillationModel,
    MeanFlowModel,
    MultistepConsistencyModel,
    PeRFlowModel,
    ProgressiveDistillationModel,
    ShortcutModel,
    TractModel,
)
from keras_mscm.networks.uvit import UViT

__version__ = "0.1.0"

__all__ = [
    "Condition",
    "ConsistencyTuningModel",
    "ContinuousConsistencyModel",
    "DenoisingModel",
    "DiffusionModel",
    "Generator",
    "GuidanceDistillationModel",
    "MeanFlowModel",
    "MultistepConsistencyModel",
    "PeRFlowModel",
    "ProgressiveDistillationModel",
    "ShortcutModel",
    "TractModel",
    "UViT",
    "adapters",
    "callbacks",
    "datasets",
    "distribution",
    "functional",
    "losses",
    "metrics",
    "presets",
    "samplers",
    "schedules",
    "spaces",
    "variance",
    "weightings",
]
