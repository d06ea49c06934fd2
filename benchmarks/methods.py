"""The paper's table 5, with what came since: methods side by side.

Command:   KERAS_BACKEND=jax python -m benchmarks.methods [--minutes 60]
Writes:    benchmarks/methods/results.jsonl (a row per model), table.md and
           quality.png
Data:      Fashion-MNIST, network, teacher and judge as in
           benchmarks/settings/fashion_small.toml

One network and one teacher, whose weights every student begins with. Each
method is trained for as many iterations, and for as much computing time: as
many iterations as take the time of distillation's (CD), by the times of steps
that are measured side by side first. A row that is in results.jsonl is not
computed again: an interrupted run goes on where it was.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from benchmarks import methods_table
from benchmarks.annealing import circumstances
from benchmarks.run import Experiment, read_settings
from keras_mscm import (
    ConsistencyTuningModel,
    ContinuousConsistencyModel,
    DenoisingModel,
    MeanFlowModel,
    MultistepConsistencyModel,
    PeRFlowModel,
    ProgressiveDistillationModel,
    ShortcutModel,
    TractModel,
    datasets,
)
from keras_mscm.callbacks import TeacherStepAnneal

FOLDER = Path(__file__).with_suffix("")
RESULTS = FOLDER / "results.jsonl"
STEPS = 1, 2, 4, 8
ITERATIONS, BATCH, RATE, DECAY = 1500, 64, 1e-3, 0.998
KEY = "seed", "method", "student_steps", "budget"
TIMED = 12  # steps whose median is a method's time


def mscm(method: str) -> Callable:
    """A multistep consistency model, of one K or of several."""

    def make(teacher, k, iterations, **common):
        steps = STEPS if k is None else k
        return MultistepConsistencyModel.from_teacher(
            teacher, student_steps=steps, method=method, **common
        )

    return make


def progressive(teacher, k, iterations, **common):
    stages = (64 // k).bit_length() - 1
    return ProgressiveDistillationModel.from_teacher(
        teacher,
        student_steps=k,
        teacher_steps=64,
        iterations_per_stage=max(1, iterations // stages),
        **{**common, "ema_decay": 0.99},  # shorter than a stage
    )


def tract(teacher, k, iterations, **common):
    return TractModel.from_teacher(
        teacher,
        steps=(64, 16, k),
        iterations_per_stage=iterations // 2,
        **{**common, "ema_decay": 0.99},
    )


def ect(teacher, k, iterations, **common):
    return ConsistencyTuningModel.from_teacher(
        teacher,
        student_steps=k,
        iterations_per_stage=max(1, iterations // 8),
        **common,
    )


def perflow(teacher, k, iterations, **common):
    return PeRFlowModel.from_teacher(
        teacher, student_steps=k, solver_steps=max(2, 16 // k), **common
    )


def shortcut(teacher, k, iterations, **common):
    return ShortcutModel.from_teacher(teacher, most_steps=64, **common)


def mean_flow(method: str) -> Callable:
    def make(teacher, k, iterations, **common):
        return MeanFlowModel.from_teacher(teacher, method=method, **common)

    return make


def continuous(method: str) -> Callable:
    def make(teacher, k, iterations, **common):
        return ContinuousConsistencyModel.from_teacher(
            teacher,
            method=method,
            warmup_iterations=max(1, iterations // 10),
            **common,
        )

    return make


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        make: Function of `(teacher, k, iterations)` that gives the student.
        every: Whether one student serves every K.
        stages: Function of K: stages in each of which the learning rate begins
            anew.
    """

    make: Callable[..., DenoisingModel]
    every: bool = False
    stages: Callable[[int], int] = lambda k: 1


METHODS = {
    "CD": Method(mscm("distillation")),
    "CD, one student": Method(mscm("distillation"), every=True),
    "CT": Method(mscm("training")),
    "CT, one student": Method(mscm("training"), every=True),
    "ECT": Method(ect),
    "sCD": Method(continuous("distillation"), every=True),
    "sCT": Method(continuous("training"), every=True),
    "MeanFlow": Method(mean_flow("training"), every=True),
    "MeanFlow, of a teacher": Method(mean_flow("distillation"), every=True),
    "shortcut": Method(shortcut, every=True),
    "PD": Method(progressive, stages=lambda k: (64 // k).bit_length() - 1),
    "TRACT": Method(tract, stages=lambda k: 2),
    "PeRFlow": Method(perflow),
}


def cells():
    """What there is to train, the most informative first."""
    for seed in (0, 1, 2):
        for budget in ("iterations", "time"):
            for name, method in METHODS.items():
                for k in (None,) if method.every else STEPS:
                    if (name, budget) != ("CD", "time"):  # it is the same
                        yield seed, name, k, budget


class Bench:
    """One seed: data, judge, teacher, and what a step of a method takes."""

    def __init__(self, seed):
        settings = read_settings("fashion_small", "cpu")
        self.experiment = Experiment("fashion_small_cpu", settings, seed)
        self.seed = seed

    def batches(self, seed):
        data = self.experiment.data
        return datasets.from_arrays(
            data.images,
            data.labels,
            batch_size=BATCH,
            seed=seed,
            repeat=True,
        )

    def make(self, name, k, iterations):
        """A student, compiled, and its callbacks."""
        method = METHODS[name]
        keras.utils.set_random_seed(self.seed + 1)
        student = method.make(
            self.experiment.teacher,
            k,
            iterations,
            ema_decay=DECAY,
            seed=self.seed + 1,
        )
        rate = RATE / 2 if k == 1 else RATE
        optimizer = self.experiment.optimizer(rate, iterations)
        stages = method.stages(k) if k else 1
        if stages > 1:
            decay = keras.optimizers.schedules.CosineDecayRestarts(
                rate, max(1, iterations // stages), t_mul=1.0, alpha=0.01
            )
            optimizer = keras.optimizers.Adam(decay, beta_2=0.99)
        student.compile(optimizer=optimizer)
        callbacks = []
        if isinstance(student, MultistepConsistencyModel):
            callbacks.append(TeacherStepAnneal())
        return student, callbacks

    def seconds(self, name, k):
        """The median time of a step, after it is compiled."""
        student, _ = self.make(name, k, ITERATIONS)
        times = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                float(logs["loss"])  # waits for the device
                times.append(time.perf_counter())

        student.fit(
            self.batches(0),
            steps_per_epoch=TIMED,
            callbacks=[Watch()],
            shuffle=False,
            verbose=0,
        )
        return statistics.median(np.diff(times))

    def relative_time(self, name, k):
        """A step's time over CD's, by turns, twice each."""
        pairs = [
            (self.seconds(name, k), self.seconds("CD", k)) for _ in range(2)
        ]
        ours, theirs = (min(values) for values in zip(*pairs))
        return ours / theirs

    def student(self, name, k, budget):
        """Trained and judged at every K that it is for."""
        iterations, relative = ITERATIONS, None
        if budget == "time":
            relative = self.relative_time(name, k or 8)
            iterations = round(ITERATIONS / relative)
        student, callbacks = self.make(name, k, iterations)
        begun = time.perf_counter()
        student.fit(
            self.batches(self.seed + 1),
            steps_per_epoch=iterations,
            callbacks=callbacks,
            shuffle=False,
            verbose=0,
        )
        seconds = time.perf_counter() - begun
        distances = {}
        for steps in STEPS if k is None else (k,):
            images = self.experiment.samples(student, steps)
            judged = self.experiment.judge.judge(images)
            distances[str(steps)] = judged["frechet_distance"]
        return {
            "iterations": iterations,
            "relative_time": relative,
            "seconds": seconds,
            "distances": distances,
        }

    def best(self):
        """The teacher's least distance, of aDDIM and DDIM."""
        return min(
            self.experiment.curve(sampler, "cosine", n)["frechet_distance"]
            for sampler in ("addim", "ddim")
            for n in (64, 128)
        )


def read():
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [json.loads(line) for line in lines]


def train(minutes):
    """Trains what results.jsonl doesn't have, until the time is up."""
    FOLDER.mkdir(exist_ok=True)
    until, rows = time.monotonic() + 60 * minutes, read()
    done = {tuple(row[name] for name in KEY) for row in rows}
    best = {row["seed"]: row["teacher_distance"] for row in rows}
    bench: Any = None
    for cell in cells():
        if cell in done or time.monotonic() > until:
            continue
        seed, *arguments = cell
        if bench is None or bench.seed != seed:
            bench = Bench(seed)
        if seed not in best:
            best[seed] = bench.best()
        row = {**dict(zip(KEY, cell)), **bench.student(*arguments)}
        row["teacher_distance"] = best[seed]
        row["ratios"] = {k: d / best[seed] for k, d in row["distances"].items()}
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **circumstances()}) + "\n")
        ratios = {k: f"{r:.2f}" for k, r in row["ratios"].items()}
        print(*cell, ratios, f"{row['seconds']:.0f} s", flush=True)


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
    methods_table.write(read(), FOLDER)


if __name__ == "__main__":
    main()
