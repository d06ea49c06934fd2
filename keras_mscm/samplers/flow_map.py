"""Steps of a network that is told where they lead (a flow map)."""

from dataclasses import dataclass

import keras

from keras_mscm import functional as F
from keras_mscm.samplers.base import Sampler


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class FlowMap(Sampler):
    """DDIM (eq. 4) for a network that takes the end of its step.

    A student of several numbers of steps is sampled so: it predicts the `x`
    with which DDIM leads from t to s, and for that must know s. `generate`
    takes it by itself.

    Call arguments:
        denoise: Function of `(z, logsnr, logsnr_end)` that predicts `x`; the
            rest is as for every sampler.

    Example:

    >>> from keras import ops
    >>> from keras_mscm.schedules import CosineSchedule
    >>> white = lambda z, logsnr, logsnr_end: ops.ones_like(z)
    >>> z = FlowMap()(white, ops.zeros((1, 2)), CosineSchedule(), 4)
    >>> [round(float(value), 2) for value in z[0]]
    [1.0, 1.0]
    """

    def advance(self, z_t, state, logsnr_t, logsnr_s, denoise, seed):
        x = denoise(z_t, logsnr_t, logsnr_s)
        return F.ddim(x, z_t, logsnr_t, logsnr_s), state
