"""The mathematics of the paper as pure `keras.ops` functions.

Nothing here knows a model or a variable. Times are handed over as
log-SNR values of shape `(batch,)`; images have shape `(batch, ...)`.
"""

from keras_mscm.functional.annealing import suggested_annealing, teacher_steps
from keras_mscm.functional.consistency import consistency_target, segment_times
from keras_mscm.functional.ddim import (
    addim,
    addim_x,
    analytic_x_var,
    ddim,
    heun_x,
    inverse_ddim,
)
from keras_mscm.functional.guidance import guided
from keras_mscm.functional.process import (
    add_noise,
    alpha,
    expand,
    mean_per_example,
    posterior,
    predict_epsilon,
    predict_x,
    sigma,
)
from keras_mscm.functional.threefry import normal, threefry_2x32

__all__ = [
    "add_noise",
    "addim",
    "addim_x",
    "alpha",
    "analytic_x_var",
    "consistency_target",
    "ddim",
    "expand",
    "guided",
    "heun_x",
    "inverse_ddim",
    "mean_per_example",
    "normal",
    "posterior",
    "predict_epsilon",
    "predict_x",
    "segment_times",
    "sigma",
    "suggested_annealing",
    "teacher_steps",
    "threefry_2x32",
]
