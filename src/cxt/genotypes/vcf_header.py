"""The header of a VCF or BCF file, read and checked before the file is given to a parser whose messages are for programmers."""

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from cxt.errors import BadRequest, first_line

GZIP_MAGIC = b"\x1f\x8b"

BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
"""The empty block at the end of a file that bgzip wrote; a file without it was cut off."""

COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")

MAX_HEADER = 2**28
"""Bytes; more than this is no header."""


class Header(NamedTuple):
    """What a header says.

    kind : `VCF` or `BCF`
    bgzipped : whether the file can have an index
    contigs : {name: length in base pairs, or None}
    info, formats : {tag: its type, such as `String`}
    """

    kind: str
    bgzipped: bool
    samples: list[str]
    contigs: dict[str, int | None]
    info: dict[str, str]
    formats: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a VCF or BCF file.

    Parameters
    ----------
    path : Path
        Plain, or compressed by bgzip or gzip.

    Returns
    -------
    Header

    Raises
    ------
    BadRequest
        If the file is not VCF or BCF, is cut off, has no samples or two of the same name, or has a damaged header.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(18)
            size = file.seek(0, 2)
            file.seek(max(0, size - len(BGZF_END)))
            end = file.read()
        if not start:
            raise BadRequest(f"{path} is empty (0 bytes); expected a VCF or BCF file")
        packed = start.startswith(GZIP_MAGIC)
        bgzipped = packed and start[3:4] == b"\x04" and start[12:14] == b"BC"
        with gzip.open(path) if packed else open(path, "rb") as file:
            kind, lines = _read_lines(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadRequest(f"{path} is compressed, but damaged or cut off: {first_line(error)}; copy or make it again") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from None
    if bgzipped and end != BGZF_END:
        raise BadRequest(f"{path} is cut off: bgzip's mark of the end of the file is missing; copy or make it again")
    samples = _read_samples(lines[-1], path)
    contigs: dict[str, int | None] = {}
    tags: dict[str, dict[str, str]] = {"INFO": {}, "FORMAT": {}}
    for line in lines[:-1]:
        text = line.decode("utf-8", errors="replace")
        if match := re.match(r"##contig=<(?:.*?,)?ID=([^,>]+)", text):
            length = re.search(r"[<,]length=(\d+)", text)
            contigs.setdefault(match[1], int(length[1]) or None if length else None)
        elif match := re.match(r"##(INFO|FORMAT)=<(?:.*?,)?ID=([^,>]+)", text):
            type_ = re.search(r"[<,]Type=(\w+)", text)
            tags[match[1]].setdefault(match[2], type_[1] if type_ else "")
    return Header(kind, bgzipped, samples, contigs, tags["INFO"], tags["FORMAT"])


def _read_lines(file, path: Path) -> tuple[str, list[bytes]]:
    """`VCF` or `BCF`, and the lines of the header; the last one is that of the columns."""
    start = file.read(5)
    if start.startswith(b"BCF"):
        if start[3:4] != b"\x02":
            raise BadRequest(
                f"{path} is BCF of version {start[3]}; expected 2: convert it with a version of bcftools that reads it"
            )
        (length,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
        text = file.read(length) if length <= MAX_HEADER else b""
        if len(text) < length:
            raise BadRequest(f"{path} ends within its header, or is damaged; copy or make it again")
        kind, lines = "BCF", [line for line in text.rstrip(b"\0").split(b"\n") if line]
    else:
        kind, lines, size = "VCF", [], 0
        line = start + file.readline(MAX_HEADER)
        if not line.startswith(b"##fileformat=VCF"):
            if not line.removeprefix(b"\xef\xbb\xbf").startswith((b"##fileformat=VCF", b"##", b"#CHROM")):
                raise BadRequest(f"{path} is not VCF or BCF: its first line is not ##fileformat=VCFv4.2 or another version")
            raise BadRequest(
                f"{path}: the first line must be ##fileformat=VCFv4.2 or another version, without anything before it"
            )
        while line.startswith(b"#") and size < MAX_HEADER:
            lines.append(line.rstrip(b"\r\n"))
            size += len(line)
            if line.startswith(b"#CHROM"):
                break
            line = file.readline(MAX_HEADER)
    if not lines or not lines[-1].startswith(b"#CHROM"):
        raise BadRequest(f"{path}: the header does not end with a line of columns, #CHROM POS ID …; it is damaged or cut off")
    return kind, lines


def _read_samples(line: bytes, path: Path) -> list[str]:
    try:
        fields = line.decode("utf-8").split("\t")
    except UnicodeDecodeError:
        raise BadRequest(
            f"{path}: names of samples are not in UTF-8; convert the file, for example with iconv -f latin1 -t utf-8"
        ) from None
    if tuple(fields[:8]) != COLUMNS:
        hint = "; they must be separated by tabs" if tuple(line.decode().split()[:8]) == COLUMNS else ""
        raise BadRequest(f"{path}: expected the columns {' '.join(COLUMNS)}, got {' '.join(fields[:8])}{hint}")
    samples = fields[9:]
    if not samples:
        raise BadRequest(f"{path} has no samples, only sites; genotypes are needed")
    if fields[8] != "FORMAT":
        raise BadRequest(f"{path}: expected the column FORMAT before those of the samples, got {fields[8]}")
    if len(set(samples)) < len(samples):
        name = next(name for place, name in enumerate(samples) if name in samples[:place])
        raise BadRequest(f"{path} has two samples called '{name}'; rename one, for example with bcftools reheader --samples")
    if "" in samples:
        raise BadRequest(f"{path} has a sample without a name (column {fields.index('', 9) + 1} of the line #CHROM)")
    return samples
