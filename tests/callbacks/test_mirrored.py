"""Every callback under TensorFlow's MirroredStrategy, as on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("mirrored.py")
tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="of the tensorflow backend"
)


@tensorflow_only
def test_files_and_weights_are_those_of_one_device(tmp_path):
    root = str(SCRIPT.parents[2])
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    one, two = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("one", "two")
    )
    for results in (one, two):
        assert results["differ"] == 0  # resumed from uninterrupted, in any bit
        # The mean of the interrupted epoch is shared out anew.
        np.testing.assert_allclose(
            results["resumed_losses"], results["losses"][1:], rtol=1e-6
        )
        assert results["diverged"] == 0
        assert results["images_in"] == results["images_out"]
    assert two["files"] == one["files"]
    assert "grids/00000012.png" in one["files"]
    assert "saves/00000015.keras" in one["files"]
    for name in ("losses", "mean", "images_in"):
        np.testing.assert_allclose(two[name], one[name], atol=1e-4)
    ours, theirs = (
        np.load(tmp_path / f"{name}.npz") for name in ("one", "two")
    )
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4)
