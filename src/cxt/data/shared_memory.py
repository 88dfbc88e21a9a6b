"""Memory shared by the processes of one machine, or a file in its place, and the amount of free memory.

Where the system allows it, neither has a name in the file system, so that nothing is left behind however the process ends.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from cxt.errors import BadRequest

CGROUP = Path("/sys/fs/cgroup")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or `max`
        return None


def _list_control_groups() -> Iterator[tuple[Path, str, str]]:
    """The control groups that may limit the memory of this process, with the names of their files, of version 2 or 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers == "":
            top, names = CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.strip("/")
        for directory in (group, *group.parents):
            yield directory, *names
            if directory == top:
                break


def _machine_free_memory() -> int:
    try:
        return psutil.virtual_memory().available
    except (OSError, RuntimeError):  # no /proc
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def free_memory() -> int:
    """Bytes that this process can still allocate, limited by the machine or by the control group of a scheduler."""
    free = _machine_free_memory()
    for directory, limit_file, used_file in _list_control_groups():
        limit, used = _read_number(directory / limit_file), _read_number(directory / used_file)
        if limit is not None and used is not None:
            statistics = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="utf-8").splitlines())
            cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))
            free = min(free, limit - used + int(cached))  # cached files are evicted if needed
    return max(0, free)


def _no_room_error(size: int, directory: str, reason: str) -> BadRequest:
    return BadRequest(
        f"the {size / 1e6:,.1f} MB of the dataset do not fit into {directory} ({reason}); set `scratch` or TMPDIR to a "
        "directory of a larger file system, hold it in memory (`storage: memory`), or train with fewer simulations"
    )


def _create_file(directory: str) -> tuple[int, str]:
    """A new temporary file in *directory*: its descriptor and its path."""
    try:
        return tempfile.mkstemp(prefix="cxt-", dir=directory)
    except OSError as error:
        raise BadRequest(
            f"the dataset cannot be held in a temporary file in {directory}: {error.strerror}; set `scratch` or TMPDIR to a "
            "directory in which you can write"
        ) from None


def _close_and_unlink(descriptor: int, name: str) -> None:
    os.close(descriptor)
    os.unlink(name)


class Arena:
    """*size* bytes in memory or, with *on_disk*, in a file in *directory*, by default the one for temporary files (`TMPDIR`).

    Forked processes share it automatically; others attach to it by its path while its owner lives.
    """

    def __init__(self, size: int, *, on_disk: bool = False, directory: str | None = None):
        self.size = max(1, size)
        directory = directory or tempfile.gettempdir()
        if on_disk:
            free = shutil.disk_usage(directory).free
            if free < self.size:
                raise _no_room_error(self.size, directory, f"{free / 1e6:,.1f} MB left")
        if hasattr(os, "memfd_create") and not on_disk:
            descriptor, name = os.memfd_create("cxt"), None
        else:
            descriptor, name = _create_file(directory)
        if Path("/proc/self/fd").exists():
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
            if name is not None:
                os.unlink(name)
            self._close = weakref.finalize(self, os.close, descriptor)
        else:
            self.path = name
            self._close = weakref.finalize(self, _close_and_unlink, descriptor, name)
        if on_disk and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, self.size)  # otherwise, writing to a full disk would kill the process
            except OSError as error:
                raise _no_room_error(self.size, directory, error.strerror or str(error)) from None
        os.ftruncate(descriptor, self.size)
        self._map = mmap.mmap(descriptor, self.size)

    @classmethod
    def attach(cls, path: str, size: int) -> "Arena":
        """Attach read-only to the arena of another process of this machine."""
        self = cls.__new__(cls)
        self.path, self.size = path, size
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        return self

    def array(self, offset: int, dtype, shape: tuple[int, ...]) -> np.ndarray:
        """The bytes starting at *offset* as an array."""
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(shape)
