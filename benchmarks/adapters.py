"""How near foreign models' own samplers an adapted model comes; its memory.

Command:   KERAS_BACKEND=jax python -m benchmarks.adapters, and so on
Writes:    benchmarks/adapters/results.jsonl, the rows of that backend anew, and
           from the rows of all backends benchmarks/adapters/table.md and the
           guide's table

The models are those of tests/adapters: of the libraries' own classes, tiny and
with random weights, because none are downloaded.

- Agreement: the largest difference between what both samplers make of the same
  noise, over the deviation of the foreign one; float32, DDIM, 4 and 50 steps.
  The worst of the seeds (`--seeds`), each of which has other weights and noise.
- CD: a step of consistency distillation, of a guided teacher where the foreign
  model can be guided, changes the student, and nothing of the teacher.
- Memory: the weights that teacher and student hold together, each counted once,
  over the foreign network's. Optimizer and autoencoder come besides.
- Lines: of the guide, those that make the teacher and the student.
"""

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks import adapters_table
from benchmarks.adapters_table import GUIDE, HOLDS, STEPS
from benchmarks.foreign_models import FOREIGN, normal
from benchmarks.run import circumstances
from keras_mscm import (
    MultistepConsistencyModel,
    backend,
)
from tests.adapters.tiny import (
    check_student,
    difference,
    sampled,
)

FOLDER = Path(__file__).with_suffix("")
RESULTS = FOLDER / "results.jsonl"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
PACKAGES = (
    "keras",
    "jax",
    "tensorflow-cpu",
    "torch",
    "keras-hub",
    "keras-cv",
    "diffusers",
    "flax",
)
SEEDS = 2


def agreement(case, seed):
    """The difference from the foreign sampler, by number of steps."""
    noise = normal(seed, case.model.space.shape)
    found = {}
    for num_steps in STEPS:
        ours = sampled(
            case.model,
            noise,
            num_steps,
            case.schedule(num_steps),
            guidance_scale=case.guidance_scale,
            conditioning=case.conditioning,
        )
        found[num_steps] = difference(ours, case.theirs(noise, num_steps))
    return found


def student_of(case, **kwargs):
    if case.guidable:
        kwargs["guidance_scale"] = 3.0
    return MultistepConsistencyModel.from_teacher(
        case.model, student_steps=2, **kwargs
    )


def distils(case, seed):
    """Whether a step changes the student, and nothing of the teacher."""
    x = np.clip(normal(seed, case.model.space.shape), -1, 1)
    try:
        check_student(student_of(case), x, case.conditioning or None)
    except AssertionError:
        return False
    return True


def memory(case):
    """Weights held, over the foreign network's, by how they are held."""
    before = size([case.model.network])
    found = {}
    for name, kwargs in HOLDS.items():
        try:
            student = student_of(case, **kwargs)
        except ValueError as error:
            if "lora_targets" not in str(error):
                raise
            found[name] = None  # it has no dense layer of Keras
            continue
        parts = [case.model.network, student.network, student.ema_network]
        if student.teacher.network is not None:
            parts.append(student.teacher.network)
        found[name] = size(parts) / before
    return found


def size(layers):
    """Bytes of the weights of layers, each counted once."""
    weights = {id(w): w for layer in layers for w in layer.variables}
    return sum(
        int(np.prod(w.shape)) * (2 if w.dtype == "bfloat16" else 4)
        for w in weights.values()
    )


def measure(only, seeds):
    """A row per foreign model that runs on this backend."""
    for name, foreign in FOREIGN.items():
        if backend.NAME not in foreign.backends or only not in name:
            continue
        began = time.perf_counter()
        found: dict[int, list[float]] = {n: [] for n in STEPS}
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            case = foreign.make(seed)
            for num_steps, error in agreement(case, seed).items():
                found[num_steps].append(float(error))
        row = {
            "backend": backend.NAME,
            "model": name,
            "seeds": seeds,
            "agreement": {n: max(errors) for n, errors in found.items()},
            "distils": distils(case, 0),
            "guided": case.guidable,
            "memory": memory(case),
            "seconds": round(time.perf_counter() - began),
        }
        print(json.dumps(row), flush=True)
        yield row


def read():
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [json.loads(line) for line in lines]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--table", action="store_true", help="the table alone")
    args = parser.parse_args()
    told = {**circumstances(""), "versions": versions()}
    FOLDER.mkdir(exist_ok=True)
    for row in [] if args.table else measure(args.only, args.seeds):
        key = row["backend"], row["model"]
        rows = [r for r in read() if (r["backend"], r["model"]) != key]
        lines = [json.dumps(r) + "\n" for r in [*rows, {**row, **told}]]
        RESULTS.write_text("".join(lines))
    (FOLDER / "table.md").write_text(adapters_table.table(read()))
    before, _, rest = GUIDE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join([BEGIN, "", *adapters_table.short_table(read()), END])
    GUIDE.write_text(before + text + after)


def versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
