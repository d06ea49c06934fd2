"""The table and the plot of `benchmarks.any_step`."""

import matplotlib

from benchmarks.tables import METHODS, cell, circumstances, markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVERY = 1, 2, 4, 8, 16
# Iterations of the one student, and of each of the five separate ones.
BUDGETS = {
    "one student": [("several", 4000), ("several", 10_000)],
    "one student, any times": [("any", 4000)],
    "separate, equal in total": [("separate", 800), ("separate", 2000)],
    "separate, equal each": [("separate", 4000)],
}
GOALS = {16: 1.0, 8: 1.03, 2: 1.12, 1: 1.4}
HEAD = """\
# One student for every K against separate ones

Written by `KERAS_BACKEND=jax python -m benchmarks.any_step` ({when}).
Digits, 8x8; batches of 64; teacher, judge and noise as in
[benchmarks/digits](../digits/table.md). Fréchet distance over the best of the
teacher of the same seed, 3,000 samples: the mean over the seeds (least to
most). "One student" draws K evenly from 1, 2, 4, 8, 16, and is told where
segments end; of "any times" they end anywhere on the teacher's grid; "separate"
are five students, each with the iterations of its line."""


def kind(row):
    """Whose row it is, without its budget."""
    steps = row["student_steps"]
    if isinstance(steps, int):
        return "separate"
    return "any" if steps == "any" else "several"


def ratios(rows, method, of_kind, budget, k, remedy=""):
    """The ratio at K by seed."""
    return {
        row["seed"]: row["ratios"][str(k)]
        for row in rows
        if (row["method"], row["budget"], row["remedy"])
        == (method, budget, remedy)
        and kind(row) == of_kind
        and str(k) in row["ratios"]
    }


def main_table(rows, method):
    lines = []
    for title, students in BUDGETS.items():
        for of_kind, budget in students:
            cells = [
                cell(ratios(rows, method, of_kind, budget, k), 2) for k in EVERY
            ]
            if any(cells):
                lines.append([title, f"{budget:,}", *cells])
    return markdown(["", "iterations", *(f"K = {k}" for k in EVERY)], lines)


def remedies_table(rows, method):
    """What was tried beside the plain setting, seed 0."""
    rows = [
        row
        for row in rows
        if row["method"] == method
        and row["seed"] == 0
        and row["budget"] == 4000
        and kind(row) == "several"
    ]
    lines = [
        [
            row["remedy"] or "as above",
            *(f"{row['ratios'][str(k)]:.2f}" for k in EVERY),
        ]
        for row in rows
    ]
    return markdown(["remedy", *(f"K = {k}" for k in EVERY)], lines)


def goals_table(rows):
    """The issue's goals for distillation, beside what was measured."""
    lines = []
    for k, goal in GOALS.items():
        found = ratios(rows, "distillation", "several", 4000, k)
        longer = ratios(rows, "distillation", "several", 10_000, k)
        lines.append([k, goal, cell(found, 3), cell(longer, 3)])
    return markdown(["K", "goal", "4,000", "10,000"], lines)


def plot(rows, path):
    """Ratio over K, one student against separate ones of equal total."""
    figure, all_axes = plt.subplots(
        1, 2, figsize=(9.6, 4.2), layout="constrained", sharey=True
    )
    for axes, method in zip(all_axes, ("distillation", "training")):
        for of_kind, budget, style, label in (
            ("several", 4000, "o-", "one student, 4,000"),
            ("several", 10_000, "o-", "one student, 10,000"),
            ("separate", 800, "s--", "five students, 800 each"),
            ("separate", 4000, "^:", "five students, 4,000 each"),
        ):
            known = {k: ratios(rows, method, of_kind, budget, k) for k in EVERY}
            known = {k: v for k, v in known.items() if v}
            if not known:
                continue
            means = [sum(v.values()) / len(v) for v in known.values()]
            axes.plot([*known], means, style, label=label)
        axes.axhline(1, color="grey", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(EVERY, EVERY)
        axes.minorticks_off()
        axes.set_title(METHODS[method])
        axes.set_xlabel("evaluations of the network per image")
        axes.grid(alpha=0.3)
        axes.legend()
    all_axes[0].set_ylabel("Fréchet distance over the teacher's best")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(rows, folder):
    """Writes table.md and ratio.png."""
    lines = [HEAD.format(when=circumstances(rows[-1])), ""]
    for method in ("distillation", "training"):
        lines += [f"## {METHODS[method]}", "", *main_table(rows, method)]
    lines += [
        "![Quality over K](ratio.png)",
        "",
        "## Goals",
        "",
        *goals_table(rows),
        "## What was tried (seed 0, 4,000 iterations)",
        "",
    ]
    for method in ("distillation", "training"):
        lines += [f"{METHODS[method]}:", "", *remedies_table(rows, method)]
    (folder / "table.md").write_text("\n".join(lines).rstrip() + "\n")
    plot(rows, folder / "ratio.png")
