"""What the algorithms in continuous time share: a derivative along a path.

Their targets are made of the rate at which a network's prediction changes while
its input moves to less or more noise. Such a path is an arc: with the angle
`theta` of TrigFlow (Lu & Song, 2024), `tan(theta) = sigma / alpha`, it is

    z = cos(theta) x + sin(theta) epsilon,
    dz / dtheta = cos(theta) epsilon - sin(theta) x,

which is our `v`, and bounded at both ends of time.

The rate is that of a network that must be smooth in time to have one. A UViT's
fastest waves (`time_rate`) are small in what it predicts, and large in the
derivative. Of `digits_teacher`, whose rate is 1000, the root mean square of
`dx / dtheta` at three fifths of time is 2.4 by forward mode, and 0.4 by a
difference over a 32nd of time, and the two hardly correlate. Of that network
trained on with a rate of 20 both are 0.32, and correlate by 0.999 and more.
"""

import math
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
DERIVATIVES = ("finite_difference", "forward_mode")
SHARED = (
    *("method", "noise_mean", "noise_std", "guidance_scale"),
    *("derivative", "difference_step"),
)
# As a consistency model's step of 32, which is long enough to smooth a UViT's
# fastest waves.
DIFFERENCE_STEP = 1 / 32


def check(
    method: Any,
    noise_mean: Any,
    noise_std: Any,
    guidance_scale: Any,
    derivative: Any,
    difference_step: Any,
    teacher: Any,
    network: Any,
) -> dict[str, Any]:
    """Raises unless the arguments that the algorithms share are right.

    Returns:
        The arguments, but for the teacher.
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
    step = checks.check_number(
        "difference_step", difference_step, 1e-3, "in [0.001, 0.25]", 0.25
    )
    if derivative == "forward_mode" and step != DIFFERENCE_STEP:
        raise ValueError(
            "`difference_step` must not be given with "
            "derivative='forward_mode', which takes no difference. Received: "
            f"{difference_step}"
        )
    policy = getattr(network, "dtype_policy", None)
    computes_in = str(getattr(policy, "compute_dtype", "float32"))
    if step < DIFFERENCE_STEP and "16" in computes_in:
        raise ValueError(
            "`difference_step` must be at least 1 / 32 for a network of half "
            "precision, whose rounding is a fifth of such a difference "
            f"already. Received: {step}, computing in {computes_in}"
        )
    if noise_mean is not None:
        noise_mean = checks.check_number(
            "noise_mean", noise_mean, -40, "a number in [-40, 40], or None", 40
        )
    if noise_std is not None:
        noise_std = checks.check_number(
            "noise_std", noise_std, 1e-3, "a number in [0.001, 40], or None", 40
        )
    if (noise_mean is None) != (noise_std is None):
        raise ValueError(
            "`noise_mean` must be given together with `noise_std`, or neither. "
            f"Received: noise_mean={noise_mean}, noise_std={noise_std}"
        )
    return {
        "method": method,
        "noise_mean": noise_mean,
        "noise_std": noise_std,
        "guidance_scale": scale,
        "derivative": derivative,
        "difference_step": step,
    }


def config_of(model: Any) -> dict[str, Any]:
    """The arguments that the algorithms share."""
    return {name: getattr(model, name) for name in SHARED}


def draw_logsnr(model: Any, batch: Sequence) -> Tensor:
    """Log-SNR of times drawn evenly, or of a log-normal noise-to-signal ratio.

    The latter is EDM's draw, of TrigFlow's angle by its tangent, and of
    rectified flow's time t by its logit, since `sigma / alpha = t / (1 - t)`.

    Args:
        model: Model with `noise_mean` and `noise_std`, of the log of the ratio,
            or None for times drawn evenly from its schedule.
        batch: The shape `(batch,)`.

    Returns:
        `(batch,)`.
    """
    if model.noise_std is None:
        return model.schedule(model.draw_uniform(batch))
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
        step = model.difference_step * math.pi / 2
        return _difference(predict, z, velocity, logsnr, step)
    # dl / dtheta of l = -2 log(tan(theta)).
    slope = -2 / (alpha * sigma)
    return backend.jvp(predict, (z, logsnr), (velocity, slope))


def _difference(
    predict: Callable, z: Tensor, velocity: Tensor, logsnr: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """The same by another evaluation, at less noise on the arc.

    It looks back alone, because what the network says at t is to become what it
    says at less noise. A difference to both sides is closer to the derivative,
    but students became worse with it in the middle of time (sCD of the digits,
    2 and 4 steps: 16 and 21 times the teacher's best distance, against 1.6 and
    1.7), as waves grow in a transport equation's central differences.

    Where little noise is left, the step is half of that.
    """
    theta = ops.arctan(ops.exp(-logsnr / 2))
    alpha, sigma = F.alpha(logsnr), F.sigma(logsnr)
    back = ops.minimum(step, theta / 2)
    cos, sin = ops.cos(back), ops.sin(back)
    z_back = F.expand(cos, z) * z - F.expand(sin, z) * velocity
    signal, noise = cos * alpha + sin * sigma, cos * sigma - sin * alpha
    x = predict(z, logsnr)
    x_back = predict(z_back, 2 * (ops.log(signal) - ops.log(noise)))
    return x, (x - x_back) / F.expand(back, z)
