"""Lists the presets: `python -m keras_mscm.presets [--json]`."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from keras_mscm.presets import summary

COLUMNS = ("name", "images", "parameters", "FLOPs", "weights", "training step")


def _short(number: float) -> str:
    """Four digits and a unit."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number:.4g}"


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    step = facts.get("training_step")
    return (
        facts["name"],
        "x".join(map(str, facts["image_shape"])),
        _short(facts["parameters"]),
        _short(facts["flops"]),
        "yes" if facts["weights"] else "no",
        f"{step['milliseconds']} ms at {step['batch_size']}" if step else "",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, or JSON.

    Args:
        arguments: Those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m keras_mscm.presets",
        description="Lists the presets. FLOPs are those of one forward pass "
        "for one image; a training step is given in milliseconds at its batch "
        "size, on the hardware that --json names.",
    )
    parser.add_argument(
        "--json", action="store_true", help="everything, as a list of objects"
    )
    as_json = parser.parse_args(arguments).json
    try:
        presets = summary()
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if as_json:
        print(json.dumps(presets, indent=2))
        return
    rows = [COLUMNS, *map(_row, presets)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
