"""A preset's folder: where it is, what it holds, and how it is replaced."""

import glob
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_mscm import checks

BUILT_IN = Path(__file__).parent.parent / "presets"
CONFIG, TASK, METADATA = "config.json", "task.json", "metadata.json"
WEIGHTS = "model.weights.h5"
#: Of the autoencoder of a model on latents, by its attributes.
CODEC = {"encoder": "encoder.weights.h5", "decoder": "decoder.weights.h5"}
FILES = (CONFIG, TASK, METADATA, WEIGHTS, *CODEC.values())
#: What stands in the metadata of every preset that was saved.
WRITTEN = ("parameters", "keras", "date")
LARGEST = 2**24  # bytes of a JSON file; a preset's are thousands


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{CONFIG}"))


def find(preset: str | os.PathLike) -> Path:
    """The directory of a preset, by name or path.

    A string that is the name of a preset of the package means that one, and
    anything else is a path. Files may be symbolic links to files, as in the
    cache of Hugging Face's hub.

    Raises:
        ValueError: If there is none.
    """
    allowed = f"a directory with a {CONFIG} or one of {names()}"
    try:
        path = checks.check_path("preset", preset)
    except (TypeError, ValueError):
        raise checks.invalid("preset", allowed, preset) from None
    if isinstance(preset, str) and preset in names():
        return BUILT_IN / preset
    try:
        if (path / CONFIG).is_file():
            return path
        beside = f".{glob.escape(path.name)}.*/*/{CONFIG}"
        left = [*path.parent.glob(beside)]
    except (OSError, ValueError):  # too long a name, or not to be entered
        left = []
    hint = ""
    if left:
        hint = (
            ". A save that was interrupted left this, to be renamed: "
            f"{[str(file.parent) for file in left]}"
        )
    raise ValueError(
        f"`preset` must be {allowed}. Received: preset="
        f"{os.fspath(preset)!r}{hint}"
    )


def read(preset: str | os.PathLike, file: str) -> dict[str, Any]:
    """One of a preset's JSON files; empty if it isn't there.

    Raises:
        ValueError: If there is no such preset, or the file doesn't hold an
            object of JSON.
    """
    path = find(preset) / file
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
        ValueError: If it holds none.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        found = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise _no_object(path, "lists within lists without end") from None
    except (OSError, ValueError) as error:
        raise _no_object(path, str(error)) from error
    if not isinstance(found, dict):
        raise _no_object(path, checks.describe(found))
    return found


def _no_object(path: Path, came: str) -> ValueError:
    return ValueError(
        f"{path} must hold an object of JSON in UTF-8. Received: {came}"
    )


def read_config(preset: str | os.PathLike) -> dict[str, Any]:
    """A preset's network, as Keras serialises it.

    Raises:
        ValueError: If the file holds something else.
    """
    config = read(preset, CONFIG)
    if not _is_config(config):
        raise ValueError(
            f"{find(preset) / CONFIG} must describe a network as Keras does, "
            "by a class_name, a registered_name or module, and its config. "
            f"Received: {checks.describe(config)}"
        )
    return config


def _is_config(config: dict[str, Any]) -> bool:
    return isinstance(config.get("class_name"), str) and isinstance(
        config.get("config"), dict
    )


def has_weights(preset: str | os.PathLike) -> bool:
    """Whether a preset holds weights."""
    return (find(preset) / WEIGHTS).is_file()


# Writing. Nothing is deleted but a preset's own files.


def write_metadata(preset: str | os.PathLike, facts: dict[str, Any]) -> None:
    """Replaces a preset's description, at once."""
    path = find(preset) / METADATA
    handle, new = tempfile.mkstemp(prefix=f".{METADATA}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(facts, indent=2) + "\n")
        mode = path.stat().st_mode if path.exists() else 0o644
        os.chmod(new, stat.S_IMODE(mode))
        os.replace(new, os.path.realpath(path))  # a link stays one
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise


def check_target(preset: str | os.PathLike) -> Path:
    """Where a preset is to be saved.

    Returns:
        Its absolute path.

    Raises:
        ValueError: If there is something else than a preset.
    """
    path = checks.check_path("preset", preset)
    if isinstance(preset, str) and preset in names():
        raise ValueError(
            f"`preset` must not be the name of one of the package's, {preset}: "
            "`from_preset` would load that. Give another name or a `Path`. "
            f"Received: preset={preset!r}"
        )
    # Links on the way are kept, as the folder may have moved.
    target = Path(os.path.abspath(path))
    try:
        other = what_else(target)
    except OSError as error:
        other = str(error)
    if other:
        raise ValueError(
            "`preset` must be a new directory, an empty one or a preset that "
            "`save_to_preset` wrote, which is then replaced. Received: preset="
            f"{str(target)!r}, {other}. Nothing has been changed"
        )
    return target


def what_else(target: Path) -> str:
    """What a path leads to but a preset, an empty directory or nothing."""
    if target.is_symlink():
        return f"a symbolic link to {os.readlink(target)}: give that path"
    if not target.exists():
        return ""
    if not target.is_dir():
        return "which is a file"
    if Path.cwd().is_relative_to(target):
        return "in which this program is working"
    entries = sorted(target.iterdir())
    if not entries:
        return ""
    foreign = [
        path.name + "/" * path.is_dir()
        for path in entries
        if path.name not in FILES or path.is_symlink() or not path.is_file()
    ]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        return f"which holds {', '.join(foreign[:5])}{more}"
    try:
        config = read_json(target / CONFIG)
        facts = read_json(target / METADATA)
    except ValueError as error:
        return f"which holds no preset: {error}"
    if not _is_config(config) or not {*WRITTEN} <= {*facts}:
        return (
            f"whose {CONFIG} and {METADATA} are not those of `save_to_preset`"
        )
    return ""


def replace_at_once(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a directory, then puts it in the place of `target`.

    A killed process leaves a directory `.{target.name}.*` beside it, in which
    `new` is what was being written. If it is killed between two renamings,
    `old` is in there as well, and `find` says so.

    Args:
        target: From `check_target`.
        write: Writes a preset's files into the directory that it is given.

    Raises:
        ValueError: If it can't be written beside `target`, or something else
            has come into its place.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ValueError(
            "`preset` must be in a directory that can be written to. "
            f"Received: preset={str(target)!r}: {error}"
        ) from error
    new, old = Path(beside, "new"), Path(beside, "old")
    try:
        new.mkdir()
        write(new)
        for path in new.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        check_target(target)  # once more, as writing takes its time
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    finally:
        _clear(new, old, Path(beside))


def _clear(new: Path, old: Path, beside: Path) -> None:
    shutil.rmtree(new, ignore_errors=True)  # if at all, all of it is ours
    try:
        if old.is_dir():
            for name in FILES:
                (old / name).unlink(missing_ok=True)
            old.rmdir()
        beside.rmdir()
    except OSError as error:
        warnings.warn(
            f"{beside} is kept, as it holds more than a preset: {error}",
            stacklevel=4,
        )
