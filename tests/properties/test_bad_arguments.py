"""Whatever comes for an argument, it works or is refused by name.

Every argument of everything public, with values that can't be right:
`python -m benchmarks.bad_arguments` tries more of them, and counts.
"""

import pytest

from benchmarks.bad_arguments import probe, public_api
from benchmarks.bad_arguments.good_arguments import entries
from benchmarks.bad_arguments.starting import nothing_starts
from benchmarks.bad_arguments.world import World


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return entries(World(tmp_path_factory.mktemp("world")))


def test_nothing_public_is_forgotten(made):
    assert set(made) == public_api.names()


def _offenders(entry, **how):
    outcomes: list[probe.Outcome] = []
    with nothing_starts():
        probe.probe(entry, outcomes.append, **how)
    return [str(each) for each in outcomes if each.kind in probe.BAD]


@pytest.mark.parametrize("name", sorted(public_api.names()))
def test_a_bad_argument_is_named(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where paths that are words lead to
    assert _offenders(made[name], generated=1, every=5) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(public_api.names()))
def test_every_bad_argument_is_named(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _offenders(made[name], generated=20) == []
