"""What a training step reads and assigns.

JAX hands a step its state and takes it back; TensorFlow and PyTorch update
variables in place.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from keras_mscm.backend.framework import NAME

if NAME == "tensorflow":
    import tensorflow as tf
elif NAME == "torch":
    import torch


def run_with_state(
    function: Callable[[], Any], model: keras.Model, state: Sequence
) -> tuple[Any, list]:
    """Runs `function`, which reads and assigns variables, inside a step.

    No gradient is recorded.

    Args:
        function: Function of no arguments.
        model: Model whose variables it uses.
        state: What Keras handed to the step besides the data. On JAX:
            `(trainable, non_trainable, optimizer, metrics)` values in
            training, without the optimizer's in evaluation. Else empty.

    Returns:
        The function's result, and the state with the values that it assigned
        to trainable and non-trainable variables.
    """
    if not state:
        with torch.no_grad() if NAME == "torch" else contextlib.nullcontext():
            return function(), []
    trainable, non_trainable, *rest = state
    mapping = [
        *zip(model.trainable_variables, trainable),
        *zip(model.non_trainable_variables, non_trainable),
    ]
    if len(rest) == 2:
        mapping += zip(model.optimizer.variables, rest[0])
    with keras.StatelessScope(state_mapping=mapping) as scope:
        result = function()
    trainable = map(scope.get_current_value, model.trainable_variables)
    non_trainable = map(scope.get_current_value, model.non_trainable_variables)
    return result, [list(trainable), list(non_trainable), *rest]


def waits_for(data: Any) -> contextlib.AbstractContextManager:
    """Makes the operations within it wait for a batch of data.

    In a graph, TensorFlow begins with whatever needs no data. At the end of a
    stream of unknown length that would count a step for which there is no
    batch.

    Args:
        data: Tensors, as they come to a step.
    """
    if NAME == "tensorflow" and not tf.executing_eagerly():
        tensors = [x for x in keras.tree.flatten(data) if x is not None]
        return tf.control_dependencies(tensors)
    return contextlib.nullcontext()


@contextlib.contextmanager
def values_kept(model: keras.Model) -> Iterator[None]:
    """Runs Keras' `fit`, `evaluate` or `predict` without losing weights.

    On JAX these take the values out of the variables before the first step,
    and don't put them back if a step fails, or the data do.

    Args:
        model: Model whose variables they are.
    """
    variables = []
    if NAME == "jax":
        variables = [*model.variables, *model.metrics_variables]
        variables += model.optimizer.variables if model.compiled else []
    before = [(variable, variable.value) for variable in variables]
    try:
        yield
    except BaseException:
        if NAME == "jax":
            # The last step's state goes back into the variables here, because
            # Keras itself does that in `fit` alone.
            model.jax_state_sync()
        for variable, value in before:
            if variable._value is None and not value.is_deleted():
                variable.assign(value)
        raise


def move_towards(
    pairs: Sequence[tuple[keras.Variable, keras.Variable]], rate: Any
) -> None:
    """Moves each average by a part of its distance to a weight, in place.

    Where that distance is not finite the average stays.

    Args:
        pairs: Averages, each with its weight.
        rate: The part, a scalar tensor.
    """
    if not pairs:
        return
    if NAME == "torch":  # because one kernel for all averages is faster
        averages = [average.value for average, _ in pairs]
        weights = [weight.value for _, weight in pairs]
        with torch.no_grad():
            steps = torch._foreach_sub(weights, averages)
            for step in steps:
                step.nan_to_num_(0.0, 0.0, 0.0)
            torch._foreach_mul_(steps, rate)
            torch._foreach_add_(averages, steps)
        return
    for average, weight in pairs:
        step = weight.value - average.value
        step = ops.where(ops.isfinite(step), step, 0)
        average.assign_add(ops.cast(rate, step.dtype) * step)
