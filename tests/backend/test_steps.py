"""What a training step reads and assigns."""

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
