"""Deterministic samplers whose step depends on `z_t` alone."""

from keras import ops

from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor
from keras_mscm.samplers.base import Denoise, Sampler


class SinglestepSampler(Sampler):
    """A sampler that a student can learn from: an integrator of the flow.

    Derive from it for a teacher's step of your own, and say its `step_x`. The
    step leads each `z_t` to one `z_s`, whatever came before, so distillation
    can take it anywhere in time. A stochastic step leads to many; a multistep
    one needs the steps before.
    """

    def step_x(
        self,
        x: Tensor,
        z_t: Tensor,
        logsnr_t: Tensor,
        logsnr_s: Tensor,
        x_var: Tensor,
        denoise: Denoise,
    ) -> Tensor:
        """The `x` for which DDIM takes this integrator's step.

        Args:
            x: Prediction at t, `(batch, ...)`.
            z_t: Noisy images at t, of the same shape.
            logsnr_t: Log-SNR at t, `(batch,)`.
            logsnr_s: Log-SNR at s, `(batch,)`.
            x_var: Posterior variance of `x` per dimension, `(batch,)`.
            denoise: Function of `(z, logsnr)`, for more predictions.

        Returns:
            Images, `(batch, ...)`.
        """
        raise NotImplementedError

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        x_var = self.x_variance(logsnr_t)
        x = self.step_x(x, z_t, logsnr_t, logsnr_s, x_var, denoise)
        return F.ddim(x, z_t, logsnr_t, logsnr_s)

    def x_variance(self, logsnr: Tensor) -> Tensor:
        """The posterior variance that sampling assumes, `(batch,)`."""
        return ops.zeros_like(logsnr)
