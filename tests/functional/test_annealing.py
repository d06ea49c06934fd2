import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import functional as F


def paper(iteration, start, end, iterations):
    """N_teacher(i) of appendix A.1 in float64."""
    done = min(max(iteration / iterations, 0.0), 1.0)
    span = math.log(end) - math.log(start)
    return math.exp(math.log(start) + done * span)


@pytest.mark.parametrize(
    "iteration", [0, 1, 7, 5000, 50_000, 99_999, 100_000, 100_001, 10**7]
)
def test_teacher_steps_is_appendix_a1(iteration):
    got = F.teacher_steps(iteration, 64.0, 1280.0, 100_000)
    expected = paper(iteration, 64.0, 1280.0, 100_000)
    # exp turns an error of log(1280) = 7.2 in its last place into 5e-7.
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_teacher_steps_at_the_ends_and_in_the_middle():
    def steps(iteration):
        return float(F.teacher_steps(iteration, 64.0, 1280.0, 1000))

    assert steps(0) == pytest.approx(64, rel=1e-6)
    assert steps(500) == pytest.approx(math.sqrt(64 * 1280), rel=1e-6)
    assert steps(1000) == pytest.approx(1280, rel=1e-6)
    assert steps(10**6) == steps(1000)


def test_teacher_steps_may_fall_or_stay():
    assert float(F.teacher_steps(5, 256.0, 256.0, 1)) == pytest.approx(256)
    got = F.teacher_steps(3, 1024.0, 16.0, 4)
    np.testing.assert_allclose(got, paper(3, 1024.0, 16.0, 4), rtol=1e-6)


def test_teacher_steps_of_an_integer_weight():
    # As in the training step: nothing is a Python number.
    iteration = keras.Variable(0, dtype="int32", trainable=False)
    start, end, iterations = ops.unstack(
        ops.convert_to_tensor([64.0, 1280.0, 10.0])
    )
    for i in (0, 4, 10, 12):
        iteration.assign(i)
        got = F.teacher_steps(iteration.value, start, end, iterations)
        np.testing.assert_allclose(got, paper(i, 64, 1280, 10), rtol=1e-6)
