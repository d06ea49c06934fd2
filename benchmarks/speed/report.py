"""Turns results.jsonl into table.md and growth.png."""

import json
import math
from itertools import groupby

from benchmarks import tables


def write(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (folder / "table.md").write_text(table(rows))
    plot([row for row in rows if row["part"] == "growth"], folder)


def table(rows):
    """A section for each kind of measurement."""
    told = rows[-1]
    dates = sorted({row["date"] for row in rows})
    versions = ", ".join(f"{k} {v}" for k, v in told["versions"].items())
    text = [
        "# Speed",
        "",
        "From `make bench-speed-all` (`python -m benchmarks.speed`); every row "
        "is in results.jsonl, with its commit.",
        f"{', '.join(dates)}; {told['hardware']}, no accelerator; Python "
        f"{told['python']}; {versions}.",
        "Ratios are of medians of runs in turn; bounds are those of issue 4.",
        "",
    ]
    parts = sorted(
        (row for row in rows if row["part"] not in ("growth", "seconds")),
        key=lambda row: [r["part"] for r in rows].index(row["part"]),
    )
    for part, group in groupby(parts, key=lambda row: row["part"]):
        group = list(group)
        hidden = {"file", "part", "date", "commit", "hardware", "python"}
        hidden |= {"versions", "preset", "kind", "network", "size"}
        names = dict.fromkeys(k for row in group for k in row)
        names = [name for name in names if name not in hidden]
        if any("bound" in row for row in group):
            names.append("within")
            group = [{**row, "within": within(row)} for row in group]
        text += [f"## {part[0].upper()}{part[1:]}", ""]
        text += tables.markdown(
            [name.replace("_", " ") for name in names],
            [[str(row.get(name, "")) for name in names] for row in group],
        )
    return "\n".join([*text, "![Growth of time and memory](growth.png)", ""])


def within(row):
    if "bound" not in row:
        return ""
    value = row.get("ratio", row.get("seconds"))
    return "yes" if value <= row["bound"] else "**no**"


def plot(rows, folder):
    """Time, and memory where it was told, over each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    if not axes_names:
        return
    columns = min(3, len(axes_names))
    lines = math.ceil(len(axes_names) / columns)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(4 * columns + 1, 3.2 * lines),
        layout="constrained",
        squeeze=False,
    )
    for axes, name in zip(panels.flat, axes_names):
        points = [row for row in rows if row["axis"] == name]
        values = [row["value"] for row in points]
        taken = [row["milliseconds"] for row in points]
        axes.plot(values, taken, "o-", label="time (ms)")
        if "gflop" in points[0]:
            scale = taken[-1] / points[-1]["gflop"]
            axes.plot(
                values,
                [scale * row["gflop"] for row in points],
                ":",
                color="grey",
                label="FLOPs, scaled to the last",
            )
        if "temporary_mib" in points[0]:
            memory = [row["temporary_mib"] for row in points]
            axes.plot(values, memory, "s--", label="temporaries (MiB)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, taken[0] / 2), max(high, 2 * taken[0]))
        axes.set_xticks(values, values)
        axes.set_xlabel({"size": "image side", "K": "K"}.get(name, name))
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    for axes in panels.flat[len(axes_names) :]:
        axes.set_axis_off()
    figure.suptitle("A training step (K: generate) on two CPU cores, JAX")
    figure.savefig(folder / "growth.png", dpi=130)
