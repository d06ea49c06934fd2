"""The one file that knows which framework runs underneath Keras.

JAX hands a training step its state and takes it back; TensorFlow and PyTorch
update variables in place. Everything that this difference touches is here.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

NAME = keras.backend.backend()

if NAME == "jax":
    import jax

    from keras_mscm.backend import tpu_attention, tpu_layouts
elif NAME == "tensorflow":
    import tensorflow as tf
elif NAME == "torch":
    import torch
else:
    raise ImportError(
        "keras_mscm runs on the Keras backends 'jax', 'tensorflow' and "
        f"'torch'. Received: KERAS_BACKEND={NAME}"
    )


def process() -> tuple[int, int]:
    """Number of this process, from 0, and how many train one model.

    On JAX, after `keras.distribution.initialize`. TensorFlow's workers share
    out a `tf.data.Dataset` by themselves, so each counts as the only one.
    """
    if NAME == "jax" and jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return 0, 1


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
    """Lets what runs within wait for a batch of data.

    In a graph, TensorFlow begins with whatever needs no data: at the end of a
    stream of unknown length that is a step without a batch, which would still
    be counted.

    Args:
        data: Tensors, as they come to a step.
    """
    if NAME == "tensorflow" and not tf.executing_eagerly():
        tensors = [x for x in keras.tree.flatten(data) if x is not None]
        return tf.control_dependencies(tensors)
    return contextlib.nullcontext()


def replica() -> tuple[Any, int]:
    """Which of how many replicas of a step this one is.

    Under a strategy of `tf.distribute` each replica runs the step with a share
    of the batch. Elsewhere a step always sees the whole: on JAX the compiler
    divides it among the devices.

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
    """Whether a strategy of `tf.distribute` spreads it over machines.

    Args:
        model: Model that was compiled within the strategy's scope.
    """
    if NAME != "tensorflow":
        return False
    several = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(model.distribute_strategy, several)


def shares(model: keras.Model) -> int:
    """Among how many a batch that this process gives to Keras is divided.

    Args:
        model: Model that is trained on it.
    """
    distribution = keras.distribution.distribution()
    if NAME == "tensorflow":
        return model.distribute_strategy.num_replicas_in_sync
    if NAME != "jax" or distribution is None:
        return 1
    replicas = distribution.num_model_replicas
    if distribution.auto_shard_dataset:  # Keras is given the whole batch
        return replicas
    return max(replicas // distribution.num_processes, 1)


def lies_on(variable: keras.Variable, distribution: Any) -> bool:
    """Whether a variable lies on a distribution's devices, all of them."""
    mesh = distribution.device_mesh.backend_mesh
    return variable.value.sharding.device_set == set(mesh.devices.flat)


def divided(batch: Any) -> Any:
    """Divides a batch among devices, in what `compile_inference` compiles.

    A batch that doesn't divide is computed whole by each. Without
    `keras.distribution` nothing happens.

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


def _gathered(outputs: Any) -> Any:
    """Tensors whole on each device, so that each process can read them."""
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

    Replicas hold the same seed and would draw the same: each draws for the
    whole batch here, and takes what belongs to its share.

    Args:
        function: One of `keras.random`'s.
        shape: Shape of the numbers of this replica's share, batch first.
        seed: Seed generator.
    """
    index, number = replica()
    if number == 1:
        return function(shape, seed=seed)
    share, *rest = shape
    numbers = function((number * share, *rest), seed=seed)
    return numbers[index * share : (index + 1) * share]


@contextlib.contextmanager
def values_kept(model: keras.Model) -> Iterator[None]:
    """Runs Keras' `fit`, `evaluate` or `predict` without losing weights.

    On JAX these take the values out of the variables before the first step,
    and don't put them back if that step fails (to compile, say).

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
        for variable, value in before:
            if variable._value is None and not value.is_deleted():
                variable.assign(value)
        raise


@contextlib.contextmanager
def rewound(seed_states: Sequence[keras.Variable]) -> Iterator[None]:
    """Runs a block, then puts the random states back to what they were.

    What runs next draws the same random numbers as the block did.

    Args:
        seed_states: The states of the `SeedGenerator`s that the block uses.
    """
    before = [ops.copy(state.value) for state in seed_states]
    # Keras' unseeded Dropout draws from PyTorch's own generator.
    with (
        torch.random.fork_rng()
        if NAME == "torch"
        else (contextlib.nullcontext())
    ):
        yield
    for state, value in zip(seed_states, before):
        state.assign(value)


def random_state(*seeds: int) -> np.ndarray:
    """A state for random draws that needs no variable.

    It lies far from the states of other seeds and from those that follow on
    them: on PyTorch, Keras adds a state's seed and count, so that neighbouring
    seeds would draw the same numbers one after the other.

    Args:
        *seeds: Integers.

    Returns:
        Seed and count, as a `keras.random.SeedGenerator` holds them.
    """
    words = np.random.SeedSequence([int(seed) % 2**64 for seed in seeds])
    seed = words.generate_state(1)[0] >> 1
    return np.asarray([seed, 0], "uint32" if NAME == "jax" else "int32")


def host_random_states() -> dict[str, Any]:
    """States of the generators outside of any model, as JSON takes them.

    They are Python's, NumPy's and on PyTorch its own: from these Keras draws
    the order in which `fit(..., shuffle=True)` takes data. (On TensorFlow the
    order of arrays comes from within `tf.data`, which doesn't say.)
    """
    states = {
        "python": random.getstate(),
        # NumPy's old global one, which Keras draws from.
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
    }
    if NAME == "torch":
        states["torch"] = torch.get_rng_state()
    return keras.tree.map_structure(
        lambda x: x.tolist() if hasattr(x, "tolist") else x, states
    )


def set_host_random_states(states: dict[str, Any]) -> None:
    """Puts generators back to what `host_random_states` has returned."""
    version, words, rest = states["python"]
    random.setstate((version, tuple(words), rest))
    np.random.set_state(states["numpy"])  # noqa: NPY002
    if NAME == "torch" and "torch" in states:
        words = torch.tensor(states["torch"], dtype=torch.uint8, device="cpu")
        torch.set_rng_state(words)


def move_towards(
    pairs: Sequence[tuple[keras.Variable, keras.Variable]], rate: Any
) -> None:
    """Moves each average by a share of its distance to a weight, in place.

    Where that distance is not finite the average stays.

    Args:
        pairs: Averages, each with its weight.
        rate: The share, a scalar tensor.
    """
    if NAME == "torch":  # a kernel for all, not several for each
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


def compile_inference(
    function: Callable[..., Any], variables: Sequence[keras.Variable]
) -> Callable[..., Any]:
    """Compiles a function of tensors that reads `variables`.

    Args:
        function: Function of tensors, or dictionaries of them; it assigns
            nothing.
        variables: The variables that it reads. Their values at the time of a
            call count, without recompilation.

    Returns:
        A function of the same arguments (arrays, numbers or tensors).
    """
    if NAME == "jax":

        @jax.jit
        def compiled(values, *args):
            with keras.StatelessScope(state_mapping=zip(variables, values)):
                return _gathered(function(*args))

        # Not `v.value`: outside of any scope it is the same, and to find that
        # out takes 1 us a variable, of which a small network has a hundred.
        return lambda *args: compiled([v._value for v in variables], *args)
    if NAME == "tensorflow":
        graph, traced = tf.function(function, jit_compile=True), {}

        def run(*args):
            tensors = _converted(args, tf.convert_to_tensor)
            # `graph` would find its trace itself, for which it takes a fifth of
            # a small network's time.
            flat = keras.tree.flatten(tensors)
            kinds = tuple((x.shape, x.dtype) for x in flat)
            if kinds not in traced:
                traced[kinds] = graph.get_concrete_function(*tensors)
            return traced[kinds](*tensors)

        return run

    def eager(*args):
        with torch.inference_mode():
            return function(*_converted(args, ops.convert_to_tensor))

    return eager


def _converted(args: Sequence[Any], convert: Callable[[Any], Any]) -> list:
    """Arrays, or dictionaries of them: faster than any `map_structure`."""
    return [
        {name: convert(value) for name, value in arg.items()}
        if isinstance(arg, dict)
        else convert(arg)
        for arg in args
    ]


def normalized_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    query_scale: Any,
    epsilons: tuple[float, float],
    mask: Any = None,
) -> Any:
    """Attention of queries and keys, each divided by its root mean square.

    `keras.ops.dot_product_attention`, on TPUs and in float16 too.

    On TPUs it is `tpu_attention.attention`: there Keras takes JAX's Splash
    attention as if places were in causal order, and leaves out the scale
    (3.15.1).

    In float16 JAX asks for a product that adds up in float32, which XLA has
    for GPUs only; on a CPU or TPU that fails when the step is compiled, too
    late for the other ways that JAX and Keras would try. There it is computed
    in float32.

    Args:
        query: `(batch, places, heads, channels)`.
        key: `(batch, length, heads, channels)`.
        value: `(batch, length, heads, channels)`.
        query_scale: What the normalised queries are multiplied by,
            `(channels,)`. The keys' need no scale, as what multiplies the one
            multiplies the other.
        epsilons: What the mean squares of queries, and of keys, are increased
            by.
        mask: True where a key counts, of a shape that broadcasts to `(batch,
            heads, places, length)`. None if all do.

    Returns:
        `(batch, places, heads, channels)`.
    """
    if _on_tpu():
        attention = functools.partial(
            tpu_attention.attention,
            query_scale=ops.cast(query_scale, "float32"),
            epsilons=epsilons,
        )
    else:
        attention = ops.dot_product_attention
        query = ops.rms_normalization(query, query_scale, epsilon=epsilons[0])
        key = ops.rms_normalization(key, epsilon=epsilons[1])
    if NAME != "jax" or query.dtype != "float16" or _platform() == "gpu":
        return attention(query, key, value, mask=mask)
    exact = [ops.cast(x, "float32") for x in (query, key, value)]
    return ops.cast(attention(*exact, mask=mask), "float16")


def laid_out(maps: Any) -> Any:
    """Feature maps as convolutions on TPUs take and leave them.

    Args:
        maps: `(batch, height, width, channels)`.

    Returns:
        The same.
    """
    return tpu_layouts.places_first(maps) if _on_tpu() else maps


def unpooled(maps: Any, unpool: keras.layers.UpSampling2D) -> Any:
    """`unpool(maps)`, on TPUs too.

    Args:
        maps: `(batch, height, width, channels)`.
        unpool: Gives what is at each place to four.

    Returns:
        `(batch, 2 height, 2 width, channels)`.
    """
    return tpu_layouts.unpooled(maps) if _on_tpu() else unpool(maps)


_compiled_for: str | None = None


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Traces on JAX what is within for another platform than this machine's.

    Args:
        platform: JAX's name of it, such as `"tpu"`.
    """
    global _compiled_for
    before, _compiled_for = _compiled_for, platform
    try:
        yield
    finally:
        _compiled_for = before


def _platform() -> str:
    return _compiled_for or jax.default_backend()


def _on_tpu() -> bool:
    return NAME == "jax" and _platform() == "tpu"


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes one kernel of a function of tensors that runs within a step.

    TensorFlow runs a step on the CPU operation by operation, each of which
    reads and writes memory; this compiles what is within. JAX does so anyway,
    and PyTorch's compiler can't be counted on to be there.

    Args:
        function: Function of tensors and numbers; it reads no variable.

    Returns:
        A function of the same arguments.
    """
    if NAME == "tensorflow":
        return tf.function(function, jit_compile=True, autograph=False)
    return function


def portable(config: Any) -> Any:
    """A serialised object without what only one backend has.

    On PyTorch Keras writes down its own subclasses of the optimizers, which
    load on the other backends, but fail in the first step.

    Args:
        config: What `keras.saving.serialize_keras_object` has returned.

    Returns:
        The same with Keras' public optimizers.
    """
    if isinstance(config, (list, tuple)):
        return [portable(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {name: portable(value) for name, value in config.items()}
    if str(config.get("module")).startswith("keras.src.backend.torch.optim"):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config
