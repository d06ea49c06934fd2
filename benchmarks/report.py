"""Turns the results into the tables and plots that benchmarks/README.md shows.

Command:   python -m benchmarks.report
Reads:     benchmarks/results/*.jsonl, from `python -m benchmarks.run`
Writes:    what stands between the marks in benchmarks/README.md, and
           benchmarks/results/*.png
"""

from pathlib import Path

import matplotlib
import numpy as np

from benchmarks import data
from benchmarks.run import MODELS, read_results, read_settings
from benchmarks.tables import cell, markdown, shared
from benchmarks.verdicts import verdicts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
METHODS = {
    "training": "CT",
    "distillation": "CD",
    "progressive": "PD",
}
SAMPLERS = {
    "ddim": "DDIM",
    "addim": "aDDIM",
    "addim_empirical": "aDDIM, measured variance",
    "noisy_ddim": "noisy DDIM",
    "ddpm": "DDPM",
    "heun": "Heun",
}
# FID on ImageNet: tables 1 (64 small), 2 (CD on 128), 3 and 4 (64, small).
PAPER_1 = {
    "CT": {1: 7.2, 2: 2.7, 4: 1.8, 16: 1.5},
    "CD": {1: 4.3, 2: 2.0, 4: 1.7, 8: 1.6, 16: 1.5},
}
PAPER_2 = {
    "annealed": {1: 7.0, 2: 3.1, 4: 2.3, 8: 2.1},
    0: {1: 8.8, 2: 5.3, 4: 5.0, 8: 4.9},
    1: {1: 7.6, 2: 3.6, 4: 3.5, 8: 3.2},
    2: {1: 10.8, 2: 3.8, 4: 2.6, 8: 2.2},
}
PAPER_PD = {1: 10.7, 2: 4.7, 4: 2.4, 8: 1.7}
PAPER_4 = {
    "ddim": {1: 3.91, 2: 1.99, 4: 1.77, 8: 1.70, 16: 1.72},
    "addim": {1: 4.35, 2: 2.02, 4: 1.68, 8: 1.58, 16: 1.54},
}
PAPER_TEACHER = {1: 1.5, 2: 2.2}  # of table 1, and of ImageNet128


class Results:
    """The rows of one experiment in one of its sizes."""

    def __init__(self, name, size):
        self.name, self.size = name, size
        self.settings = read_settings(name, size)
        self.rows = [r for r in read_results(name) if r["size"] == size]

    def values(self, field="frechet_distance", **key):
        """The number of each seed that has one."""
        return {
            row["seed"]: row[field]
            for row in self.rows
            if field in row and key.items() <= row.items()
        }

    def student(self, k, method="distillation", integrator="addim", steps=0):
        return self.values(
            kind="student",
            student_steps=k,
            method=method,
            integrator=integrator,
            teacher_steps=steps,
        )

    def further(self):
        """The rows of students beside the tables."""
        return [row for row in self.rows if row["kind"] == "further"]

    def curve(self, sampler, grid="cosine"):
        """Ratios by evaluations, of the seeds that have the whole curve."""
        key = dict(kind="curve", sampler=sampler, grid=grid)
        steps = sorted(
            {r["num_steps"] for r in self.rows if key.items() <= r.items()}
        )
        known = shared(*(self.values(num_steps=n, **key) for n in steps))
        return {n: self.ratio(v) for n, v in zip(steps, known) if v}

    def best(self):
        """Each seed's teacher at its best, by any sampler."""
        best = {}
        for row in self.rows:
            if row["kind"] == "curve":
                seed, distance = row["seed"], row["frechet_distance"]
                best[seed] = min(distance, best.get(seed, distance))
        return best

    def ratio(self, values):
        """Of what each seed has, to its teacher's best."""
        best = self.best()
        return {seed: value / best[seed] for seed, value in values.items()}


def tables(results):
    """The paper's tables, each beside the paper's own numbers."""
    settings, done = results.settings, []
    row = [r for r in results.rows if "extractor" in r][-1]
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    seeds = sorted({r["seed"] for r in results.rows})
    best = results.best()
    real = results.values(kind="real")
    held_out = max(results.values("num_samples", kind="real").values())
    judges = sorted({r["extractor"] for r in results.rows if "extractor" in r})
    hardware = sorted({r["hardware"] for r in results.rows})
    command = f"python -m benchmarks.run {results.name} --size {results.size}"
    if seeds != settings["seeds"]:
        command += " --seeds " + " ".join(map(str, seeds))
    done += [
        f"## {results.name}, {results.size} size",
        "",
        f"`{command}` on "
        f"{row['backend']}, {' and '.join(hardware)}, until {row['date']}; "
        f"seeds {seeds}; {settings['num_samples']} samples; features of "
        f"{' and '.join(f'`{judge}`' for judge in judges)}; "
        f"{versions}. Teacher: {settings['teacher']}; students: "
        f"{settings['student']}; teacher steps {settings['anneal'][0]} to "
        f"{settings['anneal'][1]} in half the iterations.",
        "",
        f"Teacher's best Fréchet distance {cell(best, 4)}; aDDIM in 512 steps "
        + cell(
            results.values(
                kind="curve", sampler="addim", grid="cosine", num_steps=512
            ),
            4,
        )
        + f"; {held_out} real images, held out, {cell(real, 4)}. In the "
        "tables: distance over the teacher's best, and the paper's FID over "
        "its teacher's.",
        "",
    ]
    if 1 in settings["tables"]:
        lines = []
        for k in (1, 2, 4, 8, 16):
            line = [k]
            for method, name in list(METHODS.items())[:2]:
                values = results.student(k, method)
                paper = PAPER_1[name].get(k)
                line += [
                    cell(values, 4),
                    cell(results.ratio(values)),
                    f"{paper / PAPER_TEACHER[1]:.2f}" if paper else "",
                ]
            lines.append(line)
        head = ["K"]
        for name in ("CT", "CD"):
            head += [f"{name}, distance", f"{name}, ratio", f"{name}, paper"]
        done += ["### Table 1: CT and CD", "", *markdown(head, lines)]
    if 2 in settings["tables"]:
        start, end = settings["anneal"]
        constants = settings["constant_teacher_steps"]
        head = ["K", f"{start} to {end}", "paper (64 to 1280)"]
        for ours, theirs in zip(constants, (128, 256, 1024)):
            head += [f"constant {ours}", f"paper ({theirs})"]
        lines = []
        for k in (1, 2, 4, 8):
            students = [results.student(k, steps=n) for n in (0, *constants)]
            line = [k]
            for i, values in zip(("annealed", 0, 1, 2), shared(*students)):
                line.append(cell(results.ratio(values)))
                line.append(f"{PAPER_2[i][k] / PAPER_TEACHER[2]:.2f}")
            lines.append(line)
        done += [
            "### Table 2: teacher steps annealed or constant (CD)",
            "",
            *markdown(head, lines),
        ]
    if 3 in settings["tables"]:
        lines = []
        for k in (1, 2, 4, 8):
            students = [results.student(k, method) for method in METHODS]
            line = [cell(results.ratio(v)) for v in shared(*students)]
            paper = f"{PAPER_PD[k] / PAPER_TEACHER[1]:.2f}"
            lines.append([k, *line, paper])
        head = ["K", *METHODS.values(), "PD, paper"]
        done += [
            "### Table 3: progressive distillation",
            "",
            *markdown(head, lines),
        ]
    if 4 in settings["tables"]:
        lines = []
        for k in (1, 2, 4, 8):
            kinds, line = ("ddim", "addim"), [k]
            students = [results.student(k, integrator=kind) for kind in kinds]
            for integrator, values in zip(kinds, shared(*students)):
                line.append(cell(results.ratio(values)))
                line.append(f"{PAPER_4[integrator][k] / PAPER_TEACHER[1]:.2f}")
            lines.append(line)
        head = ["K", "DDIM", "DDIM, paper", "aDDIM", "aDDIM, paper"]
        done += ["### Table 4: the teacher's step", "", *markdown(head, lines)]
    lines = [
        [*student, cell(values, 4), cell(results.ratio(values))]
        for student, values in _further(results).items()
    ]
    if lines:
        head = ["K", "teacher steps", "iterations", "distance", "ratio"]
        done += [
            "### Where a target was missed: further students (CD)",
            "",
            *markdown(head, lines),
        ]
    lines = [
        [claim, said, f"**{verdict}**" if verdict != "confirmed" else verdict]
        for claim, said, verdict in verdicts(results)
    ]
    head = ["claim", "measured", "reading"]
    return done + ["### Reading", "", *markdown(head, lines)]


def _further(results):
    """Distances of further students by K, teacher steps and iterations."""
    settings, students = results.settings, {}
    for row in results.further():
        steps = row["teacher_steps"] or settings["anneal"]
        if isinstance(steps, list):
            steps = f"{max(steps[0], row['student_steps'])} to {steps[1]}"
        iterations = row.get("iterations", settings["student"]["iterations"])
        student = row["student_steps"], steps, iterations
        values = students.setdefault(student, {})
        values[row["seed"]] = row["frechet_distance"]
    return students


def plots(results):
    """The plots there are results for, as Markdown."""
    drawn = {
        "evaluations": (draw_evaluations, "Quality over evaluations"),
        "samplers": (draw_samplers, "Figures 3 and 5: the teacher's samplers"),
        "time": (draw_time, "Quality over time"),
        "neighbours": (draw_neighbours, "Samples and nearest training images"),
    }
    shown = []
    for name, (draw, title) in drawn.items():
        figure = draw(results)
        path = FOLDER / "results" / f"{results.name}_{results.size}_{name}.png"
        if figure:
            figure.savefig(path, dpi=130)
            plt.close(figure)
        elif not path.is_file():  # of models that are elsewhere it stays
            continue
        shown += [f"![{title}]({path.relative_to(FOLDER)})", ""]
    return shown


def draw_evaluations(results):
    """Teacher and students over evaluations per image."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for sampler in ("ddim", "addim"):
        _line(axes, results, f"teacher, {SAMPLERS[sampler]}", sampler=sampler)
    for method, name in METHODS.items():
        known = [
            (k, _mean(values), min(values.values()), max(values.values()))
            for k in (1, 2, 4, 8, 16)
            if (values := results.ratio(results.student(k, method)))
        ]
        if known:
            steps, means, least, most = zip(*known)
            (line,) = axes.plot(steps, means, "o-", label=name)
            spread = dict(color=line.get_color(), alpha=0.2)  # of the seeds
            axes.fill_between(steps, least, most, **spread)
    further = {}
    for (k, *_), values in _further(results).items():
        ratio = _mean(results.ratio(values))
        further[k] = min(ratio, further.get(k, ratio))
    if further:
        label = "CD, best of further settings"
        axes.plot(further.keys(), further.values(), "k*", label=label)
    _finish(axes, results, "evaluations of the network per image")
    return figure


def draw_samplers(results):
    """Every sampler on the two grids."""
    if not results.values(kind="curve", grid="karras"):
        return None
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", sharey=True
    )
    for axes, grid in zip(panels, ("cosine", "karras")):
        for sampler, name in SAMPLERS.items():
            _line(axes, results, name, sampler=sampler, grid=grid)
        axes.set_title(f"{grid} grid")
        _finish(axes, results, "evaluations of the network per image")
    return figure


def draw_time(results):
    """What a user buys: time per image against quality."""
    seconds = {
        row["num_steps"]: row["seconds_per_image"]
        for row in results.rows
        if row["kind"] == "time"
    }
    if not seconds:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    curves = [
        (f"teacher, {SAMPLERS[sampler]}", "s--", results.curve(sampler))
        for sampler in ("ddim", "addim")
    ]
    for method, name in METHODS.items():
        students = {
            k: results.ratio(results.student(k, method)) for k in seconds
        }
        curves.append((name, "o-", students))
    for name, style, ratios in curves:
        points = [
            (1000 * seconds[n], _mean(ratios[n]))
            for n in sorted(seconds)
            if ratios.get(n)
        ]
        if points:
            axes.plot(*zip(*points), style, label=name)
    _finish(axes, results, "milliseconds per image, batches of 250")
    return figure


def draw_neighbours(results, count=12):
    """Samples of the 8-step student over their nearest training images."""
    seed = results.rows[0]["seed"]
    stem = f"{results.name}_{results.size}"
    path = MODELS / f"{stem}_distillation_8_addim_0_{seed}_samples.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        samples = next(iter(file.values()))[:count]
    images = data.load(results.settings["data"]).images
    training = data.as_floats(images).reshape(len(images), -1)
    flat = samples.reshape(count, -1)
    squares = np.square(training).sum(1)
    nearest = [np.argmin(squares - 2 * training @ x) for x in flat]
    shown = [samples, training[nearest].reshape(samples.shape)]
    figure, rows = plt.subplots(
        2, count, figsize=(count, 2.4), layout="constrained"
    )
    for line, images in zip(rows, shown):
        for axes, image in zip(line, images):
            axes.imshow(image.squeeze() / 2 + 0.5, cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    figure.suptitle("8 steps (CD), above; the nearest training images, below")
    return figure


def _mean(values):
    return np.mean(list(values.values()))


def _line(axes, results, label, sampler, grid="cosine"):
    curve = results.curve(sampler, grid)
    if curve:
        ratios = [_mean(values) for values in curve.values()]
        axes.plot(curve.keys(), ratios, "s--", label=label, alpha=0.8)


def _finish(axes, results, xlabel):
    axes.axhline(
        _mean(results.ratio(results.values(kind="real"))),
        color="grey",
        linestyle=":",
        label="real images, held out",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("Fréchet distance over the teacher's best")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)


def main():
    text = []
    for path in sorted((FOLDER / "results").glob("*.jsonl")):
        for size in ("cpu", "gpu"):
            results = Results(path.stem, size)
            if results.values(kind="curve"):
                text += [*tables(results), *plots(results)]
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text("\n".join([before + BEGIN, "", *text]) + END + after)


if __name__ == "__main__":
    main()
