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


# What suits a run.

RUNS = [
    1,
    2,
    3,
    10,
    11,
    100,
    300,
    1500,
    10_000,
    65_537,
    199_999,
    200_000,
    10**7,
]


@pytest.mark.parametrize("student_steps", range(1, 17))
def test_suggested_annealing_at_the_paper_s_budget(student_steps):
    suggested = F.suggested_annealing(200_000, student_steps)
    assert suggested == (64, 1280, 100_000)
    # A longer run has no more teacher steps, and half of itself for them.
    longer = F.suggested_annealing(1_000_000, student_steps)
    assert longer == (64, 1280, 500_000)


@pytest.mark.parametrize("student_steps", [1, 2, 3, 8, 16, 100, 3000])
def test_suggested_annealing_is_one_that_a_model_takes(student_steps):
    before = (0, 0, 0)
    for run in RUNS:
        suggested = F.suggested_annealing(run, student_steps)
        start, end, iterations = suggested
        assert student_steps <= start < end
        assert iterations == max(1, run // 2)
        assert all(isinstance(number, int) for number in suggested)
        # It grows with the run, and is told again by the iterations alone.
        assert all(b <= a for b, a in zip(before, suggested, strict=True))
        assert F.suggested_annealing(2 * iterations, student_steps) == suggested
        before = suggested


@pytest.mark.parametrize("name", ["run", "student_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "8", None, math.nan])
def test_suggested_annealing_of_bad_arguments(name, value):
    arguments = {"run": 300, "student_steps": 8, name: value}
    with pytest.raises(ValueError, match=f"`{name}`.*at least 1.*{name}="):
        F.suggested_annealing(**arguments)
