"""How a batch is sharded over processes, replicas and devices."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_mscm.backend.framework import NAME

if NAME == "jax":
    import jax
elif NAME == "tensorflow":
    import tensorflow as tf


def process() -> tuple[int, int]:
    """Index of this process, and the number of those that train one model.

    There are several on JAX alone, after `keras.distribution.initialize`.
    TensorFlow's workers shard a `tf.data.Dataset` by themselves, so each counts
    as the only one.
    """
    if NAME == "jax" and jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return 0, 1


def replica() -> tuple[Any, int]:
    """Index of this replica of a step, and the number of replicas.

    Under a strategy of `tf.distribute` each replica runs the step with a shard
    of the batch. Elsewhere a step always sees the whole batch, because on JAX
    the compiler shards it over the devices.

    Returns:
        Index and number of replicas.
    """
    if NAME == "tensorflow":
        context = tf.distribute.get_replica_context()
        if context is not None:
            index = context.replica_id_in_sync_group
            return index, context.num_replicas_in_sync
    return 0, 1


def has_several_workers(model: keras.Model) -> bool:
    """Whether a strategy of `tf.distribute` spreads a model over machines.

    Args:
        model: Model that was compiled within the strategy's scope.
    """
    if NAME != "tensorflow":
        return False
    several = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(model.distribute_strategy, several)


def shares(model: keras.Model) -> int:
    """Number of shards that a batch which this process gives Keras becomes.

    Args:
        model: Model that is trained on it.
    """
    distribution = keras.distribution.distribution()
    if NAME == "tensorflow":
        return model.distribute_strategy.num_replicas_in_sync
    if NAME != "jax" or distribution is None:
        return 1
    replicas = distribution.num_model_replicas
    if distribution.auto_shard_dataset:  # each process gives the whole batch
        return replicas
    return max(replicas // distribution.num_processes, 1)


def integer(variable: keras.Variable) -> int:
    """The integer that a scalar variable holds, as Python's.

    Under a strategy of `tf.distribute` `int(variable)` fails, because Python
    looks `__int__` up in the class, and TensorFlow's class of mirrored
    variables forwards only what is looked up in the object.

    Args:
        variable: The variable, on one device or several.
    """
    return int(ops.convert_to_numpy(variable))


def lies_on(variable: keras.Variable, distribution: Any) -> bool:
    """Whether a variable lies on a distribution's devices, all of them."""
    mesh = distribution.device_mesh.backend_mesh
    return variable.value.sharding.device_set == set(mesh.devices.flat)


def divided(batch: Any) -> Any:
    """Shards a batch over devices, in what `compile_inference` compiles.

    A batch that doesn't divide evenly stays whole. Without `keras.distribution`
    nothing happens.

    Args:
        batch: Tensors, each of the length of the batch; or a structure of them.
    """
    distribution = keras.distribution.distribution()
    if NAME != "jax" or distribution is None:
        return batch

    def divide(x):
        if x.shape[0] % distribution.num_model_replicas:
            return x
        layout = distribution.get_data_layout(x.shape)
        return keras.distribution.distribute_tensor(x, layout)

    return keras.tree.map_structure(divide, batch)


def gathered(outputs: Any) -> Any:
    """Replicates tensors on each device, so that each process can read them."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return outputs

    def gather(x):
        layout = keras.distribution.TensorLayout(
            (None,) * x.ndim, distribution.device_mesh
        )
        return keras.distribution.distribute_tensor(x, layout)

    return keras.tree.map_structure(gather, outputs)


def draw(
    function: Callable[..., Any],
    shape: Sequence,
    seed: keras.random.SeedGenerator,
) -> Any:
    """Draws random numbers for a batch, the same for any number of replicas.

    Each replica draws for the whole batch and takes the numbers of its shard,
    because replicas hold the same seed and would draw the same numbers.

    They are float32 whatever Keras' `floatx`, because times and noise have to
    be.

    Args:
        function: One of `keras.random`'s.
        shape: Shape of the numbers of this replica's shard, batch first.
        seed: Seed generator.
    """
    index, number = replica()
    if number == 1:
        return function(shape, dtype="float32", seed=seed)
    share, *rest = shape
    numbers = function((number * share, *rest), dtype="float32", seed=seed)
    return numbers[index * share : (index + 1) * share]
