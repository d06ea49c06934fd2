"""States of random generators."""

import json
import random

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import backend


@pytest.mark.parametrize("seed", [3, None])
def test_rewound(seed):
    dropout = keras.layers.Dropout(0.5, seed=seed)
    other = keras.random.SeedGenerator(1)
    ones = ops.ones((4, 16))

    def draw():
        return ops.convert_to_numpy(dropout(ones, training=True))

    states = [dropout.seed_generator.state]
    with backend.rewound(states):
        first = draw()
        before = ops.convert_to_numpy(keras.random.normal((4,), seed=other))
    np.testing.assert_array_equal(draw(), first)
    assert np.any(draw() != first)
    # What isn't named goes on.
    after = ops.convert_to_numpy(keras.random.normal((4,), seed=other))
    assert np.all(before != after)


def test_host_random_states():
    def draw():
        numbers = [random.random(), random.gauss(), np.random.rand()]  # noqa: NPY002
        if backend.NAME == "torch":
            import torch

            numbers.append(torch.rand(()).item())
        return numbers

    random.gauss()  # which keeps a second number
    states = json.loads(json.dumps(backend.host_random_states()))
    first = draw()
    assert draw() != first
    backend.set_host_random_states(states)
    assert draw() == first
