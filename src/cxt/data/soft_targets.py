"""Soft targets: a teacher's distributions of ln TMRCA for the examples of a shard, as quantiles.

Each shard of a dataset has a file of soft targets, of the same name but for its ending .npz, in another directory:

    quantiles  (simulations, pairs, windows, levels) int16   in thousandths of ln generations
    about      JSON: the shard's sha256, the teacher, how it was read, the digest of the quantiles, and the lineage

Quantiles take a sixth of the memory of probabilities, do not depend on a grid, and are shifted by addition.
"""

import contextlib
import hashlib
import io
import json
import statistics
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cxt.errors import BadRequest, first_line
from cxt.io import atomic_write, canonical_json
from cxt.lineage import how_to_remake

LEVELS = np.array([statistics.NormalDist().cdf(0.25 * step) for step in range(-14, 15)])
"""Probabilities of the quantiles: those of a normal distribution from -3.5 to 3.5 standard deviations, a quarter apart."""

UNIT = 1e-3
"""Unit of stored quantiles, in ln generations."""

UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError)


def write_soft_targets(path, quantiles: np.ndarray, about: dict) -> None:
    """Write the soft targets of a shard.

    Parameters
    ----------
    path : path-like
    quantiles : float array (simulations, pairs, windows, levels)
        In ln generations, at the probabilities `LEVELS`.
    about : dict
        `shard`, the sha256 of the shard, `teacher` {name, lineage, sha256}, how it was read, and lineage. The digest of the
        quantiles is added, so that it tells these soft targets from others.
    """
    limits = np.iinfo(np.int16)
    stored = np.clip(np.round(quantiles / UNIT), limits.min, limits.max).astype(np.int16)
    about = about | {"quantiles": hashlib.sha256(stored.tobytes()).hexdigest()}
    out = io.BytesIO()
    np.savez_compressed(out, quantiles=stored, about=np.array(canonical_json(about)))
    atomic_write(path, out.getvalue())


def soft_targets_path(directory, shard: str) -> Path:
    """The file of soft targets in *directory* for a shard, given by its path in the dataset."""
    return Path(directory) / f"{shard.removesuffix('.zarr.zip')}.npz"


def read_about(path, *, shard: str) -> dict:
    """What was written about soft targets.

    Parameters
    ----------
    path : path-like
    shard : str
        Checksum of the shard to which they must belong.

    Raises
    ------
    BadRequest
        If the file is missing, damaged, or belongs to another shard.
    """
    with _open(path) as arrays:
        about = json.loads(str(arrays["about"]))
        found = about["shard"]
    if found != shard:
        raise BadRequest(
            f"soft targets {path} belong to another shard than that of this dataset (its checksum differs); "
            f"{how_to_remake(path, delete=str(path))}"
        )
    return about


def read_soft_targets(path, *, shard: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Read the soft targets of a shard with this *shape* (simulations, pairs, windows); errors as in `read_about`.

    Returns
    -------
    int16 array (simulations, pairs, windows, levels)
        In units of `UNIT`.
    """
    read_about(path, shard=shard)
    with _open(path) as arrays:
        quantiles = arrays["quantiles"]
    if quantiles.dtype != np.int16 or quantiles.shape != (*shape, len(LEVELS)):
        raise BadRequest(
            f"soft targets {path} have the shape {quantiles.shape} instead of {(*shape, len(LEVELS))}; "
            f"{how_to_remake(path, delete=str(path))}"
        )
    return quantiles


@contextlib.contextmanager
def _open(path) -> Iterator[Mapping]:
    """The arrays of a file, each read when it is asked for; BadRequest if that fails."""
    try:
        with np.load(path) as arrays:
            yield arrays
    except FileNotFoundError:
        raise BadRequest(f"there are no soft targets {path}; {how_to_remake(path)}") from None
    except UNREADABLE as error:
        remedy = how_to_remake(path, delete=str(path))
        raise BadRequest(f"soft targets {path} are damaged or truncated: {first_line(error)}; {remedy}") from None
