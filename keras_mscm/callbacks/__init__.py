"""Callbacks for training."""

from keras_mscm.callbacks.evaluate_samples import EvaluateSamples
from keras_mscm.callbacks.resume_training import ResumeTraining
from keras_mscm.callbacks.sample_grid import SampleGrid
from keras_mscm.callbacks.teacher_step_anneal import TeacherStepAnneal

__all__ = [
    "EvaluateSamples",
    "ResumeTraining",
    "SampleGrid",
    "TeacherStepAnneal",
]
