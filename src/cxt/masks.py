"""Accessibility masks: reading them, making synthetic ones, and cutting a piece for one simulation.

Files say what is *accessible* (BED intervals, or True in a .npz). Inside the package a mask is True = *in*accessible.
"""

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np

from cxt.errors import BadRequest, nearest
from cxt.files import atomic_write
from cxt.lineage import check_lineage, file_sha256
from cxt.remedies import make_again
from cxt.scenarios import random_generator

ACCESSIBLE_SIGMA, INACCESSIBLE_SIGMA = 1.2, 1.5
"""Log-normal spread of synthetic run lengths: many short gaps and few of kilobases, as short-read filters leave them."""


def read_mask(path, *, key: str = "accessible", contig: str | None = None) -> np.ndarray:
    """An accessibility mask as a bool array over its chromosome, True = inaccessible.

    Parameters
    ----------
    path : a BED file of accessible intervals (`.bed`, `.bed.gz`), or a .npz with an array that is True = accessible
    key : name of the array in the .npz
    contig : sequence to take from the BED file; may be left out when it has one only

    Raises
    ------
    BadRequest
        If the file cannot be read, or has no such array or contig.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                if key not in arrays:
                    raise BadRequest(f"{path} has no array '{key}'{nearest(key, arrays.files)}")
                if arrays[key].ndim != 1:
                    raise BadRequest(f"{path}, array '{key}': found shape {arrays[key].shape}, expected one value per base")
                return ~arrays[key].astype(bool)
        if path.name.endswith((".bed", ".bed.gz")):
            return _read_bed(path, contig)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"mask {path} cannot be read: {error}") from None
    raise BadRequest(f"mask {path}: expected a name that ends in .npz, .bed or .bed.gz")


def _read_bed(path: Path, contig: str | None) -> np.ndarray:
    intervals: dict[str, list[tuple[int, int]]] = {}
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields or fields[0].startswith("#") or fields[0] in ("track", "browser"):
                continue
            try:
                left, right = int(fields[1]), int(fields[2])
            except (IndexError, ValueError):
                raise BadRequest(f"{path}, line {number}: expected contig, start and end, found {line.strip()!r}") from None
            if not 0 <= left <= right:
                raise BadRequest(f"{path}, line {number}: expected 0 <= start <= end, found {left} and {right}")
            intervals.setdefault(fields[0], []).append((left, right))
    if contig is None:
        if len(intervals) != 1:
            raise BadRequest(f"{path} has {len(intervals)} contigs; say which with `contig`{nearest('', intervals)}")
        contig = next(iter(intervals))
    if contig not in intervals:
        raise BadRequest(f"{path} has no contig '{contig}'{nearest(contig, intervals)}")
    mask = np.ones(max(right for _, right in intervals[contig]), dtype=bool)
    for left, right in intervals[contig]:
        mask[left:right] = False
    return mask


def synthetic_mask(spec: dict, *, seed: int) -> np.ndarray:
    """A mask of alternating accessible and inaccessible runs with log-normal lengths, True = inaccessible.

    *spec* holds `length` and the mean runs `accessible_run` and `inaccessible_run`, all in base pairs. With the defaults
    (500 and 200) about 29 % of the bases are inaccessible.
    """
    rng = random_generator(seed=seed, spec=spec, index=0, purpose="synthetic mask")
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
    found = digest = None
    try:
        if lineage is not None:
            with np.load(path) as arrays:
                found = str(arrays["lineage"]) if "lineage" in arrays else None
        if sha256 is not None:
            digest = file_sha256(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        remedy = "put it back" if lineage is None else make_again(path, delete=str(path))
        raise BadRequest(f"mask {path} cannot be read: {error}; {remedy}") from None
    check_lineage(f"mask {path}", found=found, planned=lineage, target=path)
    if digest != sha256:
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
