"""The loop over the steps, which all samplers share."""

import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.functional.process import Tensor
from keras_mscm.samplers.step_seed import StepSeed
from keras_mscm.schedules import NoiseSchedule

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Variance: TypeAlias = Callable[[Tensor], Tensor]
Integrator: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Denoise], Tensor
]

# The least time that a float32 holds with all its digits.
LEAST_START = 2.0**-126


class Sampler:
    """What every sampler shares: the loop over the steps.

    Derive from it for a sampler of your own, and say what one `step` does with
    the prediction at t. A sampler that evaluates the network elsewhere, or
    remembers something from step to step, says `init` and `advance` instead.
    Samplers with equal arguments are equal, and share a compiled loop.

    Call arguments:
        denoise: Function of `(z, logsnr)` that predicts `x`.
        noise: Standard normal `z_1`, or noisy images at `start`, `(batch,
            ...)`.
        schedule: Time to log-SNR; a number of steps are of equal length in its
            time.
        num_steps: Number of steps, at least 1. Or an array of the times between
            which the steps lead, `(number + 1,)`, falling from 1.
        seed: Of a stochastic sampler's noise: an integer in 0..2**31 - 3, or
            a tensor of that and the number of the first image, `(2,)`. None
            draws one.
        start: Time at which sampling begins, a number in (0, 1] or a scalar
            tensor. The steps divide what is left of time.

    Call returns:
        `z_0`, `(batch, ...)`.

    Raises:
        ValueError: If an argument isn't as above, or a number out of its
            range.

    Example:

    >>> from keras_mscm.samplers import DDIM
    >>> from keras_mscm.schedules import CosineSchedule
    >>> white = lambda z, logsnr: ops.ones_like(z)
    >>> grey = 0.5 * ops.ones((1, 2))  # at t = 0.5, a noisy image
    >>> z = DDIM()(white, grey, CosineSchedule(), 4, start=0.5)
    >>> [round(float(value), 2) for value in z[0]]
    [1.0, 1.0]
    """

    stochastic: ClassVar[bool] = False

    def init(self, z: Tensor, num_steps: Tensor) -> Any:
        """What the first step is told by the steps before: nothing.

        Args:
            z: What sampling begins with, `(batch, ...)`.
            num_steps: Number of steps.

        Returns:
            Tensors in any structure. `advance` returns the same structure, of
            the same shapes and dtypes, because one compiled loop carries it.
        """
        return ()

    def advance(
        self,
        z_t: Tensor,
        state: Any,
        logsnr_t: Tensor,
        logsnr_s: Tensor,
        denoise: Denoise,
        seed: StepSeed,
    ) -> tuple[Tensor, Any]:
        """One step from t to s, with all evaluations that it takes.

        Args:
            z_t: Noisy images at t, `(batch, ...)`.
            state: What `init` or the step before has returned.
            logsnr_t: Log-SNR at t, `(batch,)`.
            logsnr_s: Log-SNR at s, `(batch,)`.
            denoise: Function of `(z, logsnr)` that predicts `x`.
            seed: Random state of this step.

        Returns:
            `z_s`, `(batch, ...)`, and the state for the next step.
        """
        x = denoise(z_t, logsnr_t)
        return self.step(x, z_t, logsnr_t, logsnr_s, denoise, seed), state

    def step(
        self,
        x: Tensor,
        z_t: Tensor,
        logsnr_t: Tensor,
        logsnr_s: Tensor,
        denoise: Denoise,
        seed: StepSeed,
    ) -> Tensor:
        """One step from t to s, given the prediction at t.

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
        start: Tensor = 1.0,
    ) -> Tensor:
        checks.check_function("denoise", denoise, "a function of (z, logsnr)")
        checks.check_function("schedule", schedule, "a function of time")
        numbers = re.search("float|int", str(getattr(noise, "dtype", "")))
        if not checks.is_array(noise) or not numbers or 0 in noise.shape:
            raise checks.invalid("noise", "an array of numbers", noise)
        times = None
        if checks.is_array(num_steps) and len(num_steps.shape) == 1:
            times, num_steps = _times(num_steps, start)
        num_steps = _scalar("num_steps", num_steps)
        if not hasattr(num_steps, "shape"):  # a number, not a tensor
            num_steps = checks.check_positive_integer(
                "num_steps", num_steps, 2**24
            )
        start = _scalar("start", start)
        if not hasattr(start, "shape"):
            start = checks.check_number(
                "start", start, LEAST_START, "a number in (0, 1]", high=1
            )
        if not getattr(seed, "shape", ()):  # a number, not a state
            seed = backend.random_state(checks.as_seed("seed", seed))
        elif tuple(seed.shape) != (2,) or "int" not in str(seed.dtype):
            allowed = "an integer, or two: a seed, and an image's number"
            raise checks.invalid("seed", allowed, seed)
        noise = ops.convert_to_tensor(noise, "float32")
        batch = ops.ones((ops.shape(noise)[0],), "float32")
        total = ops.cast(num_steps, "float32")
        seed = ops.convert_to_tensor(seed)
        start = ops.cast(start, "float32")
        ends = ops.convert_to_tensor([0.0, 1.0])  # of a step, t and s

        def body(i, carried):
            z, state = carried
            if times is None:
                left = total - ops.cast(i, "float32")
                both = start * ((left - ends) / total)
            else:
                both = ops.take(times, ops.stack([i, i + 1]))
            logsnr_t, logsnr_s = (
                batch * logsnr for logsnr in ops.unstack(schedule(both))
            )
            of_step = StepSeed(seed, i)
            return self.advance(z, state, logsnr_t, logsnr_s, denoise, of_step)

        carried = noise, self.init(noise, num_steps)
        return ops.fori_loop(0, num_steps, body, carried)[0]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        serialize = keras.saving.serialize_keras_object
        return {name: serialize(value) for name, value in vars(self).items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sampler":
        """The inverse of `get_config`."""
        deserialize = keras.saving.deserialize_keras_object
        return cls(**{k: deserialize(value) for k, value in config.items()})


def _times(times: Any, start: Any) -> tuple[Tensor, int]:
    """The times of steps, and their number."""
    if not isinstance(start, (int, float)) or start != 1:
        raise ValueError(
            "`start` must be 1 where `num_steps` are times, which say it. "
            f"Received: start={checks.describe(start)}"
        )
    if isinstance(times, np.ndarray):  # and not a tensor, which may be traced
        times = checks.check_times("num_steps", times)
    if times.shape[0] < 2:
        raise checks.invalid("num_steps", "two times or more", times)
    return ops.convert_to_tensor(times, "float32"), times.shape[0] - 1


def _scalar(name: str, value: Any) -> Any:
    """A number if it has a value on the host, or a scalar tensor."""
    if isinstance(value, (np.ndarray, np.generic)) and not value.shape:
        return value.item()
    if getattr(value, "shape", ()) != ():
        raise checks.invalid(name, "a number, or a scalar tensor", value)
    return value
