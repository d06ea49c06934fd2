"""Ancestral sampling (eq. 1)."""

from dataclasses import dataclass

import keras
from keras import ops

from keras_mscm import functional as F
from keras_mscm.samplers.base import Sampler


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling: `z_s ~ q(z_s | z_t, x)` (eq. 1).

    Take it where hundreds of steps are no matter: its fresh noise corrects
    what earlier steps got wrong.
    """

    stochastic = True

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        mean, variance = F.posterior(x, z_t, logsnr_t, logsnr_s)
        return mean + ops.sqrt(variance) * seed.normal(x)
