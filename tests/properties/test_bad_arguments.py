"""Whatever comes for an argument, it works or is refused by name.

Every argument of everything public, with values that can't be right:
`python -m benchmarks.bad_arguments` tries more of them, and counts.
"""

import numpy as np
import pytest

from benchmarks.bad_arguments import probe, public_api
from benchmarks.bad_arguments.good_arguments import entries
from benchmarks.bad_arguments.starting import nothing_starts
from benchmarks.bad_arguments.world import World
from keras_mscm import checks


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


TWINS = {bool: np.bool_, int: np.int64, float: np.float32, str: np.str_}


@pytest.mark.parametrize("name", sorted(public_api.names()))
def test_numpys_numbers_and_words_are_as_good(
    name, made, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    entry, outcomes = made[name], []
    for argument, value in {**entry.defaults(), **entry.good()}.items():
        if type(value) in TWINS and argument in entry.domains:
            twin = TWINS[type(value)](value)
            with nothing_starts():
                outcomes.append(probe.attempt(entry, argument, twin))
    assert [str(o) for o in outcomes if o.kind != probe.WORKED] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(public_api.names()))
def test_every_bad_argument_is_named(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _offenders(made[name], generated=20) == []


# That what is wrong would be found.


def _says_nothing(size: int = 1):
    return None if size is None else size


def _says_too_little(size: int = 1):
    if type(size) is not int or size < 1:
        raise ValueError("wrong size")


def _says_it_late(size: int = 1):
    return size + 0


def _never_ends(size: int = 1):
    while size != 1:
        pass


def _says_it(size: int = 1):
    checks.check_positive_integer("size", size)


@pytest.mark.once
@pytest.mark.parametrize(
    ("function", "value", "kind"),
    [
        (_says_nothing, None, probe.SILENT),
        (_says_nothing, -1, probe.SILENT),
        (_says_nothing, 2, probe.WORKED),
        (_says_too_little, "x", probe.UNCLEAR),
        (_says_it_late, "x", probe.UNCLEAR),
        (_says_it_late, 1.5, probe.SILENT),
        (_never_ends, 2, probe.CRASH),
        (_says_it, -1, probe.CLEAR),
        (_says_it, [None], probe.CLEAR),
    ],
)
def test_an_outcome_is_what_it_is_called(function, value, kind, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    domains = public_api.domains_of("it", function)
    entry = public_api.Entry("it", function, dict, None, domains)
    assert probe.attempt(entry, "size", value).kind == kind
    unknown = probe.attempt(entry, "no_such_argument", 1)
    assert unknown.kind == probe.CLEAR
