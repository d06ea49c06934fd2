"""What a denoising model does without training: it predicts, and it draws."""

import inspect
import os
from collections.abc import Callable
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, preset_files
from keras_mscm import functional as F
from keras_mscm.functional import process
from keras_mscm.functional.process import Tensor
from keras_mscm.models import sampling
from keras_mscm.samplers import Denoise
from keras_mscm.schedules import NoiseSchedule

Conditioning = dict[str, Tensor]
Sampler = Callable[[Denoise, Tensor, NoiseSchedule, Tensor, Tensor], Tensor]


class Denoiser(keras.Model):
    """Prediction, sampling and presets of a `DenoisingModel`, which trains it.

    Its attributes are the arguments of `DenoisingModel`.
    """

    network: keras.Layer
    ema_network: keras.Layer
    schedule: NoiseSchedule
    prediction_type: str
    image_shape: tuple[int, ...]
    num_classes: int | None
    context_width: int | None
    label_dropout: float
    generate: Callable[..., np.ndarray]
    _compiled_samplers: dict[tuple, Callable]

    @property
    def conditioning_names(self) -> list[str]:
        """What the network takes besides noisy images and their log-SNR."""
        context = ["context", "context_mask"] if self.context_width else []
        return (["labels"] if self.num_classes else []) + context

    def denoise(
        self,
        network: keras.Layer,
        z: Tensor,
        logsnr: Tensor,
        conditioning: Conditioning | None = None,
        training: bool = False,
    ) -> Tensor:
        """Predicts `x` from noisy images, in float32.

        Args:
            network: `self.network` or `self.ema_network`.
            z: Noisy images, `(batch, height, width, channels)`.
            logsnr: Their log-SNR, `(batch,)`.
            conditioning: What the network takes besides, each of the length
                of the batch.
            training: Whether dropout is on.

        Returns:
            Predicted images, of the shape of `z`.
        """
        inputs = {"z": z, "logsnr": logsnr, **(conditioning or {})}
        output = ops.cast(network(inputs, training=training), "float32")
        return process.predict_x(output, z, logsnr, self.prediction_type)

    def absent(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning of the same shape that says nothing."""
        nothing = {"labels": self.num_classes, "context_mask": False}
        return {
            name: ops.full_like(value, nothing[name])
            if name in nothing
            else value
            for name, value in conditioning.items()
        }

    def denoise_guided(
        self,
        network: keras.Layer,
        z: Tensor,
        logsnr: Tensor,
        conditioning: Conditioning,
        guidance_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Predicts `x` with classifier-free guidance, in one batched call.

        `x = x_unconditional + guidance_scale (x_conditional -
        x_unconditional)`, which for `x` and for epsilon is the same (Ho &
        Salimans, 2022).

        Args:
            network: `self.network` or `self.ema_network`.
            z: Noisy images, `(batch, height, width, channels)`.
            logsnr: Their log-SNR, `(batch,)`.
            conditioning: What the network takes besides.
            guidance_scale: 1 for the conditional prediction, 0 for the
                unconditional, more for guidance. The paper's is less by 1.

        Returns:
            The guided prediction and the conditional one, of the shape of `z`.
        """
        without = self.absent(conditioning)
        both = {
            name: ops.concatenate([conditioning[name], without[name]])
            for name in conditioning
        }
        twice = ops.concatenate([z, z]), ops.concatenate([logsnr, logsnr])
        x = self.denoise(network, *twice, both)
        conditional, unconditional = ops.split(x, 2)
        step = guidance_scale * (conditional - unconditional)
        return unconditional + step, conditional

    def call(
        self, inputs: dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        names = sorted(["logsnr", "z", *self.conditioning_names])
        if not isinstance(inputs, dict) or sorted(inputs) != names:
            came = sorted(inputs) if isinstance(inputs, dict) else type(inputs)
            raise ValueError(
                f"`inputs` must be a dictionary of {names}. Received: {came}"
            )
        conditioning = {name: inputs[name] for name in self.conditioning_names}
        network = self.network if training else self.ema_network
        return self.denoise(
            network,
            inputs["z"],
            inputs["logsnr"],
            conditioning,
            training=bool(training),
        )

    def check_generate(self, *args: Any, **kwargs: Any) -> None:
        """Raises what `generate` would of its arguments; draws nothing.

        Args:
            *args: As for `generate`.
            **kwargs: As for `generate`.

        Raises:
            ValueError: If an argument is out of its range, or they disagree.
            TypeError: If there is no such argument.
        """
        bound = inspect.signature(self.generate).bind(*args, **kwargs)
        bound.apply_defaults()
        self._request(**bound.arguments)

    def _request(self, **arguments: Any) -> sampling.Request:
        """What `generate` is asked for by its arguments, checked."""
        conditioning = {
            name: arguments.pop(name) for name in sampling.CONDITIONING_DTYPES
        }
        return sampling.request(self, conditioning=conditioning, **arguments)

    def _draw(self, request: sampling.Request) -> np.ndarray:
        """Draws what is asked for, in batches of one compiled shape."""
        num, batch_size = request.num_images, request.batch_size
        scale = request.guidance_scale
        key = (request.sampler, request.schedule, scale is not None)
        run = self._compiled_samplers.get(key)
        if run is None:
            run = self._compile_sampler(*key)
            self._compiled_samplers[key] = run

        steps = np.int32(request.num_steps)
        scales = [] if scale is None else [np.float32(scale)]
        images = np.empty((num, *self.image_shape), "float32")
        for begin in range(0, num, batch_size):
            numbers = np.arange(begin, begin + batch_size, dtype="int32")
            noise, conditioning = request.noise, request.conditioning
            if batch_size != num:
                # Wrap around, so that the last batch has the compiled shape.
                places = numbers % num
                if noise is not None:
                    noise = ops.take(noise, places, axis=0)
                conditioning = {k: v[places] for k, v in conditioning.items()}
            state = backend.random_state(request.seed, begin)
            start = numbers if noise is None else noise
            drawn = run(start, conditioning, steps, state, *scales)
            end = min(begin + batch_size, num)
            images[begin:end] = ops.convert_to_numpy(drawn)[: end - begin]
        return images

    def _compile_sampler(
        self, sampler: Sampler, schedule: NoiseSchedule, guided: bool
    ) -> Callable:
        run = self._sampling_function(sampler, schedule, guided)
        return backend.compile_inference(run, self._sampling_variables())

    def _sampling_function(
        self, sampler: Sampler, schedule: NoiseSchedule, guided: bool
    ) -> Callable:
        network = self.ema_network

        def run(noise, conditioning, num_steps, seed, *scale):
            if len(noise.shape) == 1:  # the numbers of images without any
                noise = F.normal(seed[0], noise, 0, self.image_shape)
            noise, conditioning = backend.divided((noise, conditioning))

            def denoise(z, logsnr):
                if not guided:
                    return self.denoise(network, z, logsnr, conditioning)
                inputs = network, z, logsnr, conditioning, *scale
                return self.denoise_guided(*inputs)[0]

            images = sampler(denoise, noise, schedule, num_steps, seed)
            return ops.clip(images, -1.0, 1.0)

        return run

    def _sampling_variables(self) -> list[keras.Variable]:
        """What a sampler may read."""
        return self.ema_network.variables

    def check_guidable(self, name: str, value: Any) -> None:
        """Raises unless the model can do without its conditioning.

        Args:
            name: What asks for guidance, as a message is to call it.
            value: What came.
        """
        if not self.label_dropout:
            raise ValueError(
                f"`{name}` must not be given: guidance needs a model that was "
                "trained with label_dropout > 0 to do without its "
                f"conditioning. Received: {name}={value}"
            )

    # Presets: what it takes to use a model, or to begin with it.

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike,
        load_weights: bool = True,
        **kwargs: Any,
    ) -> Self:
        """A model from a preset, as with KerasHub.

        Args:
            preset: Name, one of `keras_mscm.presets.PRESETS`, or a directory
                that `save_to_preset` made. A preset of a network alone gives a
                new model of this class, with the preset's schedule.
            load_weights: Whether to load its weights; else they are random.
            **kwargs: Arguments of the model that are to differ, or that the
                preset leaves open.

        Returns:
            The model, with the preset's weights in both its networks.

        Raises:
            ValueError: If there is no such preset, it is of another class, or
                holds no weights.

        Example:

        >>> from keras_mscm import DiffusionModel
        >>> model = DiffusionModel.from_preset("digits", load_weights=False)
        >>> model.image_shape
        (8, 8, 1)
        """
        return preset_files.load_model(cls, preset, load_weights, **kwargs)

    save_to_preset = preset_files.save_to_preset
