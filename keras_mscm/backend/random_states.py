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
    # PyTorch's own generator is put back too, because Keras' unseeded Dropout
    # draws from it.
    with (
        torch.random.fork_rng()
        if NAME == "torch"
        else (contextlib.nullcontext())
    ):
        yield
    for state, value in zip(seed_states, before):
        state.assign(value)


def random_state(seed: int, first: int = 0) -> np.ndarray:
    """A state for random draws that needs no variable.

    Args:
        seed: Integer in 0..2**31 - 1.
        first: Number of the first image that it is for.

    Returns:
        Seed and number, as a `keras.random.SeedGenerator` holds seed and count.
    """
    dtype = "uint32" if NAME == "jax" else "int32"
    return np.asarray([_spread(seed), first], dtype)


def seed_generator(seed: int | None) -> keras.random.SeedGenerator:
    """A seed generator that shares no numbers with another seed's.

    Args:
        seed: Integer in 0..2**31 - 3, or None, which draws one.
    """
    if NAME == "torch" and seed is not None:
        seed = _spread(seed)
    return keras.random.SeedGenerator(seed)


def _spread(seed: int) -> int:
    """Maps a seed to one far from those of its neighbours (golden section).

    PyTorch's generator is given the sum of a state's seed and count, so
    neighbouring seeds would draw the same numbers, one after the other.
    """
    return seed * 0x4F1BBCDD % 2**31


def host_random_states() -> dict[str, Any]:
    """States of the generators outside of any model, as JSON takes them.

    They are Python's, NumPy's and on PyTorch its own: from these Keras draws
    the order in which `fit(..., shuffle=True)` takes data. (On TensorFlow the
    order of arrays comes from within `tf.data`, which doesn't say.)
    """
    states = {
        "python": random.getstate(),
        # NumPy's legacy generator, because Keras draws from it.
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
