"""Writing files so that a half-made one never stands under its final name."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cxt.errors import BadRequest


@contextlib.contextmanager
def atomic_file(path) -> Iterator[BinaryIO]:
    """A new binary file for a `with` block, which is on disk under the name *path* once the block has ended without exception.

    Until then it stands beside *path* under a name of its own, so that two writers do not disturb each other: the last one to
    end wins. An exception removes it. A file that was at *path* passes on its permissions. A symbolic link at *path* is
    replaced, not followed; links among its directories are followed.

    What a process that was killed has left of the same *path* is removed: it is locked while its writer lives.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary, file = _create(path)
    try:
        with file:
            yield file
            file.flush()
            with contextlib.suppress(OSError):  # a new file, or a file system without permissions
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode) & 0o777)
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def atomic_write(path, data) -> None:
    """Write *data* (bytes, or a view of them) to *path* as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def atomic_link(path, target: str) -> None:
    """Make *path* a symbolic link to *target*, whatever it was before, at once."""
    path = Path(path)
    temporary = _temporary(path)
    temporary.symlink_to(target)  # fails if the name is taken
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def remove_abandoned(path) -> None:
    """Remove what writers of *path* that were killed have left beside it."""
    path = Path(path)
    ours = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{16}\.tmp")
    try:
        names = [name for name in os.listdir(path.parent) if ours.fullmatch(name)]
    except OSError:  # no such directory, or one that may be written to but not be read
        return
    for name in names:
        temporary = path.with_name(name)
        with contextlib.suppress(OSError):  # it is gone, another user's, or its file system has no locks: then it stays
            file = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink()
            finally:
                os.close(file)


def is_at(file: int, path) -> bool:
    """Whether the open *file* (a descriptor) is the one that is found at *path*, which may have been replaced or removed."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


def _stem(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:200])  # file systems allow 255 bytes


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_stem(path)}.{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """A new locked file beside *path*, with the permissions that the umask leaves."""
    while True:
        temporary = _temporary(path)
        number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # no locks here: then nobody removes it, either
            fcntl.flock(number, fcntl.LOCK_EX)
        if is_at(number, temporary):
            return temporary, os.fdopen(number, "wb")
        os.close(number)  # taken for abandoned before it was locked


def _sync_directory(path: Path) -> None:
    """Have the disk know of a new name, where a file system can do that for directories."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_writable(path) -> None:
    """Make the directory of *path*; BadRequest if that cannot be, or if nothing can be written there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadRequest(f"{path} cannot be written: {'it is a directory' if path.is_dir() else 'no permission'}")


def without_nan(value):
    """*value* with None for each float that is NaN or infinite, at any depth of mappings, lists and tuples."""
    if isinstance(value, dict):
        return {key: without_nan(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value, *, indent: int | None = 1, sort_keys: bool = False) -> str:
    """*value* as strict JSON with a newline at its end; NaN and infinities become null."""
    return json.dumps(without_nan(value), indent=indent, sort_keys=sort_keys, allow_nan=False) + "\n"


def canonical(value) -> str:
    """*value* as JSON that does not depend on the order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(value) -> str:
    """Twelve hexadecimal digits that identify a JSON-able value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:12]


def file_sha256(path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
