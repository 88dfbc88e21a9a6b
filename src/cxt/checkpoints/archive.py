"""Torch files with a digest: every changed bit is detected, and nothing is unpacked into more memory than the file's size.

`torch.save` writes a zip archive of uncompressed entries, each with a checksum that `torch.load` does not verify. In addition,
every file that cxt writes ends with the sha256 of everything before it, as the archive's comment, which torch ignores; the
checksums do not cover the bytes between entries. Files without this digest, from earlier versions or the original package, are
verified by their checksums alone.
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
"""Exceptions that torch and `open_verified` raise for damaged or malformed files."""


class Damaged(BadRequest):
    """A file is damaged or was changed; the message says how."""


def pack(content) -> memoryview:
    """Serialise *content* as a torch file with a digest at its end; equal contents give equal bytes."""
    out = io.BytesIO()
    torch.save(content, out)
    with out.getbuffer() as view:
        struct.pack_into("<H", view, len(view) - 2, len(LABEL) + HEX)  # length of the archive's comment
    out.seek(0, io.SEEK_END)
    out.write(LABEL)
    with out.getbuffer() as view:
        digest = hashlib.sha256(view).hexdigest()
    out.write(digest.encode())
    return out.getbuffer()


@contextlib.contextmanager
def open_verified(path, *, sealed: bool = False):
    """Verify a torch file and open it for reading.

    *sealed* refuses files without a digest at their end.

    Raises
    ------
    Damaged
        If it is not a zip archive, has no digest although *sealed*, its digest or a checksum differs, or it has entries that
        are compressed, overlap, or claim to be larger than the file. Nothing is unpacked before these checks.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        check_bytes(file, sealed=sealed)
        file.seek(0)
        yield file


def check_bytes(file, *, sealed: bool = False) -> None:
    """Verify an open torch file, as `open_verified` does."""
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
            raise Damaged("its content does not match the digest at its end: it is damaged or was changed")
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
    """Unpack *layout* at *position* of *file*; None if that is not inside the file."""
    if position < 0:
        return None
    file.seek(position)
    data = file.read(layout.size)
    return layout.unpack(data) if len(data) == layout.size else None


def _find_end_record(file, size: int) -> tuple[int, bool]:
    """Position of the archive's end record, and whether cxt's digest follows; there are only two possible positions."""
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
    """Position of the list of entries; Damaged unless every reader of the archive would find the same list."""
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
        raise Damaged("it does not begin or end like an archive written by torch")
    if len({entry.filename for entry in entries}) < len(entries):
        raise Damaged("it has two entries with the same name")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Damaged(f"its entry {entry.filename[-100:]} is compressed, which torch never does; nothing was unpacked")
    following = [*(entry.header_offset for entry in entries[1:]), directory]
    if any(entry.header_offset + entry.file_size > end for entry, end in zip(entries, following, strict=True)):
        raise Damaged("its entries overlap, or claim to be larger than the file")
