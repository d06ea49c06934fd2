"""A PyTorch module as a Keras layer that can be copied, trained and saved."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.adapters.embeddings import is_called, unknown
from keras_mscm.adapters.foreign import (
    builder_config,
    check_backend,
    check_builder,
    load_arrays,
    save_arrays,
    with_builder,
)
from keras_mscm.functional.process import Tensor

HALVES = ("bfloat16", "float16")


class _Held:
    """Keeps a module away from Keras, which would wrap any attribute that is.

    Its parameters are variables of the layer already.
    """

    def __init__(self, module: Any):
        self.module = module


@keras.saving.register_keras_serializable(package="keras_mscm")
class TorchModule(keras.layers.Layer):
    """A `torch.nn.Module` as a Keras layer, on the torch backend.

    You want it for a network that was written in PyTorch: `AdaptedNetwork`
    takes it as the network within. Unlike `keras.layers.TorchModuleWrapper` it
    can be copied (`clone`), it tracks buffers, such as the statistics of a
    batch normalisation, and what it writes to a file are arrays, never a
    pickle.

    The module's parameters are the layer's weights, and not copies of them:
    what trains the layer trains the module. They are trainable where they
    require a gradient. A module in `bfloat16` or `float16` computes in it; one
    in float32 does under a policy such as `"mixed_bfloat16"`, by
    `torch.autocast`. Times, which have one axis, stay float32 either way.

    Random numbers, such as dropout's, come from PyTorch's default generators.
    A student's two passes drop the same, because a model rewinds these too,
    and `keras.utils.set_random_seed` seeds them.

    Args:
        module: The module; where it is None, `builder` makes it.
        builder: Function that makes a module of the same parameters, which a
            saved file names: decorated with
            `@keras.saving.register_keras_serializable()`. Without one the
            layer trains, and its weights can be saved, but neither a whole
            model nor a preset.
        arguments: Keyword arguments of `builder`, of what JSON can hold.
        **kwargs: As for any Keras layer.

    Call arguments:
        *args: Tensors, the module's own arguments.
        training: Whether the module is in its mode of training.
        **kwargs: Tensors, by name.

    Call returns:
        What the module returns.

    Raises:
        ValueError: If an argument isn't as above, or the backend is another.

    Example:

    ```python
    @keras.saving.register_keras_serializable("mine")
    def make_unet(width):
        return UNet(width)  # a torch.nn.Module

    layer = TorchModule(builder=make_unet, arguments={"width": 64})
    layer.module.load_state_dict(torch.load("unet.pt", weights_only=True))
    ```
    """

    def __init__(
        self,
        module: Any = None,
        *,
        builder: Callable[..., Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        check_backend(type(self).__name__, "torch")
        arguments = check_builder(builder, arguments)
        if module is None:
            if builder is None:
                raise checks.invalid("module", "a torch.nn.Module", module)
            module = builder(**arguments)
        self._make(module, None, kwargs)
        self.builder, self.arguments = builder, arguments

    def _make(
        self, module: Any, real: Callable[[], Any] | None, kwargs: Any
    ) -> None:
        """Makes the layer of a module.

        Args:
            module: The module; with `real` its tensors may have no values.
            real: Makes it with values, where they are wanted.
            kwargs: As for any Keras layer.
        """
        import torch

        if not isinstance(module, torch.nn.Module):
            raise checks.invalid("module", "a torch.nn.Module", module)
        lazy = torch.nn.modules.lazy.LazyModuleMixin
        if any(
            isinstance(part, lazy) and part.has_uninitialized_params()
            for part in module.modules()
        ):
            raise checks.invalid(
                "module", "a module whose parameters have shapes", module
            )
        halves = {str(p.dtype).split(".")[-1] for p in module.parameters()}
        if len(halves) == 1 and (half := halves.pop()) in HALVES:
            kwargs.setdefault("dtype", half)
        # Times must not be rounded; what else is cast, `call` does.
        kwargs.setdefault("autocast", False)
        keras.layers.Layer.__init__(self, **kwargs)
        made: list = []

        def value_of(name):
            def initializer(shape, dtype=None):
                if real is not None and not made:
                    made.append(real())
                return tensors_of(made[0] if made else module)[name]

            return initializer

        # Made as others are, by an initializer, so that Keras can leave the
        # values out where a file is asked for its size.
        tied = {}
        for name, tensor in tensors_of(module).items():
            tied[name] = self.add_weight(
                # Keras' own PyTorch layer takes no dots in names.
                name=name.replace(".", "-"),
                shape=tuple(tensor.shape),
                dtype=keras.backend.standardize_dtype(tensor.dtype),
                initializer=value_of(name),
                trainable=tensor.requires_grad,
            )
        self._tied = tied
        self._held = _Held(made[0] if made else module)
        if all(variable._value is not None for variable in tied.values()):
            self._tie()
        self.built = True

    def _tie(self) -> None:
        """Makes the variables' tensors the module's."""
        import torch

        for name, variable in self._tied.items():
            owner, _, leaf = name.rpartition(".")
            part = self.module.get_submodule(owner)
            if leaf in part._parameters:
                if part._parameters[leaf] is not variable.value:
                    setattr(part, leaf, variable.value)
            else:
                # Of the same memory, because a module writes to a buffer.
                setattr(part, leaf, variable.value.data)
        device = next(iter(self._tied.values())).value.device
        # What no file holds, such as tables of positions.
        for part in self.module.modules():
            for leaf, tensor in part._buffers.items():
                if isinstance(tensor, torch.Tensor) and (
                    tensor.device != device
                ):
                    part._buffers[leaf] = tensor.to(device)

    @property
    def module(self) -> Any:
        """The module, of which the layer's weights are the parameters."""
        return self._held.module

    def call(
        self, *args: Tensor, training: bool | None = None, **kwargs: Tensor
    ) -> Any:
        with self._computing(bool(training), (args, kwargs)):
            values = [self.cast(value) for value in args]
            named = {name: self.cast(value) for name, value in kwargs.items()}
            return self.run(*values, **named)

    def run(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Calls the module; what a subclass may do in another way."""
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def changed(
        self, name: str, change: Callable[[Any], Any]
    ) -> Iterator[None]:
        """Changes what the submodules say whose path ends with a name."""
        named = dict(self.module.named_modules())
        parts = [named[path] for path in named if is_called(path, name)]
        if not parts:
            raise unknown(name, named)
        hooks = [
            part.register_forward_hook(lambda _, given, output: change(output))
            for part in parts
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _computing(self, training: bool, inputs: Any) -> Iterator[None]:
        """The module's mode, and the precision in which it computes."""
        import torch

        if self.module.training != training:
            self.module.train(training)
        device, held = next(iter(self._tied.values())).value.device, self._held
        if any(value.is_meta for value in keras.tree.flatten(inputs)):
            # Keras asks for the shape alone, which need not be computed.
            self._held = _Held(_OnMeta(self.module))
        try:
            if self.compute_dtype not in HALVES or self._is_half():
                yield
            else:
                dtype = getattr(torch, self.compute_dtype)
                with torch.autocast(device.type, dtype):
                    yield
        finally:
            self._held = held

    def _is_half(self) -> bool:
        return self.variable_dtype in HALVES

    def cast(self, inputs: Any) -> Any:
        """An input in half precision, if that is the module's."""
        if not self._is_half():
            return inputs

        def half(value):
            floats = "float" in keras.backend.standardize_dtype(value.dtype)
            if not floats or ops.ndim(value) < 2:
                return value
            return ops.cast(value, self.variable_dtype)

        return keras.tree.map_structure(half, inputs)

    # Copies and files.

    def clone(self, name: str | None = None) -> Self:
        """A second layer around a copy of the module, with the same values.

        What is trainable is so in both; all that was, if the layer as a whole
        is frozen.

        Args:
            name: The copy's name; by default a new one.
        """
        new = self.__class__.__new__(self.__class__)
        kwargs = {"name": name} if name else {}
        trained = {id(v) for v in self._trainable_variables}
        module = copy.deepcopy(self.module)
        tensors = tensors_of(module)
        for key, variable in self._tied.items():
            learns = variable.trainable or not self.trainable
            if id(variable) in trained:
                tensors[key].requires_grad_(learns)
        new._make(module, None, {**kwargs, "dtype": self.dtype_policy})
        self._give(new)
        return new

    def _give(self, new: Any) -> None:
        """Gives a copy what isn't in the module."""
        new.builder, new.arguments = self.builder, self.arguments

    def save_own_variables(self, store: Any) -> None:
        """Stores every parameter and buffer, under the module's own names."""
        save_arrays(self._tied, store)

    def load_own_variables(self, store: Any) -> None:
        """Restores what `save_own_variables` stored."""
        load_arrays(self._tied, store)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **builder_config(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`; the parameters are the builder's."""
        check_backend(cls.__name__, "torch")
        config = with_builder(config)
        builder, arguments = config.pop("builder"), config.pop("arguments")
        layer = cls.__new__(cls)
        layer._build_from(lambda: builder(**arguments), config)
        layer.builder, layer.arguments = builder, arguments
        return layer

    def _build_from(self, make: Callable[[], Any], kwargs: Any) -> None:
        """Makes the layer by a function, which a size alone takes no memory."""
        import torch

        try:
            with torch.device("meta"):
                module, real = make(), make
        except Exception:  # because not every module can be made so
            module, real = make(), None
        self._make(module, real, kwargs)


class _OnMeta:
    """A module that is called with shapes for its tensors."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch.func import functional_call

        module = self._module
        named = [*module.named_parameters(), *module.named_buffers()]
        shapes = {name: tensor.detach().to("meta") for name, tensor in named}
        return functional_call(module, shapes, args, kwargs)


def tensors_of(module: Any) -> dict[str, Any]:
    """The parameters and buffers that a file holds, by name, each one once."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept = module.state_dict().keys()
    return {name: tensor for name, tensor in named.items() if name in kept}
