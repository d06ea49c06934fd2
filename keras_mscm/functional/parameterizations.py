"""Other people's coordinates of the diffusion process, in terms of log-SNR.

Ours are `z = alpha x + sigma epsilon` with `alpha^2 + sigma^2 = 1`, and
`v = alpha epsilon - sigma x`. A network that was trained with other inputs or
outputs is the same denoiser in other coordinates. What comes back as `v` is
bounded at both ends of time, because `alpha + sigma` lies in [1, sqrt(2)].
"""

import math
from typing import Any

import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor, alpha, expand, sigma

# A table of noise levels may say 'no signal' or 'no noise' exactly, which is
# log-SNR minus or plus infinity; beyond here a float32 can't tell.
_TABLE_BOUND = 30.0


# Rectified flow: z_flow = (1 - t) x + t epsilon, and the velocity
# u = epsilon - x (Liu et al., 2022; Lipman et al., 2022).


def flow_time(logsnr: Tensor) -> Tensor:
    """Rectified flow's time, `t = sigma / (alpha + sigma)`, in (0, 1)."""
    return ops.sigmoid(-logsnr / 2)


def flow_input(z: Tensor, logsnr: Tensor) -> Tensor:
    """What rectified flow has for `z`: `(1 - t) x + t epsilon`.

    Args:
        z: Noisy images, `(batch, ...)`.
        logsnr: Their log-SNR, `(batch,)`.
    """
    logsnr = expand(logsnr, z)
    return z / (alpha(logsnr) + sigma(logsnr))


def v_from_flow(velocity: Tensor, z: Tensor, logsnr: Tensor) -> Tensor:
    """`v` from rectified flow's velocity, `u = epsilon - x`.

    Args:
        velocity: What a network says, `(batch, ...)`.
        z: Noisy images in our coordinates, of the same shape.
        logsnr: Their log-SNR, `(batch,)`.
    """
    logsnr = expand(logsnr, z)
    signal, noise = alpha(logsnr), sigma(logsnr)
    return (velocity + (signal - noise) * z) / (signal + noise)


def flow_from_v(v: Tensor, z: Tensor, logsnr: Tensor) -> Tensor:
    """Rectified flow's velocity from `v`: the inverse of `v_from_flow`."""
    logsnr = expand(logsnr, z)
    signal, noise = alpha(logsnr), sigma(logsnr)
    return (signal + noise) * v - (signal - noise) * z


# Variance exploding, z_edm = x + S epsilon, with the preconditioning of Karras
# et al. (2022, table 1): D = c_skip z_edm + c_out F(c_in z_edm, c_noise).


def noise_to_signal(logsnr: Tensor) -> Tensor:
    """The noise level of a variance exploding process: `sigma / alpha`."""
    return ops.exp(-logsnr / 2)


def exploding_input(z: Tensor, logsnr: Tensor) -> Tensor:
    """What a variance exploding process has for `z`: `x + S epsilon`.

    Args:
        z: Noisy images, `(batch, ...)`.
        logsnr: Their log-SNR, `(batch,)`.
    """
    return z / alpha(expand(logsnr, z))


def edm_time(logsnr: Tensor) -> Tensor:
    """`c_noise = log(S) / 4`."""
    return -logsnr / 8


def _edm_deviation(logsnr: Tensor, sigma_data: float) -> Tensor:
    """The deviation of `z` where data has the deviation `sigma_data`."""
    return ops.sqrt(ops.sigmoid(-logsnr) + sigma_data**2 * ops.sigmoid(logsnr))


def edm_input(z: Tensor, logsnr: Tensor, sigma_data: float) -> Tensor:
    """`c_in z_edm`: `z` divided by its deviation.

    Args:
        z: Noisy images, `(batch, ...)`.
        logsnr: Their log-SNR, `(batch,)`.
        sigma_data: The data's deviation.
    """
    return z / _edm_deviation(expand(logsnr, z), sigma_data)


def v_from_edm(
    output: Tensor, z: Tensor, logsnr: Tensor, sigma_data: float
) -> Tensor:
    """`v` from the output `F` of an EDM-preconditioned network.

    Args:
        output: `F`, `(batch, ...)`.
        z: Noisy images in our coordinates, of the same shape.
        logsnr: Their log-SNR, `(batch,)`.
        sigma_data: The data's deviation.
    """
    logsnr = expand(logsnr, z)
    deviation = _edm_deviation(logsnr, sigma_data)
    skip = alpha(logsnr) * sigma(logsnr) * (1 - sigma_data**2) / deviation**2
    return skip * z - sigma_data / deviation * output


# Discrete steps: DDPM and what came of it.


def check_alphas_cumprod(value: Any) -> tuple[float, ...]:
    """Raises unless `value` is a table of `alpha^2`; hands back its numbers.

    Args:
        value: What came: at least 2 numbers in [0, 1], strictly falling.
    """
    allowed = "2 or more numbers in [0, 1], each below the one before"
    try:
        table = np.asarray(ops.convert_to_numpy(value), "float64")
    except Exception as error:  # because it may be anybody's object
        raise checks.invalid("alphas_cumprod", allowed, value) from error
    if (
        table.ndim != 1
        or len(table) < 2
        or not np.all(np.diff(logsnr_table(table)) < 0)
        or not 0 <= table[-1] <= table[0] <= 1
    ):
        raise checks.invalid("alphas_cumprod", allowed, value)
    return tuple(table.tolist())


def logsnr_table(alphas_cumprod: Any) -> np.ndarray:
    """Log-SNR of each step of a table of `alpha^2` (Ho et al., 2020).

    Args:
        alphas_cumprod: `alpha^2` of each step, falling, in [0, 1]. A step of
            no signal (zero terminal SNR) or no noise is given a log-SNR of
            -30 or 30.

    Returns:
        Log-SNR, float64, strictly falling wherever `alpha^2` is.
    """
    table = np.asarray(alphas_cumprod, "float64")
    with np.errstate(divide="ignore", invalid="ignore"):
        logsnr = np.log(table) - np.log1p(-table)
    return np.clip(logsnr, -_TABLE_BOUND, _TABLE_BOUND)


def discrete_step(logsnr: Tensor, table: np.ndarray) -> Tensor:
    """The step of a table at which log-SNR is as given, with a fraction.

    Args:
        logsnr: Log-SNR, `(batch,)`. Beyond the table's ends it is the end.
        table: Log-SNR of each step, strictly falling; at least 2.

    Returns:
        Steps from 0, float32, `(batch,)`, linear in log-SNR between two.
    """
    levels = ops.convert_to_tensor(table, "float32")
    last = len(table) - 1
    below = ops.searchsorted(ops.flip(levels), logsnr, side="left")
    lower = ops.clip(last - ops.cast(below, "int32"), 0, last - 1)
    above, under = ops.take(levels, lower), ops.take(levels, lower + 1)
    share = (above - logsnr) / (above - under)
    return ops.cast(lower, "float32") + ops.clip(share, 0.0, 1.0)


def level_of_step(step: Tensor, table: np.ndarray) -> Tensor:
    """Log-SNR at a step with a fraction: the inverse of `discrete_step`.

    Args:
        step: Steps from 0, float32, of any shape.
        table: Log-SNR of each step, strictly falling; at least 2.
    """
    levels = ops.convert_to_tensor(table, "float32")
    step = ops.convert_to_tensor(step, "float32")
    lower = ops.clip(ops.floor(step), 0, len(table) - 2)
    share = step - lower
    lower = ops.cast(lower, "int32")
    above, under = ops.take(levels, lower), ops.take(levels, lower + 1)
    return above * (1 - share) + under * share


def sinusoids(values: Tensor, width: int, max_period: float = 1e4) -> Tensor:
    """Cosines, then sines of `values` times falling frequencies.

    The embedding of time as DDPM's descendants have it: frequencies from 1
    down to nearly `1 / max_period`.

    Args:
        values: Times, float32, `(batch,)`.
        width: Width of the embedding, even.
        max_period: The longest period, over 2 pi.

    Returns:
        The embedding, float32, `(batch, width)`.
    """
    half = width // 2
    exponents = np.arange(half, dtype="float32") / np.float32(half)
    frequencies = np.exp(np.float32(-math.log(max_period)) * exponents)
    angles = values[:, None] * ops.convert_to_tensor(frequencies, "float32")
    return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)
