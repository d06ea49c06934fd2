"""What the documentation shows is run."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import keras
import numpy as np
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


def test_the_guide_to_scaling(tmp_path):
    path = Path(__file__).parent.parent / "guides/scaling.py"
    spec = importlib.util.spec_from_file_location("scaling", path)
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    options = "--iterations 2 --epochs 1 --batch-size 8 --student-steps 2"
    scaling.main(scaling.parse([*options.split(), "--output", str(tmp_path)]))
    student = keras.saving.load_model(tmp_path / "student.keras")
    assert int(student.iteration) == 2
    assert [*(tmp_path / "teacher").glob("*.keras")]


def test_the_code_of_the_guide(tmp_path, monkeypatch):
    root = Path(__file__).parent.parent
    guide = (root / "guides/distil_your_own_images.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {
        "images": np.random.default_rng(0)
        .uniform(-1, 1, (64, 8, 8, 1))
        .astype("float32"),
        "labels": np.arange(64) % 10,
    }
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    assert names["few_steps"].shape == (10, 8, 8, 1)
    assert int(names["student"].iteration) == 6
