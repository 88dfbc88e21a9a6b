"""The directory of a translation: its lock, its work directory, and what may be replaced or removed in it."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from cxt.errors import BadRequest, Failed
from cxt.io import acquire_lock, atomic_write, check_writable

WORK, LOCK, REQUEST = ".work", ".lock", "request.json"
"""Names in the directory: of the work directory, the lock, and, in the work directory, what was requested."""

OUTPUTS = (
    "summary.json", "tracks.tsv.gz", "tracks.tsv.gz.tbi", "tracks.tsv.gz.csi", "ne.csv", "tracks.png", "pairs.png",
    "distribution.png", "ne.png", "tracks.zarr", ".tracks.zarr.part", "bigwig",
)  # fmt: skip
"""Everything that `cxt translate` and `cxt plot` write there."""


@contextlib.contextmanager
def hold_directory(directory: Path, identity: str, *, force: bool, lock: bool) -> Iterator[Path]:
    """The work directory of the request *identity* in *directory*, new or of an interrupted translation, for a `with` block.

    After a BadRequest, the work directory is removed unless blocks are done, so that another request may be made at once.

    Parameters
    ----------
    directory : Path
    identity : str
        From `cxt.translation.request.identify`.
    force : bool
        Replace a translation of other settings, or a finished one.
    lock : bool
        Keep other processes out. Not for the parts of a workflow, which run at the same time.

    Raises
    ------
    BadRequest
        If the directory holds something else, or another process uses it.
    Failed
        If the disk is full.
    """
    if directory.exists() and not directory.is_dir():
        raise BadRequest(f"{directory} is a file; --out must be a directory, new or empty")
    check_writable(directory / "summary.json")
    work = directory / WORK
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, directory)
        if lock:
            held = acquire_lock(directory / LOCK, directory)
            stack.callback(held.close, remove=True)
        _open(directory, work, identity, force=force)
        try:
            yield work
        except BadRequest:
            if lock and not any(work.glob("*.npz")):
                shutil.rmtree(work, ignore_errors=True)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise Failed(
                f"{directory} cannot be written: {error.strerror}; make room, and repeat the command, which goes on from here"
            ) from error


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something
        directory.rmdir()


def _open(directory: Path, work: Path, identity: str, *, force: bool) -> None:
    """Make the work directory, or accept the one that is there; BadRequest if there is anything else."""
    known, finished = work / REQUEST, directory / "summary.json"
    others = [path.name for path in directory.iterdir() if path.name not in (WORK, LOCK)]
    if others and not work.is_dir() and not (directory / "tracks.zarr" / "zarr.json").is_file():
        raise BadRequest(f"{directory} is not empty and holds no translation; choose a new or an empty directory")
    is_same = known.is_file() and known.read_text(encoding="utf-8") == identity
    if not force and finished.exists():
        raise BadRequest(
            f"{directory} holds a finished translation; choose another directory, or replace it with force (--force)"
        )
    if not force and known.is_file() and not is_same:
        raise BadRequest(
            f"{directory} holds an unfinished translation of other settings or files; finish that one with its own settings, "
            "choose another directory, or replace it (--force)"
        )
    if not is_same or finished.exists():
        # A work directory without a request is left of an interrupted removal.
        for path in (*(directory / name for name in OUTPUTS), work):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        atomic_write(known, identity.encode())
