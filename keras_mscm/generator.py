"""From noise to samples: the function that `generate` compiles."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mscm import backend, checks, samplers
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.schedules import NoiseSchedule
from keras_mscm.spaces import Pixels
from keras_mscm.variance import AnalyticVariance


class Generator:
    """A model's sampling as one function of tensors, for every backend.

    You want it to compile, export or plan what `generate` does; `generate`
    itself, the plans and the callbacks call it.

    Args:
        model: Model that predicts: a `DenoisingModel`.
        sampler: Function of `(denoise, noise, schedule, num_steps, seed)`.
            `ADDIM()` takes the analytic variance of the model's space.
        schedule: Time to log-SNR; the model's by default.
        guided: Whether there is classifier-free guidance, whose scale is then
            one more argument of a call.
        decode: Whether samples come out as the model's space says (clipped,
            decoded), or as the sampler leaves them.

    Call arguments:
        noise: Standard normal noise, `(batch, *shape)`; or the numbers of the
            samples, `(batch,)` integers, each of which has its own noise by
            the seed.
        conditioning: Dictionary of arrays, each of the length of the batch.
        num_steps: Steps of the sampler, a scalar; or the times between which
            they lead, `(number + 1,)`.
        seed: Seed and number of the first sample, `(2,)`.
        guidance_scale: Scalar, where it is guided.

    Call returns:
        Samples, `(batch, ...)`.

    Raises:
        ValueError: If an argument of the constructor isn't as above.
    """

    def __init__(
        self,
        model: Any,
        sampler: Callable,
        schedule: NoiseSchedule | None = None,
        *,
        guided: bool = False,
        decode: bool = True,
    ):
        if not isinstance(model, keras.Model) or not hasattr(model, "denoise"):
            raise checks.invalid("model", "a `DenoisingModel`", model)
        self.model = model
        allowed = "one of `keras_mscm.samplers`, or a function like them"
        sampler = checks.check_function("sampler", sampler, allowed)
        variance = model.space.variance
        if sampler == samplers.ADDIM() and variance != Pixels.variance:
            # Its analytic variance is that of pixels.
            sampler = samplers.ADDIM(x_var=AnalyticVariance(variance))
        self.sampler = sampler
        self.schedule = model.schedule
        if schedule is not None:
            if not isinstance(schedule, NoiseSchedule):
                allowed = "one of `keras_mscm.schedules`, or None"
                raise checks.invalid("schedule", allowed, schedule)
            self.schedule = schedule
        self.guided = checks.check_boolean("guided", guided)
        if self.guided:
            model.check_guidable("guided", guided)
        if isinstance(sampler, samplers.FlowMap) and (
            guided or not model.takes_logsnr_end
        ):
            allowed = "another for a network that isn't told where steps end"
            raise checks.invalid("sampler", allowed, sampler)
        self.decode = checks.check_boolean("decode", decode)

    def __call__(
        self,
        noise: Tensor,
        conditioning: Conditioning,
        num_steps: Tensor,
        seed: Tensor,
        *guidance_scale: Tensor,
    ) -> Tensor:
        model, space = self.model, self.model.space
        if len(noise.shape) == 1:  # the numbers of samples without any
            noise = F.normal(seed[0], noise, 0, space.shape)
        noise, conditioning = backend.divided((noise, conditioning))

        def denoise(z, logsnr, *logsnr_end):
            inputs = model.ema_network, z, logsnr, conditioning
            if logsnr_end:
                return model.denoise(*inputs, False, *logsnr_end)
            if not self.guided:
                return model.denoise(*inputs)
            return model.denoise_guided(*inputs, *guidance_scale)[0]

        x = self.sampler(denoise, noise, self.schedule, num_steps, seed)
        shape = tuple(getattr(x, "shape", ()))[1:]
        if len(shape) != len(space.shape) or any(
            got not in (size, None) for got, size in zip(shape, space.shape)
        ):
            allowed = f"a function that returns (batch, *{space.shape})"
            raise checks.invalid("sampler", allowed, self.sampler)
        return space.decode(x) if self.decode else ops.convert_to_tensor(x)

    @property
    def variables(self) -> list[keras.Variable]:
        """What a call reads."""
        model = self.model
        found = [*model.ema_network.variables]
        if self.decode and model.space.decoder is not None:
            found += model.space.decoder.variables
        for condition in model.conditioning.values():
            if isinstance(condition.null, keras.Variable):
                found.append(condition.null)
        return list({id(v): v for v in found}.values())

    def compiled(self) -> Callable[..., Tensor]:
        """The same function, compiled; `num_steps` is free in it."""
        return backend.compile_inference(self, self.variables)
