"""The guard of quality can fail."""

import json

import pytest

from benchmarks import smoke

pytestmark = pytest.mark.once


def test_within_is_15_percent():
    assert smoke.within(1.1499, 1.0)
    assert not smoke.within(1.1501, 1.0)


def test_an_untrained_student_fails():
    """The teacher's weights alone don't pass for a student's."""
    figure = json.loads(smoke.FIGURE.read_text())
    assert not smoke.within(
        figure["teacher_distance"], figure["student_distance"]
    )
