"""A module of Flax's linen as a Keras layer."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.adapters.embeddings import is_called
from keras_mscm.adapters.flax_module import FlaxModule, Path, mode_argument
from keras_mscm.adapters.foreign import check_backend, with_builder


@keras.saving.register_keras_serializable(package="keras_mscm")
class LinenModule(FlaxModule):
    """A `flax.linen.Module` as a Keras layer, on the jax backend.

    Args:
        module: The module.
        params: Its variables: what `module.init` returns, or `"params"` of it.
            Other collections, such as `"batch_stats"`, aren't trained; in
            training the module may change them.
        builder: Function that makes the module, which a saved file names:
            decorated with `@keras.saving.register_keras_serializable()`. With
            none the layer trains, and its weights can be saved, but neither a
            whole model nor a preset. What is loaded without weights is 0.
        arguments: Keyword arguments of `builder`, of what JSON can hold.
        rngs: Names of the random streams of a call in training. They come from
            this layer's own seed, so that a student's two passes drop the
            same.
        seed: That seed.
        **kwargs: As for any Keras layer.

    Raises:
        ValueError: If an argument isn't as above, or the backend is another.
    """

    def __init__(
        self,
        module: Any,
        params: Mapping[str, Any],
        *,
        builder: Callable[..., Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        rngs: Sequence[str] = ("dropout",),
        seed: int | None = None,
        **kwargs: Any,
    ):
        from flax import linen, traverse_util

        super().__init__(builder, arguments, seed, **kwargs)
        if not isinstance(module, linen.Module):
            raise checks.invalid("module", "a flax.linen.Module", module)
        if not isinstance(params, Mapping) or not params:
            raise checks.invalid("params", "what `module.init` returns", params)
        if "params" not in params:
            params = {"params": params}
        self.module, self.rngs = module, tuple(rngs)
        for path, value in traverse_util.flatten_dict(dict(params)).items():
            if isinstance(value, keras.KerasTensor):
                self._add(path, value, path[0] == "params")
                continue
            tensor = ops.convert_to_tensor(value)
            value_of = functools.partial(ops.copy, tensor)
            self._add(path, tensor, path[0] == "params", value_of)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        import jax
        from flax import traverse_util

        positional, named = self._inputs(inputs)
        named |= mode_argument(self.module.__call__, bool(training))
        flat = self._flat()
        variables = traverse_util.unflatten_dict(flat)
        if not training:
            return self.module.apply(variables, *positional, **named)
        rngs = {}
        if self.rngs:
            key = self.seed_generator.next()
            rngs = {
                name: jax.random.fold_in(key, i)
                for i, name in enumerate(self.rngs)
            }
        changing = [name for name in variables if name != "params"]
        output = self.module.apply(
            variables, *positional, rngs=rngs, mutable=changing, **named
        )
        if not changing:
            return output[0]
        output, changed = output
        for path, value in traverse_util.flatten_dict(dict(changed)).items():
            if path in flat:
                self._assign(path, value)
        return output

    @contextlib.contextmanager
    def changed(
        self, name: str, change: Callable[[Any], Any]
    ) -> Iterator[None]:
        """Changes what the submodules say whose path ends with a name."""
        from flax import linen

        def intercept(call, args, kwargs, context):
            output = call(*args, **kwargs)
            called = context.method_name == "__call__"
            if called and is_called(context.module.path, name):
                return change(output)
            return output

        with linen.intercept_methods(intercept):
            yield

    def _anew(self, kwargs: dict[str, Any]) -> "LinenModule":
        from flax import traverse_util

        return LinenModule(
            self.module,
            traverse_util.unflatten_dict(self._shapes()),
            builder=self.builder,
            arguments=self.arguments if self.builder else None,
            rngs=self.rngs,
            seed=self.seed,
            **kwargs,
        )

    def _shapes(self) -> dict[Path, keras.KerasTensor]:
        return {
            self._paths[name]: keras.KerasTensor(v.shape, v.dtype)
            for name, v in self._variables_of.items()
        }

    def get_config(self) -> dict[str, Any]:
        shapes = [
            [list(path), list(value.shape), value.dtype]
            for path, value in self._shapes().items()
        ]
        return {
            **super().get_config(),
            "rngs": list(self.rngs),
            "variables": shapes,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LinenModule":
        """The inverse of `get_config`; weights are not in a configuration."""
        from flax import traverse_util

        check_backend(cls.__name__, "jax")
        config = with_builder(config)
        shapes = {
            tuple(path): keras.KerasTensor(shape, dtype)
            for path, shape, dtype in config.pop("variables")
        }
        module = config["builder"](**config["arguments"])
        return cls(module, traverse_util.unflatten_dict(shapes), **config)
