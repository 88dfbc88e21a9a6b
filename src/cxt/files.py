"""Writing files so that a half-made one never stands under its final name."""

import os
from pathlib import Path

from cxt.errors import BadRequest


def atomic_write(path, data) -> None:
    """Write *data* (bytes, or a view of them) to a temporary name, flush it to disk, and rename it to *path*."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def check_writable(path) -> None:
    """Make the directory of *path*; BadRequest if that cannot be, or if nothing can be written there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadRequest(f"{path} cannot be written: {'it is a directory' if path.is_dir() else 'no permission'}")
