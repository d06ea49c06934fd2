"""What every training algorithm here shares."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_mscm import backend, conditioning, preset_files
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional import process
from keras_mscm.functional.process import Tensor
from keras_mscm.models import (
    arguments,
    fitting,
    moving_average,
    sampling,
    saving,
)
from keras_mscm.schedules import NoiseSchedule
from keras_mscm.spaces import Space

Example = tuple[dict[str, Tensor], Tensor, Tensor]


class DenoisingModel(keras.Model):
    """A network that predicts clean images, and how it is trained and sampled.

    A training algorithm is a subclass with one method, `training_example`: it
    turns a batch of images into a supervised regression problem. Gradients,
    loss, metrics, callbacks and distribution are Keras'.

    The moving average of the weights (EMA) lives in a second network,
    `ema_network`; `generate`, `evaluate` and `predict` use it.

    Args:
        network: Keras layer or model of `{"z", "logsnr"}` and what it is
            conditioned on, which returns a tensor of the shape of `z` (see
            `UViT`). It may say of itself `image_shape` and `conditioning`.
        schedule: Noise schedule; `CosineSchedule()` by default.
        prediction_type: What the network predicts: `"v"`, `"x"` or
            `"epsilon"`.
        weighting: Function of log-SNR, `(batch,)`, that gives each example's
            weight in the loss; None for the algorithm's own.
        space: What `x` is: one of `keras_mscm.spaces`. By default pixels of
            `image_shape`.
        image_shape: Height, width and channels; `network.image_shape` by
            default. Short for `space=Pixels(image_shape)`.
        conditioning: What the network takes besides, a dictionary of name to
            `Condition`; `network.conditioning` by default.
        num_classes: Number of classes; `network.num_classes` by default, if it
            has one. With it the network takes labels.
        context_width: Width of the vectors of a sequence conditioning;
            `network.context_width` by default, if it has one.
        label_dropout: Probability, in [0, 1), with which an image is trained
            on without its conditioning, as classifier-free guidance needs it
            (Ho & Salimans, 2022): the network then sees what says nothing, by
            its declaration.
        guidable: Whether the network has learnt elsewhere to do without its
            conditioning, so that it can be guided.
        ema: Where the moving average is kept: `"auto"` in a second network,
            `"bfloat16"` in half the space, rounded at random; None for none,
            then `ema_network` is the network itself.
        ema_decay: Decay of the moving average per update, in [0, 1). Early on
            `(1 + i) / (10 + i)` holds where it is smaller.
        ema_half_life: The moving average's half-life in images, instead of
            `ema_decay`: independent of the batch size.
        lora_rank: Rank of adapters (LoRA) that are trained in place of the
            network, which is frozen; None for none. A student then shares its
            teacher's weights.
        lora_targets: Which dense layers get them, by what their paths contain;
            all by default.
        seed: Seed of times and noise, an integer in 0..2**31 - 3. None draws
            one, from what `keras.utils.set_random_seed` seeds.
        **kwargs: As for any Keras model.

    Call arguments:
        inputs: `{"z", "logsnr"}`, the conditioning, and `"logsnr_end"` or not,
            as the network takes them.
        training: Whether to run the trained network with its dropout, or the
            moving average without.

    Call returns:
        Predicted `x`, float32, of the shape of `z`.

    Raises:
        ValueError: If an argument is out of its range, or the network doesn't
            return arrays of the space.
    """

    default_weighting: ClassVar[Callable[[Tensor], Tensor]]
    #: Whether `fit` needs a teacher to be attached.
    needs_teacher: bool = False
    #: Whether `generate` takes uneven `times`.
    takes_times: bool = True

    def __init__(
        self,
        network: keras.Layer,
        schedule: NoiseSchedule | None = None,
        *,
        prediction_type: str = "v",
        weighting: Callable[[Tensor], Tensor] | None = None,
        space: Space | None = None,
        image_shape: tuple[int, ...] | None = None,
        conditioning: dict[str, Any] | None = None,
        num_classes: int | None = None,
        context_width: int | None = None,
        label_dropout: float = 0.0,
        guidable: bool = False,
        ema: str | None = "auto",
        ema_decay: float = arguments.EMA_DECAY,
        ema_half_life: float | None = None,
        lora_rank: int | None = None,
        lora_targets: Sequence[str] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        checked = arguments.check(
            network,
            schedule,
            prediction_type,
            weighting,
            label_dropout,
            guidable,
            seed,
        )
        arguments.check_average(ema, ema_decay, ema_half_life)
        space = arguments.space_of(network, space, image_shape)
        declared = arguments.conditioning_of(
            network, conditioning, num_classes, context_width
        )
        arguments.check_droppable(declared, label_dropout, guidable)
        # Images, times and losses are float32 whatever the network computes in;
        # under mixed_float16 the policy still brings Keras' loss scaling.
        kwargs.setdefault("dtype", network.dtype_policy)
        super().__init__(autocast=False, **kwargs)

        self.network = network
        self.schedule, self.prediction_type = checked.schedule, prediction_type
        self.weighting = weighting or type(self).default_weighting
        self.space, self.conditioning = space, declared
        self.num_classes, self.context_width = arguments.sizes_of(declared)
        self.label_dropout, self.guidable = checked.label_dropout, guidable
        self.ema, self.ema_decay = ema, ema_decay
        self.ema_half_life, self.seed = ema_half_life, checked.seed
        self.seed_generator = backend.seed_generator(self.seed)
        self._compiled_samplers: dict[tuple, Callable] = {}
        for codec in (space.encoder, space.decoder):
            if codec is not None:
                codec.trainable = False
        self.encoder, self.decoder = space.encoder, space.decoder
        self.teacher: Any = None

        arguments.check_network(network, space, self.symbolic_inputs())
        self.lora_rank, self.lora_targets = arguments.enable_lora(
            network, lora_rank, lora_targets
        )
        self.ema_network = moving_average.averaged(
            network, f"{network.name}_ema", self.symbolic_inputs(), ema
        )
        self.iteration = self.add_weight(
            shape=(),
            dtype="int32",
            initializer="zeros",
            trainable=False,
            name="iteration",
        )
        self.built = True

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one example, as the network sees it."""
        return self.space.shape

    @property
    def conditioning_names(self) -> list[str]:
        """What the network takes besides `z` and their log-SNR."""
        return [*self.conditioning]

    @property
    def takes_logsnr_end(self) -> bool:
        """Whether its network may be told where its prediction is to lead."""
        return arguments.takes_logsnr_end(self.network)

    # Methods that have a file of their own.

    compile = fitting.compile_model
    get_compile_config = fitting.get_compile_config
    compile_from_config = fitting.compile_from_config
    fit, evaluate, predict = fitting.fit, fitting.evaluate, fitting.predict
    make_train_function = fitting.make_train_function
    make_test_function = fitting.make_test_function
    generate, check_generate = sampling.generate, sampling.check_generate
    from_preset: Any = classmethod(preset_files.load_model)
    save_to_preset = preset_files.save_to_preset
    save_lora, load_lora = saving.save_lora, saving.load_lora
    merged_network = saving.merged_network
    check_guidable = arguments.check_guidable
    symbolic_inputs = arguments.symbolic_inputs
    save_own_variables = saving.save_own_variables
    load_own_variables = saving.load_own_variables
    from_config = classmethod(saving.from_config)

    def sampled_with(
        self, num_steps: Any, sampler: Any, schedule: Any, guidance_scale: Any
    ) -> tuple[int, Any, NoiseSchedule]:
        """How `generate` samples, of what it was asked for; None is open.

        Args:
            num_steps: Number of steps.
            sampler: One of `keras_mscm.samplers`.
            schedule: Time to log-SNR.
            guidance_scale: Scale of classifier-free guidance.

        Returns:
            Number of steps, sampler and schedule.

        Raises:
            ValueError: If the model can't be sampled so.
        """
        raise NotImplementedError

    # Prediction.

    def denoise(
        self,
        network: keras.Layer,
        z: Tensor,
        logsnr: Tensor,
        conditioning: Conditioning | None = None,
        training: bool = False,
        logsnr_end: Tensor | None = None,
    ) -> Tensor:
        """Predicts `x` from noisy images, in float32.

        Args:
            network: `self.network` or `self.ema_network`.
            z: Noisy images, `(batch, ...)`.
            logsnr: Their log-SNR, `(batch,)`.
            conditioning: What the network takes besides, each of the length
                of the batch.
            training: Whether dropout is on.
            logsnr_end: Log-SNR to which the prediction is to lead, `(batch,)`,
                for a network that takes it.

        Returns:
            Predicted images, of the shape of `z`.
        """
        inputs = {"z": z, "logsnr": logsnr, **(conditioning or {})}
        if logsnr_end is not None:
            inputs["logsnr_end"] = logsnr_end
        output = ops.cast(network(inputs, training=training), "float32")
        return process.predict_x(output, z, logsnr, self.prediction_type)

    def denoise_guided(
        self,
        network: keras.Layer,
        z: Tensor,
        logsnr: Tensor,
        conditioning: Conditioning,
        guidance_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Predicts `x` with classifier-free guidance, and without.

        Arguments as for `denoise`; `functional.guided` says how.
        """

        def denoise(z, logsnr, conditioning):
            return self.denoise(network, z, logsnr, conditioning)

        without = self.absent(conditioning)
        return F.guided(
            denoise, z, logsnr, conditioning, without, guidance_scale
        )

    def absent(self, given: Conditioning) -> Conditioning:
        """The conditioning of the same shape that says nothing."""
        return conditioning.absent(self.conditioning, given)

    def call(
        self, inputs: dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        names = sorted(["logsnr", "z", *self.conditioning])
        further = {"logsnr_end"} if self.takes_logsnr_end else set()
        if not isinstance(inputs, dict) or {*inputs} - further != {*names}:
            came = [*inputs] if isinstance(inputs, dict) else type(inputs)
            raise ValueError(
                f"`inputs` must be a dictionary of {names}. Received: {came}"
            )
        given = {name: inputs[name] for name in self.conditioning}
        network = self.network if training else self.ema_network
        z, logsnr = inputs["z"], inputs["logsnr"]
        end = inputs.get("logsnr_end")
        return self.denoise(network, z, logsnr, given, bool(training), end)

    # Training: one step for every algorithm.

    def default_loss(self) -> keras.losses.Loss:
        """The loss that `compile` takes when none is given."""
        raise NotImplementedError

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        """Turns images into a supervised problem; what a subclass is about.

        Runs before the gradient step, without gradient: whatever networks it
        evaluates, the target is a plain tensor.

        Args:
            images: `(batch, ...)`, of the model's space, encoded if that has
                an encoder.
            conditioning: What the network takes besides (see
                `conditioning_names`); the network's inputs are `{"z",
                "logsnr", **conditioning}`.
            training: False in evaluation.

        Returns:
            Inputs of `call`; the target for `x`, of the shape of `images`; and
            the weight of each example in the loss, `(batch,)`.
        """
        raise NotImplementedError

    def train_step(self, *args: Any) -> Any:
        """One update: the example, Keras' own step on it, then the EMA."""
        *state, data = args  # Keras on JAX: (state, data); else: (data,)
        with backend.waits_for(data):
            return self._train_step(state and state[0], data)

    def _train_step(self, state: Any, data: Any) -> Any:
        def prepare():
            return self._example(data, True), ops.copy(
                self.optimizer.iterations
            )

        (example, before), state = backend.run_with_state(prepare, self, state)
        if state:
            logs, state = super().train_step(tuple(state), example)
        else:
            logs = super().train_step(example)
        batch = ops.shape(example[1])[0]
        _, state = backend.run_with_state(
            lambda: self._after_update(before, batch), self, state
        )
        return (logs, tuple(state)) if state else logs

    def test_step(self, *args: Any) -> Any:
        """Keras' own step on an example made without dropout."""
        *state, data = args
        state = state and state[0]
        example, state = backend.run_with_state(
            lambda: self._example(data, False), self, state
        )
        if not state:
            return super().test_step(example)
        return super().test_step(tuple(state), example)

    def _example(self, data: Any, training: bool) -> Example:
        images, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        images = ops.cast(images, "float32")
        draw = self.draw_normal if training else None
        images = self.space.encode(images, draw)
        given = conditioning.as_dictionary(y)
        given = conditioning.cast(self.conditioning, given)
        if training and self.label_dropout:
            draws = self.draw_uniform(ops.shape(images)[:1])
            given = conditioning.dropped(
                self.conditioning, given, draws < self.label_dropout
            )
        inputs, target, weight = self.training_example(images, given, training)
        if sample_weight is not None:
            weight = weight * ops.cast(sample_weight, "float32")
        return inputs, target, weight

    def draw_normal(self, shape: Sequence) -> Tensor:
        """Standard normal numbers for a batch, by the model's seed.

        They depend on the example, and not on how many devices share the batch.

        Args:
            shape: Shape of the numbers, `(batch, ...)`.
        """
        return backend.draw(keras.random.normal, shape, self.seed_generator)

    def draw_uniform(self, shape: Sequence) -> Tensor:
        """Numbers uniform in [0, 1), as `draw_normal` draws."""
        return backend.draw(keras.random.uniform, shape, self.seed_generator)

    def _after_update(self, before: Tensor, batch: Tensor) -> None:
        # 0 for all but the last of the batches of a gradient accumulation.
        updates = self.optimizer.iterations - before
        if self.ema_network is not self.network:
            moving_average.after_update(self, updates, batch)
        self.iteration.assign_add(ops.cast(updates, "int32"))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments.config_of(self)}
