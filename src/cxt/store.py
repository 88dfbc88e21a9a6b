"""The on-disk format of a dataset: shards of many simulations, and the manifest that lists them.

A shard is one Zarr v3 group in one zip file, one array per field:

    genotypes     (sites, ceil(samples / 8)) uint8   haplotype h of a site is bit h % 8 of byte h // 8
    positions     (sites,) float64                   base pairs, ascending within a simulation
    site_offsets  (simulations + 1,) int64           sites of simulation i are [site_offsets[i], site_offsets[i + 1])
    pairs         (simulations, pairs, 2) uint16     haplotypes
    log_tmrca     (simulations, pairs, windows) float32
    index         (simulations,) int64               index of the simulation in its leaf scenario
    start         (simulations,) int64               where in it the stretch that is used begins, in base pairs
    mutation_rate (simulations,) float64
    mask          (simulations, ceil(length / 8)) uint8, only with missingness: bit 1 = inaccessible
    mask_offset   (simulations,) int64, only with missingness: where in the accessibility mask it was cut

With several regions per simulation, each is a row of its own, as a simulation is above, and `index` repeats.
Only usable sites are kept (see `cxt.features.usable_sites`). Bytes are a function of the content and the package versions.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from cxt.errors import BadRequest
from cxt.files import atomic_write
from cxt.jsontext import json_text

SCHEMA_VERSION = 3
SPLITS = ("train", "test")
MANIFEST = "dataset.json"
SHAPE_KEYS = ("window_size", "sequence_length", "samples", "pairs", "scales", "missing", "regions_per_simulation")
"""What all shards of a dataset agree on."""

REBUILD = f"delete it and the dataset's {MANIFEST}, and run the workflow again"
"""What to do about a bad shard; the manifest too, or Snakemake would find nothing to do."""


@dataclasses.dataclass
class Entry:
    """One preprocessed simulation, or one region of it; fields as in the module's table, for this simulation alone."""

    scenario: str
    index: int
    mutation_rate: float
    genotypes: np.ndarray  # (sites, bytes), packed
    positions: np.ndarray  # (sites,)
    pairs: np.ndarray  # (pairs, 2)
    log_tmrca: np.ndarray  # (pairs, windows)
    start: int = 0  # base pairs
    mask: np.ndarray | None = None  # (sequence_length,) bool, True = inaccessible
    mask_offset: int = 0


def write_shard(path, entries: list[Entry], attributes: dict) -> None:
    """Write simulations of one leaf scenario and split as a shard; *attributes* must hold SHAPE_KEYS."""
    chunks_of_all: dict[str, np.ndarray] = {
        "genotypes": np.concatenate([e.genotypes for e in entries]),
        "positions": np.concatenate([e.positions for e in entries]).astype(np.float64),
        "site_offsets": np.cumsum([0, *(len(e.positions) for e in entries)]).astype(np.int64),
        "pairs": np.stack([e.pairs for e in entries]).astype(np.uint16),
        "log_tmrca": np.stack([e.log_tmrca for e in entries]).astype(np.float32),
        "index": np.array([e.index for e in entries], dtype=np.int64),
        "start": np.array([e.start for e in entries], dtype=np.int64),
        "mutation_rate": np.array([e.mutation_rate for e in entries], dtype=np.float64),
    }
    if attributes["missing"]:
        chunks_of_all["mask"] = np.stack([np.packbits(e.mask, bitorder="little") for e in entries])
        chunks_of_all["mask_offset"] = np.array([e.mask_offset for e in entries], dtype=np.int64)
    content: dict[str, Buffer] = {}
    group = zarr.open_group(MemoryStore(content), mode="w", zarr_format=3)
    group.attrs.update({"schema_version": SCHEMA_VERSION, **attributes})
    for name, array in chunks_of_all.items():
        if name in ("log_tmrca", "pairs", "mask"):
            chunks = (1, *array.shape[1:])  # one simulation
        else:
            chunks = (max(1, min(len(array), 65536)), *array.shape[1:])
        stored = group.create_array(
            name, shape=array.shape, dtype=array.dtype, chunks=chunks, compressors=[ZstdCodec(level=3)], fill_value=0
        )
        if array.size:
            stored[:] = array
    atomic_write(path, _zip({key: buffer.to_bytes() for key, buffer in content.items()}))


def _zip(content: dict[str, bytes]) -> bytes:
    """A zip archive whose bytes depend on *content* alone: sorted, stored, dated 1980."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression=zipfile.ZIP_STORED) as archive:
        for key in sorted(content):
            info = zipfile.ZipInfo(key, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content[key])
    return out.getvalue()


def _check_version(what: str, version: int) -> None:
    if version != SCHEMA_VERSION:
        remedy = "update cxt" if version > SCHEMA_VERSION else "it is of an older cxt: run the workflow again to rebuild it"
        raise BadRequest(f"{what} has schema version {version}, this cxt reads {SCHEMA_VERSION}; {remedy}")


@contextlib.contextmanager
def open_shard(path, *, sha256: str | None = None) -> Iterator[tuple[zarr.Group, bytes]]:
    """The Zarr group of a shard, for a `with` block, and the file's bytes; arrays are decompressed when they are read.

    Raises
    ------
    BadRequest
        If the file is missing, damaged, of another schema version, or its bytes have another *sha256*.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRequest(f"shard {path} cannot be read: {error.strerror}; {REBUILD}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise BadRequest(
            f"shard {path} is not the one that {MANIFEST} lists (its checksum differs): damaged, or another's; {REBUILD}"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # which checks a checksum of each entry
            content = {name: Buffer.from_bytes(archive.read(name)) for name in archive.namelist()}
        group = zarr.open_group(MemoryStore(content), mode="r")
        version = group.attrs["schema_version"]
    except (zipfile.BadZipFile, zlib.error, OSError, KeyError, ValueError, EOFError, RuntimeError) as error:
        raise BadRequest(f"shard {path} is damaged or truncated: {error}; {REBUILD}") from None
    _check_version(f"shard {path}", version)
    try:
        yield group, data
    finally:
        content.clear()  # zarr's objects refer to each other, and would keep it until some later collection


def check_shape(path, attributes: dict, shape: dict) -> None:
    """BadRequest if a shard's attributes are not those of its dataset."""
    found = {key: attributes.get(key) for key in SHAPE_KEYS}
    expected = {key: shape[key] for key in SHAPE_KEYS}
    if found != expected:
        words = [f"{key} {found[key]} instead of {expected[key]}" for key in SHAPE_KEYS if found[key] != expected[key]]
        raise BadRequest(f"shard {path} belongs to another dataset: {', '.join(words)}")


def check_content(path, arrays: dict, attributes: dict, *, row: dict, shape: dict) -> None:
    """BadRequest if a shard is of another dataset, is not what its *row* of the manifest says, or holds targets like NaN."""
    check_shape(path, attributes, shape)
    found = {
        "items": len(arrays["index"]) * attributes["pairs"],
        "sites": len(arrays["positions"]),
        "simulations": len(np.unique(arrays["index"])),
        "scenario": attributes["scenario"],
        "split": attributes["split"],
    }
    expected = {key: row[key] for key in found if key in row} | {"split": Path(row["path"]).parts[0]}
    if wrong := [f"{key} {found[key]} instead of {expected[key]}" for key in found if found[key] != expected[key]]:
        raise BadRequest(f"shard {path} is not what {MANIFEST} says: {', '.join(wrong)}; {REBUILD}")
    if not np.isfinite(arrays["log_tmrca"]).all():
        raise BadRequest(f"shard {path} holds targets that are not finite; {REBUILD}")


def read_shard(path, *, sha256: str | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and attributes of a shard, decompressed into memory; errors as in `open_shard`."""
    with open_shard(path, sha256=sha256) as (group, _):
        return {name: array[:] for name, array in group.arrays()}, dict(group.attrs)


def write_manifest(directory, shards: dict[str, list[str]]) -> dict:
    """Read the *shards* ({split: paths relative to *directory*}), write dataset.json, and return it.

    Raises
    ------
    BadRequest
        If a shard is damaged, shards disagree in shape, or no simulation is in `train`.
    """
    directory = Path(directory)
    shape: dict | None = None
    splits = {}
    for split in SPLITS:
        rows = []
        for name in shards[split]:
            with open_shard(directory / name) as (group, data):
                attributes = dict(group.attrs)
                shape = shape or {key: attributes[key] for key in SHAPE_KEYS}
                check_shape(directory / name, attributes, shape)
                if attributes["split"] != split:
                    raise BadRequest(f"shard {directory / name} is of {attributes['split']}, not of {split}")
                index, sites = group["index"][:], group["positions"].shape[0]
            rows.append(
                {
                    "path": name,
                    "scenario": attributes["scenario"],
                    "simulations": len(np.unique(index)),
                    "items": len(index) * attributes["pairs"],
                    "sites": sites,
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            )
        splits[split] = {
            "simulations": sum(row["simulations"] for row in rows),
            "items": sum(row["items"] for row in rows),
            "sites": sum(row["sites"] for row in rows),
            "bytes": sum(row["bytes"] for row in rows),
            "shards": rows,
        }
    if not splits["train"]["simulations"]:
        raise BadRequest(f"{directory} has no training simulation: every index is a multiple of 10; raise `simulations`")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        **shape,
        "windows": shape["sequence_length"] // shape["window_size"],
        "splits": splits,
    }
    atomic_write(directory / MANIFEST, json_text(manifest).encode())
    return manifest


def read_manifest(directory) -> dict:
    """dataset.json of the dataset at *directory*.

    Raises
    ------
    BadRequest
        If the directory, train/, test/ or the manifest is missing, or the manifest is newer than this package.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadRequest(f"there is no dataset directory {directory}; build it with `snakemake {directory / MANIFEST}`")
    missing = [split for split in SPLITS if not (directory / split).is_dir()]
    if missing:
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:10]) or "nothing"
        raise BadRequest(
            f"{directory} has no {' and no '.join(m + '/' for m in missing)} (found: {found}); "
            f"build it with `snakemake {directory / MANIFEST}`"
        )
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise BadRequest(
            f"{directory} has no {MANIFEST}; build it with `snakemake {directory / MANIFEST}` or "
            "`python -m cxt.preprocess manifest`"
        ) from None
    except ValueError as error:  # no JSON, no UTF-8
        raise BadRequest(f"{directory / MANIFEST} is damaged: {error}; delete it and run the workflow again") from None
    if isinstance(manifest, dict) and isinstance(manifest.get("schema_version"), int):
        _check_version(str(directory / MANIFEST), manifest["schema_version"])
    fault = _fault(manifest)
    if fault is not None:
        raise BadRequest(f"{directory / MANIFEST} is damaged: {fault}; delete it and run the workflow again")
    return manifest


def _fault(manifest) -> str | None:
    """What is wrong with the content of a manifest, or None; whether its shards are what it says is for their readers."""
    try:
        numbers = [manifest[key] for key in ("window_size", "sequence_length", "samples", "pairs", "regions_per_simulation")]
        if not all(isinstance(n, int) and n > 0 for n in [*numbers, *manifest["scales"]]):
            return "a size is not a positive whole number"
        if manifest["windows"] != manifest["sequence_length"] // manifest["window_size"]:
            return f"windows is {manifest['windows']}, which sequence_length and window_size do not make"
        if not isinstance(manifest["missing"], bool) or not isinstance(manifest["schema_version"], int):
            return "`missing` or `schema_version` is of another type"
        for split in SPLITS:
            part = manifest["splits"][split]
            rows = part["shards"]
            for key in ("simulations", "items", "sites", "bytes"):
                if part[key] != sum(row[key] for row in rows) or min([0, *(row[key] for row in rows)]) < 0:
                    return f"the {key} of {split} are not those of its shards"
            names = [row["path"] for row in rows]
            if len(set(names)) < len(names):
                return f"a shard of {split} is listed twice"
            for row in rows:
                if Path(row["path"]).parts[0] != split or ".." in Path(row["path"]).parts:
                    return f"{row['path']} is no shard of {split}"
                if not isinstance(row["sha256"], str) or "/" in row["scenario"] or row["scenario"] in ("", ".", ".."):
                    return f"the entry of {row['path']}"
    except KeyError as error:
        return f"it has no {error}"
    except (TypeError, IndexError, ZeroDivisionError):
        return "a value is of another type"
    return None
