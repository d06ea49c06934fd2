"""The tables of `benchmarks.adapters`."""

import ast
import itertools
from pathlib import Path

from benchmarks.foreign_models import BACKENDS, FOREIGN
from benchmarks.tables import markdown

GUIDE = Path(__file__).parent.parent / "guides/distil_a_pretrained_model.py"
STEPS = 4, 50
# How a student can hold its teacher; the last changes the teacher's network.
HOLDS = {
    "plain": {},
    "`copy=False`": {"copy": False},
    '`copy=False, ema="bfloat16"`': {"copy": False, "ema": "bfloat16"},
    "`copy=False, ema=None`": {"copy": False, "ema": None},
    "`lora_rank=1`": {"lora_rank": 1},
    "`lora_rank=1, copy=False`": {"lora_rank": 1, "copy": False},
}
# Those of them that the guide shows.
HELD = "plain", "`copy=False`", "`copy=False, ema=None`", "`lora_rank=1`"


def lines_of_the_guide():
    """How many lines make teacher and student, by the guide's headings."""
    lines, heading = {}, None
    for node in ast.parse(GUIDE.read_text()).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for line in str(node.value.value).splitlines():
                if line.startswith("## "):
                    heading = line.removeprefix("## ")
                    lines[heading] = 0
        for part in ast.walk(node):
            names = {
                target.id
                for target in getattr(part, "targets", [])
                if isinstance(target, ast.Name)
            }
            if heading and names & {"teacher", "student"}:
                lines[heading] += part.end_lineno - part.lineno + 1
    return lines


def number(value):
    return "-" if value is None else f"{value:.1e}".replace("e-0", "e-")


def copies(value):
    return "-" if value is None else f"{value:.2f}"


def summaries(rows):
    """Of each model: name, lines, agreement, where CD ran, copies held."""
    lines = lines_of_the_guide()
    rows = sorted(rows, key=lambda row: [*FOREIGN].index(row["model"]))
    for name, group in itertools.groupby(rows, lambda row: row["model"]):
        found = list(group)
        errors = [
            max(row["agreement"][str(num_steps)] for row in found)
            for num_steps in STEPS
        ]
        ran = sorted(row["backend"] for row in found if row["distils"])
        guided = " (guided)" if found[0]["guided"] else ""
        held = [
            max((row["memory"][hold] or 0) for row in found) or None
            for hold in HOLDS
        ]
        counted = lines[FOREIGN[name].section]
        yield name, counted, *errors, ", ".join(ran) + guided, held


def short_table(rows):
    """The guide's table: models by library, and some ways to hold them."""
    header = ["foreign model", "lines", "4 steps", "50 steps", "CD", "copies"]
    shown = [[*HOLDS].index(name) for name in HELD]
    body = [
        [
            name,
            lines,
            *map(number, errors),
            ran,
            " / ".join(copies(held[place]) for place in shown),
        ]
        for name, lines, *errors, ran, held in summaries(rows)
    ]
    return markdown(header, body)


def table(rows):
    """Markdown, with what the numbers depend on."""
    told = max(rows, key=lambda row: row["date"])
    seeds = ", ".join(
        f"{b} {min(row['seeds'] for row in rows if row['backend'] == b)}"
        for b in sorted({row["backend"] for row in rows})
    )
    packages = ", ".join(f"{k} {v}" for k, v in told["versions"].items())
    text = [
        "# Foreign models: agreement, distillation, memory",
        "",
        "Written by `KERAS_BACKEND=... python -m benchmarks.adapters` on "
        f"{', '.join(BACKENDS)} ({told['date']}; {told['hardware']}, no "
        f"accelerator; {packages}; seeds from 0, how many: {seeds}).",
        "",
        "Agreement: the largest difference from the foreign sampler on the "
        "same noise, over the deviation of what that draws; float32, DDIM; the "
        "worst of the seeds and of the backends. CD: where a step of "
        "consistency distillation changed the student, and nothing of the "
        "teacher. Lines: those of the guide that make teacher and student.",
        "",
    ]
    body, holds = [], []
    for name, lines, *errors, ran, held in summaries(rows):
        sampler = FOREIGN[name].sampler
        body.append([name, lines, sampler, *map(number, errors), ran])
        holds.append([name, *map(copies, held)])
    header = [
        "foreign model",
        "lines",
        "its own sampler",
        *(f"{num_steps} steps" for num_steps in STEPS),
        "CD",
    ]
    text += [*markdown(header, body), "## Memory", ""]
    text += [
        "Weights that teacher and student hold together, in copies of the "
        "foreign network (without optimizer and autoencoder); the most of the "
        "backends. These networks are so small that an adapter of rank 1 is a "
        "large share of them; in an earnest one it is some thousandths.",
        "",
        *markdown(["foreign model", *HOLDS], holds),
    ]
    return "\n".join(text)
