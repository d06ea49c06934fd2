"""Adjusted DDIM (eq. 14, algorithm 3)."""

from dataclasses import dataclass

import keras

from keras_mscm import checks
from keras_mscm import functional as F
from keras_mscm.samplers.base import Variance
from keras_mscm.samplers.singlestep import SinglestepSampler
from keras_mscm.variance import ErrorShare


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class ADDIM(SinglestepSampler):
    """Adjusted DDIM (eq. 14, algorithm 3).

    Take it for diffusion models and teachers where DDIM's images are too
    smooth: it keeps the noise of the norm that a perfect sampler's would have.
    Costs what DDIM costs.

    Args:
        x_var: The posterior variance of `x` per dimension, as a function of
            log-SNR: analytic, `0.1 / (2 + SNR)`, by default (in `generate` the
            `AnalyticVariance` of the model's space), or empirical, the
            `x_var` of a model that has measured it
            (`DiffusionModel.measure_x_var`). In distillation the student says
            what it is.
    """

    x_var: Variance = F.analytic_x_var

    def __post_init__(self):
        checks.check_function("x_var", self.x_var, "a function of log-SNR")

    def step_x(self, x, z_t, logsnr_t, logsnr_s, x_var, denoise):
        return F.addim_x(x, z_t, logsnr_t, logsnr_s, x_var)

    def x_variance(self, logsnr):
        if isinstance(self.x_var, ErrorShare):
            raise ValueError(
                "`x_var` must be a function of log-SNR alone in sampling, "
                f"where the data aren't known. Received: {self.x_var}"
            )
        return self.x_var(logsnr)
