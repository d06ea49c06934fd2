"""A disk that is really full: a small file system, mounted for a process."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "full_disk.py"
spec = importlib.util.spec_from_file_location(
    "resumable", HERE / "resumable.py"
)
resumable = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resumable)

MOUNTED = 'mount -t tmpfs -o size=1500k none "$0" && exec "$@"'


@functools.cache
def namespace():
    """How to start a process that may mount, or why none can."""
    said = []
    # As root; or as anyone, where the kernel lets them be root of their own.
    for options in ("-m", "-rm"):
        command = ["unshare", options, "sh", "-c", MOUNTED]
        try:
            run = subprocess.run(
                [*command, "/mnt", "true"], capture_output=True, text=True
            )
        except FileNotFoundError as error:
            return None, str(error)
        if run.returncode == 0:
            return command, ""
        said.append(run.stderr.strip())
    return None, "; ".join(said)


# Each backend's training has a full disk in `test_resume_training.py`.
@pytest.mark.once
def test_training_goes_on_when_the_disk_is_full(tmp_path):
    command, why = namespace()
    if command is None:
        reason = (
            f"no file system can be mounted here ({why}); test_a_full_disk "
            "of test_resume_training.py limits the size of files instead"
        )
        print(reason)
        pytest.skip(reason)
    folder, end = tmp_path / "disk", tmp_path / "end.npz"
    folder.mkdir()
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    run = subprocess.run(
        [*command, folder, sys.executable, SCRIPT, folder, end],
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "PYTHONPATH": path,
        },
        capture_output=True,
        text=True,
    )
    # Not -11 either: HDF5 used to die of it.
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(end.with_suffix(".json").read_text())
    assert "No space left on device" in report["full"]
    assert report["kept"]
    for what, number in {
        ".keras could not be saved": 4,  # 8, 10, 12, 14
        ".png could not be written": 3,  # 9, 12, 15
        "or its weights, could not be written": 3,
    }.items():
        said = [text for text in report["warned"] if what in text]
        assert 1 <= len(said) <= number, report["warned"]
        assert "No space left on device" in said[0]
    assert "saves/00000018.keras" in report["files"]
    assert "saves/00000020.keras" in report["files"]
    # Whole lines; those that found no room are missing.
    evaluated = report["evaluated"]
    assert evaluated[:2] == [3, 6]
    assert evaluated[-1] == 18
    assert report["best"] == report["best weights"] == 18
    # Nothing but what is whole: no folder of an unfinished file.
    assert not [name for name in report["files"] if "/." in f"/{name}"]

    keras.utils.set_random_seed(0)
    student = resumable.make_student()
    resumable.train(student, resumable.make_data())
    state = resumable.state_of(student)
    with np.load(end) as saved:
        for name, value in zip(saved, state, strict=True):
            np.testing.assert_array_equal(saved[name], value)
