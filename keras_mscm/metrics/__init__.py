"""How near samples are to a data set, in the features of any network.

A `FeatureExtractor` turns images into vectors, a `Reference` is the data set in
them, and the metrics compare samples with it, batch by batch, as Keras metrics.
What they return says beside the number what it was measured on.

They run on the host in float64 NumPy, not within a compiled step: pass them to
`callbacks.EvaluateSamples`, not to `compile`.
"""

from keras_mscm.metrics.classifier import classifier_features
from keras_mscm.metrics.extractors import (
    FeatureExtractor,
    inception_v3,
    keras_features,
)
from keras_mscm.metrics.frechet import FrechetDistance, frechet_distance
from keras_mscm.metrics.kernel import KernelDistance
from keras_mscm.metrics.over_steps import quality_over_steps
from keras_mscm.metrics.precision_recall import (
    ImprovedPrecision,
    ImprovedRecall,
)
from keras_mscm.metrics.reference import Reference

__all__ = [
    "FeatureExtractor",
    "FrechetDistance",
    "ImprovedPrecision",
    "ImprovedRecall",
    "KernelDistance",
    "Reference",
    "classifier_features",
    "frechet_distance",
    "inception_v3",
    "keras_features",
    "quality_over_steps",
]
