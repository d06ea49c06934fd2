"""Turns the results into the tables and plots that benchmarks/README.md shows.

Command:   python -m benchmarks.report
Reads:     benchmarks/results/*.jsonl, from `python -m benchmarks.run`
Writes:    what stands between the marks in benchmarks/README.md, and
           benchmarks/results/*.png
"""

from pathlib import Path

from benchmarks.plots import plots
from benchmarks.run import read_results, read_settings
from benchmarks.tables import METHODS, cell, markdown, shared
from benchmarks.verdicts import verdicts

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
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

    def further_students(self):
        """Distances of these by K, teacher steps and iterations."""
        settings, students = self.settings, {}
        for row in self.further():
            steps = row["teacher_steps"] or settings["anneal"]
            if isinstance(steps, list):
                steps = f"{max(steps[0], row['student_steps'])} to {steps[1]}"
            iterations = row.get(
                "iterations", settings["student"]["iterations"]
            )
            student = row["student_steps"], steps, iterations
            values = students.setdefault(student, {})
            values[row["seed"]] = row["frechet_distance"]
        return students

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
    done = heading(results)
    for number, (title, table) in TABLES.items():
        if number in results.settings["tables"]:
            done += [f"### Table {number}: {title}", "", *table(results)]
    lines = [
        [*student, cell(values, 4), cell(results.ratio(values))]
        for student, values in results.further_students().items()
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


def heading(results):
    """What was run, on what, and how near to real images the teacher is."""
    settings, name, size = results.settings, results.name, results.size
    row = [r for r in results.rows if "extractor" in r][-1]
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    seeds = sorted({r["seed"] for r in results.rows})
    judges = sorted({r["extractor"] for r in results.rows if "extractor" in r})
    hardware = sorted({r["hardware"] for r in results.rows})
    date = max(r["date"] for r in results.rows)
    command = f"python -m benchmarks.run {name} --size {size}"
    if seeds != settings["seeds"]:
        command += " --seeds " + " ".join(map(str, seeds))
    real = results.values(kind="real")
    held_out = max(results.values("num_samples", kind="real").values())
    addim = results.values(
        kind="curve", sampler="addim", grid="cosine", num_steps=512
    )
    return [
        f"## {name}, {size} size",
        "",
        f"`{command}` on "
        f"{row['backend']}, {' and '.join(hardware)}, until {date}; "
        f"seeds {seeds}; {settings['num_samples']} samples; features of "
        f"{' and '.join(f'`{judge}`' for judge in judges)}; "
        f"{versions}. Teacher: {settings['teacher']}; students: "
        f"{settings['student']}; teacher steps {settings['anneal'][0]} to "
        f"{settings['anneal'][1]} in half the iterations.",
        "",
        f"Teacher's best Fréchet distance {cell(results.best(), 4)}; aDDIM in "
        f"512 steps {cell(addim, 4)}; {held_out} real images, held out, "
        f"{cell(real, 4)}. In the tables: distance over the teacher's best, "
        "and the paper's FID over its teacher's.",
        "",
    ]


def table_1(results):
    head, lines = ["K"], []
    for name in ("CT", "CD"):
        head += [f"{name}, distance", f"{name}, ratio", f"{name}, paper"]
    for k in (1, 2, 4, 8, 16):
        line = [k]
        for method, name in list(METHODS.items())[:2]:
            values = results.student(k, method)
            paper = PAPER_1[name].get(k)
            line += [cell(values, 4), cell(results.ratio(values))]
            line.append(_over_teacher(paper) if paper else "")
        lines.append(line)
    return markdown(head, lines)


def table_2(results):
    start, end = results.settings["anneal"]
    constants = results.settings["constant_teacher_steps"]
    head, lines = ["K", f"{start} to {end}", "paper (64 to 1280)"], []
    for ours, theirs in zip(constants, (128, 256, 1024)):
        head += [f"constant {ours}", f"paper ({theirs})"]
    for k in (1, 2, 4, 8):
        students = [results.student(k, steps=n) for n in (0, *constants)]
        line = [k]
        for i, values in zip(("annealed", 0, 1, 2), shared(*students)):
            line.append(cell(results.ratio(values)))
            line.append(_over_teacher(PAPER_2[i][k], table=2))
        lines.append(line)
    return markdown(head, lines)


def table_3(results):
    lines = []
    for k in (1, 2, 4, 8):
        students = [results.student(k, method) for method in METHODS]
        line = [cell(results.ratio(values)) for values in shared(*students)]
        lines.append([k, *line, _over_teacher(PAPER_PD[k])])
    return markdown(["K", *METHODS.values(), "PD, paper"], lines)


def table_4(results):
    lines = []
    for k in (1, 2, 4, 8):
        kinds, line = ("ddim", "addim"), [k]
        students = [results.student(k, integrator=kind) for kind in kinds]
        for kind, values in zip(kinds, shared(*students)):
            line.append(cell(results.ratio(values)))
            line.append(_over_teacher(PAPER_4[kind][k]))
        lines.append(line)
    head = ["K", "DDIM", "DDIM, paper", "aDDIM", "aDDIM, paper"]
    return markdown(head, lines)


TABLES = {
    1: ("CT and CD", table_1),
    2: ("teacher steps annealed or constant (CD)", table_2),
    3: ("progressive distillation", table_3),
    4: ("the teacher's step", table_4),
}


def _over_teacher(fid, table=1):
    """The paper's own ratio."""
    return f"{fid / PAPER_TEACHER[table]:.2f}"


def main():
    text = []
    for path in sorted((FOLDER / "results").glob("*.jsonl")):
        for size in ("cpu", "gpu"):
            results = Results(path.stem, size)
            if results.values(kind="curve"):
                text += [*tables(results), *plots(results, FOLDER)]
    readme = FOLDER / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text("\n".join([before + BEGIN, "", *text]) + END + after)


if __name__ == "__main__":
    main()
