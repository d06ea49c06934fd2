"""DDIM with noise added to each prediction (appendix A.4)."""

from dataclasses import dataclass

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm import functional as F
from keras_mscm.samplers.base import Sampler, Variance


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class NoisyDDIM(Sampler):
    """DDIM with Gaussian noise added to each prediction (appendix A.4).

    Take it to compare aDDIM with: the perfect sampler of eq. 10 with a normal
    distribution for `p(x | z_t)`, which does by noise what aDDIM does to the
    norm alone.

    Args:
        x_var: As in `ADDIM`.
    """

    stochastic = True
    x_var: Variance = F.analytic_x_var

    def __post_init__(self):
        checks.check_function("x_var", self.x_var, "a function of log-SNR")

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        deviation = F.expand(ops.sqrt(self.x_var(logsnr_t)), x)
        x = x + deviation * seed.normal(x)
        return F.ddim(x, z_t, logsnr_t, logsnr_s)
