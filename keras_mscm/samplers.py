"""Samplers: from noise to images in a number of equal steps of time.

Each is called as `sampler(denoise, noise, schedule, num_steps, seed)`.
`denoise(z, logsnr)` predicts `x` from images `(batch, ...)` at log-SNR
`(batch,)`. `num_steps` may be a tensor: the loop is then compiled once for
every number of steps.

A deterministic sampler is an integrator of the probability flow as well: its
`step_x` says with which `x` DDIM would take the same step. That is what a
student learns from in distillation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import keras
from keras import ops

from keras_mscm import backend, checks
from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor
from keras_mscm.schedules import NoiseSchedule

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Variance: TypeAlias = Callable[[Tensor], Tensor]
Integrator: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Denoise], Tensor
]


class StepSeed(keras.random.SeedGenerator):
    """The random state of one step: a tensor, where Keras has a variable.

    Within a compiled loop nothing can be assigned. As a seed of
    `keras.random`'s functions it is good for one draw, which depends on how
    images are batched; `normal` is not.

    Args:
        state: Seed, and number of the first image, `(2,)`.
        step: Number of the step, from 0.
    """

    def __init__(self, state: Tensor, step: Tensor):
        self.state, self.step = state, step

    def normal(self, images: Tensor) -> Tensor:
        """Standard normal noise, each image's its own.

        Args:
            images: What it is for, `(batch, ...)`.
        """
        seed, first = ops.unstack(ops.cast(self.state, "int32"))
        number = first + ops.arange(ops.shape(images)[0], dtype="int32")
        # Draw 0 is the noise that sampling begins with.
        draw = ops.cast(self.step, "int32") + 1
        return F.normal(seed, number, draw, tuple(images.shape[1:]))

    def next(self, ordered: bool = True) -> Tensor:
        """A state that no other step has, for one of `keras.random`."""
        seed, first = ops.unstack(self.state)
        word, _ = F.threefry_2x32((seed, first), (-1, self.step))
        word = ops.cast(ops.bitwise_and(word, 2**31 - 1), seed.dtype)
        return ops.stack([word, ops.zeros_like(word)])


class Sampler:
    """What every sampler shares: the loop over the steps.

    A subclass says what one `step` is. Samplers with equal arguments are
    equal, and share a compiled loop.

    Call arguments:
        denoise: Function of `(z, logsnr)` that predicts `x`.
        noise: Standard normal `z_1`, `(batch, ...)`.
        schedule: Time to log-SNR; steps are of equal length in its time.
        num_steps: Number of steps, at least 1.
        seed: Of a stochastic sampler's noise: an integer in 0..2**31 - 3, or
            a tensor of that and the number of the first image, `(2,)`. None
            draws one.

    Call returns:
        `z_0`, `(batch, ...)`.
    """

    stochastic: ClassVar[bool] = False

    def step(
        self,
        x: Tensor,
        z_t: Tensor,
        logsnr_t: Tensor,
        logsnr_s: Tensor,
        denoise: Denoise,
        seed: StepSeed,
    ) -> Tensor:
        """One step from t to s.

        Args:
            x: Prediction at t, `(batch, ...)`.
            z_t: Noisy images at t, of the same shape.
            logsnr_t: Log-SNR at t, `(batch,)`.
            logsnr_s: Log-SNR at s, `(batch,)`.
            denoise: Function of `(z, logsnr)`, for more predictions.
            seed: Random state of this step: `seed.normal(x)`, or one draw
                by a function of `keras.random`.

        Returns:
            `z_s`, `(batch, ...)`.
        """
        raise NotImplementedError

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        schedule: NoiseSchedule,
        num_steps: Tensor,
        seed: Any = None,
    ) -> Tensor:
        noise = ops.convert_to_tensor(noise, "float32")
        batch = ops.ones((ops.shape(noise)[0],), "float32")
        total = ops.cast(num_steps, "float32")
        if not getattr(seed, "shape", ()):  # a number, not a state
            seed = backend.random_state(checks.as_seed("seed", seed))
        seed = ops.convert_to_tensor(seed)
        ends = ops.convert_to_tensor([0.0, 1.0])  # of a step, t and s

        def body(i, z):
            left = total - ops.cast(i, "float32")
            logsnr_t, logsnr_s = (
                batch * logsnr
                for logsnr in ops.unstack(schedule((left - ends) / total))
            )
            x = denoise(z, logsnr_t)
            of_step = StepSeed(seed, i)
            return self.step(x, z, logsnr_t, logsnr_s, denoise, of_step)

        return ops.fori_loop(0, num_steps, body, noise)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        serialize = keras.saving.serialize_keras_object
        return {name: serialize(value) for name, value in vars(self).items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sampler":
        """The inverse of `get_config`."""
        deserialize = keras.saving.deserialize_keras_object
        return cls(**{k: deserialize(value) for k, value in config.items()})


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM (eq. 4); with a multistep consistency model, algorithm 2.

    Example:

    >>> from keras_mscm.schedules import CosineSchedule
    >>> white = lambda z, logsnr: ops.ones_like(z)
    >>> z = DDIM()(white, ops.zeros((1, 2)), CosineSchedule(), 4)
    >>> [round(float(value), 2) for value in z[0]]
    [1.0, 1.0]
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
        return x

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        x_var = self.x_variance(logsnr_t)
        x = self.step_x(x, z_t, logsnr_t, logsnr_s, x_var, denoise)
        return F.ddim(x, z_t, logsnr_t, logsnr_s)

    def x_variance(self, logsnr: Tensor) -> Tensor:
        """The posterior variance that sampling assumes, `(batch,)`."""
        return ops.zeros_like(logsnr)


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class ADDIM(DDIM):
    """Adjusted DDIM (eq. 14, algorithm 3).

    Args:
        x_var: The posterior variance of `x` per dimension, as a function of
            log-SNR: analytic, `0.1 / (2 + SNR)`, by default, or empirical, the
            `x_var` of a model that has measured it
            (`DiffusionModel.measure_x_var`). In distillation the student says
            what it is.
    """

    x_var: Variance = F.analytic_x_var

    def __post_init__(self):
        checks.check_function("x_var", self.x_var, "a function of log-SNR")

    def step_x(self, x, z_t, logsnr_t, logsnr_s, x_var, denoise):
        return F.addim_x(x, z_t, logsnr_t, logsnr_s, x_var)

    def x_variance(self, logsnr):
        return self.x_var(logsnr)


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class Heun(DDIM):
    """Heun's second-order steps; two evaluations in each.

    The trapezoidal rule on `d(z / alpha) = epsilon d(sigma / alpha)`, in which
    DDIM is Euler's (Karras et al., 2022, algorithm 1, in these coordinates).
    The last step is second-order too: time ends at a little noise, not at
    none.
    """

    def step_x(self, x, z_t, logsnr_t, logsnr_s, x_var, denoise):
        x_s = denoise(F.ddim(x, z_t, logsnr_t, logsnr_s), logsnr_s)
        return F.heun_x(x, x_s, logsnr_t, logsnr_s)


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class NoisyDDIM(Sampler):
    """DDIM with Gaussian noise added to each prediction (appendix A.4).

    The perfect sampler of eq. 10 with a normal distribution for `p(x | z_t)`:
    what aDDIM does to the norm alone, done by noise.

    Args:
        x_var: As in `ADDIM`.
    """

    stochastic = True
    x_var: Variance = F.analytic_x_var

    def __post_init__(self):
        checks.check_function("x_var", self.x_var, "a function of log-SNR")

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        deviation = F.expand(ops.sqrt(self.x_var(logsnr_t)), x)
        x = x + deviation * seed.normal(x)
        return F.ddim(x, z_t, logsnr_t, logsnr_s)


@keras.saving.register_keras_serializable(package="keras_mscm")
@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling: `z_s ~ q(z_s | z_t, x)` (eq. 1)."""

    stochastic = True

    def step(self, x, z_t, logsnr_t, logsnr_s, denoise, seed):
        mean, variance = F.posterior(x, z_t, logsnr_t, logsnr_s)
        return mean + ops.sqrt(variance) * seed.normal(x)
