"""What the documentation shows is run."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import runpy
import types
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


def test_the_guide_to_pretrained_models():
    root = Path(__file__).parent.parent
    names = runpy.run_path(str(root / "guides/distil_a_pretrained_model.py"))
    assert names["images"].shape == (2, 8, 8, 3)
    assert names["student"].teacher.attached
    assert int(names["small"].iteration) == 1


def test_the_code_of_the_readme_that_distils_your_model():
    from tests.adapters import test_keras_hub as tiny

    root = Path(__file__).parent.parent
    section = (root / "README.md").read_text().split("## Distil your model")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    assert len(section.split("\n## ")[0].splitlines()) < 30
    # Its own tokenizer is a download.
    preprocessor = types.SimpleNamespace(
        generate_preprocess=lambda prompts: tiny.tokens(len(prompts), 0)
    )
    names = {
        "keras": keras,
        "MultistepConsistencyModel": keras_mscm.MultistepConsistencyModel,
        "sd3": types.SimpleNamespace(
            backbone=tiny.stable_diffusion_3(), preprocessor=preprocessor
        ),
        "images": np.zeros((2, 64, 64, 3), "float32"),
        "captions": ["a hare", "a hedgehog"],
    }
    exec(code.replace("lora_rank=64", "lora_rank=2"), names)
    assert names["pictures"].shape == (1, 64, 64, 3)
    assert int(names["student"].iteration) == 1
