"""Heun's second-order steps (Karras et al., 2022)."""

from dataclasses import dataclass

import keras

from keras_mscm import functional as F
from keras_mscm.samplers.singlestep import SinglestepSampler


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class Heun(SinglestepSampler):
    """Heun's second-order steps; two evaluations in each.

    Take it for a teacher of few, exact steps, with `KarrasSchedule`, whose
    grid it needs. For sampling alone, `DPMSolverMultistep` is of second order
    for one evaluation a step.

    The trapezoidal rule on `d(z / alpha) = epsilon d(sigma / alpha)`, in which
    DDIM is Euler's (Karras et al., 2022, algorithm 1, in these coordinates).
    The last step is second-order too: time ends at a little noise, not at
    none.
    """

    def step_x(self, x, z_t, logsnr_t, logsnr_s, x_var, denoise):
        x_s = denoise(F.ddim(x, z_t, logsnr_t, logsnr_s), logsnr_s)
        return F.heun_x(x, x_s, logsnr_t, logsnr_s)
