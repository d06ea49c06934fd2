"""DDIM, its inverse, aDDIM and Heun (eq. 4, 5 and 14, algorithm 3).

All are one linear map, `z_s = r z_t + c x` with `r = sigma_s / sigma_t` and
`c = alpha_s - alpha_t r`. As `s -> t` the two terms of `c` cancel, and the
inverse divides by it; `c = -alpha_s expm1((l_t - l_s) / 2)` is the same number
with all its digits.
"""

import keras
from keras import ops

from keras_mscm.functional.process import (
    Tensor,
    alpha,
    expand,
    mean_per_example,
    predict_epsilon,
    sigma,
)


def _x_coefficient(logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    return -alpha(logsnr_s) * ops.expm1((logsnr_t - logsnr_s) / 2)


def ddim(x: Tensor, z_t: Tensor, logsnr_t: Tensor, logsnr_s: Tensor) -> Tensor:
    """`DDIM_{t -> s}(x, z_t)` (eq. 4).

    Args:
        x: Predicted images, `(batch, ...)`.
        z_t: Noisy images at t, of the same shape.
        logsnr_t: Log-SNR at t, `(batch,)`.
        logsnr_s: Log-SNR at s, `(batch,)`.

    Returns:
        `z_s`, `(batch, ...)`. Equal to `z_t` when `s == t`.

    Example:

    >>> x, z = ops.ones((2, 4)), ops.zeros((2, 4))
    >>> z_s = ddim(x, z, ops.full((2,), -15.0), ops.full((2,), 15.0))
    >>> round(float(z_s[0, 0]), 4)
    1.0
    """
    logsnr_t, logsnr_s = expand(logsnr_t, x), expand(logsnr_s, x)
    kept = sigma(logsnr_s) / sigma(logsnr_t)
    return kept * z_t + _x_coefficient(logsnr_t, logsnr_s) * x


def inverse_ddim(
    z_s: Tensor, z_t: Tensor, logsnr_t: Tensor, logsnr_s: Tensor
) -> Tensor:
    """`invDDIM_{t -> s}(z_s, z_t)` (eq. 5): the `x` that takes `z_t` to `z_s`.

    Args:
        z_s: Noisy images at s, `(batch, ...)`.
        z_t: Noisy images at t, of the same shape.
        logsnr_t: Log-SNR at t, `(batch,)`.
        logsnr_s: Log-SNR at s, `(batch,)`; must differ from `logsnr_t`.

    Returns:
        `x` such that `ddim(x, z_t, logsnr_t, logsnr_s) == z_s`.
    """
    logsnr_t, logsnr_s = expand(logsnr_t, z_t), expand(logsnr_s, z_t)
    kept = sigma(logsnr_s) / sigma(logsnr_t)
    return (z_s - kept * z_t) / _x_coefficient(logsnr_t, logsnr_s)


@keras.saving.register_keras_serializable(package="keras_mscm")
def analytic_x_var(logsnr: Tensor) -> Tensor:
    """`Var[x | z_t]` per dimension, `0.1 / (2 + SNR)` (section 3.2)."""
    return 0.1 / (2.0 + ops.exp(logsnr))


def addim_x(
    x: Tensor,
    z_t: Tensor,
    logsnr_t: Tensor,
    logsnr_s: Tensor,
    x_var: Tensor,
) -> Tensor:
    """The `x` for which DDIM takes the step that aDDIM takes with `x`.

    Eq. 14 inflates the noise from `sigma_s` to `sqrt(sigma_s^2 + c^2 k)`, with
    `k = x_var d / ||epsilon||^2`. Moved into `x`, that is

        x + c k / (sqrt(sigma_s^2 + c^2 k) + sigma_s) epsilon

    in which nothing cancels, however close `s` is to `t`. It is what a
    distillation target wants: eq. 5 applied to eq. 14, without the division.

    Args:
        x: Predicted images, `(batch, ...)`.
        z_t: Noisy images at t, of the same shape.
        logsnr_t: Log-SNR at t, `(batch,)`.
        logsnr_s: Log-SNR at s, `(batch,)`.
        x_var: Posterior variance of `x` given `z_t`, per dimension, at least
            0, `(batch,)`; 0 gives DDIM.

    Returns:
        Adjusted images, `(batch, ...)`.
    """
    epsilon = predict_epsilon(x, z_t, logsnr_t)
    power = mean_per_example(ops.square(epsilon))
    k = expand(x_var / ops.maximum(power, 1e-12), x)
    logsnr_t, logsnr_s = expand(logsnr_t, x), expand(logsnr_s, x)
    c, sigma_s = _x_coefficient(logsnr_t, logsnr_s), sigma(logsnr_s)
    return x + c * k / (ops.sqrt(sigma_s**2 + c**2 * k) + sigma_s) * epsilon


def addim(
    x: Tensor,
    z_t: Tensor,
    logsnr_t: Tensor,
    logsnr_s: Tensor,
    x_var: Tensor,
) -> Tensor:
    """`aDDIM_{t -> s}(x, z_t, x_var)` (eq. 14, algorithm 3).

    DDIM with the noise inflated so that `z_s` has the norm that a perfect
    sampler's would have. Arguments as in `addim_x`.

    Returns:
        `z_s`, `(batch, ...)`.
    """
    x = addim_x(x, z_t, logsnr_t, logsnr_s, x_var)
    return ddim(x, z_t, logsnr_t, logsnr_s)


def heun_x(
    x_t: Tensor, x_s: Tensor, logsnr_t: Tensor, logsnr_s: Tensor
) -> Tensor:
    """The `x` for which DDIM takes Heun's step.

    With `y = z / alpha` and `tau = sigma / alpha`, DDIM is Euler's method for
    `dy / dtau = epsilon`, and Heun's takes the mean of the slopes at t and at
    the s that DDIM reaches. Moved into `x` that is

        x_t + tau_t / (2 tau_s) (x_s - x_t)

    with `tau_t / tau_s = exp((l_s - l_t) / 2)` (Karras et al., 2022,
    algorithm 1).

    Args:
        x_t: Prediction at t, `(batch, ...)`.
        x_s: Prediction at s, from the `z_s` that DDIM reaches with `x_t`.
        logsnr_t: Log-SNR at t, `(batch,)`.
        logsnr_s: Log-SNR at s, `(batch,)`.

    Returns:
        Images, `(batch, ...)`.
    """
    ratio = expand(ops.exp((logsnr_s - logsnr_t) / 2), x_t)
    return x_t + ratio / 2 * (x_s - x_t)
