"""What judges speed: pairs in turn, bounds, and a guard that can fail."""

import itertools
import json

import pytest

from benchmarks.speed import __main__ as speed
from benchmarks.speed import profile, report, timing

pytestmark = pytest.mark.once


def test_pairs_are_compared_one_by_one():
    """A machine that halves its speed between pairs changes no ratio."""
    slowdown = itertools.count()

    def ours():
        return 3.0 * 2 ** (next(slowdown) // 2)

    bare_slowdown = itertools.count()

    def bare():
        return 2.0 * 2 ** (next(bare_slowdown) // 2)

    result = timing.paired(ours, bare, rounds=5)
    assert result["ratio"] == pytest.approx(1.5)
    assert result["seconds"] / result["bare_seconds"] == pytest.approx(1.5)


def test_pairs_time_what_tells_no_time():
    result = timing.paired(lambda: sum(range(300_000)), lambda: None, rounds=3)
    assert result["seconds"] > result["bare_seconds"] > 0


@pytest.mark.parametrize(("ratio", "passes"), [(1.13, True), (1.14, False)])
def test_the_guard_fails_beyond_a_tenth(monkeypatch, capsys, ratio, passes):
    row = {"part": "p", "backend": "b", "what": "w", "bound": 1.03}
    monkeypatch.setattr(
        speed, "run", lambda *args, **kwargs: [{**row, "ratio": ratio}]
    )
    assert speed.check() is passes
    assert ("over its bound" in capsys.readouterr().out) is not passes


def test_report(tmp_path):
    told = {
        "file": "f",
        "date": "2026-01-01",
        "commit": "c",
        "hardware": "h",
        "python": "3",
        "versions": {"keras": "3"},
        "backend": "jax",
    }
    rows = [
        {**told, "part": "a", "what": "good", "bound": 1.03, "ratio": 1.0},
        {**told, "part": "b", "what": "slow", "bound": 20, "seconds": 21.0},
        {**told, "part": "a", "what": "bad", "bound": 1.03, "ratio": 1.2},
    ]
    growth = {**told, "part": "growth", "axis": "K", "what": "over K"}
    rows += [{**growth, "value": k, "milliseconds": 2.0 * k} for k in (1, 2)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results.jsonl").write_text(lines)
    report.write(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| jax | good | 1.03 | 1.0 | yes |" in table
    assert "| jax | bad | 1.03 | 1.2 | **no** |" in table
    assert "| jax | slow | 20 | 21.0 | **no** |" in table
    assert table.index("good") < table.index("bad") < table.index("slow")
    assert (tmp_path / "growth.png").stat().st_size > 0


def test_time_that_is_covered():
    assert profile.covered([]) == 0
    assert profile.covered([(7, 9), (0, 3), (2, 4), (2, 3)]) == 6
