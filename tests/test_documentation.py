"""What the documentation shows is run."""

import doctest
import importlib
import pkgutil

import pytest

import keras_mscm

MODULES = [
    module.name
    for module in pkgutil.walk_packages(
        keras_mscm.__path__, keras_mscm.__name__ + "."
    )
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [
        example
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(examples) > 20
