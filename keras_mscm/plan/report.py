"""Puts a plan into a table."""

from collections.abc import Sequence
from typing import Any

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _short(number: float) -> str:
    """Three digits and a unit."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.3g} "


def markdown(plan: dict[str, Any]) -> str:
    """A plan as Markdown.

    Args:
        plan: What `make_plan` has returned.

    Returns:
        A table of its numbers, and one of its costliest operations.
    """
    rows = [
        (
            "network",
            f"{plan['preset']}, {_short(plan['parameters'])}parameters",
        ),
        ("step", f"{plan['method']}, batch {plan['batch_size']}"),
        ("settings", _settings(plan)),
        ("slice", f"{plan['topology']}, {plan['num_chips']} x {plan['chip']}"),
    ]
    needed, capacity = plan["memory_gib_per_chip"], plan["memory_capacity_gib"]
    verdict = " **does not fit**" if plan["fits"] is False else ""
    memory = [f"{needed:.2f} of {capacity:g} GiB{verdict}"]
    memory += [
        f"{name} {size:.2f}" for name, size in plan["memory_gib"].items()
    ]
    rows.append(("memory per chip", "; ".join(memory)))
    state = {**plan["state_gib"], "gradients, within the step": 0.0}
    state["gradients, within the step"] = plan["gradients_gib"]
    parts = [f"{k} {size:.2f}" for k, size in state.items() if size >= 5e-3]
    rows.append(("in GiB, of all chips together", "; ".join(parts)))
    if plan["steps_per_second"]:
        rows += _time_rows(plan)
    if "compile_seconds" in plan:
        rows.append(("compiled in", f"{plan['compile_seconds']:.0f} s"))
    versions = ", ".join(f"{k} {v}" for k, v in plan["versions"].items())
    rows.append(("made", f"{plan['date']}, {versions}"))

    lines = [plan["note"], "", *_table(("", "per step"), rows)]
    if "operations" in plan:
        operations = [
            (
                o["operation"].replace("|", "\\|"),
                str(o["count"]),
                _short(o["cycles"]).strip(),
                f"{100 * o['share']:.1f} %",
            )
            for o in plan["operations"]
        ]
        head = ("operation", "number", "cycles", "share")
        lines += ["", *_table(head, operations)]
    lines += [
        f"{line}"
        for way in plan.get("advice", [])
        for line in ("", f"To make it fit: {way}")
    ]
    return "\n".join(lines) + "\n"


def _settings(plan: dict[str, Any]) -> str:
    settings = [plan["dtype"]]
    if plan["method"] == "generate":
        settings.append(f"{plan['student_steps']} evaluations")
    else:
        settings.append("Adam, moving average")
    if plan["lora_rank"]:
        settings.append(f"LoRA of rank {plan['lora_rank']}")
    if plan["guidance_scale"] is not None:
        settings.append(f"guidance {plan['guidance_scale']:g}")
    settings += ["remat"] if plan["remat"] else []
    settings += ["weights sharded"] if plan["shard_weights"] else []
    accumulated = plan["gradient_accumulation_steps"]
    if accumulated:
        settings.append(f"an update in {accumulated} steps")
    return ", ".join(settings)


def _time_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = plan["seconds"]
    flops, bound = (
        seconds["bound_by_flops"],
        seconds["bound_by_memory_bandwidth"],
    )
    once = ""
    if plan["method"] == "generate":
        once = " (of one evaluation: the compiler counts a loop once)"
    rows = [
        ("**steps per second**", f"**{plan['steps_per_second']:.2f}**"),
        (
            "seconds",
            f"{seconds['step']:.3f}: {seconds['computation']:.3f} to compute "
            f"({_short(plan['cycles'])}cycles), "
            f"{seconds['communication']:.3f} to send",
        ),
        (
            "FLOPs per chip",
            f"{_short(plan['flops_per_chip'])}{once}; the network's passes are "
            f"{_short(plan['model_flops_per_chip'])}",
        ),
        ("utilisation", f"{100 * plan['model_flops_utilisation']:.0f} %"),
        (
            "roofline",
            f"{1 / max(flops, bound):.2f} steps per second: {flops:.3f} s at "
            f"the peak of FLOPs, {bound:.3f} s to read and write state once",
        ),
        ("bytes accessed", f"{_short(plan['bytes_accessed_per_chip'])}B"),
        ("bytes sent per chip", _kinds(plan["sent_bytes_per_chip"])),
    ]
    if meanwhile := plan["sent_meanwhile_bytes_per_chip"]:
        hidden = f"{seconds['communication_meanwhile']:.3f} s"
        rows.append(("while others compute", f"{_kinds(meanwhile)}, {hidden}"))
    return rows


def _kinds(sent: dict[str, float]) -> str:
    return (
        ", ".join(f"{kind} {_short(n)}B" for kind, n in sent.items()) or "none"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns as wide as what is in them, so that it reads as text too."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]

    def line(cells):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        return f"| {' | '.join(padded)} |"

    rule = f"| {' | '.join('-' * width for width in widths)} |"
    return [line(head), rule, *map(line, rows)]
