"""A PyTorch module as a Keras layer that can be copied, trained and saved."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks
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
        check_backend(type(self).__name__)
        self._check_builder(builder, arguments)
        arguments = dict(arguments or {})
        if module is None:
            if builder is None:
                raise checks.invalid("module", "a torch.nn.Module", module)
            module = builder(**arguments)
        self._make(module, None, kwargs)
        self.builder, self.arguments = builder, arguments

    def _check_builder(self, builder: Any, arguments: Any) -> None:
        if builder is None:
            if arguments is not None:
                raise checks.invalid(
                    "arguments", "None without a `builder`", arguments
                )
            return
        checks.check_function("builder", builder)
        name = keras.saving.get_registered_name(builder)
        if keras.saving.get_registered_object(name) is None:
            raise checks.invalid(
                "builder",
                "a function that is known to Keras, by a line above it: "
                "@keras.saving.register_keras_serializable()",
                builder,
            )
        if arguments is not None and not isinstance(arguments, Mapping):
            raise checks.invalid("arguments", "a dictionary", arguments)

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
        with self._computing(bool(training)):
            args, kwargs = keras.tree.map_structure(self._cast, (args, kwargs))
            return self.run(*args, **kwargs)

    def run(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Calls the module; what a subclass may do in another way."""
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def _computing(self, training: bool) -> Iterator[None]:
        """The module's mode, and the precision in which it computes."""
        import torch

        if self.module.training != training:
            self.module.train(training)
        if self.compute_dtype not in HALVES or self._is_half():
            yield
            return
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, getattr(torch, self.compute_dtype)):
            yield

    def _is_half(self) -> bool:
        return self.variable_dtype in HALVES

    def _cast(self, value: Any) -> Any:
        if not self._is_half() or ops.ndim(value) < 2:
            return value
        floats = "float" in keras.backend.standardize_dtype(value.dtype)
        return ops.cast(value, self.variable_dtype) if floats else value

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """The shape and dtype of what a call returns, without computing it."""
        import torch

        kwargs.pop("training", None)
        values = {
            name: tensor.detach().to("meta")
            for name, tensor in [
                *self.module.named_parameters(),
                *self.module.named_buffers(),
            ]
        }
        shapes = []
        held, self._held = self._held, _Held(_OnMeta(self.module, values))
        try:
            for size in (2, 3):  # for axes of any length
                inputs = keras.tree.map_structure(
                    lambda x, size=size: _on_meta(x, size), (args, kwargs)
                )
                with torch.no_grad(), self._computing(False):
                    inputs = keras.tree.map_structure(self._cast, inputs)
                    shapes.append(self.run(*inputs[0], **inputs[1]))
        finally:
            self._held = held
        return keras.tree.map_structure(
            lambda one, other: keras.KerasTensor(
                [a if a == b else None for a, b in zip(one.shape, other.shape)],
                keras.backend.standardize_dtype(one.dtype),
            ),
            *shapes,
        )

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
        for name, variable in self._tied.items():
            store[name] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Restores what `save_own_variables` stored."""
        names = {*store.keys()}
        if names != {*self._tied}:
            raise ValueError(
                f"A file for {self.name} must hold its weights. Received: "
                f"without {sorted({*self._tied} - names)[:5]}, with "
                f"{sorted(names - {*self._tied})[:5]} besides"
            )
        for name, variable in self._tied.items():
            variable.assign(np.asarray(store[name]))

    def get_config(self) -> dict[str, Any]:
        if self.builder is None:
            raise ValueError(
                "`builder` must be given to TorchModule where a whole model "
                "or a preset is saved, because a module can only be written "
                "down as the function that makes it: `TorchModule(module, "
                "builder=make_module)`. Weights alone need none: "
                "`save_weights`. Received: builder=None"
            )
        return {
            **super().get_config(),
            "builder": keras.saving.serialize_keras_object(self.builder),
            "arguments": self.arguments,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`; the parameters are the builder's."""
        check_backend(cls.__name__)
        config = dict(config)
        builder = config.pop("builder", None)
        if isinstance(builder, dict):
            builder = keras.saving.deserialize_keras_object(builder)
        arguments = config.pop("arguments", None) or {}
        layer = cls.__new__(cls)
        layer._check_builder(builder, arguments)
        if builder is None:
            raise checks.invalid("builder", "a function", builder)
        layer._build_from(lambda: builder(**arguments), config)
        layer.builder, layer.arguments = builder, dict(arguments)
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
    """A module that is called with other tensors for its own."""

    training = False

    def __init__(self, module: Any, values: dict[str, Any]):
        self._module, self._values = module, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch.func import functional_call

        return functional_call(self._module, self._values, args, kwargs)


def _on_meta(value: Any, size: int) -> Any:
    import torch

    if not isinstance(value, keras.KerasTensor):
        return value
    shape = [size if axis is None else axis for axis in value.shape]
    dtype = getattr(torch, keras.backend.standardize_dtype(value.dtype))
    return torch.empty(shape, dtype=dtype, device="meta")


def tensors_of(module: Any) -> dict[str, Any]:
    """The parameters and buffers that a file holds, by name, each one once."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kept = module.state_dict().keys()
    return {name: tensor for name, tensor in named.items() if name in kept}


def check_backend(what: str, name: str = "torch") -> None:
    """Raises unless Keras runs on the framework that is asked for.

    Args:
        what: What needs it.
        name: The backend's name.

    Raises:
        ValueError: If it is another.
    """
    if name != backend.NAME:
        raise ValueError(
            f"{what} must run on KERAS_BACKEND={name}, because the other "
            f"framework's modules do. Received: KERAS_BACKEND={backend.NAME}"
        )
