"""Models of Hugging Face's diffusers as Keras layers, with channels last."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.adapters.foreign import check_backend
from keras_mscm.adapters.torch_module import TorchModule

# What each class calls noisy images, classes, sequences and pooled vectors.
CALLED = {
    "UNet2DModel": {"z": "sample", "labels": "class_labels"},
    "UNet2DConditionModel": {
        "z": "sample",
        "labels": "class_labels",
        "context": "encoder_hidden_states",
        "pooled": "text_embeds",
    },
    "DiTTransformer2DModel": {"z": "hidden_states", "labels": "class_labels"},
    "SD3Transformer2DModel": {
        "z": "hidden_states",
        "context": "encoder_hidden_states",
        "pooled": "pooled_projections",
    },
}

# What each class embeds time with; of DiT each block does so for itself.
EMBED_TIME = {
    "UNet2DModel": "time_embedding",
    "UNet2DConditionModel": "time_embedding",
    "DiTTransformer2DModel": "norm1.emb",
    "SD3Transformer2DModel": "time_text_embed",
}


@keras.saving.register_keras_serializable(package="keras_mscm")
class DiffusersModule(TorchModule):
    """A model of diffusers as a Keras layer; a file names it by its class.

    You want it where `from_diffusers` doesn't know the scheduler: in an
    `AdaptedNetwork`, which says what the network predicts. It takes and
    returns arrays with channels last, and its configuration is the model's
    own, in JSON.

    Args:
        module: One of the models that `from_diffusers` takes, or a part of an
            `AutoencoderKL`.
        part: `"encoder"` or `"decoder"` of an `AutoencoderKL`; None for the
            whole of another model.
        whole_steps: Whether times within 0.001 of a whole number are taken
            for that, as is right for tables of steps: log-SNR in float32
            tells steps from each other to 0.0001.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: Dictionary of tensors, by the names of the model's arguments;
            for a part of an autoencoder images or latents.
        training: Whether dropout is on.

    Call returns:
        What the model predicts, channels last; of an encoder the moments of
        the latents, mean and log-variance.

    Raises:
        ValueError: If an argument isn't as above.
    """

    def __init__(
        self,
        module: Any,
        *,
        part: str | None = None,
        whole_steps: bool = False,
        **kwargs: Any,
    ):
        check_backend(type(self).__name__, "torch")
        name, config = described(module)
        _check_class(name, part)
        checks.check_boolean("whole_steps", whole_steps)
        self._make(_part_of(module, part), None, kwargs)
        self.library_class, self.library_config = name, config
        self.part, self.whole_steps = part, whole_steps

    def cast(self, inputs: Any) -> Any:
        if not isinstance(inputs, Mapping):
            return super().cast(inputs)
        # These are the arguments of sinusoids, which must not be rounded.
        exact = ("timestep", "time_ids")
        return {
            name: value
            if name in exact
            else super(DiffusersModule, self).cast(value)
            for name, value in inputs.items()
        }

    def run(self, inputs: Any) -> Any:
        if self.part is not None:
            z = ops.transpose(inputs, (0, 3, 1, 2))
            return ops.transpose(self.module(z), (0, 2, 3, 1))
        # Labels are left out by the model that trains, and not by chance
        # within the network, because a teacher would see others.
        for module in self.module.modules():
            if hasattr(module, "token_drop"):
                module.training = False
        inputs = dict(inputs)
        image = CALLED[self.library_class]["z"]
        z = inputs[image] = ops.transpose(inputs[image], (0, 3, 1, 2))
        if "text_embeds" in inputs:
            inputs["added_cond_kwargs"] = {
                name: inputs.pop(name) for name in ("text_embeds", "time_ids")
            }
        time = inputs["timestep"]
        whole = ops.round(time)
        if self.library_config.get("time_embedding_type") == "learned":
            inputs["timestep"] = ops.cast(whole, "int64")
        elif self.whole_steps:
            near = ops.abs(time - whole) < 1e-3
            inputs["timestep"] = ops.where(near, whole, time)
        if "class_labels" in inputs:
            inputs["class_labels"] = ops.cast(inputs["class_labels"], "int64")
        output = self.module(**inputs, return_dict=False)[0]
        # A network that learned variances too says these after the means.
        return ops.transpose(output[:, : z.shape[1]], (0, 2, 3, 1))

    @contextlib.contextmanager
    def changed(
        self, name: str, change: Callable[[Any], Any]
    ) -> Iterator[None]:
        """As of any module, outside of what is computed again."""
        with super().changed(name, lambda output: change(self._once(output))):
            yield

    def _once(self, output: Any) -> Any:
        """Raises if a part's output is computed again for the gradient."""
        again = getattr(self.module, "is_gradient_checkpointing", False)
        if again and self.library_class == "DiTTransformer2DModel":
            raise ValueError(
                "`network` must not compute its blocks again for the gradient "
                "(`network.disable_gradient_checkpointing()`), because in them "
                "DiT embeds time, to which a step's end is added. Received: "
                "gradient checkpointing"
            )
        return output

    def _give(self, new: Any) -> None:
        new.library_class = self.library_class
        new.library_config = self.library_config
        new.part, new.whole_steps = self.part, self.whole_steps

    def get_config(self) -> dict[str, Any]:
        return {
            **keras.layers.Layer.get_config(self),
            "library_class": self.library_class,
            "library_config": self.library_config,
            "part": self.part,
            "whole_steps": self.whole_steps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`; the parameters are random."""
        check_backend(cls.__name__, "torch")
        config = dict(config)
        name, part = config.pop("library_class", None), config.pop("part", None)
        library_config = config.pop("library_config", None)
        whole_steps = config.pop("whole_steps", False)
        _check_class(name, part)
        if not isinstance(library_config, Mapping):
            raise checks.invalid(
                "library_config", "a dictionary", library_config
            )
        kind = getattr(_library(), name)
        layer = cls.__new__(cls)
        layer._build_from(
            lambda: _part_of(kind.from_config(dict(library_config)), part),
            config,
        )
        layer.library_class, layer.part = name, part
        layer.whole_steps = checks.check_boolean("whole_steps", whole_steps)
        layer.library_config = dict(library_config)
        return layer


def _part_of(module: Any, part: str | None) -> Any:
    """A model, or the half of an autoencoder that maps images one way."""
    if part is None:
        return module
    import torch

    if part == "encoder":
        parts = [module.encoder, module.quant_conv]
    else:
        parts = [module.post_quant_conv, module.decoder]
    return torch.nn.Sequential(*(step for step in parts if step is not None))


def described(module: Any, name: str = "module") -> tuple[str, dict[str, Any]]:
    """The class and the configuration of a model, as JSON has it.

    Args:
        module: What came.
        name: The argument's name.
    """
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise checks.invalid(name, "a model of diffusers", module)
    kept = {k: v for k, v in config.items() if not k.startswith("_")}
    return type(module).__name__, json.loads(json.dumps(kept))


def _check_class(name: Any, part: Any) -> None:
    """Raises unless a class is known, which a file may have named."""
    if part is None:
        checks.check_choice("network", name, (*CALLED,))
    else:
        checks.check_choice("part", part, ("encoder", "decoder"))
        checks.check_choice("vae", name, ("AutoencoderKL",))


def _library() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "A model of diffusers needs that library: `pip install diffusers`"
        ) from error
    return diffusers
