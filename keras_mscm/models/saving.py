"""What a model's file holds besides weights: random states, and arguments."""

import copy
import os
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import lora
from keras_mscm.models import moving_average
from keras_mscm.preset_files import untrusted


def random_states(layer: keras.Layer) -> list[keras.Variable]:
    """The states of the seed generators of a layer and those within."""
    weights = {id(weight) for weight in layer.weights}
    return [v for v in layer.variables if id(v) not in weights]


def states_of_training(model: Any) -> list[keras.Variable]:
    """The random states that a model's training goes on from."""
    return [model.seed_generator.state, *random_states(model.network)]


def save_own_variables(model: Any, store: Any) -> None:
    """Stores the model's own weights and every random state.

    Keras leaves the random states out; with them, training resumes exactly.
    """
    keras.Model.save_own_variables(model, store)
    for i, state in enumerate(states_of_training(model)):
        store[f"seed_{i}"] = ops.convert_to_numpy(state)


def load_own_variables(model: Any, store: Any) -> None:
    """Restores what `save_own_variables` stored."""
    stored = {name: store[name] for name in [*store.keys()]}
    for i, state in enumerate(states_of_training(model)):
        if f"seed_{i}" in stored:
            state.assign(np.asarray(stored.pop(f"seed_{i}")))
    keras.Model.load_own_variables(model, stored)


def from_config(
    cls: Any, config: dict[str, Any], custom_objects: Any = None
) -> Any:
    """The inverse of `get_config`, whoever wrote it.

    Raises:
        ValueError: If it names what Keras doesn't know or what is no function
            of tensors, or the network is larger than this machine's memory.
    """
    untrusted.check_network(config.get("network"), custom_objects)
    if isinstance(config.get("space"), dict):
        untrusted.check_size(lambda: _codec(config["space"], custom_objects))
    # All but plain values were serialised: network, schedule, functions.
    return cls(
        **{
            name: untrusted.deserialize(value, custom_objects)
            if isinstance(value, dict) and name != "dtype"
            else value
            for name, value in config.items()
        }
    )


def _codec(space: dict[str, Any], custom_objects: Any) -> SimpleNamespace:
    """The weights of the autoencoder that a configuration has, built."""
    made = untrusted.deserialize(copy.deepcopy(space), custom_objects)
    weights: list = []
    for layer, shape in (
        (made.encoder, made.picture_shape),
        (made.decoder, made.shape),
    ):
        if layer is not None:
            if not layer.built:  # and not called, which takes its values
                layer.build((None, *shape))
            weights += layer.weights
    return SimpleNamespace(weights=weights)


def save_lora(model: Any, path: str | os.PathLike) -> None:
    """Writes the averaged adapters of a model with `lora_rank`, a small file.

    You want it to hand on a student without the network that it adapts.

    Args:
        path: A file that ends in `.npz`; one that is there is replaced.

    Raises:
        ValueError: If the model has no adapters, or `path` is something else.
    """
    averages = {
        id(weight): average
        for average, weight in moving_average.pairs(
            model.ema_network, model.network
        )
    }
    lora.save_adapters(path, model.network, averages)


def load_lora(model: Any, path: str | os.PathLike) -> None:
    """Reads what `save_lora` wrote, into the adapters and their average.

    Args:
        path: The file.

    Raises:
        ValueError: If it is none, or of other adapters than the model's.
    """
    lora.load_adapters(path, model.network)
    for average, weight in moving_average.pairs(
        model.ema_network, model.network
    ):
        average.assign(ops.cast(weight.value, average.dtype))


def merged_network(model: Any) -> keras.Layer:
    """The averaged network on its own, its adapters folded into its kernels.

    You want it to export a student with `lora_rank`, or to train on.
    """
    inputs = model.symbolic_inputs()
    if hasattr(model.ema_network, "as_network"):
        return lora.merged(model.ema_network.as_network(inputs), inputs)
    return lora.merged(model.ema_network, inputs)
