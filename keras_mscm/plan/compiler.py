"""Compiles a step for a TPU slice that isn't there. The one file of JAX."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras

from keras_mscm import backend
from keras_mscm.plan.chips import Slice

# What libtpu asks the machine for, where there is none to be asked. Its import
# fills in what is missing.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Nobody is to be kept from a TPU that nobody uses.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Efforts of the compiler, from -1 to 1.
_QUICK = {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0}


class DoesNotFit(Exception):
    """The compiler found no way to make do with the chip's memory.

    Args:
        needed_bytes: What it would take on each chip, besides the arguments.
        message: What the compiler says.
    """

    def __init__(self, needed_bytes: float, message: str):
        super().__init__(message)
        self.needed_bytes = needed_bytes


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of a compiled step, each number per chip.

    Args:
        text: The program.
        flops: Floating-point operations of a step.
        bytes_accessed: Read and written.
        argument_bytes: Weights, optimizer and data.
        temporary_bytes: What is alive within the step.
        output_bytes: Results.
        alias_bytes: Results that take the arguments' place.
        code_bytes: The program itself.
    """

    text: str
    flops: float
    bytes_accessed: float
    argument_bytes: float
    temporary_bytes: float
    output_bytes: float
    alias_bytes: float
    code_bytes: float


def check_backend() -> None:
    """Raises unless JAX runs underneath Keras.

    Raises:
        ValueError: If Keras runs on another backend.
    """
    if backend.NAME != "jax":
        raise ValueError(
            "Plans are made with JAX, whose compiler knows TPUs: set "
            f"KERAS_BACKEND=jax. Received: KERAS_BACKEND={backend.NAME}"
        )


def check() -> None:
    """Raises unless JAX runs underneath Keras, and libtpu is there.

    Raises:
        ValueError: If Keras runs on another backend.
        ImportError: If libtpu is not installed.
    """
    check_backend()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Plans need the TPU compiler, which runs on any Linux machine: "
            "pip install 'keras-mscm[tpu]'"
        ) from error


def without_values(make: Callable[[], Any]) -> Any:
    """Makes Keras objects whose variables have shapes, and no values.

    Args:
        make: Function that makes them. What it computes is traced, and not
            computed.

    Returns:
        What it returns. It takes no memory, and can be traced with
        `keras.StatelessScope`, but not run.
    """
    import jax

    made = []

    def trace():
        with keras.StatelessScope(initialize_variables=False):
            made.append(make())

    # In a thread of its own: Keras keeps a list per thread of variables that
    # are yet to get values, and the next scope would give these theirs.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(jax.eval_shape, trace).result()
    return made[0]


def compile_step(
    function: Callable[..., Any],
    variables: Any,
    batch: Any,
    constants: tuple,
    chips: Slice,
    *,
    donate: bool,
    axes_of: Callable[[keras.Variable], tuple] | None = None,
    quick: bool = False,
) -> Program:
    """Compiles a step whose batch is spread over the chips of a slice.

    Args:
        function: Function of values of `variables`, `batch` and `constants`.
        variables: Structure of Keras variables.
        batch: Structure of `keras.KerasTensor`s, whose first axis is spread.
        constants: `keras.KerasTensor`s that every chip has.
        chips: The slice.
        donate: Whether the function returns new values of the variables, which
            then take the place of the old ones.
        axes_of: Function of a variable that gives, for each of its axes, None
            or `"batch"`, if the chips share that axis out. By default each
            chip holds all variables.
        quick: Whether the compiler is to spend little time on the program's
            speed.

    Returns:
        What the compiler says.

    Raises:
        DoesNotFit: If the compiler says that a chip's memory doesn't suffice.
        ValueError: If it doesn't know the slice.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = _mesh(chips)

    def abstract(tensor, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(
            tuple(tensor.shape), tensor.dtype, sharding=sharding
        )

    def of_variable(variable):
        return abstract(variable, *(axes_of(variable) if axes_of else ()))

    state = keras.tree.map_structure(of_variable, variables)
    jitted = jax.jit(
        function,
        donate_argnums=0 if donate else (),
        out_shardings=(None, jax.tree.map(lambda v: v.sharding, state))
        if donate
        else None,
    )
    with backend.compiling_for("tpu"):
        lowered = jitted.lower(
            state,
            keras.tree.map_structure(lambda x: abstract(x, "batch"), batch),
            *map(abstract, constants),
        )
    with _memory_errors():
        compiled = lowered.compile(_QUICK if quick else None)
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Program(
        text=compiled.as_text(),
        flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
    )


def flops_of(layer: keras.Layer, inputs: Any) -> float:
    """FLOPs of a layer's call, as it is written, before it is compiled.

    Args:
        layer: A layer, with values or without.
        inputs: Structure of `keras.KerasTensor`s.
    """
    import jax

    variables = layer.variables

    def call(values, inputs):
        with keras.StatelessScope(zip(variables, values)):
            return layer(inputs)

    def shape(x):
        return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)

    lowered = jax.jit(call).lower(
        *keras.tree.map_structure(shape, (variables, inputs))
    )
    return lowered.cost_analysis()["flops"]


def _mesh(chips: Slice) -> Any:
    """All chips of a slice in one row, as data parallelism has them."""
    from jax.experimental import topologies

    # A host has four chips, if nobody says something else.
    alone = {"chips_per_host_bounds": (1, 1, 1)} if chips.num_chips == 1 else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=chips.topology, **alone
        )
    except Exception as error:  # whatever libtpu raises
        raise ValueError(
            "`topology` must be one that libtpu knows. Received: topology="
            f"{chips.topology!r}, of which it says: {error}"
        ) from error
    return topologies.make_mesh(described, (chips.num_chips,), ("batch",))


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    units = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    try:
        yield
    except Exception as error:  # JAX has no class of its own for it
        used = re.search(
            r"required for HLO temporaries \(([\d.]+)([BKMGT])\)", str(error)
        )
        if not used:
            raise
        needed = float(used[1]) * units[used[2]]
        raise DoesNotFit(needed, str(error).split("\n")[0]) from error
