"""The table and the plot of `benchmarks.methods`."""

import matplotlib

from benchmarks.tables import cell, circumstances, markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = 1, 2, 4, 8
HEAD = """\
# Methods side by side (the paper's table 5, and what came since)

Written by `KERAS_BACKEND=jax python -m benchmarks.methods` ({when}).
Fashion-MNIST, 28x28; one network, one teacher per seed, from whose weights
every student begins; batches of 64; 1,500 iterations (equal iterations), or as
many as take the time of 1,500 of CD (equal time; the number stands beside it).
Fréchet distance in a classifier's features over the teacher's best, 2,000
samples: mean of the seeds (least to most). A method in *italics* is one student
for every K; of the others each K has a student, and a budget, of its own."""


def ratios(rows, method, budget, k):
    """The ratio at K by seed."""
    return {
        row["seed"]: row["ratios"][str(k)]
        for row in rows
        if (row["method"], row["budget"]) == (method, budget)
        and str(k) in row["ratios"]
    }


def table(rows, budget):
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        # CD is what the time is measured by, so that both budgets are one.
        of = "iterations" if method == "CD" else budget
        found = [row for row in rows if row["method"] == method]
        cells = [cell(ratios(rows, method, of, k), 2) for k in STEPS]
        if not any(cells):
            continue
        every = any(row["student_steps"] is None for row in found)
        counted = [r["iterations"] for r in found if r["budget"] == of]
        told = f"{min(counted)}"
        if max(counted) != min(counted):
            told += f" to {max(counted)}"
        lines.append([f"*{method}*" if every else method, told, *cells])
    return markdown(
        ["method", "iterations", *(f"K = {k}" for k in STEPS)], lines
    )


def plot(rows, path):
    """Ratio over K, by both budgets."""
    figure, all_axes = plt.subplots(
        1, 2, figsize=(11, 5), layout="constrained", sharey=True
    )
    names = [*dict.fromkeys(row["method"] for row in rows)]
    for axes, budget in zip(all_axes, ("iterations", "time")):
        for i, method in enumerate(names):
            of = "iterations" if method == "CD" else budget
            known = {k: ratios(rows, method, of, k) for k in STEPS}
            known = {k: sum(v.values()) / len(v) for k, v in known.items() if v}
            style = "o-" if i < 4 else "s--" if i < 10 else "^:"
            axes.plot(
                [*known],
                [*known.values()],
                style,
                color=plt.cm.tab20(i),
                label=method,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(STEPS, STEPS)
        axes.minorticks_off()
        axes.set_yticks([1, 1.5, 2, 3, 5, 10], [1, 1.5, 2, 3, 5, 10])
        axes.set_title(f"equal {budget}")
        axes.set_xlabel("evaluations of the network per image")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("Fréchet distance over the teacher's best")
    all_axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(rows, folder):
    """Writes table.md and quality.png."""
    lines = [HEAD.format(when=circumstances(rows[-1])), ""]
    for budget in ("iterations", "time"):
        lines += [f"## Equal {budget}", "", *table(rows, budget)]
    lines += ["![Quality over K](quality.png)"]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    plot(rows, folder / "quality.png")
