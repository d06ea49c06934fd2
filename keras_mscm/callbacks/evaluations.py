"""Evaluations of samples as JSON, and the files that hold them."""

import json
import os
from pathlib import Path
from typing import Any

import h5py
from keras import ops

from keras_mscm import checks
from keras_mscm.callbacks import own_files

#: The attribute of a file of best weights that holds their evaluation.
MARK = "keras_mscm.EvaluateSamples"


def plain(result: Any) -> Any:
    """A metric's result as JSON can hold it."""
    if isinstance(result, dict):
        return {key: plain(value) for key, value in result.items()}
    if hasattr(result, "shape"):
        result = ops.convert_to_numpy(result)
        return result.item() if result.size == 1 else result.tolist()
    if result is None or isinstance(result, (str, bool, int, float)):
        return result
    return str(result)


def value(name: str, result: Any) -> float:
    """The number that a metric's result is, or has as its "value"."""
    value = result.get("value") if isinstance(result, dict) else result
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            "`metrics` must return a number or a dictionary with 'value', a "
            f"number. Received: {checks.describe(result)} of the metric "
            f"{name!r}"
        )
    return float(value)


def text_of(path: Path) -> str:
    """What is in a file; nothing, if that isn't text."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def parsed(text: str) -> dict[str, Any] | None:
    """An evaluation, if that is what it says."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    try:
        checks.check_integer("iteration", found.get("iteration"), 0)
        for name in {*found} - {"iteration"}:
            value(name, found[name])
    except ValueError:
        return None
    return found if len(found) > 1 else None


def mark_of(path: Path) -> str:
    """What best weights say of themselves; nothing, if they are none."""
    try:
        with h5py.File(path, "r") as opened:
            return str(opened.attrs.get(MARK, ""))
    except OSError:
        return ""


def check_results(path: Path) -> None:
    """Raises unless there is a file of evaluations, or none.

    A last line that a killed process or a full disk has cut off is taken away,
    because the next one would be joined to it.
    """
    if not own_files.is_there(path):
        return
    error = own_files.foreign("results", path, "evaluations")
    try:
        with path.open("r+b") as file:
            content = file.read()
            lines = content.split(b"\n")
            last = lines.pop()
            if not all(parsed(line.decode("utf-8")) for line in lines):
                raise error
            if last and parsed(last.decode("utf-8", "replace")):
                file.write(b"\n")
            elif last:
                begin = b'{"iteration": '
                if last[: len(begin)] != (
                    begin[: len(last)] if lines else begin
                ):
                    raise error
                file.truncate(len(content) - len(last))
    except (OSError, UnicodeDecodeError) as cause:
        raise error from cause


def append(path: Path, line: str) -> None:
    """Appends a line, all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        content = line.encode("utf-8")
        try:
            if file.write(content) < len(content):
                raise OSError(f"no room for a line in {path}")
        except OSError:
            file.truncate(end)
            raise
