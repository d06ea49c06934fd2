"""Samplers: from noise to images in a number of steps, equal in time.

Each is called as `sampler(denoise, noise, schedule, num_steps, seed)`.
`denoise(z, logsnr)` predicts `x` from images `(batch, ...)` at log-SNR
`(batch,)`. `num_steps` may be a tensor: the loop is then compiled once for
every number of steps. Uneven steps are given by their times. With `start` below
1 it begins with noisy images at that time instead of noise, as editing does.

A sampler whose step depends on `z_t` alone, and not on chance, is an
integrator of the probability flow as well: its `step_x` says with which `x`
DDIM would take the same step. That is what a student learns from in
distillation.
"""

from keras_mscm.samplers.addim import ADDIM
from keras_mscm.samplers.base import Denoise, Integrator, Sampler, Variance
from keras_mscm.samplers.ddim import DDIM
from keras_mscm.samplers.ddpm import DDPM
from keras_mscm.samplers.dpm_solver_multistep import DPMSolverMultistep
from keras_mscm.samplers.flow_map import FlowMap
from keras_mscm.samplers.heun import Heun
from keras_mscm.samplers.noisy_ddim import NoisyDDIM
from keras_mscm.samplers.renoise import Renoise
from keras_mscm.samplers.singlestep import SinglestepSampler
from keras_mscm.samplers.step_seed import StepSeed

__all__ = [
    "ADDIM",
    "DDIM",
    "DDPM",
    "DPMSolverMultistep",
    "Denoise",
    "FlowMap",
    "Heun",
    "Integrator",
    "NoisyDDIM",
    "Renoise",
    "Sampler",
    "SinglestepSampler",
    "StepSeed",
    "Variance",
]
