"""Noise schedules: time t in [0, 1] to log-SNR, falling from data to noise."""

from keras_mscm.schedules.base import NoiseSchedule
from keras_mscm.schedules.cosine import (
    CosineSchedule,
    InterpolatedCosineSchedule,
    ShiftedCosineSchedule,
)
from keras_mscm.schedules.discrete import DiscreteSchedule
from keras_mscm.schedules.karras import KarrasSchedule
from keras_mscm.schedules.rectified_flow import RectifiedFlowSchedule

__all__ = [
    "CosineSchedule",
    "DiscreteSchedule",
    "InterpolatedCosineSchedule",
    "KarrasSchedule",
    "NoiseSchedule",
    "RectifiedFlowSchedule",
    "ShiftedCosineSchedule",
]
