"""What the algorithms in continuous time share: a derivative along a path.

Their targets are made of the rate at which a network's prediction changes while
its input moves to less or more noise. Such a path is an arc: with the angle
`theta` of TrigFlow (Lu & Song, 2024), `tan(theta) = sigma / alpha`, it is

    z = cos(theta) x + sin(theta) epsilon,
    dz / dtheta = cos(theta) epsilon - sin(theta) x,

which is our `v`, and bounded at both ends of time.
"""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_mscm import backend, checks
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import distillation
from keras_mscm.models.saving import random_states

METHODS = ("distillation", "training")
DERIVATIVES = ("forward_mode", "finite_difference")
# Radians that a finite difference looks ahead and back. Float32 leaves an error
# of about its 1e-7 over this, and what varies faster is smoothed.
STEP = 0.003


def check(
    method: Any,
    noise_mean: Any,
    noise_std: Any,
    guidance_scale: Any,
    derivative: Any,
    teacher: Any,
    network: Any,
) -> tuple[float, float, float]:
    """Raises unless the arguments that the algorithms share are right.

    Returns:
        Mean and deviation of the noise, and the scale of the guidance.
    """
    checks.check_choice("method", method, METHODS)
    scale = distillation.check_guidance_scale(guidance_scale)
    for name, value, default in (
        ("guidance_scale", scale, 1),
        ("teacher", teacher, None),
    ):
        if method == "training" and value is not default and value != default:
            raise ValueError(
                f"`{name}` must not be given with method='training', which "
                "learns from the images themselves. Received: "
                f"{name}={checks.describe(value)}"
            )
    checks.check_choice("derivative", derivative, DERIVATIVES)
    policy = getattr(network, "dtype_policy", None)
    computes_in = getattr(policy, "compute_dtype", "float32")
    if derivative == "finite_difference" and "16" in str(computes_in):
        raise ValueError(
            "`derivative` must be 'forward_mode' for a network of half "
            "precision, whose rounding would be all of a finite difference. "
            f"Received: derivative={derivative!r}, computing in {computes_in}"
        )
    mean = checks.check_number(
        "noise_mean", noise_mean, -40, "a number in [-40, 40]", 40
    )
    std = checks.check_number(
        "noise_std", noise_std, 1e-3, "a number in [0.001, 40]", 40
    )
    return mean, std, scale


def config_of(model: Any) -> dict[str, Any]:
    """The arguments that the algorithms share."""
    return {
        "method": model.method,
        "noise_mean": model.noise_mean,
        "noise_std": model.noise_std,
        "guidance_scale": model.guidance_scale,
        "derivative": model.derivative,
    }


def draw_logsnr(model: Any, batch: Sequence) -> Tensor:
    """Log-SNR of a log-normal noise-to-signal ratio, `(batch,)`.

    That is EDM's draw of times, of TrigFlow's angle by its tangent, and of
    rectified flow's time t by its logit, since `sigma / alpha = t / (1 - t)`.

    Args:
        model: Model with `noise_mean` and `noise_std`, of the log of the ratio.
        batch: The shape `(batch,)`.
    """
    most, least = ops.unstack(model.schedule(ops.convert_to_tensor([0.0, 1.0])))
    log_ratio = model.noise_mean + model.noise_std * model.draw_normal(batch)
    return ops.clip(-2 * log_ratio, least, most)


def path_end(
    model: Any, x: Tensor, z: Tensor, logsnr: Tensor, conditioning: Conditioning
) -> Tensor:
    """The `x` towards which the path through z leads at this moment.

    Args:
        x: The images that `z` was made of, `(batch, ...)`.
        z: Noisy images, of the same shape.
        logsnr: Their log-SNR, `(batch,)`.
        conditioning: What the network takes besides.

    Returns:
        What the teacher says, or with "training" `x`, `(batch, ...)`.
    """
    if model.method == "training":
        return x
    scale = model.guidance_scale
    return model.teacher.teach(z, logsnr, conditioning, scale)[0]


def prediction_and_rate(
    model: Any,
    x: Tensor,
    z: Tensor,
    logsnr: Tensor,
    conditioning: Conditioning,
    training: bool,
    **end: Tensor,
) -> tuple[Tensor, Tensor]:
    """A network's prediction at z, and its rate `dx / dtheta` along the path.

    Dropout is that of the network's next pass, and in evaluation the network is
    the moving average, as in `call`.

    Args:
        x: Where the path leads: with z, it says its direction, `(batch, ...)`.
        z: Noisy images, of the same shape.
        logsnr: Their log-SNR, `(batch,)`.
        conditioning: What the network takes besides.
        training: Whether dropout is on.
        **end: `logsnr_end`, which stays as it is, where the network takes it.

    Returns:
        Both of the shape of `x`.
    """
    network = model.network if training else model.ema_network

    def predict(z, logsnr):
        with backend.rewound(random_states(network)):
            return model.denoise(
                network, z, logsnr, conditioning, training, **end
            )

    alpha, sigma = F.alpha(logsnr), F.sigma(logsnr)
    velocity = (F.expand(alpha, z) * z - x) / F.expand(sigma, z)
    if model.derivative == "finite_difference":
        return _difference(predict, z, velocity, logsnr)
    # dl / dtheta of l = -2 log(tan(theta)).
    slope = -2 / (alpha * sigma)
    return backend.jvp(predict, (z, logsnr), (velocity, slope))


def _difference(
    predict: Callable, z: Tensor, velocity: Tensor, logsnr: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by two more evaluations, a little before and after on the arc.

    Near the ends of time the steps are shorter, half of what is left.
    """
    theta = ops.arctan(ops.exp(-logsnr / 2))
    from_end = ops.arctan(ops.exp(logsnr / 2))
    alpha, sigma = F.alpha(logsnr), F.sigma(logsnr)

    def at(angle):
        cos, sin = ops.cos(angle), ops.sin(angle)
        z_moved = F.expand(cos, z) * z + F.expand(sin, z) * velocity
        signal, noise = cos * alpha - sin * sigma, cos * sigma + sin * alpha
        return predict(z_moved, 2 * (ops.log(signal) - ops.log(noise)))

    ahead, back = ops.minimum(STEP, from_end / 2), ops.minimum(STEP, theta / 2)
    difference = at(ahead) - at(-back)
    return predict(z, logsnr), difference / F.expand(ahead + back, z)
