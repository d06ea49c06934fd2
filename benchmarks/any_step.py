"""One student for every K against separate ones, on the digits.

Command:   KERAS_BACKEND=jax python -m benchmarks.any_step [--minutes 60]
Writes:    benchmarks/any_step/results.jsonl (a row per student), table.md and
           ratio.png; the models into benchmarks/any_step/models/
Data:      scikit-learn's digits, judge and teachers as in benchmarks/digits.py

A row that is in results.jsonl is not computed again: an interrupted run goes on
where it was. Every student begins with the weights of the one teacher of its
seed; batches are of 64.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from benchmarks import any_step_table
from benchmarks.annealing import circumstances
from benchmarks.digits import Experiment
from examples import digits
from keras_mscm import MultistepConsistencyModel, preset_files, samplers
from keras_mscm.callbacks import TeacherStepAnneal

FOLDER = Path(__file__).with_suffix("")
RESULTS = FOLDER / "results.jsonl"
EVERY = 1, 2, 4, 8, 16
KEY = "seed", "method", "student_steps", "budget", "remedy"
BATCH, DECAY = 64, 0.998
# What is tried beside the plain setting, each by its name: the learning rate,
# how often each K is drawn, the teacher steps at the end, the average's decay.
REMEDIES = {
    "": {},
    "half the rate": {"rate": 5e-4},
    "twice the rate": {"rate": 2e-3},
    "K drawn as 1 / K": {"weights": [16, 8, 4, 2, 1]},
    "K drawn as 1 / sqrt K": {"weights": [4, 2.83, 2, 1.41, 1]},
    "K drawn as sqrt K": {"weights": [1, 1.41, 2, 2.83, 4]},
    "to 32 teacher steps": {"end": 32},
    "to 256 teacher steps": {"end": 256},
    "decay 0.9995": {"decay": 0.9995},
    "reference by EMA": {"reference": "ema"},
    "batches of 256, a quarter of the iterations": {"batch": 256},
}


def cells():
    """What there is to train, the most informative first."""
    several = [*EVERY]
    for seed in (0, 1, 2):
        for method in ("distillation", "training"):
            yield seed, method, several, 4000, ""
            for k in EVERY:
                yield seed, method, k, 800, ""
        yield seed, "distillation", several, 10_000, ""
    for remedy in [*REMEDIES][1:]:
        yield 0, "training", several, 4000, remedy
        if "teacher" not in remedy:
            yield 0, "distillation", several, 4000, remedy
    for seed in (0, 1, 2):
        for method in ("distillation", "training"):
            yield seed, method, "any", 4000, ""
            for budget in (2000, 4000):
                for k in EVERY:
                    yield seed, method, k, budget, ""
        yield seed, "training", several, 10_000, ""


class Seed(Experiment):
    """One seed's data, judge, noise and teacher."""

    def __init__(self, seed):
        settings = argparse.Namespace(
            num_samples=3000,
            teacher_batch_size=128,
            teacher_iterations=3000,
            teacher_learning_rate=2e-3,
        )
        super().__init__(seed, settings)
        self._teacher = None

    def teacher(self):
        if self._teacher is None:
            self._teacher = super().teacher()
        return self._teacher

    def best(self):
        """The teacher's least distance, as in benchmarks/digits.py."""
        curve = [
            self.evaluate(self.teacher(), n, sampler=sampler)
            for sampler in (samplers.DDIM(), samplers.ADDIM())
            for n in (64, 512)
        ]
        return min(row["frechet_distance"] for row in curve)

    def student(self, method, student_steps, budget, remedy):
        """A student, trained and judged at every K that it is for."""
        given = REMEDIES[remedy]
        steps = student_steps
        steps = tuple(steps) if isinstance(steps, list) else steps
        further = {
            name: given[ours]
            for ours, name in (
                ("weights", "step_weights"),
                ("reference", "reference"),
            )
            if ours in given
        }
        student = MultistepConsistencyModel.from_teacher(
            self.teacher(),
            student_steps=steps,
            method=method,
            ema_decay=given.get("decay", DECAY),
            seed=self.seed + 1,
            **further,
        )
        batch = given.get("batch", BATCH)
        iterations = budget * BATCH // batch
        rate = given.get("rate", 5e-4 if steps == 1 else 1e-3)
        begun = time.perf_counter()
        student.compile(optimizer=digits.make_optimizer(rate, iterations))
        student.fit(
            self.data(batch, self.seed + 1),
            steps_per_epoch=iterations,
            callbacks=[
                TeacherStepAnneal(
                    max(16, student.largest_steps),
                    given.get("end", 128),
                    iterations // 2,
                )
            ],
            verbose=0,
        )
        seconds = time.perf_counter() - begun
        several = EVERY if not isinstance(steps, int) else (steps,)
        distances = {
            str(k): self.evaluate(student, k)["frechet_distance"]
            for k in several
        }
        return student, {"distances": distances, "seconds": seconds}


def read():
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [json.loads(line) for line in lines]


def _key(cell):
    return json.dumps(cell)


def train(minutes):
    """Trains what results.jsonl doesn't have, until the time is up."""
    (FOLDER / "models").mkdir(parents=True, exist_ok=True)
    until, rows = time.monotonic() + 60 * minutes, read()
    done = {_key([row[name] for name in KEY]) for row in rows}
    best = {row["seed"]: row["teacher_distance"] for row in rows}
    seeds: dict = {}
    for cell in cells():
        if _key([*cell]) in done or time.monotonic() > until:
            continue
        done.add(_key([*cell]))
        seed, *arguments = cell
        if seed not in seeds:
            seeds = {seed: Seed(seed)}  # and not those before, for the memory
        if seed not in best:
            best[seed] = seeds[seed].best()
        student, row = seeds[seed].student(*arguments)
        row = {**dict(zip(KEY, cell)), **row, "teacher_distance": best[seed]}
        row["ratios"] = {k: d / best[seed] for k, d in row["distances"].items()}
        name = "_".join(str(part) for part in cell if part != "")
        if not isinstance(cell[2], int):
            name = name.replace(str(cell[2]), "several")
            student.save(FOLDER / "models" / f"{name}.keras")
        with RESULTS.open("a") as file:
            file.write(json.dumps({**row, **circumstances()}) + "\n")
        ratios = {k: f"{r:.3f}" for k, r in row["ratios"].items()}
        print(*cell, ratios, f"{row['seconds']:.0f} s", flush=True)


def write_preset():
    """The preset that ships: seed 0's student of the longest distillation."""
    rows = [
        row
        for row in read()
        if (row["seed"], row["method"], row["remedy"])
        == (0, "distillation", "")
        and row["student_steps"] == [*EVERY]
    ]
    row = max(rows, key=lambda row: row["budget"])
    name = f"0_distillation_several_{row['budget']}.keras"
    kept = "distances", "teacher_distance", "budget", "date"
    model = keras.saving.load_model(FOLDER / "models" / name)
    model.save_to_preset(
        preset_files.BUILT_IN / "digits_any_step",
        weights_dtype="float16",
        metadata={
            "description": "Digits in 1, 2, 4, 8 or 16 steps, distilled.",
            "command": "python -m benchmarks.any_step && "
            "python -m benchmarks.any_step --preset",
            "measured": {
                **{key: row[key] for key in kept},
                "num_samples": 3000,
                "batch_size": BATCH,
            },
        },
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
    parser.add_argument(
        "--preset", action="store_true", help="write the preset that ships"
    )
    args = parser.parse_args()
    if args.preset:
        write_preset()
        return
    train(args.minutes)
    any_step_table.write(read(), FOLDER)


if __name__ == "__main__":
    main()
