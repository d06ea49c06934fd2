"""How long it takes to begin: the import, and the demo's first step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time

import keras

from benchmarks.speed.rows import emit, main

FIRST_STEP = """
import runpy, sys, time
import keras
import numpy as np
from keras_mscm import DiffusionModel, MultistepConsistencyModel
demo = runpy.run_path("examples/digits.py")
teacher = DiffusionModel(demo["make_network"](0))
model = MultistepConsistencyModel.from_teacher(teacher, student_steps=8)
model.compile(optimizer=keras.optimizers.Adam(1e-4))
images, labels = np.zeros((64, 8, 8, 1), "float32"), np.zeros(64, "int32")
begun = time.perf_counter()
model.fit(images, labels, batch_size=64, verbose=0)
print("seconds", time.perf_counter() - begun)
"""


def importing(statement):
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begun


def imports(rounds):
    pairs = []
    for i in range(rounds + 1):
        names = ["keras_mscm", "keras"][:: 1 if i % 2 else -1]
        taken = {name: importing(f"import {name}") for name in names}
        pairs.append((taken["keras_mscm"], taken["keras"]))
    pairs = pairs[1:]
    emit(
        part="import beyond Keras and its backend",
        what="seconds",
        bound=0.3,
        seconds=statistics.median(ours - theirs for ours, theirs in pairs),
        keras_seconds=statistics.median(theirs for _, theirs in pairs),
    )


def first_step(what, **environment):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    emit(
        part="first step of the demo's student",
        what=what,
        bound=20,
        seconds=float(done.stdout.split()[-1]),
    )


def measure(quick):
    imports(3 if quick else 7)
    if keras.backend.backend() != "jax":
        first_step("as it comes")
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder}
        first_step("compilation cache empty", **cache)
        first_step("compilation cache filled", **cache)


if __name__ == "__main__":
    main(measure)
