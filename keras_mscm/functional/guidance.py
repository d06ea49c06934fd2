"""Classifier-free guidance (Ho & Salimans, 2022)."""

from collections.abc import Callable

from keras import ops

from keras_mscm.functional.process import Tensor


def guided(
    denoise: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    z: Tensor,
    logsnr: Tensor,
    conditioning: dict[str, Tensor],
    without: dict[str, Tensor],
    guidance_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Predicts `x` with classifier-free guidance, in one batched call.

    `x = x_unconditional + guidance_scale (x_conditional - x_unconditional)`,
    which for `x`, epsilon and velocities is the same, because at one `z` they
    are affine in one another.

    Args:
        denoise: Function of `(z, logsnr, conditioning)` that predicts `x`.
        z: Noisy examples, `(batch, ...)`.
        logsnr: Their log-SNR, `(batch,)`.
        conditioning: Arrays by name, each of the length of the batch.
        without: Of the same shapes, what says nothing.
        guidance_scale: 1 for the conditional prediction, 0 for the
            unconditional, more for guidance. The paper's is less by 1.

    Returns:
        The guided prediction and the conditional one, of the shape of `z`.
    """
    both = {
        name: ops.concatenate([value, without[name]])
        for name, value in conditioning.items()
    }
    twice = ops.concatenate([z, z]), ops.concatenate([logsnr, logsnr])
    conditional, unconditional = ops.split(denoise(*twice, both), 2)
    step = guidance_scale * (conditional - unconditional)
    return unconditional + step, conditional
