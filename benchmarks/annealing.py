"""Which teacher steps suit a run: students by budget, K, start and end.

Command:   KERAS_BACKEND=jax python -m benchmarks.annealing [--minutes 60]
Writes:    benchmarks/annealing/results.jsonl (a row per student), table.md;
           models of Fashion-MNIST into benchmarks/annealing/models/
Data:      scikit-learn's digits, as in examples/digits.py, their teacher the
           preset `digits_teacher`; Fashion-MNIST, as in
           benchmarks/settings/fashion_small.toml, with a shorter teacher

A row that is in results.jsonl is not computed again: an interrupted run goes on
where it was. Steps are per segment in `CELLS`, and of the whole, as
`TeacherStepAnneal` takes them, in the rows. Distillation (CD) throughout.
"""

import argparse
import datetime
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_mscm
from benchmarks import annealing_table, run
from examples import digits
from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    samplers,
)
from keras_mscm import functional as F
from keras_mscm.callbacks import TeacherStepAnneal

FOLDER = Path(__file__).with_suffix("")
RESULTS = FOLDER / "results.jsonl"
KEY = "data", "student_steps", "budget", "start", "end", "over", "seed", "ema"
NUM_SAMPLES, BATCH, DECAY = 3000, 64, 0.998


def ends(data, k, budget, per_segment, seeds=(0,)):
    """Annealed from an eighth of the end, at least a step per segment."""
    for n in per_segment:
        start, end = k * max(1, n // 8), k * n
        for seed in seeds:
            yield data, k, budget, start, end, budget // 2, seed, DECAY


def starts(data, k, budget, begins, n):
    """The same end, n per segment, from other beginnings."""
    for begin in begins:
        yield data, k, budget, k * begin, k * n, budget // 2, 0, DECAY


def averages(k, budget, n, decays):
    """The same annealing under other moving averages."""
    start, end = k * max(1, n // 8), k * n
    for decay in decays:
        yield "digits", k, budget, start, end, budget // 2, 0, decay


def the_rule(data, k, budget):
    """What `TeacherStepAnneal` takes without arguments."""
    yield data, k, budget, *F.suggested_annealing(budget, k), 0, DECAY


def cells():
    """What there is to train, the most informative first."""
    for k in (1, 2, 8):
        yield from ends("digits", k, 300, (2, 4, 8, 16, 32, 64))
    # What the callback without arguments took before: the paper's.
    yield "digits", 1, 300, 64, 1280, 100_000, 0, DECAY
    for k in (1, 2):
        yield from ends("digits", k, 1000, (2, 4, 8, 16, 32, 64))
    yield from ends("fashion_mnist", 1, 300, (4, 16, 32, 64))
    yield from ends("digits", 1, 3000, (64, 128))
    for k in (1, 2):
        yield from averages(k, 300, 32, (0.9999, 0.99))
    yield from ends("digits", 16, 300, (2, 4, 8))
    for k in (1, 2, 8):
        yield from the_rule("digits", k, 300)
    for k in (1, 2):
        yield from the_rule("digits", k, 1000)
    yield from the_rule("fashion_mnist", 1, 1000)
    yield from the_rule("digits", 1, 3000)
    yield from ends("digits", 1, 10_000, (256, 64))
    yield from starts("digits", 1, 1000, (1, 8), 32)
    yield from ends("digits", 8, 1000, (8, 32))
    for k in (1, 2):
        yield from ends("digits", k, 300, (16, 32, 64), (1,))
    yield from ends("digits", 1, 3000, (16, 32))
    yield from ends("digits", 1, 1000, (16, 32, 64), (1,))
    yield from ends("digits", 2, 3000, (8, 32, 64))
    yield from starts("fashion_mnist", 1, 300, (8,), 32)
    yield from ends("fashion_mnist", 1, 1000, (16, 64))
    yield from ends("fashion_mnist", 2, 300, (4, 16))
    yield from ends("digits", 16, 1000, (2, 4, 8))
    yield from ends("digits", 8, 3000, (4, 16))
    yield from averages(1, 10_000, 64, (0.9999,))
    yield from ends("digits", 2, 10_000, (16, 64))
    yield from ends("fashion_mnist", 1, 3000, (32, 128))
    for k in (1, 2):
        yield from ends("digits", k, 30_000, (64, 256))


class Digits:
    """Students of the digits that ship; one is compiled for many cells."""

    def __init__(self):
        images, held_out, labels, _ = digits.load_data(0)
        self.images, self.labels = images, labels
        self.judge = digits.Judge(images, labels, held_out, 0)
        self.teacher = DiffusionModel.from_preset("digits_teacher")
        self.noise = np.random.default_rng(0).standard_normal(
            (NUM_SAMPLES, 8, 8, 1), dtype="float32"
        )
        self.wanted = np.arange(NUM_SAMPLES, dtype="int32") % 10
        self._made: tuple = ()

    def distance(self, model, num_steps, **kwargs):
        images = model.generate(
            noise=self.noise,
            labels=self.wanted,
            num_steps=num_steps,
            batch_size=500,
            **kwargs,
        )
        judged = self.judge.judge(images, self.wanted, "", num_steps)
        kept = "frechet_distance", "label_accuracy", "num_samples"
        return {name: judged[name] for name in kept}

    def reference(self):
        return self.distance(self.teacher, 128, sampler=samplers.ADDIM())

    def student(self, k, budget, start, end, over, seed, ema):
        self._make(k, budget, seed, ema)
        _, student, begin = self._made
        variables = [*student.variables, *student.optimizer.variables]
        for variable, value in zip(variables, begin, strict=True):
            variable.assign(value)
        begun = time.perf_counter()
        student.fit(
            digits.batches(self.images, self.labels, BATCH, seed + 1),
            steps_per_epoch=budget,
            callbacks=[TeacherStepAnneal(start, end, over)],
            verbose=0,
        )
        seconds = time.perf_counter() - begun
        return {**self.distance(student, k), "seconds": seconds}

    def _make(self, *key):
        """A student, and the values it begins from, unless it is there."""
        if self._made and self._made[0] == key:
            return
        k, budget, seed, ema = key
        student = MultistepConsistencyModel.from_teacher(
            self.teacher, student_steps=k, ema_decay=ema, seed=seed + 1
        )
        rate = 5e-4 if k == 1 else 1e-3  # as benchmarks/digits.py
        student.compile(optimizer=digits.make_optimizer(rate, budget))
        variables = [*student.variables, *student.optimizer.variables]
        values = [keras.ops.convert_to_numpy(v).copy() for v in variables]
        self._made = key, student, values


class Fashion:
    """Students of a small and short teacher of Fashion-MNIST."""

    def __init__(self):
        # A folder of its own, because judge and teacher are shorter than those
        # that the experiment keeps.
        run.MODELS = FOLDER / "models"
        settings = run.read_settings("fashion_small", "cpu")
        settings |= {"judge_epochs": 2, "num_samples": 1000}
        settings["teacher"] |= {"iterations": 2000}
        self.experiment = run.Experiment("annealing", settings, 0)

    def reference(self):
        return _kept(self.experiment.curve("addim", "cosine", 32))

    def student(self, k, budget, start, end, over, seed, ema):
        assert (over, seed, ema) == (budget // 2, 0, DECAY)
        begun = time.perf_counter()
        row = self.experiment.student(
            "distillation", k, "addim", [start, end], budget
        )
        return {**_kept(row), "seconds": time.perf_counter() - begun}


def _kept(row):
    return {name: row[name] for name in ("frechet_distance", "num_samples")}


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def circumstances():
    on_linux = hasattr(os, "sched_getaffinity")
    packages = {"keras_mscm": keras_mscm.__version__}
    for name in ("keras", keras.backend.backend(), "numpy", "scikit-learn"):
        packages[name] = metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if on_linux else os.cpu_count(),
        "backend": keras.backend.backend(),
        "versions": packages,
    }


def read():
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [json.loads(line) for line in lines]


def train(minutes):
    """Trains what results.jsonl doesn't have, until the time is up."""
    RESULTS.parent.mkdir(exist_ok=True)
    until = time.monotonic() + 60 * minutes
    kinds, made, references = (
        {"digits": Digits, "fashion_mnist": Fashion},
        {},
        {},
    )
    rows = read()
    done = {tuple(row[name] for name in KEY) for row in rows}
    for row in rows:
        references[row["data"]] = row["teacher_distance"]
    for cell in cells():
        if cell in done or time.monotonic() > until:
            continue
        done.add(cell)
        data, *arguments = cell
        if data not in made:
            made[data] = kinds[data]()
        if data not in references:
            measured = made[data].reference()
            references[data] = measured["frechet_distance"]
        row = {
            **dict(zip(KEY, cell)),
            **made[data].student(*arguments),
            "teacher_distance": references[data],
        }
        row["ratio"] = row["frechet_distance"] / references[data]
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **circumstances()}) + "\n")
        print(
            *cell, f"{row['ratio']:.3f}", f"{row['seconds']:.0f} s", flush=True
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no student after so many",
    )
    train(parser.parse_args().minutes)
    (FOLDER / "table.md").write_text(annealing_table.table(read(), cells()))


if __name__ == "__main__":
    main()
