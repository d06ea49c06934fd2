"""What a model's file holds besides weights: random states, and arguments."""

from typing import Any

import keras
import numpy as np
from keras import ops

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
    # All but plain values were serialised: network, schedule, functions.
    return cls(
        **{
            name: untrusted.deserialize(value, custom_objects)
            if isinstance(value, dict) and name != "dtype"
            else value
            for name, value in config.items()
        }
    )
