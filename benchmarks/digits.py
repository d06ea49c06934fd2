"""CT, CD and progressive distillation on the digits, for K = 1, 2, 4, 8, 16.

Command:   KERAS_BACKEND=jax python -m benchmarks.digits
Writes:    benchmarks/digits/results.jsonl (a row per model), table.md, and
           the models themselves into benchmarks/digits/models/
Data:      scikit-learn's digits, as in examples/digits.py

Every student begins with the weights of the one teacher of its seed and has the
same budget of iterations, batch size and learning rate. A row that is in
results.jsonl is not computed again, so an interrupted run goes on where it was.
"""

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import keras_mscm
from benchmarks import tables
from examples import digits
from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    ProgressiveDistillationModel,
    preset_files,
    samplers,
)
from keras_mscm.callbacks import TeacherStepAnneal

FOLDER = Path(__file__).with_suffix("")
STUDENT_STEPS = (1, 2, 4, 8, 16)
METHODS = ("training", "distillation", "progressive")
# The paper's FID over its teacher's on ImageNet64, small (tables 1, 3 and 5).
PAPER = {
    "training": {1: 4.8, 2: 1.8, 4: 1.2, 16: 1.0},
    "distillation": {1: 2.9, 2: 1.33, 4: 1.13, 8: 1.07, 16: 1.0},
    "progressive": {1: 7.1, 2: 3.1, 4: 1.6, 8: 1.13},
}


class Experiment:
    """One seed: its data, judge, noise and teacher."""

    def __init__(self, seed, args):
        self.seed, self.args = seed, args
        keras.utils.set_random_seed(seed)
        self.images, self.held_out, self.labels, _ = digits.load_data(seed)
        self.judge = digits.Judge(self.images, self.labels, self.held_out, seed)
        self.noise = np.random.default_rng(seed).standard_normal(
            (args.num_samples, 8, 8, 1), dtype="float32"
        )
        self.wanted = np.arange(args.num_samples, dtype="int32") % 10

    def data(self, batch_size, seed):
        return digits.batches(self.images, self.labels, batch_size, seed)

    def evaluate(self, model, num_steps, name="ddim", **kwargs):
        images = model.generate(
            noise=self.noise,
            labels=self.wanted,
            num_steps=num_steps,
            batch_size=500,
            **kwargs,
        )
        return self.judge.judge(images, self.wanted, name, num_steps)

    def teacher(self):
        """The teacher of this seed, trained once, and its file."""
        path = FOLDER / "models" / f"teacher_{self.seed}.keras"
        if path.exists():
            return keras.saving.load_model(path)
        teacher = DiffusionModel(
            digits.make_network(self.seed), ema_decay=0.998, seed=self.seed
        )
        digits.train(
            teacher,
            self.data(self.args.teacher_batch_size, self.seed),
            self.args.teacher_learning_rate,
            self.args.teacher_iterations,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        teacher.save(path)
        return teacher

    def teacher_rows(self):
        """The teacher's own curve."""
        teacher = self.teacher()
        for sampler in (samplers.DDIM(), samplers.ADDIM()):
            for num_steps in digits.TEACHER_STEPS:
                name = type(sampler).__name__.lower()
                yield self.evaluate(teacher, num_steps, name, sampler=sampler)

    def student_row(self, method, student_steps):
        """A student, trained, saved and judged."""
        teacher, args = self.teacher(), self.args
        iterations, callbacks = args.student_iterations, []
        common = dict(
            student_steps=student_steps, ema_decay=0.998, seed=self.seed + 1
        )
        # One step from noise to image asks for a lower rate (measured, seed 0:
        # CD at K = 1 is 5.5 times its teacher with 1e-3, 1.7 times with 5e-4).
        rate = args.student_learning_rate / (2 if student_steps == 1 else 1)
        optimizer = digits.make_optimizer(rate, iterations)
        if method == "progressive":
            stages = (args.progressive_start // student_steps).bit_length() - 1
            per_stage = iterations // stages
            student = ProgressiveDistillationModel.from_teacher(
                teacher,
                teacher_steps=args.progressive_start,
                iterations_per_stage=per_stage,
                # Each stage hands on its average: it must be shorter than one.
                **{**common, "ema_decay": 0.99},
            )
            optimizer = keras.optimizers.Adam(
                keras.optimizers.schedules.CosineDecayRestarts(
                    rate, per_stage, t_mul=1.0, alpha=0.01
                ),
                beta_2=0.99,
            )
        else:
            student = MultistepConsistencyModel.from_teacher(
                teacher, method=method, **common
            )
            callbacks.append(
                TeacherStepAnneal(
                    max(16, student_steps), args.anneal_to, iterations // 2
                )
            )
        begun = time.perf_counter()
        student.compile(optimizer=optimizer)
        student.fit(
            self.data(args.batch_size, self.seed + 1),
            steps_per_epoch=iterations,
            callbacks=callbacks,
            verbose=0,
        )
        seconds = time.perf_counter() - begun
        name = f"{method}_{student_steps}_{self.seed}.keras"
        student.save(FOLDER / "models" / name)
        return {**self.evaluate(student, student_steps), "seconds": seconds}


def write_preset():
    """The teacher that ships, of seed 0."""
    rows = (FOLDER / "results.jsonl").read_text().splitlines()
    row = min(
        (
            row
            for row in map(json.loads, rows)
            if row["seed"] == 0 and row["method"] == "teacher"
        ),
        key=lambda row: row["frechet_distance"],
    )
    model = keras.saving.load_model(FOLDER / "models" / "teacher_0.keras")
    model.save_to_preset(
        preset_files.BUILT_IN / "digits_teacher",
        weights_dtype="float16",
        metadata={
            "description": "Diffusion model of scikit-learn's digits.",
            "command": "python -m benchmarks.digits --seeds 0 && "
            "python -m benchmarks.digits --preset",
            "measured": {
                key: row[key]
                for key in (
                    "frechet_distance",
                    "label_accuracy",
                    "num_steps",
                    "sampler",
                    "num_samples",
                    "settings",
                )
            },
        },
    )


def provenance(args):
    skipped = "seeds", "methods", "student_steps", "preset"
    return {
        "settings": {k: v for k, v in vars(args).items() if k not in skipped},
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "keras_mscm": keras_mscm.__version__,
            "numpy": np.__version__,
        },
    }


def run(args):
    path = FOLDER / "results.jsonl"
    path.parent.mkdir(exist_ok=True)
    rows = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    done = {(row["seed"], row["method"], row["student_steps"]) for row in rows}

    def write(row):
        with path.open("a") as file:
            file.write(json.dumps({**row, **provenance(args)}) + "\n")
        print(
            row["seed"],
            row["method"],
            row["num_steps"],
            round(row["frechet_distance"], 5),
            flush=True,
        )

    for seed in args.seeds:
        experiment = Experiment(seed, args)
        if (seed, "teacher", None) not in done:
            for row in experiment.teacher_rows():
                key = dict(seed=seed, method="teacher", student_steps=None)
                write({**key, **row})
        for student_steps in args.student_steps:
            for method in args.methods:
                if (seed, method, student_steps) not in done:
                    row = experiment.student_row(method, student_steps)
                    key = dict(
                        seed=seed, method=method, student_steps=student_steps
                    )
                    write({**key, **row})


def table(rows):
    """The rows as Markdown: mean and spread over the seeds."""
    best, ratios, curve = {}, {}, {}
    for row in rows:
        distance = row["frechet_distance"]
        if row["method"] == "teacher":
            best[row["seed"]] = min(distance, best.get(row["seed"], np.inf))
            key = row["sampler"], row["num_steps"]
            curve.setdefault(key, []).append(distance)
    for row in rows:
        if row["method"] != "teacher":
            key = row["method"], row["student_steps"]
            ratio = row["frechet_distance"] / best[row["seed"]]
            ratios.setdefault(key, []).append(ratio)

    def cell(values, digits=2):
        if not values:
            return ""
        low, high = (f"{f(values):.{digits}f}" for f in (min, max))
        return f"{np.mean(values):.{digits}f} ({low} to {high})"

    head, students = ["K"], [[k] for k in STUDENT_STEPS]
    for method in METHODS:
        head += [method, "paper"]
        for row in students:
            k = row[0]
            row += [cell(ratios.get((method, k), [])), PAPER[method].get(k, "")]
    lines = [
        "# Digits: CT, CD and progressive distillation",
        "",
        "Written by `KERAS_BACKEND=jax python -m benchmarks.digits` "
        f"({rows[-1]['date']}, {rows[-1]['hardware']}, "
        + ", ".join(f"{k} {v}" for k, v in rows[-1]["versions"].items())
        + f"; seeds {sorted(best)}).",
        "",
        "Student's Fréchet distance over its teacher's best (of DDIM and aDDIM,"
        " 1 to 512 steps): mean over the seeds (least to most), and the paper's"
        " on ImageNet64, small network.",
        "",
        *tables.markdown(head, students),
        "The teacher's Fréchet distance, mean (least to most):",
        "",
        *tables.markdown(
            ("steps", "DDIM", "aDDIM"),
            [
                [
                    n,
                    *(
                        cell(curve.get((s, n), []), 4)
                        for s in ("ddim", "addim")
                    ),
                ]
                for n in digits.TEACHER_STEPS
            ],
        ),
    ]
    settings = [f"`{k}` {v}" for k, v in rows[-1]["settings"].items()]
    lines += [
        f"Settings: {', '.join(settings)}; half the student's learning rate at "
        "K = 1; moving averages of decay 0.998, in progressive distillation, "
        "whose stages are short, 0.99.",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument(
        "--student-steps", type=int, nargs="+", default=STUDENT_STEPS
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=3000)
    parser.add_argument("--teacher-batch-size", type=int, default=128)
    parser.add_argument("--teacher-iterations", type=int, default=3000)
    parser.add_argument("--teacher-learning-rate", type=float, default=2e-3)
    parser.add_argument("--student-iterations", type=int, default=2000)
    parser.add_argument("--student-learning-rate", type=float, default=1e-3)
    parser.add_argument("--anneal-to", type=int, default=128)
    parser.add_argument("--progressive-start", type=int, default=64)
    parser.add_argument(
        "--preset",
        action="store_true",
        help="write the teacher that ships, of seed 0",
    )
    args = parser.parse_args()
    if args.preset:
        write_preset()
    else:
        run(args)
        rows = (FOLDER / "results.jsonl").read_text().splitlines()
        (FOLDER / "table.md").write_text(table([*map(json.loads, rows)]))


if __name__ == "__main__":
    main()
