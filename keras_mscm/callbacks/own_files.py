"""Which files callbacks may replace or remove: their own, and no others."""

import contextlib
import errno
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import keras


def check_folder(name: str, folder: Path) -> None:
    """Makes a folder; raises unless files can be written into it.

    Args:
        name: The argument that says where the files go.
        folder: The folder.

    Raises:
        ValueError: If it can't be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(
            f"`{name}` must be where files can be written. Received: "
            f"{str(folder)!r}, in which they can't be: {error}"
        ) from error


def check_space(folder: Path, model: keras.Model, slack: int = 0) -> None:
    """Raises unless there is room for a file of a model's weights.

    HDF5 takes the process with it (a segmentation fault) if it is closed on a
    disk that has become full, so it must not get that far.

    Args:
        folder: Where the file goes.
        model: The model.
        slack: Bytes for each variable, beside its numbers.

    Raises:
        OSError: If there isn't.
    """
    variables = {
        id(v): v for v in [*model.variables, *model.optimizer.variables]
    }
    teacher = getattr(model, "teacher", None)
    if teacher is not None and not teacher.saved:
        for variable in teacher.variables:
            variables.pop(id(variable), None)
    needed = sum(
        math.prod(v.shape) * _bytes_of(v.dtype) for v in variables.values()
    )
    needed += slack * len(variables)
    free = shutil.disk_usage(folder).free
    if free < needed:
        told = f"{os.strerror(errno.ENOSPC)}: {free} bytes of {needed}"
        raise OSError(errno.ENOSPC, told)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(needed)  # fails for what a file may not grow to


def _bytes_of(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) // 8 if digits else 1


def foreign(name: str, path: Path, what: str) -> ValueError:
    """The error for a file that is not the callback's own.

    Args:
        name: The argument that says where the files go.
        path: The file.
        what: What it would be, if it were the callback's own.
    """
    return ValueError(
        f"`{name}` must be where nothing but {what} would be replaced. "
        f"Received: {str(path)!r}, which is something else: move it, or give "
        "another path"
    )


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, even a link to nothing."""
    return path.exists() or path.is_symlink()


def is_plain(path: Path) -> bool:
    """Whether it is a file, and not a link to one."""
    return path.is_file() and not path.is_symlink()


def remove_leftovers(folder: Path, names: str) -> None:
    """Removes what killed processes have left of `write_atomically`.

    That is a directory `.{name}.{8 characters}` which holds nothing but the new
    file, or what Keras puts beside it meanwhile.

    Args:
        folder: Where to look.
        names: Regular expression of the names that were written.
    """
    directories = re.compile(rf"\.(?:{names})\.[a-z0-9_]{{8}}")
    files = re.compile(r"new(?:\.\w+)+|tmp[a-z0-9_]{8}")
    for directory in [*folder.iterdir()]:
        if not directories.fullmatch(directory.name) or (
            directory.is_symlink() or not directory.is_dir()
        ):
            continue
        with contextlib.suppress(OSError):
            content = [*directory.iterdir()]
            if all(is_plain(f) and files.fullmatch(f.name) for f in content):
                for file in content:
                    file.unlink(missing_ok=True)
                directory.rmdir()
