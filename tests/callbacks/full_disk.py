"""Trains on a disk that becomes full, and says what came of it.

Called with a folder on a file system of its own, which may be small; and a file
for the state at the end. `test_full_disk.py` mounts one.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import resumable  # beside this script

from keras_mscm.callbacks import EvaluateSamples, ResumeTraining, SampleGrid

FULL, NEARLY, FREE = 7, 11, 15  # before these batches it becomes that


class Better:
    """A metric that gets better all the time."""

    name = "better"

    def __init__(self):
        self.value = 0.0
        self.update_state = lambda images: None
        self.reset_state = lambda: None

    def result(self):
        self.value -= 1.0
        return self.value


def held(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


class Disk(keras.callbacks.Callback):
    """Fills the disk, and frees it again."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.filler = folder, folder / "filler"
        self.batches, self.held, self.kept = 0, None, []

    def on_train_batch_begin(self, batch, logs=None):
        if self.batches == FULL:
            self.fill()
            self.held = held(self.folder / "saves")
        elif self.batches == NEARLY:
            os.truncate(self.filler, self.filler.stat().st_size - 60_000)
        elif self.batches == FREE:
            self.kept = held(self.folder / "saves") == self.held
            self.filler.unlink()
        self.batches += 1

    def fill(self):
        with self.filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError as error:
                self.full = str(error)


if __name__ == "__main__":
    folder, end = map(Path, sys.argv[1:])
    keras.utils.set_random_seed(0)
    disk = Disk(folder)
    evaluate = EvaluateSamples(
        [Better()],
        every=3,
        num_images=3,
        best_weights=folder / "best" / "best.weights.h5",
        results=folder / "best" / "results.jsonl",
    )
    grid = SampleGrid(folder / "grids", every=3, num_images=3)
    resume = ResumeTraining(folder / "saves", save_freq=2)
    student = resumable.make_student()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        data = resumable.make_data()
        resumable.train(student, data, disk, evaluate, grid, resume)
    said = [str(warning.message) for warning in warned]
    lines = evaluate.results.read_text().splitlines()
    files = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.*")
    )
    report = {
        "full": disk.full,
        "kept": disk.kept,
        "warned": said,
        "evaluated": [json.loads(line)["iteration"] for line in lines],
        "best": json.loads(evaluate._record.read_text())["iteration"],
        "files": files,
    }
    best = resumable.make_student()
    best.load_weights(evaluate.best_weights)
    report["best weights"] = int(keras.ops.convert_to_numpy(best.iteration))
    np.savez(end, *resumable.state_of(student))
    end.with_suffix(".json").write_text(json.dumps(report))
