"""Accessibility masks: reading them, making synthetic ones, and cutting out a part for one simulation.

Files mark what is *accessible* (BED intervals, or True in a .npz file), or the opposite, depending on `marks`. Inside the
package, a mask is True = *in*accessible.
"""

import argparse
import contextlib
import gzip
import io
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cxt.console import get_logger
from cxt.data.shared_memory import free_memory
from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.io import atomic_write, file_sha256
from cxt.lineage import check_lineage, derive_mask_file_lineage, how_to_remake
from cxt.scenarios.seeds import build_random_generator

logger = get_logger(__name__)

ACCESSIBLE_SIGMA, INACCESSIBLE_SIGMA = 1.2, 1.5
"""Log-normal sigma of synthetic run lengths: many short gaps and few of kilobases, as with short-read filters."""


MARKS = ("accessible", "inaccessible")
"""Possible meanings of the intervals of a BED file, or the True values of an array."""

MAX_MASK_BASES = 2**33
"""Length in base pairs that no chromosome exceeds."""

UNREADABLE = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, NotImplementedError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, SyntaxError, tokenize.TokenError,
)  # fmt: skip
"""Exceptions that gzip, zipfile and numpy raise for damaged or malformed files."""


def read_mask(path, *, key: str = "accessible", contig: str | None = None, marks: str = "accessible") -> np.ndarray:
    """Read an accessibility mask as a bool array over its chromosome, True = inaccessible.

    Parameters
    ----------
    path : path-like
        A BED file (`.bed`, `.bed.gz`, `.bed.bgz`), or a .npz file with one value (bool, 0 or 1) for each base.
    key : str
        Name of the array in the .npz file.
    contig : str, optional
        Sequence to use from the BED file; required if the file has several.
    marks : {"accessible", "inaccessible"}
        Whether intervals, or True values, mark where genotypes can be called or where they cannot.

    Returns
    -------
    bool array
        For a BED file, it ends with the last interval, because the file does not contain the length of the sequence.

    Raises
    ------
    BadRequest
        If the file cannot be read, has no such array or contig, has other values or intervals of several samples, or the mask
        does not fit into memory.
    """
    path = Path(path)
    name = path.name.lower()
    if marks not in MARKS:
        raise BadRequest(f"mask {path}: `marks` must be one of {', '.join(MARKS)}, got '{marks}'")
    with refuse_unreadable(path):
        marked = _read_npz(path, key) if name.endswith(".npz") else _read_bed(path, contig)
    return np.logical_not(marked, out=marked) if marks == "accessible" else marked


@contextlib.contextmanager
def refuse_unreadable(path: Path) -> Iterator[None]:
    """BadRequest, in a `with` block that reads a mask, if the file is damaged or its name is that of another kind of file."""
    if not path.name.lower().endswith((".npz", ".bed", ".bed.gz", ".bed.bgz")):
        raise BadRequest(f"mask {path}: the file name must end in .npz, .bed, .bed.gz or .bed.bgz")
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"mask {path} cannot be read: {first_line(error)}") from None


def describe_mask(path, mask: np.ndarray) -> str:
    """Describe how much of a mask is accessible, so that a user sees whether its polarity is right."""
    return f"mask {path}: {1 - mask.mean(dtype=np.float64):.1%} of {len(mask):,} bp accessible"


def check_memory(path: Path, size: int) -> None:
    """BadRequest if a mask of *size* base pairs does not fit into memory."""
    if size > free_memory():
        raise BadRequest(
            f"mask {path} has {size:,} bp, one byte each, more than the {free_memory() / 1e9:,.1f} GB of free memory"
        )


def _read_npz(path: Path, key: str) -> np.ndarray:
    """Read the array *key* of a .npz file as a new bool array."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename == f"{key}.npy":
                check_memory(path, entry.file_size)
    with np.load(path) as arrays:
        if key not in arrays:
            raise BadRequest(f"{path} has no array '{key}'{suggest_nearest(key, arrays.files)}")
        values = arrays[key]
    if not isinstance(values, np.ndarray):
        raise BadRequest(f"{path}, '{key}' is not a numpy array")
    if values.ndim != 1:
        raise BadRequest(f"{path}, array '{key}' must have one value per base, got shape {values.shape}")
    if not values.size:
        raise BadRequest(f"{path}, array '{key}' is empty")
    if values.dtype == bool:
        return values
    if values.dtype.kind not in "iu":
        raise BadRequest(f"{path}, array '{key}' must hold True and False, or 0 and 1, got values of type {values.dtype}")
    if values.min() < 0 or values.max() > 1:
        odd = values[(values < 0) | (values > 1)][0]
        raise BadRequest(f"{path}, array '{key}' must hold True and False, or 0 and 1, one value per base, got the value {odd}")
    return values.astype(bool)


def _is_header(fields: list[str]) -> bool:
    """Whether the first line of a table names its columns."""
    return len(fields) >= 3 and "start" in fields[1].lower() and "end" in fields[2].lower()


def read_intervals(path: Path) -> Iterator[tuple[str, int, int, str | None]]:
    """(contig, start, end, name or None) of each line of a BED file."""
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rt", encoding="utf-8-sig") if is_packed else open(path, encoding="utf-8-sig") as file:
        is_first = True
        for number, line in enumerate(file, 1):
            fields = line.split("\t") if "\t" in line else line.split()
            fields = [field.strip() for field in fields]
            if not line.strip() or line.lstrip().startswith("#") or line.split()[0] in ("track", "browser"):
                continue
            if is_first and _is_header(fields):
                is_first = False
                continue
            is_first = False
            if len(fields) < 3 or not fields[0] or not all(field.isascii() and field.isdigit() for field in fields[1:3]):
                raise BadRequest(f"{path}, line {number}: expected contig, start and end, found {line.strip()[:100]!r}")
            left, right = int(fields[1][:20]), int(fields[2][:20])
            if left > right:
                raise BadRequest(f"{path}, line {number}: expected 0 <= start <= end, found {left} and {right}")
            if right > MAX_MASK_BASES:
                raise BadRequest(f"{path}, line {number}: the end must be at most {MAX_MASK_BASES}, got {right}")
            yield fields[0], left, right, fields[3] if len(fields) > 3 else None


def check_interval_names(path: Path, intervals: list[tuple[int, int, str | None]]) -> None:
    """BadRequest if intervals with different names overlap: they belong to several samples, or are not a mask."""
    ends: dict[str | None, int] = {}  # largest end of the intervals of each name
    farthest, others = None, 0
    for left, right, name in sorted(intervals, key=lambda interval: interval[:2]):
        if ends and left < right and left < (others if name == farthest else max(others, ends[farthest])):
            other = next(n for n, end in ends.items() if n != name and end > left)
            raise BadRequest(
                f"{path}: intervals of '{name}' and '{other}' overlap at {left}; the file lists intervals of several samples "
                "or features, but a mask is one set of intervals. Use those of one sample, those that all samples share "
                "(`bedtools multiinter`), or their union (`cut -f 1-3`)"
            )
        ends[name] = max(ends.get(name, 0), right)
        if farthest not in ends or ends[name] > ends[farthest]:
            if farthest in ends and farthest != name:
                others = max(others, ends[farthest])
            farthest = name
        elif name != farthest:
            others = max(others, ends[name])


def _read_bed(path: Path, contig: str | None) -> np.ndarray:
    """A bool array that is True within the intervals of *contig*."""
    intervals: dict[str, list[tuple[int, int, str | None]]] = {}
    for name, left, right, label in read_intervals(path):
        contig_intervals = intervals.setdefault(name, [])
        if contig is None or name == contig:
            contig_intervals.append((left, right, label))
    if not intervals:
        raise BadRequest(f"{path} has no intervals")
    if contig is None:
        if len(intervals) != 1:
            raise BadRequest(f"{path} has {len(intervals)} contigs; set `contig`{suggest_nearest('', intervals)}")
        contig = next(iter(intervals))
    if contig not in intervals:
        raise BadRequest(f"{path} has no contig '{contig}'{suggest_nearest(contig, intervals)}")
    chosen = intervals[contig]
    length = max(right for _, right, _ in chosen)
    if all(left == right for left, right, _ in chosen):
        raise BadRequest(f"{path}: all intervals of '{contig}' are empty")
    check_interval_names(path, chosen)
    check_memory(path, length)
    marked = np.zeros(length, dtype=bool)
    for left, right, _ in chosen:
        marked[left:right] = True
    return marked


def draw_synthetic_mask(spec: dict, *, seed: int) -> np.ndarray:
    """Draw a mask of alternating accessible and inaccessible runs with log-normal lengths, True = inaccessible.

    *spec* holds `length` and the mean runs `accessible_run` and `inaccessible_run`, all in base pairs. With the defaults
    (500 and 200) about 29% of the bases are inaccessible. Two lists of runs divide the mask into equal parts.
    """
    rng = build_random_generator(seed=seed, spec=spec, index=0, purpose="synthetic mask")
    accessible, inaccessible = spec["accessible_run"], spec["inaccessible_run"]
    parts = list(zip(accessible, inaccessible, strict=True)) if isinstance(accessible, list) else [(accessible, inaccessible)]
    mask = np.zeros(spec["length"], dtype=bool)
    for part, runs in zip(np.array_split(mask, len(parts)), parts, strict=True):  # views of the mask
        if runs[1]:
            _draw_runs(part, runs, rng)
    return mask


def _draw_runs(mask: np.ndarray, means: tuple[float, float], rng: np.random.Generator) -> None:
    """Mark inaccessible runs in *mask*, in place; *means* are those of the accessible and the inaccessible runs."""
    at = 0
    while at < len(mask):
        count = int(2 * (len(mask) - at) / sum(means)) + 10
        runs = np.empty(2 * count)
        for i, (length, sigma) in enumerate(zip(means, (ACCESSIBLE_SIGMA, INACCESSIBLE_SIGMA), strict=True)):
            runs[i::2] = rng.lognormal(np.log(length) - sigma**2 / 2, sigma, size=count)
        edges = at + np.concatenate([[0], np.cumsum(np.maximum(1, np.rint(runs)).astype(np.int64))])
        for left, right in zip(edges[1:-1:2], edges[2::2], strict=True):
            mask[left:right] = True
        at = int(edges[-1])


def write_mask(path, mask: np.ndarray, *, lineage: str | None = None) -> None:
    """Write a mask (True = inaccessible) as .npz file, with the inverse as array `accessible`, and the *lineage*."""
    out = io.BytesIO()
    np.savez_compressed(out, accessible=~mask, **({} if lineage is None else {"lineage": lineage}))
    atomic_write(path, out.getvalue())


def check_mask(path, *, lineage: str | None = None, sha256: str | None = None) -> None:
    """BadRequest if the mask file is not the planned one, by the *lineage* that `write_mask` stored or the file's *sha256*."""
    stored_lineage = file_digest = None
    try:
        if lineage is not None:
            with np.load(path) as arrays:
                stored_lineage = str(arrays["lineage"]) if "lineage" in arrays else None
        if sha256 is not None:
            file_digest = file_sha256(path)
    except UNREADABLE as error:
        remedy = "put it back" if lineage is None else how_to_remake(path, delete=str(path))
        raise BadRequest(f"mask {path} cannot be read: {first_line(error)}; {remedy}") from None
    check_lineage(f"mask {path}", actual=stored_lineage, planned=lineage, target=path)
    if file_digest != sha256:
        raise BadRequest(f"mask {path} was changed since this job was planned; run the same command again to use the new mask")


def cut_mask(mask: np.ndarray, *, length: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Cut a random part of *length* bases out of *mask*; return it and its offset in [0, len(mask) - length].

    Raises BadRequest if the mask is shorter than *length*.
    """
    if len(mask) < length:
        raise BadRequest(
            f"the accessibility mask is {len(mask)} bp long, shorter than the sequence of {length} bp; use a longer mask"
        )
    offset = int(rng.integers(0, len(mask) - length + 1))
    return mask[offset : offset + length], offset


def add_mask_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for a dataset's mask; `read_mask_from_flags` reads it."""
    parser.add_argument("--mask", type=Path, help="accessibility mask, a .npz or BED file")
    parser.add_argument("--mask-key", default="accessible", help="array in the .npz file (default accessible)")
    parser.add_argument("--mask-contig", help="sequence in the BED file")
    parser.add_argument(
        "--mask-marks", choices=MARKS, default=MARKS[0], help="meaning of its intervals or true values (default accessible)"
    )
    parser.add_argument("--mask-lineage", help="expected lineage of a synthetic mask")
    parser.add_argument("--mask-sha256", help="expected digest of the mask file")


def identify_mask_from_flags(args: argparse.Namespace) -> str | None:
    """Lineage of the mask that the flags name; None if there is no mask, or a synthetic one whose lineage is not expected."""
    if args.mask is None or args.mask_sha256 is None:
        return args.mask_lineage
    return derive_mask_file_lineage(args.mask_sha256, key=args.mask_key, contig=args.mask_contig, marks=args.mask_marks)


def read_mask_from_flags(args: argparse.Namespace) -> np.ndarray | None:
    """Read and check the mask that the flags name, and log how much of it is accessible; None if there is no mask."""
    if args.mask is None:
        if args.mask_contig is not None:
            raise BadRequest("--mask-contig cannot be used without --mask")
        return None
    check_mask(args.mask, lineage=args.mask_lineage, sha256=args.mask_sha256)
    mask = read_mask(args.mask, key=args.mask_key, contig=args.mask_contig, marks=args.mask_marks)
    logger.info(describe_mask(args.mask, mask))
    return mask
