"""Runs one experiment: trains teacher and students, and judges their samples.

Command:   python -m benchmarks.run fashion_small [--size gpu] [--seeds 0 1]
Settings:  benchmarks/settings/fashion_small.toml
Writes:    benchmarks/results/fashion_small.jsonl, a row per evaluation;
           models, judges and samples into benchmarks/runs/models/

Interrupted anywhere, the same command goes on where it was: what has a row in
the results is not computed again, a trained model is loaded, and a training
that was cut off goes on after its last finished tenth.

`python -m benchmarks.report` makes tables and plots of all results.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import time
import tomllib
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_mscm
from benchmarks import data
from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    ProgressiveDistillationModel,
    UViT,
    datasets,
    samplers,
)
from keras_mscm.atomic_file import write_atomically
from keras_mscm.callbacks import ResumeTraining, TeacherStepAnneal
from keras_mscm.schedules import KarrasSchedule

FOLDER = Path(__file__).parent
MODELS = FOLDER / "runs" / "models"
PARTS = 10  # of a training; it goes on after the last that was finished
BATCH = 250  # of the images that are drawn for judgement
CURVES = {
    "ddim": (samplers.DDIM, {}),
    "addim": (samplers.ADDIM, {}),
    "addim_empirical": (samplers.ADDIM, {"x_var": True}),
    "noisy_ddim": (samplers.NoisyDDIM, {}),
    "ddpm": (samplers.DDPM, {}),
    "heun": (samplers.Heun, {}),
}
CD = {"method": "distillation", "integrator": "addim", "teacher_steps": 0}


def students(table, settings):
    """What a table of the paper is made of: a dictionary per student."""
    steps = {1: (8, 4, 16, 2, 1), 2: (1, 2, 4, 8), 3: (8, 4, 2, 1)}
    if table == 1:
        varied = [{}, {"method": "training"}]
    elif table == 2:
        constants = settings["constant_teacher_steps"]
        varied = [{"teacher_steps": n} for n in constants]
    elif table == 3:
        varied = [{"method": "progressive"}]
    else:
        varied = [{"integrator": "ddim"}]
    return [
        {"student_steps": k, **CD, **change}
        for k in steps.get(table, (4, 2, 8, 1))
        for change in varied
    ]


class Experiment:
    """One seed: its data, judge, noise and teacher."""

    def __init__(self, name, settings, seed):
        self.name, self.settings, self.seed = name, settings, seed
        MODELS.mkdir(parents=True, exist_ok=True)
        keras.utils.set_random_seed(seed)
        self.data = data.load(settings["data"])
        self.judge = data.Judge(
            settings["data"],
            self.data,
            MODELS,
            epochs=settings.get("judge_epochs", 5),
        )
        num, shape = settings["num_samples"], self.data.images.shape[1:]
        self.noise = np.random.default_rng(seed).standard_normal(
            (num, *shape), dtype="float32"
        )
        # Classes as often as they are in the data.
        draw = np.random.default_rng(seed).permutation(len(self.data.labels))
        self.wanted = self.data.labels[np.resize(draw, num)]
        self._teacher = None

    def samples(self, model, num_steps, **kwargs):
        return model.generate(
            noise=self.noise,
            labels=self.wanted,
            num_steps=num_steps,
            batch_size=BATCH,
            seed=self.seed,
            **kwargs,
        )

    def train(self, model, budget, name, callbacks=(), optimizer=None):
        """Trains by the budget; from its last tenth, if it was cut off.

        Returns:
            The seconds it took; None if it was cut off, as nobody knows.
        """
        iterations = budget["iterations"]
        optimizer = optimizer or self.optimizer(
            budget["learning_rate"], iterations
        )
        model.compile(optimizer=optimizer)
        resume = ResumeTraining(MODELS / f"{name}_saves")
        at_once = not resume.saves
        begun = time.perf_counter()
        model.fit(
            datasets.from_arrays(
                self.data.images,
                self.data.labels,
                batch_size=budget["batch_size"],
                seed=model.seed,
                repeat=True,
            ),
            epochs=PARTS,
            steps_per_epoch=iterations // PARTS,
            shuffle=False,  # the batches come shuffled
            callbacks=[*callbacks, resume],
            verbose=0,
        )
        return time.perf_counter() - begun if at_once else None

    def keep(self, model, name):
        """Saves a model that is done, and drops what it could resume from."""
        write_atomically(MODELS / f"{name}.keras", model.save, ".keras")
        shutil.rmtree(MODELS / f"{name}_saves", ignore_errors=True)

    def optimizer(self, rate, iterations):
        """Adam with a warm-up over 5 % of the iterations, cosine decay."""
        warmup = iterations // 20
        decay = keras.optimizers.schedules.CosineDecay(
            0.0,
            iterations - warmup,
            warmup_target=rate,
            warmup_steps=warmup,
            alpha=0.01,
        )
        return keras.optimizers.Adam(decay, beta_2=0.99)

    def untrained(self):
        """A diffusion model that has not seen an image yet."""
        network = UViT(
            image_shape=self.data.images.shape[1:],
            num_classes=self.data.num_classes,
            seed=self.seed,
            **self.settings["network"],
        )
        return DiffusionModel(network, ema_decay=0.999, seed=self.seed)

    @property
    def teacher(self):
        """The teacher of this seed, trained once."""
        if self._teacher is None:
            name = f"{self.name}_teacher_{self.seed}"
            path = MODELS / f"{name}.keras"
            if not path.is_file():
                model = self.untrained()
                self.train(model, self.settings["teacher"], name)
                model.measure_x_var(
                    data.as_floats(self.data.images[:2000]),
                    self.data.labels[:2000],
                    seed=self.seed,
                )
                self.keep(model, name)
            self._teacher = keras.saving.load_model(path)
        return self._teacher

    def curve(self, sampler, grid, num_steps):
        """The teacher's samples, judged."""
        kind, kwargs = CURVES[sampler]
        if "x_var" in kwargs:
            kwargs = {"x_var": self.teacher.x_var}
        # Heun's method evaluates twice a step.
        steps = num_steps // 2 if sampler == "heun" else num_steps
        images = self.samples(
            self.teacher,
            steps,
            sampler=kind(**kwargs),
            schedule=KarrasSchedule() if grid == "karras" else None,
        )
        return self.judge.judge(images)

    def student(
        self,
        method,
        student_steps,
        integrator,
        teacher_steps,
        iterations=None,
    ):
        """A student, trained, saved and judged.

        `teacher_steps` is a number, two to be annealed from and to, or 0 for
        those of the settings.
        """
        settings, budget = self.settings, dict(self.settings["student"])
        name = f"{self.name}_{method}_{student_steps}_{integrator}"
        name += f"_{teacher_steps}_{self.seed}"
        if iterations:
            budget["iterations"] = iterations
            name += f"_{iterations}"
        iterations, optimizer, callbacks = budget["iterations"], None, []
        common = dict(
            student_steps=student_steps,
            integrator=CURVES[integrator][0](),
            ema_decay=0.998,
            seed=self.seed + 1,
        )
        if student_steps == 1:
            # One step from noise to image asks for a lower rate (measured on
            # the digits: 1.7 times the teacher's distance instead of 5.5).
            budget["learning_rate"] /= 2
        if method == "progressive":
            begin = settings["progressive_start"]
            stages = (begin // student_steps).bit_length() - 1
            per_stage = iterations // stages
            model = ProgressiveDistillationModel.from_teacher(
                self.teacher,
                teacher_steps=begin,
                iterations_per_stage=per_stage,
                # Each stage hands on its average: it must be shorter than one.
                **{**common, "ema_decay": 0.99},
            )
            decay = keras.optimizers.schedules.CosineDecayRestarts(
                budget["learning_rate"], per_stage, t_mul=1.0, alpha=0.01
            )
            optimizer = keras.optimizers.Adam(decay, beta_2=0.99)
        else:
            annealed = teacher_steps or settings["anneal"]
            if isinstance(annealed, list):
                start, end = max(annealed[0], student_steps), annealed[1]
                callbacks = [TeacherStepAnneal(start, end, iterations // 2)]
                teacher_steps = start
            model = MultistepConsistencyModel.from_teacher(
                self.teacher,
                method=method,
                teacher_steps=teacher_steps,
                **common,
            )
        path, seconds = MODELS / f"{name}.keras", None
        if path.is_file():
            model = keras.saving.load_model(path)
        else:
            seconds = self.train(model, budget, name, callbacks, optimizer)
            self.keep(model, name)
        images = self.samples(model, student_steps)
        np.savez_compressed(MODELS / f"{name}_samples.npz", images[:100])
        return {**self.judge.judge(images), "training_seconds": seconds}

    def seconds_per_image(self, num_steps):
        """Of the teacher's network, which is the students' as well.

        What it has learnt doesn't change the time, so it isn't trained for it.
        """
        model = self.untrained()
        few = dict(noise=self.noise[:BATCH], labels=self.wanted[:BATCH])

        def seconds(num_steps):
            begun = time.perf_counter()
            model.generate(
                num_steps=num_steps,
                sampler=samplers.DDIM(),
                batch_size=BATCH,
                **few,
            )
            return time.perf_counter() - begun

        seconds(1)  # compiles, for every number of steps
        took = min(seconds(num_steps) for _ in range(2))
        return {"seconds_per_image": took / BATCH}

    def real(self):
        """As many real images, held out: what there is to reach."""
        images = self.data.test_images[: self.settings["num_samples"]]
        return self.judge.judge(data.as_floats(images))


def tasks(settings):
    """What there is to do for a seed: pairs of a key and a method's name."""
    yield dict(kind="real"), "real"
    first = [
        dict(kind="curve", sampler=sampler, grid="cosine", num_steps=n)
        for sampler, n in (("addim", 512), ("addim", 8), ("ddim", 8))
    ]
    yield from ((key, "curve") for key in first)
    done = []
    for table in settings["tables"]:
        for student in students(table, settings):
            if student not in done:
                done.append(student)
                yield dict(kind="student", **student), "student"
    for change in settings.get("further", []):
        yield dict(kind="further", **CD | change), "student"
    for n in (1, 2, 4, 8, 16, 64, 512):
        yield dict(kind="time", num_steps=n), "seconds_per_image"
    if settings.get("curves"):
        for n in settings["curve_steps"]:
            for grid in ("cosine", "karras"):
                for sampler in CURVES:
                    key = dict(
                        kind="curve", sampler=sampler, grid=grid, num_steps=n
                    )
                    if key not in first:
                        yield key, "curve"


def hardware():
    """The CPU cores that this process may use; `taskset` can restrict them."""
    on_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count()
    return f"{platform.machine()}, {cores} CPU core{'s' if cores > 1 else ''}"


def circumstances(size):
    packages = ("keras", "jax", "tensorflow-cpu", "torch", "numpy")
    versions = {"keras_mscm": keras_mscm.__version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "size": size,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "backend": keras.backend.backend(),
        "versions": versions,
    }


def read_settings(name, size):
    """The settings of an experiment in one of its sizes."""
    text = (FOLDER / "settings" / f"{name}.toml").read_text()
    settings = tomllib.loads(text)
    sizes = {key: settings.pop(key) for key in ("cpu", "gpu")}
    return {**settings, **sizes[size]}


def read_results(name):
    path = FOLDER / "results" / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def run(name, size, seeds=None):
    """Does what the results don't have yet."""
    settings = read_settings(name, size)
    path = FOLDER / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    for seed in seeds or settings["seeds"]:
        experiment = Experiment(f"{name}_{size}", settings, seed)
        rows = read_results(name)
        for key, method in tasks(settings):
            whole = {"size": size, "seed": seed, **key}
            if any(whole.items() <= row.items() for row in rows):
                continue
            arguments = {k: v for k, v in key.items() if k != "kind"}
            numbers = getattr(experiment, method)(**arguments)
            row = {**whole, **numbers, **circumstances(size)}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            told = {k: row[k] for k in row if k.startswith("frechet")}
            print(datetime.datetime.now().strftime("%H:%M:%S"), whole, told)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("experiment")
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+")
    args = parser.parse_args()
    run(args.experiment, args.size, args.seeds)


if __name__ == "__main__":
    main()
