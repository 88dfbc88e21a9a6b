"""Atomic file writes, lock files, canonical JSON and digests, and aligned tables."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from cxt.console import get_logger
from cxt.errors import BadRequest

logger = get_logger(__name__)


@contextlib.contextmanager
def atomic_file(path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a new binary file for a `with` block, which replaces *path* when the block ends without an exception.

    Until then the data is in a temporary file beside *path*, so that concurrent writers do not disturb each other: the last one
    to finish wins. An exception removes the temporary file. Permissions of an existing *path* are kept. A symbolic link at
    *path* is replaced, not followed; links among its directories are followed.

    Temporary files left by killed writers of the same *path* are removed; a running writer holds a lock on its own.

    Parameters
    ----------
    path : path-like
    durable : bool
        False for one of thousands of small files that are made again if they are damaged. Nothing is flushed to disk, so that
        the file may be empty or cut off after a crash of the machine (not of the process). The directory is not searched for
        temporary files, which takes longer the more files it has.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if durable:
        remove_abandoned_files(path)
    temporary, file = _create_temporary(path)
    try:
        with file:
            yield file
            file.flush()
            with contextlib.suppress(OSError):  # a new file, or a file system without permissions
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode) & 0o777)
            if durable:
                os.fsync(file.fileno())
                temporary.replace(path)
        if not durable:  # when it is closed, which may be when a network file system finds that the disk is full
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_directory(path.parent)


def atomic_write(path, data) -> None:
    """Write *data* (bytes, or a view of them) to *path* as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def atomic_link(path, target: str) -> None:
    """Make *path* a symbolic link to *target*, atomically replacing whatever was there."""
    path = Path(path)
    temporary = _temporary_name(path)
    temporary.symlink_to(target)  # fails if the name is taken
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def remove_abandoned_files(path) -> None:
    """Remove temporary files beside *path* that were left by killed writers."""
    path = Path(path)
    temporary_pattern = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{16}\.tmp")
    try:
        names = [name for name in os.listdir(path.parent) if temporary_pattern.fullmatch(name)]
    except OSError:  # no such directory, or one that is writable but not readable
        return
    for name in names:
        temporary = path.with_name(name)
        with contextlib.suppress(OSError):  # already removed; or kept: another user's, or on a file system without locks
            file = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(file)


def is_same_file(file: int, path) -> bool:
    """Whether the open *file* (a descriptor) is still the file at *path*, which may have been replaced or removed."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _stem(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:200])  # file systems allow 255 bytes


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{_stem(path)}.{secrets.token_hex(8)}.tmp")


def _create_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """A new, locked temporary file beside *path*, with the permissions that the umask allows."""
    while True:
        temporary = _temporary_name(path)
        number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks, where no process removes it either
            fcntl.flock(number, fcntl.LOCK_EX)
        if is_same_file(number, temporary):
            return temporary, os.fdopen(number, "wb")
        os.close(number)  # removed as abandoned before it was locked


def _sync_directory(path: Path) -> None:
    """Flush a directory to disk, so that a new name survives a crash, where the file system supports it."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_writable(path) -> None:
    """Create the directory of *path*; BadRequest if that fails or the directory is not writable."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadRequest(f"{path} cannot be written: {'it is a directory' if path.is_dir() else 'no permission'}")


def expand_path(text: str, *, setting: str) -> str:
    """Replace `~` and environment variables in a path from the configuration; BadRequest for a variable that is not set.

    Parameters
    ----------
    text : path
    setting : name of the setting that it is from, for the message
    """
    path = os.path.expanduser(os.path.expandvars(text))
    if missing := re.search(r"\$\{?\w+\}?", path):
        raise BadRequest(f"{setting}: {missing[0]} in '{text}' is not set on {socket.gethostname()}; set it, or give a path")
    return path


def find_directory(text: str, *, setting: str) -> str:
    """The directory that a setting names, with `~` and environment variables replaced; BadRequest if it does not exist."""
    path = expand_path(text, setting=setting)
    if not os.path.isdir(path):
        raise BadRequest(f"{setting}: there is no directory {path} on {socket.gethostname()}; create it, or name another one")
    return path


def replace_nan(value):
    """Replace NaN and infinite floats by None, at any depth of mappings, lists and tuples."""
    if isinstance(value, dict):
        return {key: replace_nan(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nan(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value, *, indent: int | None = 1, sort_keys: bool = False) -> str:
    """Format *value* as strict JSON with a final newline; NaN and infinities become null."""
    return json.dumps(replace_nan(value), indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n"


def format_columns(rows: Iterable[Sequence[str]], *, left: int = 1, separator: str = "  ") -> list[str]:
    """Align the cells of a table.

    Parameters
    ----------
    rows : iterable of sequences of str
        The rows, including the header, all with the same number of cells.
    left : int
        Number of leading columns that are aligned to the left; the others are aligned to the right.
    separator : str
        Text between two columns.

    Returns
    -------
    list of str
        One line per row, with trailing padding.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        separator.join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def canonical_json(value) -> str:
    """*value* as compact JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(value) -> str:
    """Twelve hexadecimal digits that identify a JSON-able value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:12]


def file_sha256(path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_held_locks: set[int] = set()
"""File descriptors of the locks that this process holds."""


def _release_after_fork() -> None:
    """Release the locks in a forked process: a loader that outlives the trainer would otherwise lock out the next one."""
    for number in _held_locks:
        with contextlib.suppress(OSError):
            os.close(number)
    _held_locks.clear()


os.register_at_fork(after_in_child=_release_after_fork)


class Lock:
    """A lock file that this process holds until `close`, or until the process ends for any reason.

    The lock belongs to the open file (`flock`): the process may open and close the file elsewhere, and forked processes do not
    hold it. A lock file left behind by a dead process locks nothing.
    """

    def __init__(self, path: Path, number: int):
        self.path, self._number = path, number
        _held_locks.add(number)

    def close(self, *, remove: bool = False) -> None:
        """Release the lock and empty the file, which marks a clean exit; with *remove*, delete the file first."""
        if self._number not in _held_locks:  # released before, or in a forked process
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.ftruncate(self._number, 0)
        _held_locks.discard(self._number)
        os.close(self._number)


def acquire_lock(path, what) -> Lock:
    """Acquire the lock file *path*.

    Parameters
    ----------
    path : path-like
        The lock file, created if need be.
    what : str or path-like
        What it locks, for messages.

    Returns
    -------
    Lock

    Raises
    ------
    BadRequest
        If another process holds the lock (the message says which), or the file cannot be locked.
    """
    path = Path(path)
    check_writable(path)
    tries = 0
    while True:
        try:
            # Links are not followed, because the file that they point to would be emptied.
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise BadRequest(f"{what}: the lock {path} cannot be opened: {error.strerror}; remove it") from None
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(number)
            os.close(number)
            if error.errno not in LOCK_TAKEN:
                raise BadRequest(
                    f"{what}: its file system cannot lock files ({error.strerror}), so that two trainers could write there at "
                    "once; use a file system that supports locks"
                ) from None
            tries += 1
            if tries < 5:  # it may be `is_locked` probing the lock
                time.sleep(0.05)
                continue
            process = re.fullmatch(r"process (\d+) on (\S+?)(?:, Slurm job (\d+))?", holder)
            stop = ""
            if process and process[3]:
                stop = f" (to stop it: scancel {process[3]}; it saves first)"
            elif process and process[2] == socket.gethostname():
                stop = f" (to stop it: kill {process[1]}; it saves first)"
            raise BadRequest(
                f"{what} is in use by {holder or 'an unknown process'}; wait for it or stop it{stop}, then try again"
            ) from None
        if is_same_file(number, path):
            break
        os.close(number)  # its holder removed it in the meantime, and another process may hold a new one
    holder = _holder(number)
    if holder:
        logger.warning(f"note: taking over {what}: {holder} ended without releasing it")
    os.ftruncate(number, 0)
    slurm_job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if os.environ.get("SLURM_JOB_ID") else ""
    os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}{slurm_job}".encode(), 0)
    return Lock(path, number)


LOCK_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def _holder(number: int) -> str:
    return os.pread(number, 1000, 0).decode(errors="replace").strip()


def is_locked(path) -> bool:
    """Whether a process holds the lock file *path*."""
    try:
        number = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in LOCK_TAKEN
    finally:
        os.close(number)
    return False
