"""Reading a tree sequence from a file, `.trees` or `.tsz` compressed by tszip."""

from pathlib import Path

import tskit

from cxt.errors import BadRequest, first_line

MAGIC = b"\x89KAS\r\n\x1a\n"
"""First bytes of a tree sequence."""


def load_tree_sequence(path: str | Path) -> tuple[tskit.TreeSequence, bool]:
    """The first tree sequence of a file, compressed or not, and whether others follow, as in a simulation batch.

    Raises
    ------
    BadRequest
        If it cannot be read, or other data follow.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                return _load_compressed(path), False
        with open(path, "rb") as file:
            ts = tskit.load(file)
            following = file.read(len(MAGIC))
    except (tskit.FileFormatError, tskit.LibraryError, OSError, EOFError) as error:
        reason = first_line(error) if str(error) else "it ends too early"
        raise BadRequest(f"{path} cannot be read as a tree sequence: {reason}; copy or make it again") from None
    if following and following != MAGIC:
        raise BadRequest(f"{path} has other data after the tree sequence; copy or make it again")
    return ts, bool(following)


def _load_compressed(path: str | Path) -> tskit.TreeSequence:
    import tszip

    try:
        return tszip.load(path)
    except Exception as error:  # a damaged file makes zipfile, zarr, numcodecs and tskit raise any kind
        raise BadRequest(f"{path} cannot be read as a tree sequence compressed by tszip: {first_line(error)}") from None
