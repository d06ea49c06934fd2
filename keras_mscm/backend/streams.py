"""Where the batches of a stream lie, and how TensorFlow hands them over."""

import sys
from collections.abc import Callable
from typing import Any

import keras

from keras_mscm.backend.framework import NAME


def is_tf_dataset(x: Any) -> bool:
    """Whether it is a `tf.data.Dataset`, which every backend takes."""
    # TensorFlow isn't imported here, because whoever has such a data set has
    # imported it.
    tf = sys.modules.get("tensorflow")
    return tf is not None and isinstance(x, tf.data.Dataset)


def watched_tf_dataset(dataset: Any, see: Callable[[Any, int], Any]) -> Any:
    """The same data set, each of whose batches a function sees on the host.

    Args:
        dataset: A `tf.data.Dataset`.
        see: Function of a batch of arrays and its number, which may raise.
    """
    tf = sys.modules["tensorflow"]

    def mapped(number, batch):
        tensors = keras.tree.flatten(batch)

        def seen(number, *arrays):
            see(keras.tree.pack_sequence_as(batch, arrays), number)
            return number

        # The batch depends on the call, because TensorFlow would prune it else.
        done = tf.numpy_function(seen, [number, *tensors], number.dtype)
        with tf.control_dependencies([done]):
            return keras.tree.map_structure(tf.identity, batch)

    return dataset.enumerate().map(mapped).prefetch(1)


def lies_on_host(array: Any) -> bool:
    """Whether an array or tensor can be read without waiting for a device."""
    if NAME == "torch" and hasattr(array, "device"):
        return getattr(array.device, "type", "cpu") == "cpu"
    if NAME == "jax" and hasattr(array, "devices"):
        return all(device.platform == "cpu" for device in array.devices())
    if NAME == "tensorflow" and hasattr(array, "device"):
        return "GPU" not in str(array.device) and "TPU" not in str(array.device)
    return True
