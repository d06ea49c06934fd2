"""What a denoising model does without training: it predicts, and it draws."""

import os
import random
from collections.abc import Callable
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks, preset_files
from keras_mscm.functional import process
from keras_mscm.functional.process import Tensor
from keras_mscm.models import data_checks
from keras_mscm.samplers import Denoise
from keras_mscm.schedules import NoiseSchedule

Conditioning = dict[str, Tensor]
Sampler = Callable[[Denoise, Tensor, NoiseSchedule, Tensor, Tensor], Tensor]

CONDITIONING_DTYPES = {
    "labels": "int32",
    "context": "float32",
    "context_mask": "bool",
}


class Denoiser(keras.Model):
    """Prediction, sampling and presets of a `DenoisingModel`, which trains it.

    Its attributes are the arguments of `DenoisingModel`.
    """

    network: keras.Layer
    ema_network: keras.Layer
    schedule: NoiseSchedule
    prediction_type: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    context_width: int | None
    label_dropout: float
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

    def _generate(
        self,
        sampler: Sampler,
        num_steps: int,
        *,
        num_images: int | None,
        conditioning: dict[str, Any],
        noise: Any,
        seed: int | None,
        batch_size: int | None,
        schedule: NoiseSchedule | None = None,
        guidance_scale: float | None = None,
    ) -> np.ndarray:
        """`generate` with any sampler, in batches of one compiled shape."""
        checks.check_positive_integer("num_steps", num_steps)
        if not callable(sampler) or isinstance(sampler, type):
            raise ValueError(
                "`sampler` must be one of `keras_mscm.samplers` or a function "
                "of (denoise, noise, schedule, num_steps, seed). Received: "
                f"sampler={sampler!r}"
            )
        schedule = self.schedule if schedule is None else schedule
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(
                "`schedule` must be one of `keras_mscm.schedules`. Received: "
                f"schedule={schedule!r}"
            )
        if guidance_scale is not None:
            checks.check_number(
                "guidance_scale", guidance_scale, 0, "a number of at least 0"
            )
            self._check_guidable("guidance_scale", guidance_scale)
        noise, conditioning = self._sampling_inputs(
            num_images, conditioning, noise, seed
        )
        num_images = noise.shape[0]
        if batch_size is None:
            batch_size = min(num_images, 128)
        checks.check_positive_integer("batch_size", batch_size)

        guided = guidance_scale is not None
        key = (sampler, schedule, guided)
        run = self._compiled_samplers.get(key)
        if run is None:
            run = self._compile_sampler(*key)
            self._compiled_samplers[key] = run

        if seed is None:
            seed = random.randrange(2**31)
        steps = np.int32(num_steps)
        scale = [np.float32(guidance_scale)] if guided else []
        batches = []
        for begin in range(0, num_images, batch_size):
            part = noise, conditioning
            if batch_size != num_images:
                # Wrap around, so that the last batch has the compiled shape.
                places = np.arange(begin, begin + batch_size) % num_images
                part = (
                    ops.take(noise, places, axis=0),
                    {name: value[places] for name, value in part[1].items()},
                )
            state = backend.random_state(seed, begin)
            images = run(*part, steps, state, *scale)
            batches.append(ops.convert_to_numpy(images))
        return np.concatenate(batches)[:num_images]

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

    def _check_guidable(self, name: str, value: Any) -> None:
        if not self.label_dropout:
            raise ValueError(
                f"`{name}` must not be given: guidance needs a model that was "
                "trained with label_dropout > 0 to do without its "
                f"conditioning. Received: {name}={value}"
            )

    def _sampling_inputs(self, num_images, conditioning, noise, seed):
        """Noise and conditioning for `num_images`, from what was given."""
        given = {
            name: value
            if isinstance(value, np.ndarray)
            else np.asarray(ops.convert_to_numpy(value))
            for name, value in conditioning.items()
            if value is not None
        }
        counts = {}
        if num_images is not None:
            checks.check_positive_integer("num_images", num_images)
            counts["num_images"] = int(num_images)
        counts |= {name: len(v) for name, v in given.items() if v.ndim}
        if noise is not None:
            # An array stays one: the compiled sampler takes it as it is.
            convert = np.asarray
            if not isinstance(noise, np.ndarray):
                convert = ops.convert_to_tensor
            noise = convert(noise, "float32")
            if tuple(noise.shape[1:]) != self.image_shape:
                raise ValueError(
                    "`noise` must be of shape (num_images, height, width, "
                    f"channels) = (num_images, {str(self.image_shape)[1:]}. "
                    f"Received: shape {tuple(noise.shape)}"
                )
            if 0 in noise.shape:
                raise ValueError(
                    "`noise` has no images. Received: shape "
                    f"{tuple(noise.shape)}"
                )
            counts["noise"] = noise.shape[0]
        if len(set(counts.values())) > 1:
            raise ValueError(
                "`num_images`, the conditioning and `noise` must agree in "
                f"number. Received: {counts}"
            )
        count = next(iter(counts.values()), self.num_classes or 1)
        if self.num_classes and "labels" not in given:
            given["labels"] = np.arange(count) % self.num_classes
        if self.context_width and "context" not in given:
            given["context"] = np.zeros((count, 1, self.context_width))
            given.setdefault("context_mask", np.zeros((count, 1), "bool"))
        if "context" in given and "context_mask" not in given:
            given["context_mask"] = np.ones(given["context"].shape[:2], "bool")
        data_checks.check_conditioning(
            "", given, count, self.num_classes, self.context_width
        )
        if noise is None:
            noise = keras.random.normal((count, *self.image_shape), seed=seed)
        return noise, {
            name: value.astype(CONDITIONING_DTYPES[name], copy=False)
            for name, value in given.items()
        }

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
