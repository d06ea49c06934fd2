"""What modules of Flax have in common as Keras layers."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

import keras
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.adapters.foreign import (
    builder_config,
    check_backend,
    check_builder,
    load_arrays,
    save_arrays,
)
from keras_mscm.functional.process import Tensor

Path = tuple[Any, ...]
# What modules call the argument that tells them that they train, or don't.
MODES = ("training", "train", "is_training")


class FlaxModule(keras.layers.Layer):
    """What `LinenModule` and `NnxModule` share: variables by their paths.

    Unlike `keras.layers.FlaxLayer` it names its weights, can be copied
    (`clone`), and is saved without the module, which has no configuration
    that could be read safely.

    Call arguments:
        inputs: Dictionary of tensors by the names of the module's arguments,
            or a list of them.
        training: Whether dropout is on and statistics are updated.

    Call returns:
        What the module returns.
    """

    def __init__(
        self,
        builder: Callable[..., Any] | None,
        arguments: Mapping[str, Any] | None,
        seed: int | None,
        **kwargs: Any,
    ):
        check_backend(type(self).__name__, "jax")
        arguments = check_builder(builder, arguments)
        # Times must not be rounded; what else is cast, `call` does.
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        self.builder, self.arguments = builder, arguments
        self.seed = checks.check_seed("seed", seed)
        self.seed_generator = backend.seed_generator(self.seed)
        self._paths: dict[str, Path] = {}
        self._variables_of: dict[str, keras.Variable] = {}

    def _add(
        self,
        path: Path,
        like: Any,
        trainable: bool,
        value: Callable[[], Any] | None = None,
    ) -> None:
        """A weight of a path, whose value a function gives where it is wanted.

        Args:
            path: Where it is in the module's tree.
            like: Anything of its shape and dtype.
            trainable: Whether it is trained.
            value: Function that gives its value; None for 0.
        """
        name = ".".join(map(str, path))

        def initializer(shape, dtype=None):
            if value is None:
                return ops.zeros(shape, dtype)
            # A copy, because JAX gives buffers away in a step.
            return ops.copy(ops.convert_to_tensor(value(), dtype))

        self._paths[name] = path
        self._variables_of[name] = self.add_weight(
            name=name,
            shape=tuple(like.shape),
            dtype=keras.backend.standardize_dtype(like.dtype),
            initializer=initializer,
            trainable=trainable,
        )

    def _flat(self, trainable: bool | None = None) -> dict[Path, Tensor]:
        """Values by path, in the precision in which the layer computes."""
        trained = {id(v) for v in self._trainable_variables}
        return {
            self._paths[name]: self._cast(variable.value)
            for name, variable in self._variables_of.items()
            if trainable is None or (id(variable) in trained) == trainable
        }

    def _cast(self, value: Any) -> Any:
        floats = "float" in keras.backend.standardize_dtype(value.dtype)
        if floats and self.compute_dtype in ("bfloat16", "float16"):
            return ops.cast(value, self.compute_dtype)
        return value

    def _cast_input(self, value: Any) -> Any:
        return self._cast(value) if ops.ndim(value) > 1 else value

    def _assign(self, path: Path, value: Any) -> None:
        variable = self._variables_of[".".join(map(str, path))]
        variable.assign(ops.cast(value, variable.dtype))

    def _inputs(self, inputs: Any) -> tuple[list, dict[str, Any]]:
        if isinstance(inputs, Mapping):
            named = {k: self._cast_input(v) for k, v in inputs.items()}
            return [], named
        inputs = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        return [self._cast_input(value) for value in inputs], {}

    def clone(self, name: str | None = None) -> Self:
        """A second layer with the same values, of which none are shared.

        Args:
            name: Its name; by default a new one.
        """
        new = self._anew({"name": name, "dtype": self.dtype_policy})
        for key, theirs in self._variables_of.items():
            ours = new._variables_of[key]
            ours.trainable = theirs.trainable or not self.trainable
            ours.assign(ops.copy(theirs.value))
        new.seed_generator.state.assign(
            ops.copy(self.seed_generator.state.value)
        )
        return new

    def _anew(self, kwargs: dict[str, Any]) -> Self:
        raise NotImplementedError

    def save_own_variables(self, store: Any) -> None:
        """Stores every weight under its path."""
        save_arrays(self._variables_of, store)

    def load_own_variables(self, store: Any) -> None:
        """Restores what `save_own_variables` stored."""
        load_arrays(self._variables_of, store)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **builder_config(self),
            "seed": self.seed,
        }


def mode_argument(function: Callable[..., Any], training: bool) -> dict:
    """The argument that tells a module whether it trains, if it takes one.

    Args:
        function: What is called.
        training: Whether it trains.

    Returns:
        That argument by its name, or nothing.
    """
    names = inspect.signature(function).parameters
    told = {name: training for name in MODES if name in names}
    if "deterministic" in names:
        told["deterministic"] = not training
    return told
