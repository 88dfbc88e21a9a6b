"""Torch files in which no bit changes unnoticed, and that are not unpacked into more than they are.

`torch.save` writes a zip archive of uncompressed entries, each with a checksum that `torch.load` does not look at. Every file
that cxt writes ends, moreover, in the sha256 of all that stands before it, as the archive's comment, which torch passes over:
the checksums do not cover what lies between the entries. Files without such an end, of earlier versions or of the original
package, are read by their checksums alone.
"""

import contextlib
import hashlib
import io
import pickle
import struct
import zipfile

import torch

from cxt.errors import BadRequest

LABEL = b"cxt sha256 "
HEX = 64
END = struct.Struct("<4s4H2LH")  # magic, two disks, entries here and in all, size and offset of the directory, comment's length
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")

UNREADABLE = (
    pickle.UnpicklingError, struct.error, zipfile.BadZipFile, RuntimeError, EOFError, OSError, LookupError, TypeError,
    ValueError, AttributeError, AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip
"""Exceptions that torch and `open_verified` raise for files that are damaged or malformed."""


class Damaged(BadRequest):
    """Why a file is not what was once written."""


def pack(content) -> memoryview:
    """The bytes of a torch file of *content*, with a digest at its end; equal contents have equal bytes."""
    out = io.BytesIO()
    torch.save(content, out)
    with out.getbuffer() as view:
        struct.pack_into("<H", view, len(view) - 2, len(LABEL) + HEX)  # how long the archive's comment is
    out.seek(0, io.SEEK_END)
    out.write(LABEL)
    with out.getbuffer() as view:
        digest = hashlib.sha256(view).hexdigest()
    out.write(digest.encode())
    return out.getbuffer()


@contextlib.contextmanager
def open_verified(path, *, sealed: bool = False):
    """A torch file, open for reading, after its bytes were found to be those that were written.

    *sealed* refuses files without a digest at their end.

    Raises
    ------
    Damaged
        If it is no zip archive, has no digest though *sealed*, its digest or a checksum differs, or it holds entries that are
        compressed, overlap, or claim to be larger than the file. Nothing has been unpacked by then.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        check_bytes(file, sealed=sealed)
        file.seek(0)
        yield file


def check_bytes(file, *, sealed: bool = False) -> None:
    """What `open_verified` does, of a file that is open."""
    size = file.seek(0, io.SEEK_END)
    end, is_sealed = _find_end_record(file, size)
    if sealed and not is_sealed:
        raise Damaged("it does not end in a digest: it was written by another program, or an earlier cxt")
    if is_sealed:
        file.seek(0)
        digest = hashlib.sha256()
        left = size - HEX
        while left and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        if left or file.read(HEX) != digest.hexdigest().encode():
            raise Damaged("its bytes are not those that were written, the digest at its end says; it was damaged or changed")
    directory = _find_directory(file, end)
    try:
        with zipfile.ZipFile(file) as archive:
            _check_entries(archive, directory)
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise error if isinstance(error, Damaged) else Damaged(f"not a whole zip archive: {error}") from None
    if bad is not None:
        raise Damaged(f"the checksum of its entry {bad[-100:]} differs")


def _read_at(file, position: int, layout: struct.Struct) -> tuple | None:
    """What *layout* finds at *position* of *file*; None before its beginning."""
    if position < 0:
        return None
    file.seek(position)
    data = file.read(layout.size)
    return layout.unpack(data) if len(data) == layout.size else None


def _find_end_record(file, size: int) -> tuple[int, bool]:
    """Where the archive's end record is, and whether our digest follows; it may stand in these two places only."""
    for comment in (0, len(LABEL) + HEX):
        record = _read_at(file, size - comment - END.size, END)
        if record is not None and record[0] == b"PK\x05\x06" and record[-1] == comment:
            file.seek(size - comment)
            if not comment or file.read(len(LABEL)) == LABEL:
                return size - comment - END.size, comment > 0
    file.seek(0)
    is_zip = file.read(2) == b"PK"
    raise Damaged("the end of the file is missing or was changed" if is_zip else "not a zip archive")


def _find_directory(file, end: int) -> int:
    """Where the list of entries begins; Damaged unless whoever reads the archive must find the same list."""
    _, *disks, _, entries, size, offset, _ = _read_at(file, end, END)
    locator = _read_at(file, end - LOCATOR_64.size, LOCATOR_64)
    if locator is not None and locator[0] == b"PK\x06\x07":
        end = end - LOCATOR_64.size - END_64.size
        wide = _read_at(file, end, END_64)
        if wide is None or wide[0] != b"PK\x06\x06" or locator[2] != end:
            raise Damaged("its end records disagree")
        narrow, (entries, size, offset) = (entries, size, offset), wide[-3:]
        for value, true, full in zip(narrow, (entries, size, offset), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True):
            if value not in (true, full):
                raise Damaged("its end records disagree")
    if any(disks) or offset + size != end:
        raise Damaged("its end records do not fit the file")
    return offset


def _check_entries(archive: zipfile.ZipFile, directory: int) -> None:
    """Damaged if reading the entries could take more memory than the file is large."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if archive.start_dir != directory or not entries or entries[0].header_offset != 0:
        raise Damaged("it does not begin or end as an archive of torch's does")
    if len({entry.filename for entry in entries}) < len(entries):
        raise Damaged("an entry is there twice")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Damaged(f"its entry {entry.filename[-100:]} is compressed, which torch never does; nothing was unpacked")
    following = [*(entry.header_offset for entry in entries[1:]), directory]
    if any(entry.header_offset + entry.file_size > end for entry, end in zip(entries, following, strict=True)):
        raise Damaged("its entries overlap, or claim to be larger than the file")
