"""The table of `benchmarks.annealing`."""

import math

from benchmarks.tables import cell, markdown
from keras_mscm import functional as F

DECAY = 0.998
NAMES = {"digits": "Digits, 8x8", "fashion_mnist": "Fashion-MNIST, 28x28"}
NOT_MEASURED = """\
Nothing here was trained for longer than the rows say, on images larger than
28x28, in colour, by training instead of distillation (CT), with another batch
size than 64, or on a GPU. 30,000 iterations were planned, several
starts and further seeds too: what has no cell has not been run. The seconds of
the rows are those of a machine that others used as well.
Fashion-MNIST in 1,500 and 4,500 iterations, with a longer teacher, is in
[benchmarks/README.md](../README.md). From the longest run here to the paper's
200,000 the rule is a straight line in logarithms; at 200,000 it is the paper's,
of which nobody has measured here that it is best. Most cells have one seed; at
K = 1 two seeds of one cell can differ by a third (benchmarks/README.md)."""
AVERAGES = """\
In a run of few iterations the decay doesn't matter: until 9 / (1 - decay)
iterations, 90,000 for 0.9999, the average takes the shorter (1 + i) / (10 + i).
So no warning is due."""
RATES = """\
The learning rate is the one that `benchmarks/digits.py` found: half at K = 1,
where CD of the digits had 5.5 times the teacher's distance with 1e-3 and 1.7
with 5e-4 (one seed). No rate was varied here."""


def _is_plain(row):
    """Whether a row is of the main table: an eighth of the end to begin with,
    a power of two per segment, half of the run, and the usual average."""
    k = row["student_steps"]
    return (
        math.log2(row["end"] / k).is_integer()
        and row["start"] == k * max(1, row["end"] // k // 8)
        and row["over"] == row["budget"] // 2
        and row["ema"] == DECAY
    )


def _by_end(rows):
    """Ratios by end, then by seed."""
    found: dict = {}
    for row in rows:
        found.setdefault(row["end"], {})[row["seed"]] = row["ratio"]
    return dict(sorted(found.items()))


def _mean(values):
    return math.fsum(values.values()) / len(values)


def ends_table(rows, data):
    """A line per run and K; a column per end."""
    rows = [row for row in rows if row["data"] == data and _is_plain(row)]
    ends = sorted({row["end"] for row in rows})
    runs = sorted({(row["budget"], row["student_steps"]) for row in rows})
    lines = []
    for run, k in runs:
        found = _by_end(
            row
            for row in rows
            if (row["budget"], row["student_steps"]) == (run, k)
        )
        best = min(map(_mean, found.values()))
        cells = []
        for end in ends:
            text = cell(found.get(end, {}), 2)
            close = end in found and _mean(found[end]) <= 1.03 * best
            cells.append(f"**{text}**" if close else text)
        start, end, _ = F.suggested_annealing(run, k)
        lines.append([run, k, *cells, f"{start} to {end}"])
    return markdown(["run", "K", *ends, "the rule"], lines)


def list_table(rows, columns):
    """A line per row."""
    lines = [[row[name] for name in columns] for row in rows]
    return markdown(columns, lines)


def _is_the_rule(row):
    return (row["start"], row["end"], row["over"]) == F.suggested_annealing(
        row["budget"], row["student_steps"]
    )


def rule_table(rows):
    """What the rule takes, beside the best end of the same run."""
    lines = []
    for row in rows:
        if not _is_the_rule(row) or row["ema"] != DECAY:
            continue
        names = "data", "budget", "student_steps", "seed"
        key = {name: row[name] for name in names}
        rest = [
            other
            for other in rows
            if key.items() <= other.items()
            and not _is_the_rule(other)
            and other["ema"] == DECAY
        ]
        best = min(rest, key=lambda other: other["ratio"], default=None)
        told = ""
        if best:
            told = f"{best['ratio']:.2f} ({best['start']} to {best['end']})"
        steps = f"{row['start']} to {row['end']}"
        lines.append([*key.values(), steps, f"{row['ratio']:.2f}", told])
    return markdown(
        ["data", "run", "K", "seed", "the rule", "ratio", "best of the others"],
        lines,
    )


def starts_table(rows):
    """The same run and end from several beginnings."""
    groups: dict = {}
    for row in rows:
        if row["ema"] == DECAY and row["over"] == row["budget"] // 2:
            key = row["data"], row["budget"], row["student_steps"], row["end"]
            starts = groups.setdefault(key, {})
            starts.setdefault(row["start"], {})[row["seed"]] = row["ratio"]
    lines = []
    for key, starts in groups.items():
        if len(starts) > 1:
            told = [
                f"{start}: {cell(values, 2)}"
                for start, values in sorted(starts.items())
            ]
            lines.append([*key, "; ".join(told)])
    return markdown(["data", "run", "K", "end", "start: ratio"], lines)


def averages_table(rows):
    """The same annealing under several decays of the moving average."""
    groups: dict = {}
    for row in rows:
        if row["over"] == row["budget"] // 2:
            names = "data", "budget", "student_steps", "start", "end"
            key = tuple(row[name] for name in names)
            decays = groups.setdefault(key, {})
            decays.setdefault(row["ema"], {})[row["seed"]] = row["ratio"]
    lines = [
        [*key, *(cell(decays.get(d, {}), 3) for d in (0.99, 0.998, 0.9999))]
        for key, decays in groups.items()
        if len(decays) > 1
    ]
    head = ["data", "run", "K", "start", "end", "0.99", "0.998", "0.9999"]
    return markdown(head, lines)


def provenance(rows):
    def told(name):
        return ", ".join(sorted({str(row[name]) for row in rows}))

    versions = {
        f"{name} {version}"
        for row in rows
        for name, version in row["versions"].items()
    }
    hours = math.fsum(row["seconds"] for row in rows) / 3600
    return (
        "Written by `KERAS_BACKEND=jax python -m benchmarks.annealing` "
        f"(until {max(row['date'] for row in rows)}; {told('processor')}, "
        f"{told('cores')} core; backend {told('backend')}; seeds "
        f"{told('seed')}; {len(rows)} students in {hours:.1f} hours of "
        f"training; {', '.join(sorted(versions))})."
    )


def table(rows, cells):
    """The rows as Markdown; what the command has not trained yet is named."""
    names = "data", "student_steps", "budget", "start", "end"
    done = {tuple(row[name] for name in names) for row in rows}
    missing = sorted({cell[:5] for cell in cells} - done)
    lines = [
        "# Annealing: which teacher steps suit a run",
        "",
        provenance(rows),
        "",
        "Distillation (CD) from a trained teacher: the preset `digits_teacher`,"
        " and a teacher of 2,000 iterations of Fashion-MNIST; batch 64; Adam, "
        "warm-up over 5 % of the run, cosine decay from 1e-3 (5e-4 at K = 1); "
        "moving average of decay 0.998; annealed over half of the run.",
        "",
        "The numbers are the student's Fréchet distance over its teacher's "
        "(aDDIM; digits in 128 steps, Fashion-MNIST in 32), in the features of "
        "a classifier of the data; 3,000 and 1,000 samples. "
        "Where several seeds were run: mean (least to most). Bold is what lies "
        "within 3 % of the line's best. Steps are of the whole of time, as "
        "`TeacherStepAnneal` takes them.",
        "",
    ]
    for data, name in NAMES.items():
        lines += [f"## {name}: by the end", ""]
        lines += ["From an eighth of the end, at least from K.", ""]
        lines += ends_table(rows, data)
    lines += ["## The rule", "", *rule_table(rows)]
    starts = starts_table(rows)
    lines += ["## By the start", ""]
    lines += starts if len(starts) > 3 else ["Not measured yet.", ""]
    paper = [row for row in rows if row["over"] != row["budget"] // 2]
    if paper:
        lines += ["## The paper's 64 to 1280 over 100,000", ""]
        columns = "data", "budget", "student_steps", "ratio"
        short = [{**row, "ratio": f"{row['ratio']:.2f}"} for row in paper]
        lines += list_table(short, columns)
    lines += ["## By the decay of the moving average", ""]
    lines += [AVERAGES, "", *averages_table(rows)]
    lines += ["## Learning rate", "", RATES, ""]
    lines += ["## What was not measured", "", NOT_MEASURED, ""]
    if missing:
        runs: dict = {}
        for data, k, run, start, end in missing:
            steps = runs.setdefault((data, k, run), [])
            steps.append(f"{start} to {end}")
        told = "; ".join(
            f"{data}, K = {k}, {run} iterations, {', '.join(steps)}"
            for (data, k, run), steps in runs.items()
        )
        lines += [
            "Of what the command trains when it is given the time, these are "
            f"missing: {told}.",
            "",
        ]
    return "\n".join(lines)
