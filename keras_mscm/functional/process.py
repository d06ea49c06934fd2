"""The diffusion process (section 2): noising, conversions, posterior.

The process is variance preserving, so a log-SNR value `l = log(alpha^2 /
sigma^2)` says everything about a time: `alpha^2 = sigmoid(l)`, `sigma^2 =
sigmoid(-l)`. Both stay accurate at either end of time, where one of them is
nearly 0.
"""

from typing import Any, TypeAlias

from keras import ops

from keras_mscm import checks

Tensor: TypeAlias = Any
"""A tensor of the running backend; a number too, where a scalar is asked."""

PREDICTION_TYPES = ("v", "x", "epsilon")


def expand(values: Tensor, images: Tensor) -> Tensor:
    """Reshapes `(batch,)` to `(batch, 1, ..., 1)`, of the rank of `images`."""
    # `ops.reshape` would take PyTorch twenty times as long.
    return values[(..., *[None] * (len(images.shape) - 1))]


def mean_per_example(values: Tensor) -> Tensor:
    """The mean over all axes but the first, `(batch,)`."""
    return ops.mean(values, axis=tuple(range(1, len(values.shape))))


def alpha(logsnr: Tensor) -> Tensor:
    """Signal rate: `sqrt(sigmoid(logsnr))`, in (0, 1)."""
    return ops.sqrt(ops.sigmoid(logsnr))


def sigma(logsnr: Tensor) -> Tensor:
    """Noise rate: `sqrt(sigmoid(-logsnr))`, in (0, 1)."""
    return ops.sqrt(ops.sigmoid(-logsnr))


def add_noise(x: Tensor, epsilon: Tensor, logsnr: Tensor) -> Tensor:
    """Noises images: `z_t = alpha_t x + sigma_t epsilon` (section 2).

    Args:
        x: Images, `(batch, ...)`.
        epsilon: Standard normal noise of the same shape.
        logsnr: Log-SNR at t, `(batch,)`.

    Returns:
        `z_t`, of the shape of `x`.

    Example:

    >>> z = add_noise(ops.ones((2, 4)), ops.zeros((2, 4)), ops.zeros(2))
    >>> round(float(z[0, 0]), 4)
    0.7071
    """
    logsnr = expand(logsnr, x)
    return alpha(logsnr) * x + sigma(logsnr) * epsilon


def predict_x(
    output: Tensor, z: Tensor, logsnr: Tensor, prediction_type: str
) -> Tensor:
    """Turns a network's output into its prediction of `x`.

    Args:
        output: What the network says, `(batch, ...)`.
        z: Noisy images that it saw, of the same shape.
        logsnr: Their log-SNR, `(batch,)`.
        prediction_type: `"v"` (`v = alpha epsilon - sigma x`, Salimans & Ho,
            2022), `"x"` or `"epsilon"`.

    Returns:
        The predicted `x`, `(batch, ...)`.

    Raises:
        ValueError: If `prediction_type` is none of these.
    """
    checks.check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    logsnr = expand(logsnr, z)
    if prediction_type == "v":
        return alpha(logsnr) * z - sigma(logsnr) * output
    if prediction_type == "epsilon":
        return (z - sigma(logsnr) * output) / alpha(logsnr)
    return output


def predict_epsilon(x: Tensor, z: Tensor, logsnr: Tensor) -> Tensor:
    """The noise that `x` leaves in `z_t`: `(z_t - alpha_t x) / sigma_t`."""
    logsnr = expand(logsnr, z)
    return (z - alpha(logsnr) * x) / sigma(logsnr)


def posterior(
    x: Tensor, z_t: Tensor, logsnr_t: Tensor, logsnr_s: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of `q(z_s | z_t, x)` (eq. 1).

    Written with `-expm1(l_t - l_s) = sigma_{t|s}^2 / sigma_t^2`, which keeps
    its digits as `s -> t` (Kingma et al., 2021).

    Args:
        x: Images, `(batch, ...)`.
        z_t: Noisy images at t, of the same shape.
        logsnr_t: Log-SNR at t, `(batch,)`.
        logsnr_s: Log-SNR at s < t, so a larger one, `(batch,)`.

    Returns:
        The mean, `(batch, ...)`, and the variance, `(batch, 1, ...)`.
    """
    logsnr_t, logsnr_s = expand(logsnr_t, x), expand(logsnr_s, x)
    fresh = -ops.expm1(logsnr_t - logsnr_s)
    kept = ops.exp(logsnr_t - logsnr_s) * alpha(logsnr_s) / alpha(logsnr_t)
    mean = kept * z_t + alpha(logsnr_s) * fresh * x
    return mean, sigma(logsnr_s) ** 2 * fresh
