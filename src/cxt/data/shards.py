"""The on-disk format of a dataset: shards of many simulations, and the manifest that lists them.

A shard is one Zarr v3 group in one zip file, one array per field:

    genotypes     (sites, ceil(samples / 8)) uint8   haplotype h of a site is bit h % 8 of byte h // 8
    positions     (sites,) float64                   base pairs, ascending within a simulation
    site_offsets  (simulations + 1,) int64           sites of simulation i are [site_offsets[i], site_offsets[i + 1])
    pairs         (simulations, pairs, 2) uint16     haplotypes
    log_tmrca     (simulations, pairs, windows) float32
    index         (simulations,) int64               index of the simulation in its variant
    start         (simulations,) int64               start of the region that is used, in base pairs
    mutation_rate (simulations,) float64
    recombination_rate (simulations,) float64        mean over the simulation, NaN if unknown; both per base pair and generation
    mask          (simulations, ceil(length / 8)) uint8, only with missingness: bit 1 = inaccessible
    mask_offset   (simulations,) int64, only with missingness: offset in the accessibility mask

With several regions per simulation, each region has its own row, and `index` repeats.
Only usable sites are kept (see `cxt.data.features.select_usable_sites`). The bytes of a shard depend only on its content and
the package versions.
"""

import contextlib
import dataclasses
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from cxt.data.shard_checks import ShardError, check_arrays, check_layout, check_zip_entries
from cxt.data.shared_memory import free_memory
from cxt.errors import BadRequest, first_line
from cxt.io import atomic_write
from cxt.lineage import how_to_remake

LARGEST_COUNT = 2**48
"""Largest number of simulations, examples, sites or bytes; more would not fit into any machine."""

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, OSError, LookupError, ValueError, TypeError, EOFError, RuntimeError, AttributeError,
    ArithmeticError, AssertionError, MemoryError,
)  # fmt: skip
"""Exceptions that zipfile and zarr raise for damaged or malformed files."""

SHAPE_KEYS = ("window_size", "sequence_length", "samples", "pairs", "scales", "missing", "regions_per_simulation")
"""Attributes that all shards of a dataset share."""


def how_to_rebuild(shard) -> str:
    """Advice on rebuilding a bad shard: the manifest must be deleted, too, otherwise Snakemake would find nothing to do."""
    manifest = Path(shard).parent.parent / MANIFEST
    return how_to_remake(manifest, delete=f"it and the dataset's {MANIFEST}")


@dataclasses.dataclass
class PreprocessedSimulation:
    """One preprocessed simulation, or one region of it, with the fields of the module's table for this simulation."""

    scenario: str
    index: int
    mutation_rate: float
    recombination_rate: float
    genotypes: np.ndarray  # (sites, bytes), packed
    positions: np.ndarray  # (sites,)
    pairs: np.ndarray  # (pairs, 2)
    log_tmrca: np.ndarray  # (pairs, windows)
    start: int = 0  # base pairs
    mask: np.ndarray | None = None  # (sequence_length,) bool, True = inaccessible
    mask_offset: int = 0


def write_shard(path, simulations: list[PreprocessedSimulation], attributes: dict) -> None:
    """Write simulations of one variant and split as a shard.

    Parameters
    ----------
    path : path-like
        The shard, `FILE.zarr.zip`.
    simulations : list of PreprocessedSimulation
        The simulations, at least one.
    attributes : dict
        `SHAPE_KEYS`, and scenario, split and seed.
    """
    arrays: dict[str, np.ndarray] = {
        "genotypes": np.concatenate([one.genotypes for one in simulations]),
        "positions": np.concatenate([one.positions for one in simulations]).astype(np.float64),
        "site_offsets": np.cumsum([0, *(len(one.positions) for one in simulations)]).astype(np.int64),
        "pairs": np.stack([one.pairs for one in simulations]).astype(np.uint16),
        "log_tmrca": np.stack([one.log_tmrca for one in simulations]).astype(np.float32),
        "index": np.array([one.index for one in simulations], dtype=np.int64),
        "start": np.array([one.start for one in simulations], dtype=np.int64),
        "mutation_rate": np.array([one.mutation_rate for one in simulations], dtype=np.float64),
        "recombination_rate": np.array([one.recombination_rate for one in simulations], dtype=np.float64),
    }
    if attributes["missing"]:
        arrays["mask"] = np.stack([np.packbits(one.mask, bitorder="little") for one in simulations])
        arrays["mask_offset"] = np.array([one.mask_offset for one in simulations], dtype=np.int64)
    content: dict[str, Buffer] = {}
    group = zarr.open_group(MemoryStore(content), mode="w", zarr_format=3)
    group.attrs.update({"schema_version": SCHEMA_VERSION, **attributes})
    for name, array in arrays.items():
        if name in ("log_tmrca", "pairs", "mask"):
            chunks = (1, *array.shape[1:])  # one simulation
        else:
            chunks = (max(1, min(len(array), 65536)), *array.shape[1:])
        stored = group.create_array(
            name, shape=array.shape, dtype=array.dtype, chunks=chunks, compressors=[ZstdCodec(level=3)], fill_value=0
        )
        if array.size:
            stored[:] = array
    atomic_write(path, _build_zip({key: buffer.to_bytes() for key, buffer in content.items()}))


def _build_zip(content: dict[str, bytes]) -> bytes:
    """Build a zip archive whose bytes depend on *content* only: sorted, uncompressed, dated 1980."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression=zipfile.ZIP_STORED) as archive:
        for key in sorted(content):
            info = zipfile.ZipInfo(key, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content[key])
    return out.getvalue()


@contextlib.contextmanager
def open_shard(path, *, sha256: str | None = None) -> Iterator[tuple[zarr.Group, bytes]]:
    """Open a shard for a `with` block: its Zarr group, whose arrays are decompressed when they are read, and the file's bytes.

    Raises
    ------
    BadRequest
        If the file is missing, damaged, of another schema version, or its *sha256* differs.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRequest(f"shard {path} cannot be read: {error.strerror}; {how_to_rebuild(path)}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise BadRequest(
            f"shard {path} is not the one that {MANIFEST} lists (its checksum differs): it is damaged or was replaced; "
            f"{how_to_rebuild(path)}"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # verifies a checksum of each entry
            check_zip_entries(archive, len(data))
            content = {name: Buffer.from_bytes(archive.read(name)) for name in archive.namelist()}
        group = zarr.open_group(MemoryStore(content), mode="r")
        version = group.attrs["schema_version"]
        if type(version) is not int:
            raise ShardError(f"its schema version is {version!r}")
        if version == SCHEMA_VERSION:
            check_layout(group, content, memory=free_memory())
    except UNREADABLE as error:
        raise _damaged_error(path, error) from None
    check_schema_version(f"shard {path}", version, remedy=how_to_rebuild(path))
    try:
        yield group, data
    finally:
        content.clear()  # zarr's cyclic references would otherwise keep it until a later garbage collection


def _damaged_error(path, error: Exception) -> BadRequest:
    return BadRequest(f"shard {path} is damaged or truncated: {first_line(error)}; {how_to_rebuild(path)}")


def check_shape(path, attributes: dict, shape: dict) -> None:
    """BadRequest if the attributes of a shard differ from those of its dataset."""
    actual = {key: attributes.get(key) for key in SHAPE_KEYS}
    expected = {key: shape[key] for key in SHAPE_KEYS}
    if actual != expected:
        differences = [f"{key} {actual[key]} instead of {expected[key]}" for key in SHAPE_KEYS if actual[key] != expected[key]]
        raise BadRequest(f"shard {path} belongs to another dataset: {', '.join(differences)}")


def check_content(path, arrays: dict, attributes: dict, *, row: dict, shape: dict) -> None:
    """BadRequest if a shard belongs to another dataset, or does not match its *row* of the manifest."""
    check_shape(path, attributes, shape)
    actual = {
        "items": len(arrays["index"]) * attributes["pairs"],
        "sites": len(arrays["positions"]),
        "simulations": len(np.unique(arrays["index"])),
        "scenario": attributes["scenario"],
        "split": attributes["split"],
    }
    expected = {key: row[key] for key in actual if key in row} | {"split": Path(row["path"]).parts[0]}
    if differences := [f"{key} {actual[key]} instead of {expected[key]}" for key in actual if actual[key] != expected[key]]:
        raise BadRequest(f"shard {path} does not match {MANIFEST}: {', '.join(differences)}; {how_to_rebuild(path)}")


def read_shard(path, *, sha256: str | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Read and check the arrays and attributes of a shard; errors as in `open_shard`."""
    with open_shard(path, sha256=sha256) as (group, _):
        return read_arrays(path, group), dict(group.attrs)


def read_arrays(path, group: zarr.Group) -> dict[str, np.ndarray]:
    """Read and check the arrays of an open shard; BadRequest if it is damaged."""
    try:
        arrays = {name: array[:] for name, array in group.arrays()}
        check_arrays(arrays, group.attrs)
    except UNREADABLE as error:
        raise _damaged_error(path, error) from None
    return arrays


SCHEMA_VERSION = 4
"""Version of the format; readers accept no other."""


MANIFEST = "dataset.json"
"""File name of the manifest."""


def check_schema_version(what: str, version: int, *, remedy: str) -> None:
    """BadRequest unless *version* is `SCHEMA_VERSION`; the advice is *remedy*, or to update cxt if the version is newer."""
    if version != SCHEMA_VERSION:
        remedy = "update cxt" if version > SCHEMA_VERSION else f"an older cxt wrote it: {remedy}"
        raise BadRequest(f"{what} has schema version {version}, but this cxt reads version {SCHEMA_VERSION}; {remedy}")
