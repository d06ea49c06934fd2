"""Distils a diffusion model of handwritten digits into one of 1 to 16 steps.

Command:   make demo   (or: KERAS_BACKEND=jax python examples/digits.py)
Time:      see demo/results.json, "seconds"
Data:      scikit-learn's digits, 1797 scans of 8x8 pixels, ten classes
Writes:    demo/results.json, demo/distance.png, demo/samples.png,
           demo/neighbours.png

A teacher is trained, and sampled in 1 to 512 steps with DDIM and with aDDIM.
One student is distilled from it for 1, 2, 4, 8 and 16 steps (CD: aDDIM
teacher, teacher steps annealed, synchronised dropout, EMA). All are judged by
the Frechet distance to the training images in the features of a digit
classifier, and by how often that classifier sees the digit that was asked for.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
import scipy
import sklearn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import keras_mscm
from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    metrics,
    samplers,
)
from keras_mscm.callbacks import TeacherStepAnneal

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STUDENT_STEPS = (1, 2, 4, 8, 16)
TEACHER_STEPS = [1, 2, 4, 8, 16, 32, 64, 512]


def load_data(seed):
    """Images in [-1, 1] and labels; a part of them is held out."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype("float32").reshape(-1, 8, 8, 1)
    return train_test_split(
        images,
        labels.astype("int32"),
        test_size=500,
        stratify=labels,
        random_state=seed,
    )


class Judge:
    """Frechet distance and label accuracy, by a classifier of the digits."""

    def __init__(self, images, labels, held_out, seed):
        self.classifier = MLPClassifier(
            (128, 32),
            activation="logistic",
            alpha=1e-3,
            max_iter=400,
            random_state=seed,
        ).fit(_flat(images), labels)
        extractor = metrics.FeatureExtractor(
            self.features, name="digits classifier", batch_size=10_000
        )
        self.training, self.held_out = (
            metrics.FrechetDistance(
                metrics.Reference(part, extractor, name=name)
            )
            for part, name in (
                (images, "digits, training"),
                (held_out, "digits, held out"),
            )
        )

    def features(self, images):
        """Activations of the last hidden layer, `(num, 32)`."""
        hidden = _flat(images)
        layers = zip(self.classifier.coefs_, self.classifier.intercepts_)
        for kernel, bias in [*layers][:-1]:
            hidden = scipy.special.expit(hidden @ kernel + bias)
        return hidden

    def judge(self, images, labels, sampler, num_steps):
        """One entry of results.json."""
        distances = []
        for metric in (self.training, self.held_out):
            metric.reset_state()
            metric.update_state(images)
            distances.append(float(metric.result()["value"]))
        seen = self.classifier.predict(_flat(images))
        return {
            "sampler": sampler,
            "num_steps": num_steps,
            "frechet_distance": distances[0],
            "frechet_distance_held_out": distances[1],
            "label_accuracy": float(np.mean(seen == labels)),
            "num_samples": len(images),
        }


def _flat(images):
    return np.asarray(images, "float64").reshape(len(images), -1)


def make_network(seed):
    """A UViT of one stage: four tokens of 4x4 pixels.

    Large patches leave matrix products and little else, which is what a CPU is
    quick at.
    """
    return UViT(
        image_shape=(8, 8, 1),
        patch_size=4,
        widths=(128,),
        depths=(4,),
        attention=True,
        head_width=64,
        embedding_width=64,
        num_classes=10,
        dropout=0.01,
        seed=seed,
    )


def make_optimizer(learning_rate, iterations):
    """Adam with a warm-up over 5 % of the iterations, then a cosine decay."""
    warmup = iterations // 20
    return keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(
            0.0,
            iterations - warmup,
            warmup_target=learning_rate,
            warmup_steps=warmup,
            alpha=0.01,
        ),
        beta_2=0.99,
    )


def batches(images, labels, batch_size, seed):
    """Batches of shuffled images, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for begin in range(0, len(images) - batch_size + 1, batch_size):
            chosen = order[begin : begin + batch_size]
            yield images[chosen], labels[chosen]


def train(model, data, learning_rate, iterations, callbacks=(), epochs=5):
    model.compile(optimizer=make_optimizer(learning_rate, iterations))
    model.fit(
        data,
        epochs=epochs,
        steps_per_epoch=iterations // epochs,
        callbacks=[*callbacks],
    )


def teacher_curves(teacher, noise, labels, evaluate):
    """The teacher's quality over the number of steps, for each sampler."""
    curves, progress = {}, keras.utils.Progbar(2 * sum(TEACHER_STEPS))
    for sampler in (samplers.DDIM(), samplers.ADDIM()):
        curves[_name(sampler)] = []
        for num_steps in TEACHER_STEPS:
            images = teacher.generate(
                noise=noise,
                labels=labels,
                num_steps=num_steps,
                sampler=sampler,
                batch_size=500,
            )
            entry = evaluate(images, labels, _name(sampler), num_steps)
            curves[_name(sampler)].append(entry)
            progress.add(num_steps, [("distance", entry["frechet_distance"])])
    return curves


def _name(sampler):
    return type(sampler).__name__.lower()


def plot_distances(results, path):
    """Frechet distance over the number of evaluations, log-log."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, curve), style in zip(
        results["curves"].items(), ("s--", "o-"), strict=True
    ):
        label = {"ddim": "teacher, DDIM", "addim": "teacher, aDDIM"}[name]
        axes.plot(
            [entry["num_steps"] for entry in curve],
            [entry["frechet_distance"] for entry in curve],
            style,
            label=label,
        )
    axes.plot(
        STUDENT_STEPS,
        [entry["frechet_distance"] for entry in results["student"]],
        "*-",
        markersize=12,
        label="one student",
    )
    floor = results["real_floor"]
    axes.axhline(
        floor["frechet_distance"],
        color="grey",
        linestyle=":",
        label=f"{floor['num_samples']} real images, held out",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(TEACHER_STEPS, TEACHER_STEPS)
    axes.set_xlabel("evaluations of the network per image")
    axes.set_ylabel("Fréchet distance to the training images")
    axes.set_title("Digits: one student, distilled from its teacher")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_rows(rows, path, columns=20):
    """Sets of images one below another; a column has the same noise."""
    figure, all_axes = plt.subplots(
        len(rows), 1, figsize=(11, 0.6 * len(rows)), layout="constrained"
    )
    for axes, (title, images) in zip(all_axes, rows.items(), strict=True):
        cells = np.pad(images[:columns, :, :, 0], ((0, 0), (1, 1), (1, 1)))
        axes.imshow(
            np.concatenate([*cells], axis=1), cmap="gray_r", vmin=-1, vmax=1
        )
        axes.set_ylabel(title, rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[], frame_on=False)
    figure.savefig(path, dpi=150)


def plot_grids(panels, path, columns=10, rows=6):
    """Sets of images side by side; column c shows the digit c."""
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(4 * len(panels), 4 * rows / columns + 0.4),
        layout="constrained",
    )
    for axes, (title, images) in zip(all_axes, panels.items(), strict=True):
        images = np.pad(
            images[: rows * columns, :, :, 0],
            ((0, 0), (1, 1), (1, 1)),
            constant_values=0,
        ).reshape(rows, columns, 10, 10)
        axes.imshow(
            images.transpose(0, 2, 1, 3).reshape(rows * 10, columns * 10),
            cmap="gray_r",
            vmin=-1,
            vmax=1,
        )
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def nearest(images, training_images):
    """For each image the training image at the least distance in pixels."""
    distances = scipy.spatial.distance.cdist(
        _flat(images), _flat(training_images)
    )
    return training_images[distances.argmin(axis=1)], distances.min(axis=1)


def closing_table(results):
    best = results["teacher_best"]
    ddim = results["curves"]["ddim"]
    rows = [
        (f"teacher, best ({best['sampler']})", best),
        *(("teacher, DDIM", e) for e in ddim if e["num_steps"] <= 16),
        *(("student", entry) for entry in results["student"]),
        ("real images, held out", results["real_floor"]),
    ]
    print(f"\n{'':24}{'steps':>6}{'distance':>10}{'held out':>10}{'label':>8}")
    for title, entry in rows:
        print(
            f"{title:24}{entry['num_steps']:6}"
            f"{entry['frechet_distance']:10.3f}"
            f"{entry['frechet_distance_held_out']:10.3f}"
            f"{entry['label_accuracy']:8.1%}"
        )
    for name, ratios in results["ratios"].items():
        told = ", ".join(f"{k}: {ratio:.2f}" for k, ratio in ratios.items())
        print(f"{name.replace('_', ' ')}, by steps: {told}")


def main(args):
    begun = time.perf_counter()
    seconds = {}

    def done(part):
        seconds[part] = round(time.perf_counter() - begun, 1)

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(args.seed)
    images, held_out, labels, held_out_labels = load_data(args.seed)
    judge = Judge(images, labels, held_out, args.seed)
    noise = np.random.default_rng(args.seed).standard_normal(
        (args.num_samples, 8, 8, 1), dtype="float32"
    )
    wanted = np.arange(args.num_samples, dtype="int32") % 10

    def data(batch_size, seed):
        return batches(images, labels, batch_size, seed)

    print(f"\nTraining the teacher, {args.teacher_iterations} iterations")
    teacher = DiffusionModel(
        make_network(args.seed), ema_decay=0.998, seed=args.seed
    )
    train(
        teacher,
        data(args.teacher_batch_size, args.seed),
        args.teacher_learning_rate,
        args.teacher_iterations,
    )
    done("teacher_trained")

    print("\nSampling the teacher, 1 to 512 steps with DDIM and aDDIM")
    curves = teacher_curves(teacher, noise, wanted, judge.judge)
    done("teacher_sampled")

    print(f"\nDistilling the student, {args.student_iterations} iterations")
    student = MultistepConsistencyModel.from_teacher(
        teacher,
        student_steps=STUDENT_STEPS,
        weighting=getattr(keras_mscm.losses, args.weighting),
        ema_decay=0.998,
        seed=args.seed + 1,
    )
    train(
        student,
        data(args.student_batch_size, args.seed + 1),
        args.student_learning_rate,
        args.student_iterations,
        [TeacherStepAnneal(16, 128, args.student_iterations // 2)],
    )
    done("student_trained")

    samples = {
        k: student.generate(
            noise=noise, labels=wanted, num_steps=k, batch_size=500
        )
        for k in STUDENT_STEPS
    }
    best = min(
        curves["ddim"] + curves["addim"], key=lambda e: e["frechet_distance"]
    )
    of_student = [
        judge.judge(samples[k], wanted, "student", k) for k in STUDENT_STEPS
    ]
    of_ddim = {entry["num_steps"]: entry for entry in curves["ddim"]}
    neighbours, distances = nearest(samples[8], images)
    _, real_distances = nearest(held_out, images)
    results = {
        "teacher_best": best,
        "student": of_student,
        "real_floor": judge.judge(held_out, held_out_labels, "real", 0),
        "ratios": {
            f"student_over_{name}": {
                entry["num_steps"]: entry["frechet_distance"]
                / against(entry)["frechet_distance"]
                for entry in of_student
            }
            for name, against in (
                ("teacher_best", lambda entry: best),
                ("teacher_ddim", lambda entry: of_ddim[entry["num_steps"]]),
            )
        },
        "nearest_training_image": {
            "median_pixel_distance_of_student_samples": float(
                np.median(distances)
            ),
            "median_pixel_distance_of_held_out_images": float(
                np.median(real_distances)
            ),
        },
        "curves": curves,
        "settings": vars(args),
        "parameters": teacher.network.count_params(),
        "training_images": len(images),
        "held_out_images": len(held_out),
        "versions": {
            "backend": keras.backend.backend(),
            **{
                module.__name__: module.__version__
                for module in (keras, keras_mscm, np, scipy, sklearn)
            },
        },
    }

    plot_distances(results, output / "distance.png")
    grid_of = {
        f"student, {k} step{'s'[: k > 1]}": samples[k] for k in (1, 2, 4, 8)
    }
    grid_of["teacher, 512 steps"] = teacher.generate(
        noise=noise[:60],
        labels=wanted[:60],
        num_steps=512,
        sampler=samplers.DDIM(),
    )
    plot_rows(grid_of, output / "samples.png")
    plot_grids(
        {
            "samples of the student, 8 steps": samples[8],
            "the nearest training images": neighbours,
        },
        output / "neighbours.png",
        rows=3,
    )
    done("all")
    results["seconds"] = seconds
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    closing_table(results)
    print(f"Written to {output}/ after {seconds['all']:.0f} seconds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=3000)
    parser.add_argument("--teacher-batch-size", type=int, default=128)
    parser.add_argument("--teacher-iterations", type=int, default=3000)
    parser.add_argument("--teacher-learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--weighting",
        default="sqrt_snr_plus_one",
        choices=("sqrt_snr_plus_one", "snr_plus_one"),
        help="weight of the student's loss over time",
    )
    parser.add_argument("--student-batch-size", type=int, default=64)
    parser.add_argument("--student-iterations", type=int, default=4000)
    parser.add_argument("--student-learning-rate", type=float, default=1e-3)
    main(parser.parse_args())
