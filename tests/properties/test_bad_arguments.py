"""Every bad argument of every public call ends in a clear `ValueError`.

With `-s` the counts are printed: `pytest -s tests/properties -k clearly`.
"""

import os

import pytest

from tests.properties import api, bad_values


@pytest.fixture(scope="module")
def calls():
    return api.calls()


def test_every_public_call_has_an_entry(calls):
    names = {name for name, _ in api.public()}
    assert names, "nothing is public"
    assert not names - {*calls} - api.EXEMPT


def test_good_arguments_are_good(calls):
    for title, call in calls.items():
        try:
            call.function(**call.good)
        except Exception as error:
            # Of these even good ones need what isn't here: a download, a font.
            needs = ("datasets.from_keras", "datasets.from_tfds")
            needs += ("datasets.emoji", "metrics.inception_v3")
            if title not in needs:
                raise AssertionError(title) from error


def test_bad_arguments_are_told_clearly(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts, offenders = bad_values.survey(calls)
    print(
        f"\n{counts['tried']} inputs tried: {counts['clear']} clear, "
        f"{counts['unclear']} unclear, {counts['silent']} silent, "
        f"{counts['crash']} crashes"
    )
    if "OFFENDERS" in os.environ:
        with open(os.environ["OFFENDERS"], "w") as file:
            file.write("\n".join(offenders))
    assert counts["tried"] > 3000
    assert not offenders, "\n".join(offenders)


def test_unknown_keywords_are_named(calls):
    for title, call in calls.items():
        with pytest.raises((TypeError, ValueError), match="no_such_keyword"):
            call.function(**call.good, no_such_keyword=1)
        assert title
