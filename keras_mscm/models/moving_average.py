"""The moving average of a network's weights (EMA), held by a second network."""

import keras
from keras import ops

from keras_mscm import backend
from keras_mscm.functional.process import Tensor
from keras_mscm.models.sampling import CONDITIONING_DTYPES


def clone_network(
    network: keras.Layer, name: str, values: keras.Layer | None = None
) -> keras.Layer:
    """A second network of the same configuration.

    Its weights are those of `values` (by default `network`). What is trainable
    in `network` is in the clone; all of it, if `network` as a whole is frozen.
    """
    config = {**network.get_config(), "name": name, "trainable": True}
    clone = type(network).from_config(config)
    if not clone.built:
        # Called, as the network was: Keras' `build_from_config` can't always.
        shapes = network.get_build_config()["input_shape"]
        clone(
            {
                key: keras.KerasTensor(
                    shape, CONDITIONING_DTYPES.get(key, "float32")
                )
                for key, shape in shapes.items()
            }
        )
    if not network.trainable:
        # And so the layers within; by way of False, as TensorFlow's tracking
        # ignores an attribute that is set to what it is.
        clone.trainable = False
        clone.trainable = True
    values = network if values is None else values
    for theirs, ours in zip(values.weights, clone.weights, strict=True):
        # A copy: JAX gives buffers away, and these two must not share one.
        ours.assign(ops.copy(theirs.value))
    return clone


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
    average: keras.Layer, network: keras.Layer, rate: float | Tensor
) -> None:
    """Moves the average towards the network by a share of the way.

    What isn't trained (counters, statistics) it takes over, whatever the rate;
    and nothing that isn't finite.
    """
    pairs = [*zip(average.weights, network.weights)]
    for ours, theirs in pairs:
        if not theirs.trainable:
            finite = ops.isfinite(theirs.value)
            ours.assign(ops.where(finite, theirs.value, ours.value))
    trained = [pair for pair in pairs if pair[1].trainable]
    backend.move_towards(trained, rate)
