"""Memory that the processes of one machine share, or a file that stands in for it, and how much of it there is.

Neither has a name in the file system where the system allows it, so that nothing stays behind, whatever ends the process.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import psutil

from cxt.errors import BadRequest

CGROUP = Path("/sys/fs/cgroup")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or `max`
        return None


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, or of the control group that a scheduler put it into."""
    free = psutil.virtual_memory().available
    try:
        group = CGROUP / Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return free
    for directory in (group, *group.parents):
        limit, used = _number(directory / "memory.max"), _number(directory / "memory.current")
        if limit is not None and used is not None:
            statistics = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(statistics.get("inactive_file", 0)))  # a cache of files gives way
        if directory == CGROUP:
            break
    return max(0, free)


class Arena:
    """*size* bytes in memory or, with *on_disk*, in a file of the directory for temporary files (`TMPDIR`).

    Forked processes share it as it is; others, and what unpickles it, attach to it by its path while its owner lives.
    """

    def __init__(self, size: int, *, on_disk: bool = False):
        self.size = max(1, size)
        if on_disk:
            directory = tempfile.gettempdir()
            free = shutil.disk_usage(directory).free
            if free < self.size:
                raise BadRequest(
                    f"{self.size / 1e9:.1f} GB for a dataset fit neither into memory nor into {directory}, which has "
                    f"{free / 1e9:.1f} GB left; set TMPDIR to a larger file system, or train with fewer simulations"
                )
        if hasattr(os, "memfd_create") and not on_disk:
            descriptor, name = os.memfd_create("cxt"), None
        else:
            descriptor, name = tempfile.mkstemp(prefix="cxt-")
        if Path("/proc/self/fd").exists():
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
            if name is not None:
                os.unlink(name)
            self._close = weakref.finalize(self, os.close, descriptor)
        else:
            self.path = name
            self._close = weakref.finalize(self, os.unlink, name)
        os.ftruncate(descriptor, self.size)
        self._map = mmap.mmap(descriptor, self.size)

    @classmethod
    def attach(cls, path: str, size: int) -> "Arena":
        """The arena that another process of this machine made, to read."""
        self = cls.__new__(cls)
        self.path, self.size = path, size
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return self

    def __reduce__(self):
        return Arena.attach, (self.path, self.size)

    def array(self, offset: int, dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The bytes from *offset* on as an array."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(shape)
