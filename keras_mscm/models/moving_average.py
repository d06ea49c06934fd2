"""The moving average of a network's weights (EMA), and who holds it."""

import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_mscm import backend, lora
from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor

Inputs = dict[str, keras.KerasTensor]


def averaged(
    network: keras.Layer, name: str, inputs: Inputs, kept: str | None
) -> keras.Layer:
    """What predicts with the moving average of a network's weights.

    Args:
        network: The network.
        name: What it is to be called.
        inputs: The network's inputs, without values.
        kept: `"auto"`: in a second network, or of a network with LoRA the
            adapters alone; `"bfloat16"`: the trained weights in that; None: it
            is the network itself.
    """
    if kept is None:
        return network
    if kept == "auto" and not lora.adapted(network):
        average = clone_network(network, name, inputs)
    else:
        dtype = "bfloat16" if kept == "bfloat16" else "float32"
        average = AveragedWeights(network, dtype, name=name)
    average.trainable = False
    return average


class AveragedWeights(keras.layers.Layer):
    """A network with averages in the place of its trained weights.

    It holds these alone. What isn't trained it shares with the network, so
    that a large frozen part is held once.

    Args:
        network: The network, built.
        dtype: In which the averages are kept.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: As for the network.
        training: As for the network, though there is no dropout here.

    Call returns:
        As the network.
    """

    def __init__(self, network: keras.Layer, dtype: str, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        weights = tuple(network.trainable_weights)
        # Functions, because Keras would track and save the network twice.
        self._network, self._weights_averaged = lambda: network, lambda: weights
        self.averages = [
            self.add_weight(
                shape=weight.shape,
                dtype=dtype,
                initializer="zeros",
                trainable=False,
                autocast=False,
                name=f"average_{i}",
            )
            for i, weight in enumerate(self.weights_averaged)
        ]
        for average, weight in zip(self.averages, self.weights_averaged):
            average.assign(ops.copy(ops.cast(weight.value, dtype)))
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        network = self._network()
        # All variables, because within a scope Keras doesn't look at one
        # around it, in which a compiled step has their values.
        values = {id(v): (v, v.value) for v in network.variables}
        for average, weight in zip(self.averages, self.weights_averaged):
            value = ops.cast(average.value, weight.dtype)
            values[id(weight)] = weight, value
        with keras.StatelessScope(state_mapping=values.values()):
            return network(inputs, training=False)

    @property
    def weights_averaged(self) -> tuple[keras.Variable, ...]:
        """The network's weights that there are averages of."""
        return self._weights_averaged()

    @property
    def variables(self) -> list[keras.Variable]:
        """What a call reads: the network's, but for what is averaged."""
        own = {id(weight) for weight in self.weights_averaged}
        shared = [v for v in self._network().variables if id(v) not in own]
        return [*super().variables, *shared]

    @property
    def conditioning(self) -> Any:
        """What the network is conditioned on."""
        return getattr(self._network(), "conditioning", None)

    def as_network(self, inputs: Inputs) -> keras.Layer:
        """A network of its own with the averages as its weights."""
        network = self._network()
        clone = clone_network(network, network.name, inputs)
        places = {id(w): i for i, w in enumerate(network.weights)}
        for average, weight in zip(self.averages, self.weights_averaged):
            ours = clone.weights[places[id(weight)]]
            ours.assign(ops.cast(average.value, ours.dtype))
        return clone


def clone_network(
    network: keras.Layer,
    name: str,
    inputs: Inputs,
    values: keras.Layer | None = None,
) -> keras.Layer:
    """A second network of the same configuration.

    A layer that is trainable in `network` is trainable in the clone. If
    `network` is frozen as a whole, all of the clone is trainable, because a
    student begins with a frozen teacher's network. A network that Keras can't
    make from its configuration may have a method `clone()`.

    Args:
        network: The first.
        name: The second's name.
        inputs: Symbolic inputs of both.
        values: What predicts with the weights that the clone is to have;
            `network` by default.
    """
    if isinstance(values, AveragedWeights):
        network = values = values.as_network(inputs)
    if hasattr(network, "clone"):
        clone = network.clone()
        clone.name = name
    else:
        config = _unshared(network.get_config())
        clone = type(network).from_config(
            {**config, "name": name, "trainable": True}
        )
    if not clone.built:
        # Called, as the network was: Keras' `build_from_config` can't always.
        clone(inputs)
    if not network.trainable:
        # And so the layers within; by way of False, as TensorFlow's tracking
        # ignores an attribute that is set to what it is.
        clone.trainable = False
        clone.trainable = True
    lora.like(clone, network)
    values = network if values is None else values
    for theirs, ours in zip(values.weights, clone.weights, strict=True):
        # A copy: JAX gives buffers away, and these two must not share one.
        ours.assign(ops.copy(theirs.value))
    return clone


def _unshared(config: Any) -> Any:
    """A configuration of new objects, whatever has been made of it before.

    While it loads a file, Keras marks what it serialises more than once, and
    would give a second clone the first one's layers.
    """
    if isinstance(config, dict):
        kept = {k: v for k, v in config.items() if k != "shared_object_id"}
        return {k: _unshared(v) for k, v in kept.items()}
    if isinstance(config, list):
        return [_unshared(each) for each in config]
    return config


def pairs(
    average: keras.Layer, network: keras.Layer
) -> Iterator[tuple[keras.Variable, keras.Variable]]:
    """Averages, each with its weight; none where the network is its own."""
    if average is network:
        return iter(())
    if isinstance(average, AveragedWeights):
        return zip(average.averages, average.weights_averaged, strict=True)
    return zip(average.weights, network.weights, strict=True)


def after_update(model: Any, updates: Tensor, batch: Tensor) -> None:
    """Moves a model's average after a step.

    Args:
        model: The model.
        updates: Updates by that step, 0 or 1.
        batch: Examples in the step's batch.
    """
    decay = model.ema_decay
    if model.ema_half_life:
        images = batch * _batches_per_update(model.optimizer)
        decay = decay_of_half_life(model.ema_half_life, images)
    decay = decay_at(model.iteration, decay)
    rate = (1.0 - decay) * ops.cast(updates, "float32")
    update(model.ema_network, model.network, rate, model.iteration)


def _batches_per_update(optimizer: Any) -> int:
    """Of the size that a replica sees."""
    # It may be within one that scales the loss.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    _, replicas = backend.replica()
    return replicas * (optimizer.gradient_accumulation_steps or 1)


def decay_at(iteration: Tensor, decay: float | Tensor) -> Tensor:
    """The decay of an update, shorter in the first ones.

    Args:
        iteration: Updates so far, a scalar.
        decay: The decay later on.
    """
    i = ops.cast(iteration, "float32")
    return ops.minimum(decay, (1.0 + i) / (10.0 + i))


def decay_of_half_life(half_life: float, images: Tensor) -> Tensor:
    """The decay of an update by `images`, for a half-life in images."""
    return ops.power(0.5, ops.cast(images, "float32") / half_life)


def update(
    average: keras.Layer,
    network: keras.Layer,
    rate: float | Tensor,
    iteration: Tensor = 0,
) -> None:
    """Moves the average towards the network by a share of the way.

    What isn't trained (counters, statistics) it takes over, whatever the rate;
    and nothing that isn't finite.

    Args:
        average: What `averaged` made of the network.
        network: The network.
        rate: The share.
        iteration: Updates so far, for what is rounded at random.
    """
    trained = []
    for i, (ours, theirs) in enumerate(pairs(average, network)):
        if not theirs.trainable:
            finite = ops.isfinite(theirs.value)
            ours.assign(ops.where(finite, theirs.value, ours.value))
        elif ours.dtype == "bfloat16":
            _move_rounded(ours, theirs, rate, (iteration, i))
        else:
            trained.append((ours, theirs))
    backend.move_towards(trained, rate)


def _move_rounded(
    average: keras.Variable, weight: keras.Variable, rate: Any, seed: tuple
) -> None:
    """Moves an average of 8 bits by less than its last one, in the mean.

    Up or down is drawn with the probability that makes the mean right, because
    to the nearest it would stay where it is for ever.
    """
    value = ops.cast(average.value, "float32")
    step = ops.cast(weight.value, "float32") - value
    step = ops.where(ops.isfinite(step), step, 0.0)
    value = value + rate * step
    place = ops.arange(math.prod(average.shape), dtype="int32")
    word, _ = F.threefry_2x32(
        (ops.cast(seed[0], "int32"), seed[1]), (place, ops.zeros_like(place))
    )
    draw = ops.cast(word, "float32") * 2.0**-32 + 0.5  # in [0, 1]
    draw = ops.reshape(draw, average.shape)
    size = ops.maximum(ops.abs(value), 1e-30)
    last_bit = ops.exp2(ops.floor(ops.log2(size)) - 7.0)
    # Between its two neighbours, because beside a power of 2 the lower one is
    # half as far as the upper one.
    lower = ops.floor(value / last_bit)
    up = ops.cast(draw < value / last_bit - lower, "float32")
    average.assign(ops.cast((lower + up) * last_bit, average.dtype))
