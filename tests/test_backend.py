"""The one file that knows which framework runs underneath."""

import json
import os
import random
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import backend


class Counter(keras.Model):
    """A model with one weight of each kind."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")
        self.count = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="count"
        )
        self.dense.build((None, 2))
        self.built = True


def number(tensor):
    return float(ops.convert_to_numpy(tensor))


def test_process():
    assert backend.process() == (0, 1)


TWO_PROCESSES = """if True:
    import sys
    import keras
    from keras_mscm import backend
    assert backend.process() == (0, 1)
    keras.distribution.initialize(sys.argv[1], 2, int(sys.argv[2]))
    print(*backend.process())
"""


@pytest.mark.skipif(backend.NAME != "jax", reason="JAX has processes")
def test_process_of_two():
    """And asking before they know of each other gets in nobody's way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, address, str(i)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    # The last words: Gloo may say something of its own before.
    told = [run.communicate(timeout=120)[0].split()[-2:] for run in runs]
    assert told == [["0", "2"], ["1", "2"]]


def test_run_with_state():
    model = Counter()
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)

    def function():
        model.count.assign_add(2.0)
        return model.count + model.dense.kernel[0, 0]

    if backend.NAME != "jax":
        result, state = backend.run_with_state(function, model, [])
        assert state == []
        assert number(model.count) == 2
    else:
        # The values are the state's, not the variables', and stay there.
        state = (
            [5 * v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
            [v.value for v in model.optimizer.variables],
            ["metrics"],
        )
        result, state = backend.run_with_state(function, model, state)
        assert number(model.count) == 0
        place = [v is model.count for v in model.non_trainable_variables].index(
            True
        )
        assert number(state[1][place]) == 2
        assert number(state[0][0][0, 0]) == 5
        assert state[3] == ["metrics"]
        assert len(state) == 4
    assert number(result) == (7 if backend.NAME == "jax" else 3)


def test_run_with_state_records_no_gradient():
    if backend.NAME != "torch":  # elsewhere nothing is recorded unasked
        return
    model = Counter()
    result, _ = backend.run_with_state(
        lambda: model.dense(ops.ones((1, 2))), model, []
    )
    assert not result.requires_grad
    assert model.dense(ops.ones((1, 2))).requires_grad


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


def test_compile_inference():
    # Not a bare 2.0: JAX takes that for weakly typed, and traces once more.
    weight, traces = keras.Variable(np.float32(2.0)), []

    def function(x, y):
        traces.append(1)
        return weight * x + y

    run = backend.compile_inference(function, [weight])
    x = np.arange(3, dtype="float32")
    got = ops.convert_to_numpy(run(x, np.float32(1)))
    np.testing.assert_allclose(got, [1, 3, 5])
    weight.assign(3.0)
    got = ops.convert_to_numpy(run(x, np.float32(0)))
    np.testing.assert_allclose(got, [0, 3, 6])
    assert len(traces) == (2 if backend.NAME == "torch" else 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_in_every_precision(dtype):
    """Against NumPy, and compiled: that is where JAX fails."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 5, 3, 4), "float32")
    mask = rng.random((2, 1, 1, 5)) < 0.7
    scale, epsilons = rng.uniform(1, 2, 4).astype("float32"), (0.1, 0.2)
    roots = [
        np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon)
        for x, epsilon in zip((query, key), epsilons)
    ]
    normed = query / roots[0] * scale, key / roots[1]
    logits = np.einsum("bqhd,bkhd->bhqk", *normed) / 2
    weights = np.exp(np.where(mask, logits, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)

    def attend(query, key, value, mask):
        halves = (ops.cast(x, dtype) for x in (query, key, value))
        attended = backend.normalized_attention(
            *halves, query_scale=scale, epsilons=epsilons, mask=mask
        )
        assert keras.backend.standardize_dtype(attended.dtype) == dtype
        return ops.cast(attended, "float32")

    got = backend.compile_inference(attend, [])(query, key, value, mask)
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    np.testing.assert_allclose(
        ops.convert_to_numpy(got), expected, atol=tolerance
    )


def test_values_kept():
    model = Counter()
    model.compile("sgd", "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    before = [ops.convert_to_numpy(v) for v in model.variables]

    def step():
        if backend.NAME == "jax":  # as Keras does at a first step
            for variable in model.variables:
                variable._value = None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), backend.values_kept(model):
        step()
    for value, variable in zip(before, model.variables):
        np.testing.assert_array_equal(value, ops.convert_to_numpy(variable))


def test_another_backend_is_refused():
    run = subprocess.run(
        [sys.executable, "-c", "import keras_mscm"],
        env={**os.environ, "KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
    )
    assert run.returncode
    assert "KERAS_BACKEND=numpy" in run.stderr
    assert "'jax', 'tensorflow' and 'torch'" in run.stderr


def test_move_towards_is_an_average_that_takes_nothing_infinite():
    values = [np.float32([1.0, np.nan, np.inf]), np.float32([[2.0, -4.0]])]
    begin = [np.float32([3.0, 5.0, 7.0]), np.float32([[0.0, 1.0]])]
    pairs = [
        (keras.Variable(average), keras.Variable(weight))
        for average, weight in zip(begin, values)
    ]
    backend.move_towards(pairs, ops.convert_to_tensor(0.25))
    for (average, _), expected in zip(pairs, ([2.5, 5, 7], [[0.5, -0.25]])):
        np.testing.assert_allclose(
            ops.convert_to_numpy(average), expected, rtol=1e-6
        )
