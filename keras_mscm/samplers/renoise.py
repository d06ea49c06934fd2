"""Steps of a consistency model: each prediction is noised afresh."""

from dataclasses import dataclass

import keras

from keras_mscm import functional as F
from keras_mscm.samplers.base import Sampler


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class Renoise(Sampler):
    """For a consistency model whose every prediction is a clean image.

    `z_s` is that prediction with fresh noise, `alpha_s x + sigma_s epsilon`
    (Song et al., 2023, algorithm 1), so that nothing of `z_t` is kept besides.
    A diffusion model's predictions are blurred: take `DDPM` for it.

    Example:

    >>> from keras import ops
    >>> from keras_mscm.schedules import CosineSchedule
    >>> white = lambda z, logsnr: ops.ones_like(z)
    >>> z = Renoise()(white, ops.zeros((1, 2)), CosineSchedule(), 2, seed=0)
    >>> [round(float(value), 2) for value in z[0]]
    [1.0, 1.0]
    """

    stochastic = True

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        return F.add_noise(x, seed.normal(x), logsnr_s)
