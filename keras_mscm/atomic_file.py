"""Files that appear as a whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(
    path: Path, write: Callable[[Path], Any], suffix: str
) -> None:
    """Writes a file that is at any time the old or the new one.

    That holds too if the process is killed, the machine stops or the disk is
    full. A killed process leaves a directory `.{path.name}.*` behind. A
    symbolic link stays one: what it leads to is replaced.

    Args:
        path: The file.
        write: Writes to the path that it is given.
        suffix: What that path must end in.

    Raises:
        ValueError: If `path` is a directory; nothing has been written then.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(
            f"`path` must be a file, or new. Received: the directory {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}."
    ) as folder:
        temporary = Path(folder, f"new{suffix}")
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
