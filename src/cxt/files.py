"""Writing files so that a half-made one never stands under its final name."""

import os
from pathlib import Path


def atomic_write(path, data: bytes) -> None:
    """Write *data* to a temporary name, flush it to disk, and rename it to *path*."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
