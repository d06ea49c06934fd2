"""What every training algorithm here shares."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.functional import process
from keras_mscm.functional.process import Tensor
from keras_mscm.models import data_checks, moving_average
from keras_mscm.models.denoiser import Conditioning, Denoiser
from keras_mscm.models.fitted import FittedModel
from keras_mscm.models.sampling import CONDITIONING_DTYPES, check_schedule
from keras_mscm.preset_files import untrusted
from keras_mscm.schedules import CosineSchedule, NoiseSchedule

Example = tuple[dict[str, Tensor], Tensor, Tensor]


def _agreed(name: str, value: Any, network: keras.Layer) -> Any:
    """What the network says, or the argument where it doesn't."""
    own = getattr(network, name, None)
    if own is None or value is None:
        return own if value is None else value
    agree = value == own
    if name == "image_shape" and isinstance(value, (list, tuple)):
        agree = tuple(value) == tuple(own)
    if not (isinstance(agree, bool) and agree) or isinstance(value, bool):
        raise ValueError(
            f"`{name}` must be what the network says, {own}. Received: "
            f"{name}={checks.describe(value)}"
        )
    return own


class DenoisingModel(Denoiser, FittedModel):
    """A network that predicts clean images, and how it is trained and sampled.

    A training algorithm is a subclass with one method, `training_example`: it
    turns a batch of images into a supervised regression problem. Gradients,
    loss, metrics, callbacks and distribution are Keras'.

    The moving average of the weights (EMA) lives in a second network,
    `ema_network`; `generate`, `evaluate` and `predict` use it.

    Args:
        network: Keras layer or model of `{"z", "logsnr"[, "labels"][,
            "context", "context_mask"]}` (see `UViT`) that returns a tensor of
            the shape of `z`.
        schedule: Noise schedule; `CosineSchedule()` by default.
        prediction_type: What the network predicts: `"v"`, `"x"` or
            `"epsilon"`.
        weighting: Function of log-SNR, `(batch,)`, that gives each example's
            weight in the loss; None for the algorithm's own.
        image_shape: Height, width and channels; `network.image_shape` by
            default.
        num_classes: Number of classes; `network.num_classes` by default, if it
            has one. With it the network takes labels.
        context_width: Width of the vectors of a sequence conditioning;
            `network.context_width` by default, if it has one.
        label_dropout: Probability, in [0, 1), with which an image is trained
            on without its conditioning, as classifier-free guidance needs it
            (Ho & Salimans, 2022): the network then sees the label
            `num_classes` and a `context_mask` of False.
        ema_decay: Decay of the moving average per update, in [0, 1). Early on
            `(1 + i) / (10 + i)` holds where it is smaller.
        ema_half_life: The moving average's half-life in images, instead of
            `ema_decay`: independent of the batch size.
        seed: Seed of times and noise, an integer in 0..2**31 - 3. None draws
            one, from what `keras.utils.set_random_seed` seeds.
        **kwargs: As for any Keras model.

    Call arguments:
        inputs: `{"z", "logsnr"}` and the conditioning, as the network takes
            them.
        training: Whether to run the trained network with its dropout, or the
            moving average without.

    Call returns:
        Predicted `x`, float32, `(batch, height, width, channels)`.

    Raises:
        ValueError: If an argument is out of its range, or the network doesn't
            return images.
    """

    default_weighting: ClassVar[Callable[[Tensor], Tensor]]

    def __init__(
        self,
        network: keras.Layer,
        schedule: NoiseSchedule | None = None,
        *,
        prediction_type: str = "v",
        weighting: Callable[[Tensor], Tensor] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        context_width: int | None = None,
        label_dropout: float = 0.0,
        ema_decay: float = 0.9999,
        ema_half_life: float | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        if not isinstance(network, keras.Layer):
            raise checks.invalid("network", "a Keras layer or model", network)
        schedule = CosineSchedule() if schedule is None else schedule
        check_schedule(schedule)
        checks.check_choice(
            "prediction_type", prediction_type, process.PREDICTION_TYPES
        )
        below_1 = math.nextafter(1, 0)
        ema_decay = checks.check_number(
            "ema_decay", ema_decay, 0, "in [0, 1)", below_1
        )
        label_dropout = checks.check_number(
            "label_dropout", label_dropout, 0, "in [0, 1)", below_1
        )
        if ema_half_life is not None:
            ema_half_life = checks.check_positive_number(
                "ema_half_life", ema_half_life
            )
        if weighting is not None:
            checks.check_function(
                "weighting",
                weighting,
                "a function of log-SNR, as those of `keras_mscm.losses`",
            )
        seed = checks.check_seed("seed", seed)
        shape = checks.check_shape(
            "image_shape",
            _agreed("image_shape", image_shape, network),
            ("height", "width", "channels"),
        )
        num_classes = _agreed("num_classes", num_classes, network)
        context_width = _agreed("context_width", context_width, network)
        for name, value in (
            ("num_classes", num_classes),
            ("context_width", context_width),
        ):
            if value is not None:
                checks.check_positive_integer(name, value, 2**31 - 2)
        # Images, times and losses are float32 whatever the network computes in;
        # under mixed_float16 the policy still brings Keras' loss scaling.
        kwargs.setdefault("dtype", network.dtype_policy)
        super().__init__(autocast=False, **kwargs)

        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.weighting = weighting or type(self).default_weighting
        self.image_shape = shape
        self.num_classes = num_classes
        self.context_width = context_width
        self.label_dropout = label_dropout
        self._check_label_dropout()
        self.ema_decay, self.ema_half_life = ema_decay, ema_half_life
        self.seed = seed
        self.seed_generator = backend.seed_generator(seed)
        self._compiled_samplers = {}

        self._check_network()
        self.ema_network = moving_average.clone_network(
            network, f"{network.name}_ema"
        )
        self.ema_network.trainable = False
        self.iteration = self.add_weight(
            shape=(),
            dtype="int32",
            initializer="zeros",
            trainable=False,
            name="iteration",
        )
        self.built = True

    def _check_network(self) -> None:
        symbolic = {
            "z": keras.KerasTensor((None, *self.image_shape), "float32"),
            "logsnr": keras.KerasTensor((None,), "float32"),
        }
        shapes = {
            "labels": (None,),
            "context": (None, None, self.context_width),
            "context_mask": (None, None),
        }
        for name in self.conditioning_names:
            dtype = CONDITIONING_DTYPES[name]
            symbolic[name] = keras.KerasTensor(shapes[name], dtype)
        shape = tuple(self.network(symbolic).shape[1:])
        if shape != self.image_shape:
            raise ValueError(
                "`network` must return images of the shape of `z`, "
                f"{self.image_shape}. Received: a network that returns {shape}"
            )

    def _check_label_dropout(self) -> None:
        if self.label_dropout and not self.conditioning_names:
            raise ValueError(
                "`label_dropout` must be 0 for a network without conditioning. "
                f"Received: label_dropout={self.label_dropout}"
            )

    # Training: one step for every algorithm.

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        """Turns images into a supervised problem; what a subclass is about.

        Runs before the gradient step, without gradient: whatever networks it
        evaluates, the target is a plain tensor.

        Args:
            images: `(batch, height, width, channels)`, in [-1, 1].
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
        images, labels, sample_weight = keras.utils.unpack_x_y_sample_weight(
            data
        )
        images = ops.cast(images, "float32")
        conditioning = data_checks.as_conditioning(labels)
        conditioning = {
            name: ops.cast(value, CONDITIONING_DTYPES[name])
            for name, value in conditioning.items()
        }
        if training and self.label_dropout:
            conditioning = self._drop_labels(conditioning)
        inputs, target, weight = self.training_example(
            images, conditioning, training
        )
        if sample_weight is not None:
            weight = weight * ops.cast(sample_weight, "float32")
        return inputs, target, weight

    def _drop_labels(self, conditioning: Conditioning) -> Conditioning:
        """Leaves each example's conditioning out, or not, as a whole."""
        batch = ops.shape(next(iter(conditioning.values())))[:1]
        draw = self.draw_uniform(batch)
        dropped, absent = draw < self.label_dropout, self.absent(conditioning)
        return {
            name: ops.where(process.expand(dropped, value), absent[name], value)
            for name, value in conditioning.items()
        }

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
        decay = self.ema_decay
        if self.ema_half_life:
            decay = moving_average.decay_of_half_life(
                self.ema_half_life, batch * self._batches_per_update()
            )
        decay = moving_average.decay_at(self.iteration, decay)
        rate = (1.0 - decay) * ops.cast(updates, "float32")
        moving_average.update(self.ema_network, self.network, rate)
        self.iteration.assign_add(ops.cast(updates, "int32"))

    def _batches_per_update(self) -> int:
        """Of the size that a replica sees."""
        optimizer: Any = self.optimizer
        # It may be within one that scales the loss.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        _, replicas = backend.replica()
        return replicas * (optimizer.gradient_accumulation_steps or 1)

    # Saving. Keras leaves random states out; with them, training resumes
    # exactly.

    def _seed_states(self, layer: keras.Layer) -> list[keras.Variable]:
        weights = {id(weight) for weight in layer.weights}
        return [v for v in layer.variables if id(v) not in weights]

    def _own_seed_states(self) -> list[keras.Variable]:
        return [self.seed_generator.state, *self._seed_states(self.network)]

    def save_own_variables(self, store: Any) -> None:
        """Stores the model's own weights and every random state."""
        super().save_own_variables(store)
        for i, state in enumerate(self._own_seed_states()):
            store[f"seed_{i}"] = ops.convert_to_numpy(state)

    def load_own_variables(self, store: Any) -> None:
        """Restores what `save_own_variables` stored."""
        stored = {name: store[name] for name in [*store.keys()]}
        for i, state in enumerate(self._own_seed_states()):
            if f"seed_{i}" in stored:
                state.assign(np.asarray(stored.pop(f"seed_{i}")))
        super().load_own_variables(stored)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "network": serialize(self.network),
            "schedule": serialize(self.schedule),
            "prediction_type": self.prediction_type,
            "weighting": serialize(self.weighting),
            "image_shape": self.image_shape,
            "num_classes": self.num_classes,
            "context_width": self.context_width,
            "label_dropout": self.label_dropout,
            "ema_decay": self.ema_decay,
            "ema_half_life": self.ema_half_life,
            "seed": self.seed,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Self:
        """The inverse of `get_config`, whoever wrote it.

        Raises:
            ValueError: If it names what Keras doesn't know or what is no
                function of tensors, or the network is larger than this
                machine's memory.
        """
        untrusted.check_network(config.get("network"), custom_objects)
        # All but plain values were serialised: network, schedule, functions.
        return cls(
            **{
                name: untrusted.deserialize(value, custom_objects)
                if isinstance(value, dict) and name != "dtype"
                else value
                for name, value in config.items()
            }
        )
