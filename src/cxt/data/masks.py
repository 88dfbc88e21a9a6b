"""Accessibility masks: reading them, making synthetic ones, and cutting a piece for one simulation.

Files say what is *accessible* (BED intervals, or True in a .npz), or the opposite where `marks` says so. Inside the package a
mask is True = *in*accessible.
"""

import argparse
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
from cxt.lineage import check_lineage, how_to_remake
from cxt.scenarios.seeds import build_random_generator

logger = get_logger(__name__)

ACCESSIBLE_SIGMA, INACCESSIBLE_SIGMA = 1.2, 1.5
"""Log-normal spread of synthetic run lengths: many short gaps and few of kilobases, as short-read filters leave them."""


MARKS = ("accessible", "inaccessible")
"""What the intervals of a BED file, or the True of an array, can mean."""

MAX_MASK_BASES = 2**33
"""Base pairs; no chromosome is longer."""

UNREADABLE = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, NotImplementedError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, SyntaxError, tokenize.TokenError,
)  # fmt: skip
"""What gzip, zipfile and numpy raise for files that are damaged or malformed."""


def read_mask(path, *, key: str = "accessible", contig: str | None = None, marks: str = "accessible") -> np.ndarray:
    """An accessibility mask as a bool array over its chromosome, True = inaccessible.

    Parameters
    ----------
    path : path-like
        A BED file (`.bed`, `.bed.gz`, `.bed.bgz`), or a .npz that holds one value (bool, 0 or 1) for each base.
    key : str
        Name of the array in the .npz.
    contig : str, optional
        Sequence to take from the BED file; needed if the file has several.
    marks : {"accessible", "inaccessible"}
        Whether intervals, or True, mark where genotypes can be called or where they cannot.

    Returns
    -------
    bool array
        Up to the end of the last interval of a BED file, which does not say how long its sequence is.

    Raises
    ------
    BadRequest
        If the file cannot be read, has no such array or contig, holds other values or intervals of several samples, or the
        mask does not fit into memory.
    """
    path = Path(path)
    name = path.name.lower()
    if marks not in MARKS:
        raise BadRequest(f"mask {path}: `marks` is '{marks}', expected one of {', '.join(MARKS)}")
    try:
        if name.endswith(".npz"):
            marked = _read_npz(path, key)
        elif name.endswith((".bed", ".bed.gz", ".bed.bgz")):
            marked = _read_bed(path, contig)
        else:
            raise BadRequest(f"mask {path}: expected a name that ends in .npz, .bed or .bed.gz")
    except UNREADABLE as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"mask {path} cannot be read: {first_line(error)}") from None
    return np.logical_not(marked, out=marked) if marks == "accessible" else marked


def describe_mask(path, mask: np.ndarray) -> str:
    """How much of a mask is accessible, in words: the quickest way to see that its polarity is right."""
    return f"mask {path}: {1 - mask.mean(dtype=np.float64):.1%} of {len(mask):,} bp accessible"


def _check_memory(path: Path, size: int) -> None:
    if size > free_memory():
        raise BadRequest(
            f"mask {path} has {size:,} bp, a byte each, more than the {free_memory() / 1e9:,.1f} GB of free memory"
        )


def _read_npz(path: Path, key: str) -> np.ndarray:
    """Array *key*, a new bool array."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename == f"{key}.npy":
                _check_memory(path, entry.file_size)
    with np.load(path) as arrays:
        if key not in arrays:
            raise BadRequest(f"{path} has no array '{key}'{suggest_nearest(key, arrays.files)}")
        values = arrays[key]
    if not isinstance(values, np.ndarray):
        raise BadRequest(f"{path}, '{key}': not an array of numpy's")
    if values.ndim != 1:
        raise BadRequest(f"{path}, array '{key}': found shape {values.shape}, expected one value per base")
    if not values.size:
        raise BadRequest(f"{path}, array '{key}' is empty")
    if values.dtype == bool:
        return values
    if values.dtype.kind not in "iu":
        raise BadRequest(f"{path}, array '{key}': found values of type {values.dtype}, expected True and False, or 0 and 1")
    if values.min() < 0 or values.max() > 1:
        odd = values[(values < 0) | (values > 1)][0]
        raise BadRequest(
            f"{path}, array '{key}': found the value {odd}, expected one value per base, True and False, or 0 and 1"
        )
    return values.astype(bool)


def _is_header(fields: list[str]) -> bool:
    """Whether the first line of a table names its columns."""
    return len(fields) >= 3 and "start" in fields[1].lower() and "end" in fields[2].lower()


def _read_intervals(path: Path) -> Iterator[tuple[str, int, int, str | None]]:
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
                raise BadRequest(
                    f"{path}, line {number}: the end {right} is beyond any chromosome; expected at most {MAX_MASK_BASES}"
                )
            yield fields[0], left, right, fields[3] if len(fields) > 3 else None


def _check_names(path: Path, intervals: list[tuple[int, int, str | None]]) -> None:
    """BadRequest if intervals with different names overlap: they are of different samples, or no mask at all."""
    ends: dict[str | None, int] = {}  # how far intervals reach: of the name that reaches farthest, and of all others
    farthest, others = None, 0
    for left, right, name in sorted(intervals, key=lambda interval: interval[:2]):
        if ends and left < right and left < (others if name == farthest else max(others, ends[farthest])):
            other = next(n for n, end in ends.items() if n != name and end > left)
            raise BadRequest(
                f"{path}: intervals of '{name}' and '{other}' overlap at {left}; it lists intervals of several samples or "
                "features, and a mask is one set of intervals. Take those of one sample, or those that all samples share "
                "(`bedtools multiinter`); `cut -f 1-3` takes their union"
            )
        ends[name] = max(ends.get(name, 0), right)
        if farthest not in ends or ends[name] > ends[farthest]:
            if farthest in ends and farthest != name:
                others = max(others, ends[farthest])
            farthest = name
        elif name != farthest:
            others = max(others, ends[name])


def _read_bed(path: Path, contig: str | None) -> np.ndarray:
    """True where an interval of *contig* is."""
    intervals: dict[str, list[tuple[int, int, str | None]]] = {}
    for name, left, right, label in _read_intervals(path):
        contig_intervals = intervals.setdefault(name, [])
        if contig is None or name == contig:
            contig_intervals.append((left, right, label))
    if not intervals:
        raise BadRequest(f"{path} has no intervals")
    if contig is None:
        if len(intervals) != 1:
            raise BadRequest(f"{path} has {len(intervals)} contigs; say which with `contig`{suggest_nearest('', intervals)}")
        contig = next(iter(intervals))
    if contig not in intervals:
        raise BadRequest(f"{path} has no contig '{contig}'{suggest_nearest(contig, intervals)}")
    chosen = intervals[contig]
    length = max(right for _, right, _ in chosen)
    if all(left == right for left, right, _ in chosen):
        raise BadRequest(f"{path}: all intervals of '{contig}' are empty")
    _check_names(path, chosen)
    _check_memory(path, length)
    marked = np.zeros(length, dtype=bool)
    for left, right, _ in chosen:
        marked[left:right] = True
    return marked


def draw_synthetic_mask(spec: dict, *, seed: int) -> np.ndarray:
    """A mask of alternating accessible and inaccessible runs with log-normal lengths, True = inaccessible.

    *spec* holds `length` and the mean runs `accessible_run` and `inaccessible_run`, all in base pairs. With the defaults
    (500 and 200) about 29% of the bases are inaccessible.
    """
    rng = build_random_generator(seed=seed, spec=spec, index=0, purpose="synthetic mask")
    mean = spec["accessible_run"] + spec["inaccessible_run"]
    mask = np.zeros(spec["length"], dtype=bool)
    at = 0
    while at < len(mask):
        count = int(2 * (len(mask) - at) / mean) + 10
        runs = np.empty(2 * count)
        for i, (length, sigma) in enumerate(
            ((spec["accessible_run"], ACCESSIBLE_SIGMA), (spec["inaccessible_run"], INACCESSIBLE_SIGMA))
        ):
            runs[i::2] = rng.lognormal(np.log(length) - sigma**2 / 2, sigma, size=count)
        edges = at + np.concatenate([[0], np.cumsum(np.maximum(1, np.rint(runs)).astype(np.int64))])
        for left, right in zip(edges[1:-1:2], edges[2::2], strict=True):
            mask[left:right] = True
        at = int(edges[-1])
    return mask


def write_mask(path, mask: np.ndarray, *, lineage: str | None = None) -> None:
    """Write a mask (True = inaccessible) as .npz, where array `accessible` is its opposite; *lineage* is stored beside it."""
    out = io.BytesIO()
    np.savez_compressed(out, accessible=~mask, **({} if lineage is None else {"lineage": lineage}))
    atomic_write(path, out.getvalue())


def check_mask(path, *, lineage: str | None = None, sha256: str | None = None) -> None:
    """BadRequest if the mask file is not what was planned: the *lineage* that `write_mask` stored, or the file's *sha256*."""
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
        raise BadRequest(f"mask {path} was changed since this job was planned; run the same command again, to plan with it")


def cut_mask(mask: np.ndarray, *, length: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A random stretch of *length* bases of *mask*, and its offset in [0, len(mask) - length].

    Raises BadRequest if the mask is shorter than *length*.
    """
    if len(mask) < length:
        raise BadRequest(
            f"the accessibility mask is {len(mask)} bp long, shorter than the sequence of {length} bp; use a longer mask"
        )
    offset = int(rng.integers(0, len(mask) - length + 1))
    return mask[offset : offset + length], offset


def add_mask_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that tell a stage of a dataset's mask; `read_mask_from_flags` reads it."""
    parser.add_argument("--mask", type=Path, help="accessibility mask, .npz or BED")
    parser.add_argument("--mask-key", default="accessible", help="array in the .npz (default accessible)")
    parser.add_argument("--mask-contig", help="sequence in the BED file")
    parser.add_argument(
        "--mask-marks", choices=MARKS, default=MARKS[0], help="what its intervals or true values mark (default accessible)"
    )
    parser.add_argument("--mask-lineage", help="lineage that a synthetic mask must have")
    parser.add_argument("--mask-sha256", help="digest that the mask file must have")


def read_mask_from_flags(args: argparse.Namespace) -> np.ndarray | None:
    """The mask that the flags name, checked, after saying how much of it is accessible; None without one."""
    if args.mask is None:
        if args.mask_contig is not None:
            raise BadRequest("--mask-contig has no meaning without --mask")
        return None
    check_mask(args.mask, lineage=args.mask_lineage, sha256=args.mask_sha256)
    mask = read_mask(args.mask, key=args.mask_key, contig=args.mask_contig, marks=args.mask_marks)
    logger.info(describe_mask(args.mask, mask))
    return mask
