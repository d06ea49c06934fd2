"""Samplers: functions of `(denoise, noise, schedule, num_steps)`.

`denoise(z, logsnr)` predicts `x` from images `(batch, ...)` at log-SNR
`(batch,)`. `num_steps` may be a tensor: the loop is then compiled once for
every number of steps.
"""

from collections.abc import Callable
from typing import TypeAlias

from keras import ops

from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor
from keras_mscm.schedules import NoiseSchedule

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Step: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _march(
    denoise: Denoise,
    noise: Tensor,
    schedule: NoiseSchedule,
    num_steps: Tensor,
    step: Step,
) -> Tensor:
    """Takes `z_s = step(x, z_t, l_t, l_s)` for t = 1, ..., 1 / num_steps."""
    batch = ops.ones((ops.shape(noise)[0],), "float32")
    total = ops.cast(num_steps, "float32")

    def body(i, z):
        left = total - ops.cast(i, "float32")
        logsnr_t = batch * schedule(left / total)
        logsnr_s = batch * schedule((left - 1.0) / total)
        return step(denoise(z, logsnr_t), z, logsnr_t, logsnr_s)

    return ops.fori_loop(0, num_steps, body, noise)


def ddim(
    denoise: Denoise,
    noise: Tensor,
    schedule: NoiseSchedule,
    num_steps: Tensor,
) -> Tensor:
    """DDIM (eq. 4); with a multistep consistency model, algorithm 2.

    Args:
        denoise: Function of `(z, logsnr)` that predicts `x`.
        noise: Standard normal `z_1`, `(batch, ...)`.
        schedule: Time to log-SNR; steps are of equal length in its time.
        num_steps: Number of evaluations of `denoise`, at least 1.

    Returns:
        `z_0`, `(batch, ...)`.
    """
    return _march(denoise, noise, schedule, num_steps, F.ddim)


def addim(
    denoise: Denoise,
    noise: Tensor,
    schedule: NoiseSchedule,
    num_steps: Tensor,
) -> Tensor:
    """aDDIM (algorithm 3) with the analytic variance `0.1 / (2 + SNR)`.

    Arguments and result as in `ddim`.
    """

    def step(x, z_t, logsnr_t, logsnr_s):
        x_var = F.analytic_x_var(logsnr_t)
        return F.addim(x, z_t, logsnr_t, logsnr_s, x_var)

    return _march(denoise, noise, schedule, num_steps, step)
