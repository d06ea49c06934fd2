"""States of random generators: made, kept, and put back."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm.backend.framework import NAME

if NAME == "torch":
    import torch


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
