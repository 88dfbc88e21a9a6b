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
    recombination_rate (simulations,) float64        mean over the simulation; both per base pair and generation
    mask          (simulations, ceil(length / 8)) uint8, only with missingness: bit 1 = inaccessible
    mask_offset   (simulations,) int64, only with missingness: where in the accessibility mask it was cut

With several regions per simulation, each is a row of its own, as a simulation is above, and `index` repeats.
Only usable sites are kept (see `cxt.data.features.usable_sites`). Bytes are a function of the content and the package versions.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from cxt.data.ranges import RANGES, overall_ranges, ranges_of
from cxt.data.shard_checks import LONGEST, SPLITS, Fault, check_arrays, check_entries, check_layout
from cxt.data.shared_memory import free_memory
from cxt.errors import BadRequest, first_line
from cxt.io import atomic_write, json_text
from cxt.lineage import check_lineage, make_again, stage_lineage

SCHEMA_VERSION = 4
MANIFEST = "dataset.json"
LARGEST_COUNT = 2**48
"""Simulations, items, sites or bytes; more would not fit into any machine."""

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, OSError, LookupError, ValueError, TypeError, EOFError, RuntimeError, AttributeError,
    ArithmeticError, AssertionError, MemoryError,
)  # fmt: skip
"""What zipfile and zarr raise for files that are damaged or malformed."""

SHAPE_KEYS = ("window_size", "sequence_length", "samples", "pairs", "scales", "missing", "regions_per_simulation")
"""What all shards of a dataset agree on."""


def rebuild(shard) -> str:
    """What to do about a bad shard: the manifest goes, too, or Snakemake would find nothing to do."""
    manifest = Path(shard).parent.parent / MANIFEST
    return make_again(manifest, delete=f"it and the dataset's {MANIFEST}")


@dataclasses.dataclass
class Entry:
    """One preprocessed simulation, or one region of it; fields as in the module's table, for this simulation alone."""

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
        "recombination_rate": np.array([e.recombination_rate for e in entries], dtype=np.float64),
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


def _check_version(what: str, version: int, *, remedy: str) -> None:
    if version != SCHEMA_VERSION:
        remedy = "update cxt" if version > SCHEMA_VERSION else f"it is of an older cxt: {remedy}"
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
        raise BadRequest(f"shard {path} cannot be read: {error.strerror}; {rebuild(path)}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise BadRequest(
            f"shard {path} is not the one that {MANIFEST} lists (its checksum differs): damaged, or another's; {rebuild(path)}"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # which checks a checksum of each entry
            check_entries(archive, len(data))
            content = {name: Buffer.from_bytes(archive.read(name)) for name in archive.namelist()}
        group = zarr.open_group(MemoryStore(content), mode="r")
        version = group.attrs["schema_version"]
        if type(version) is not int:
            raise Fault(f"its schema version is {version!r}")
        if version == SCHEMA_VERSION:
            check_layout(group, content, memory=free_memory())
    except UNREADABLE as error:
        raise _damaged(path, error) from None
    _check_version(f"shard {path}", version, remedy=rebuild(path))
    try:
        yield group, data
    finally:
        content.clear()  # zarr's objects refer to each other, and would keep it until some later collection


def _damaged(path, error: Exception) -> BadRequest:
    return BadRequest(f"shard {path} is damaged or truncated: {first_line(error)}; {rebuild(path)}")


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
        raise BadRequest(f"shard {path} is not what {MANIFEST} says: {', '.join(wrong)}; {rebuild(path)}")


def read_shard(path, *, sha256: str | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and attributes of a shard, decompressed into memory, checked; errors as in `open_shard`."""
    with open_shard(path, sha256=sha256) as (group, _):
        return _arrays_of(path, group), dict(group.attrs)


def _arrays_of(path, group: zarr.Group) -> dict[str, np.ndarray]:
    try:
        arrays = {name: array[:] for name, array in group.arrays()}
        check_arrays(arrays, group.attrs)
    except UNREADABLE as error:
        raise _damaged(path, error) from None
    return arrays


def write_manifest(directory, shards: dict[str, list[str]], *, lineages: dict[str, str] | None = None) -> dict:
    """Read the *shards* ({split: paths relative to *directory*}), write dataset.json, and return it.

    *lineages*, if given, are {leaf scenario: `dataset_lineage_of` its shards} as planned. The manifest's own is that of all
    shards; it has none where one of them has none.

    Raises
    ------
    BadRequest
        If a shard is damaged or of another lineage, shards disagree in shape, or no simulation is in `train`.
    """
    directory = Path(directory)
    shape: dict | None = None
    splits = {}
    of_shards: dict[str, list[str | None]] = {}
    ranges: list[dict[str, list[float] | None]] = []
    for split in SPLITS:
        rows = []
        for name in shards[split]:
            with open_shard(directory / name) as (group, data):
                attributes = dict(group.attrs)
                shape = shape or {key: attributes[key] for key in SHAPE_KEYS}
                check_shape(directory / name, attributes, shape)
                if attributes["split"] != split:
                    raise BadRequest(f"shard {directory / name} is of {attributes['split']}, not of {split}")
                arrays = _arrays_of(directory / name, group)
                index, sites = arrays["index"], len(arrays["positions"])
                if split == "train":
                    ranges.append(ranges_of(arrays, attributes))
                of_shards.setdefault(attributes["scenario"], []).append(attributes.get("lineage"))
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
    for leaf, planned in (lineages or {}).items():
        check_lineage(
            f"{directory}: a shard of '{leaf}'", found=dataset_lineage_of(of_shards.get(leaf, [])), planned=planned,
            target=directory / MANIFEST,
        )  # fmt: skip
    if not splits["train"]["simulations"]:
        raise BadRequest(f"{directory} has no training simulation: every index is a multiple of 10; raise `simulations`")
    lineage = dataset_lineage_of([lineage for of_leaf in of_shards.values() for lineage in of_leaf])
    manifest = {
        "schema_version": SCHEMA_VERSION,
        **({} if lineage is None else {"lineage": lineage}),
        **shape,
        "windows": shape["sequence_length"] // shape["window_size"],
        "ranges": overall_ranges(ranges),
        "splits": splits,
    }
    atomic_write(directory / MANIFEST, json_text(manifest).encode())
    return manifest


def dataset_lineage_of(shards: list[str | None]) -> str | None:
    """The lineage of shards with the lineages *shards*, in no particular order; None if one of them has none."""
    return None if None in shards else stage_lineage("preprocess", sorted(shards))


def read_manifest(directory) -> dict:
    """dataset.json of the dataset at *directory*.

    Raises
    ------
    BadRequest
        If the directory, train/, test/ or the manifest is missing, or the manifest is newer than this package.
    """
    directory = Path(directory)
    file = directory / MANIFEST
    if not directory.is_dir():
        raise BadRequest(f"there is no dataset directory {directory}; {make_again(file)}")
    missing = [split for split in SPLITS if not (directory / split).is_dir()]
    if missing:
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:10]) or "nothing"
        raise BadRequest(f"{directory} has no {' and no '.join(m + '/' for m in missing)} (found: {found}); {make_again(file)}")
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise BadRequest(
            f"{directory} has no {MANIFEST}; {make_again(file)}, or list the shards that are there with "
            f"`python -m cxt.preprocess manifest --dataset {directory}`"
        ) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, brackets in brackets
        raise BadRequest(f"{directory / MANIFEST} is damaged: {error}; {make_again(file, delete='it')}") from None
    if isinstance(manifest, dict) and isinstance(manifest.get("schema_version"), int):
        _check_version(str(file), manifest["schema_version"], remedy=make_again(file, delete="it"))
    fault = _fault(manifest)
    if fault is not None:
        raise BadRequest(f"{directory / MANIFEST} is damaged: {fault}; {make_again(file, delete='it')}")
    return manifest


def _fault(manifest) -> str | None:
    """What is wrong with the content of a manifest, or None; whether its shards are what it says is for their readers."""
    try:
        numbers = [manifest[key] for key in ("window_size", "sequence_length", "samples", "pairs", "regions_per_simulation")]
        if not all(type(n) is int and 0 < n <= LONGEST for n in [*numbers, *manifest["scales"]]) or not manifest["scales"]:
            return f"a size is not a whole number of 1 to {LONGEST}"
        if not 2 <= manifest["samples"] <= 65_535 or manifest["pairs"] > math.comb(manifest["samples"], 2):
            return f"{manifest['pairs']} pairs cannot be taken from {manifest['samples']} samples"
        if not _are_ranges(manifest["ranges"]):
            return "its ranges are not pairs of numbers"
        if manifest["windows"] != manifest["sequence_length"] // manifest["window_size"]:
            return f"windows is {manifest['windows']}, which sequence_length and window_size do not make"
        if not isinstance(manifest.get("lineage"), str | None):
            return "its lineage is no text"
        if not isinstance(manifest["missing"], bool) or not isinstance(manifest["schema_version"], int):
            return "`missing` or `schema_version` is of another type"
        for split in SPLITS:
            part = manifest["splits"][split]
            rows = part["shards"]
            for key in ("simulations", "items", "sites", "bytes"):
                counts = [row[key] for row in rows]
                if not all(type(n) is int and 0 <= n <= LARGEST_COUNT for n in counts) or part[key] != sum(counts):
                    return f"the {key} of {split} are not those of its shards"
            names = [row["path"] for row in rows]
            if len(set(names)) < len(names):
                return f"a shard of {split} is listed twice"
            for row in rows:
                if row["items"] % (manifest["pairs"] * manifest["regions_per_simulation"]):
                    return f"{row['items']} items of {row['path']} are not {manifest['pairs']} pairs of each region"
                if Path(row["path"]).parts[0] != split or ".." in Path(row["path"]).parts:
                    return f"{row['path']} is no shard of {split}"
                if (
                    not isinstance(row["scenario"], str)
                    or not isinstance(row["sha256"], str)
                    or "/" in row["scenario"]
                    or row["scenario"] in ("", ".", "..")
                ):
                    return f"the entry of {row['path']}"
        if not manifest["splits"]["train"]["simulations"]:
            return "it has no training simulation"
    except KeyError as error:
        return f"it has no {error}"
    except (TypeError, IndexError, ZeroDivisionError, AttributeError):
        return "a value is of another type"
    return None


def _are_ranges(ranges) -> bool:
    """Whether *ranges* are those of a manifest: for each name two finite numbers, the least and the largest, or nothing."""

    def is_range(pair) -> bool:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(n) in (int, float) and math.isfinite(n) for n in pair)
        return pair is None or (is_pair and 0 <= pair[0] <= pair[1])

    return isinstance(ranges, dict) and ranges.keys() == set(RANGES) and all(map(is_range, ranges.values()))
