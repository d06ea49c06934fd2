"""DDIM (eq. 4)."""

from dataclasses import dataclass

import keras

from keras_mscm.samplers.singlestep import SinglestepSampler


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class DDIM(SinglestepSampler):
    """DDIM (eq. 4); with a multistep consistency model, algorithm 2.

    Take it for the same noise to give the same image in any number of steps,
    and for students, which are trained for its steps. It is the Euler method
    of the probability flow, of first order.

    Example:

    >>> from keras import ops
    >>> from keras_mscm.schedules import CosineSchedule
    >>> white = lambda z, logsnr: ops.ones_like(z)
    >>> z = DDIM()(white, ops.zeros((1, 2)), CosineSchedule(), 4)
    >>> [round(float(value), 2) for value in z[0]]
    [1.0, 1.0]
    """

    def step_x(self, x, z_t, logsnr_t, logsnr_s, x_var, denoise):
        return x
