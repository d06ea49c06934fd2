"""A module of Flax's nnx as a Keras layer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from keras_mscm import checks
from keras_mscm.adapters.embeddings import is_called, then, unknown
from keras_mscm.adapters.flax_module import FlaxModule, Path, mode_argument
from keras_mscm.adapters.foreign import check_backend, with_builder


@keras.saving.register_keras_serializable(package="keras_mscm")
class NnxModule(FlaxModule):
    """A `flax.nnx.Module` as a Keras layer, on the jax backend.

    Args:
        module: The module. Its `nnx.Param`s are trained; what else it has,
            such as `nnx.BatchStat`s, isn't, but in training it may change.
            Its random streams are seeded by this layer, so that a student's
            two passes drop the same.
        builder: Function that makes such a module, as for `LinenModule`.
        arguments: Keyword arguments of `builder`, of what JSON can hold.
        seed: Seed of the random streams.
        **kwargs: As for any Keras layer.

    Raises:
        ValueError: If an argument isn't as above, or the backend is another.
    """

    def __init__(
        self,
        module: Any,
        *,
        builder: Callable[..., Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(builder, arguments, seed, **kwargs)
        self._make(module)

    def _make(self, module: Any, real: Callable[[], Any] | None = None) -> None:
        """Makes the layer of a module.

        Args:
            module: The module; with `real` it may be one of shapes alone.
            real: Makes it with values, where they are wanted.
        """
        from flax import nnx

        if not isinstance(module, nnx.Module):
            raise checks.invalid("module", "a flax.nnx.Module", module)
        # Of a typed library; how many states come depends on the arguments.
        split: Any = nnx.split
        _, trained, random, rest = split(module, nnx.Param, nnx.RngState, ...)
        # The mode that a module is in, training or not, is part of its graph.
        copied = nnx.merge(*nnx.split(module))
        copied.train()
        training = nnx.graphdef(copied)
        copied.eval()
        graphs = {True: training, False: nnx.graphdef(copied)}
        mode = {on: mode_argument(module.__call__, on) for on in graphs}
        made: dict[Path, Any] = {}

        def value_of(path, value):
            def function():
                if real is None:
                    return value
                if not made:
                    made.update(nnx.to_flat_state(nnx.state(real())))
                return made[path].get_value()

            return function

        for state, trainable in ((trained, True), (rest, False)):
            for path, variable in nnx.to_flat_state(state):
                value = variable.get_value()
                self._add(path, value, trainable, value_of(path, value))
        if made:  # the keys have values now, too
            random = nnx.from_flat_state(
                [(path, made[path]) for path, _ in nnx.to_flat_state(random)]
            )
        # In a function, because Keras would track what is in attributes.
        self._changing: Callable = lambda module: contextlib.nullcontext()
        self._parts = lambda on: (graphs[on], mode[on], trained, random, rest)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        from flax import nnx

        training = bool(training)
        positional, named = self._inputs(inputs)
        module = self._merged(training, self._flat())
        mode = self._parts(training)[1]
        with self._changing(module):
            output = module(*positional, **named, **mode)
        if training:
            split: Any = nnx.split
            states = split(module, nnx.Param, nnx.RngState, ...)
            for path, value in nnx.to_flat_state(states[-1]):
                self._assign(path, value.get_value())
        return output

    @contextlib.contextmanager
    def changed(
        self, name: str, change: Callable[[Any], Any]
    ) -> Iterator[None]:
        """Changes what the submodules say whose path ends with a name."""
        before = self._changing
        self._changing = lambda module: _changed(module, name, change)
        try:
            yield
        finally:
            self._changing = before

    def _merged(self, training: bool, values: dict[Path, Any]) -> Any:
        """The module, with other values for its variables."""
        from flax import nnx

        graph, _, trained, random, rest = self._parts(training)
        states = [
            nnx.from_flat_state(
                [
                    (path, variable.replace(values[path]))
                    for path, variable in nnx.to_flat_state(state)
                ]
            )
            for state in (trained, rest)
        ]
        random = self._seeded(random, training)
        return nnx.merge(graph, states[0], random, states[1])

    def _seeded(self, random: Any, training: bool) -> Any:
        """The random streams of one call, in training by this layer's seed."""
        import jax
        from flax import nnx

        flat = nnx.to_flat_state(random)
        key = self.seed_generator.next() if training and flat else None
        seeded = []
        for i, (path, variable) in enumerate(flat):
            value = variable.get_value()
            if key is not None and isinstance(variable, nnx.RngKey):
                # As many words as the module's own kind of key has.
                words = jax.random.bits(
                    jax.random.fold_in(key, i),
                    jax.random.key_data(value).shape,
                    "uint32",
                )
                value = jax.random.wrap_key_data(
                    words, impl=jax.random.key_impl(value)
                )
            # A new variable, because the module counts in the one it is given.
            seeded.append((path, variable.replace(value)))
        return nnx.from_flat_state(seeded)

    def _anew(self, kwargs: dict[str, Any]) -> "NnxModule":
        values = {
            self._paths[name]: variable.value
            for name, variable in self._variables_of.items()
        }
        return NnxModule(
            self._merged(False, values),
            builder=self.builder,
            arguments=self.arguments if self.builder else None,
            seed=self.seed,
            **kwargs,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NnxModule":
        """The inverse of `get_config`; the parameters are the builder's."""
        from flax import nnx

        check_backend(cls.__name__, "jax")
        config = with_builder(config)
        arguments = config["arguments"]

        def make():
            return config["builder"](**arguments)

        layer = cls.__new__(cls)
        FlaxModule.__init__(layer, **config)
        try:
            module, real = nnx.eval_shape(make), make
        except Exception:  # because not every module can be made so
            module, real = make(), None
        layer._make(module, real)
        return layer


@contextlib.contextmanager
def _changed(
    module: Any, name: str, change: Callable[[Any], Any]
) -> Iterator[None]:
    """Changes what the parts of a module say whose path ends with a name."""
    from flax import nnx

    owners: dict[Path, Any] = {(): module}
    owners |= {tuple(path): part for path, part in nnx.iter_modules(module)}
    parts = {
        path: part for path, part in owners.items() if is_called(path, name)
    }
    if not parts:
        raise unknown(name, [".".join(map(str, path)) for path in owners])
    for path, part in parts.items():
        # Functions in their places, because nnx has no hooks.
        vars(owners[path[:-1]])[path[-1]] = then(part, change)
    try:
        yield
    finally:
        for path, part in parts.items():
            vars(owners[path[:-1]])[path[-1]] = part
