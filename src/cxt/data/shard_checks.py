"""Checks of a shard before compiled code indexes it: types, shapes, ranges and padding.

A shard may come from anyone. Compiled loops do not check bounds, and a few kilobytes may claim to unpack into gigabytes.
Therefore `check_zip_entries` and `check_layout` run before anything is unpacked, and `check_arrays` before any computation.
"""

import math
import zipfile
from collections.abc import Mapping

import numpy as np
import zarr
from zarr.codecs import BytesCodec, ZstdCodec

from cxt.scenarios.indices import SPLITS

MAX_SHARD_BASES = 2**40
"""Length in base pairs that no chromosome exceeds, and up to which sums of positions are exact."""

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class ShardError(ValueError):
    """A shard is not valid; the message says why."""


def check_zip_entries(archive: zipfile.ZipFile, size: int) -> None:
    """ShardError if reading the entries of a shard of *size* bytes could take more memory than that; nothing is read."""
    entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise ShardError("it has two entries with the same name")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ShardError(f"its entry {entry.filename[-100:]} is compressed, but only arrays may be; nothing was unpacked")
    if sum(entry.file_size for entry in entries) > size:
        raise ShardError("its entries claim to be larger than the file")


def check_attributes(attributes: Mapping) -> None:
    """ShardError unless the attributes of a shard have valid types and ranges."""
    for key, highest in (
        ("window_size", MAX_SHARD_BASES), ("sequence_length", MAX_SHARD_BASES), ("samples", 65_535), ("pairs", 2**32),
        ("regions_per_simulation", MAX_SHARD_BASES),
    ):  # fmt: skip
        value = attributes.get(key)
        if type(value) is not int or not 1 <= value <= highest:
            raise ShardError(f"its {key} must be a whole number from 1 to {highest}, got {value!r}")
    if attributes["samples"] < 2 or attributes["pairs"] > math.comb(attributes["samples"], 2):
        raise ShardError(f"{attributes['pairs']} pairs cannot be taken from {attributes['samples']} samples")
    if attributes["sequence_length"] % attributes["window_size"]:
        raise ShardError(f"its sequence_length {attributes['sequence_length']} is not a multiple of its window_size")
    scales = attributes.get("scales")
    if not isinstance(scales, list) or not scales or not all(type(s) is int and 1 <= s <= 2**31 for s in scales):
        raise ShardError(f"its scales must be a list of positive whole numbers, got {scales!r}")
    if type(attributes.get("missing")) is not bool:
        raise ShardError(f"its `missing` must be true or false, got {attributes.get('missing')!r}")
    if not isinstance(attributes.get("scenario"), str) or attributes.get("split") not in SPLITS:
        raise ShardError(f"it is of scenario {attributes.get('scenario')!r}, split {attributes.get('split')!r}")
    if type(attributes.get("seed")) is not int:
        raise ShardError(f"its seed must be a whole number, got {attributes.get('seed')!r}")
    if not isinstance(attributes.get("lineage"), str | None):
        raise ShardError("its lineage is not text")


def build_layout(attributes: Mapping, *, rows: int, sites: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """{array: (type, shape)} of a shard with *rows* simulations or regions, and *sites* sites in total."""
    windows = attributes["sequence_length"] // attributes["window_size"]
    layout = {
        "genotypes": (np.uint8, (sites, -(-attributes["samples"] // 8))),
        "positions": (np.float64, (sites,)),
        "site_offsets": (np.int64, (rows + 1,)),
        "pairs": (np.uint16, (rows, attributes["pairs"], 2)),
        "log_tmrca": (np.float32, (rows, attributes["pairs"], windows)),
        "index": (np.int64, (rows,)),
        "start": (np.int64, (rows,)),
        "mutation_rate": (np.float64, (rows,)),
        "recombination_rate": (np.float64, (rows,)),
    }
    if attributes["missing"]:
        layout["mask"] = (np.uint8, (rows, -(-attributes["sequence_length"] // 8)))
        layout["mask_offset"] = (np.int64, (rows,))
    return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in layout.items()}


def check_layout(group: zarr.Group, content: Mapping, *, memory: int) -> None:
    """ShardError unless a shard has the arrays of the format, and all of them fit into *memory* bytes.

    Unpacks nothing. *content* holds the entries of the archive, by name.
    """
    attributes = dict(group.attrs)
    check_attributes(attributes)
    arrays = dict(group.arrays())
    for name in ("log_tmrca", "positions"):
        if name not in arrays:
            raise ShardError(f"it has no array {name}")
        if not arrays[name].ndim:
            raise ShardError(f"its array {name} has no dimension")
    rows, sites = arrays["log_tmrca"].shape[0], arrays["positions"].shape[0]
    expected = build_layout(attributes, rows=rows, sites=sites)
    if differing := sorted(expected.keys() ^ arrays.keys()):
        raise ShardError(
            f"its arrays are {', '.join(sorted(arrays))}; {', '.join(differing)} should not be there, or is missing"
        )
    if not rows:
        raise ShardError("it holds no simulation")
    for name, (dtype, shape) in expected.items():
        if arrays[name].dtype != dtype or arrays[name].shape != shape:
            raise ShardError(f"its array {name} must be {dtype} {shape}, got {arrays[name].dtype} {arrays[name].shape}")
        if any(chunk > max(1, size) for chunk, size in zip(arrays[name].chunks, shape, strict=True)):
            raise ShardError(f"its array {name} has chunks of {arrays[name].chunks}, larger than itself")
        _check_codecs(name, arrays[name])
    needed = sum(math.prod(shape) * dtype.itemsize for dtype, shape in expected.values())
    if needed > memory:
        raise ShardError(f"it claims to unpack into {needed / 1e9:,.1f} GB, but only {memory / 1e9:,.1f} GB are free")
    _check_chunks(arrays, content, most=len(content) + -(-sites // 65536))
    for key, buffer in content.items():
        name, *rest = key.split("/")
        if name in expected and rest != ["zarr.json"]:
            chunk = math.prod(arrays[name].chunks) * expected[name][0].itemsize
            if (claimed := _zstd_size(buffer.to_bytes())) != chunk:
                raise ShardError(f"its entry {key} must unpack into {chunk} bytes, but claims {claimed}")


def _check_chunks(arrays: Mapping[str, zarr.Array], content: Mapping, *, most: int) -> None:
    """ShardError if an array has more than *most* chunks, or chunks of the targets are missing.

    Chunks of zeros need not be stored, but reading them takes time: a few bytes could cause days of work. Targets are never 0.
    """
    for name, array in sorted(arrays.items()):
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
        if chunks > most:
            raise ShardError(f"its array {name} must have at most {most} chunks, got {chunks}")
        stored = sum(key.startswith(f"{name}/c/") for key in content)
        if name == "log_tmrca" and stored < chunks:
            raise ShardError(f"{chunks - stored} of {chunks} chunks of its targets are missing")


def _check_codecs(name: str, array: zarr.Array) -> None:
    """ShardError unless chunks are single Zstandard frames, whose unpacked size is known in advance."""
    chain = [*array.filters, array.serializer, *array.compressors]
    if array.shards is not None or [type(codec) for codec in chain] != [BytesCodec, ZstdCodec]:
        raise ShardError(f"its array {name} is not stored as chunks of bytes, compressed once by zstd")


def _zstd_size(data: bytes) -> int:
    """The unpacked size that a Zstandard frame declares (RFC 8878, section 3.1.1.1); -1 if it declares none."""
    if data[:4] != ZSTD_MAGIC or len(data) < 5:
        raise ShardError("a chunk is not a zstd frame")
    flags = data[4]
    single = flags >> 5 & 1
    size = (1 if single else 0, 2, 4, 8)[flags >> 6]
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    if not size:
        return -1  # it could be of any size
    return int.from_bytes(data[at : at + size], "little") + (256 if size == 2 else 0)


def _first_index(wrong: np.ndarray) -> int:
    return int(np.flatnonzero(wrong)[0])


def check_arrays(arrays: Mapping[str, np.ndarray], attributes: Mapping) -> None:
    """ShardError unless the values of the arrays, whose types and shapes are already checked, are valid."""
    samples, length = attributes["samples"], attributes["sequence_length"]
    offsets, positions = arrays["site_offsets"], arrays["positions"]
    if offsets[0] != 0 or offsets[-1] != len(positions) or (np.diff(offsets) < 0).any():
        raise ShardError(f"its site_offsets do not rise from 0 to its {len(positions)} sites")
    if (wrong := ~((positions >= 0) & (positions < length))).any():
        raise ShardError(f"it has a site at {positions[_first_index(wrong)]}, outside its {length} bp")
    falls = np.diff(positions) < 0
    falls[offsets[(offsets > 0) & (offsets < len(positions))] - 1] = False  # from one simulation to the next
    if falls.any():
        raise ShardError(
            f"its positions do not rise: {positions[_first_index(falls)]:g} comes before {positions[_first_index(falls) + 1]:g}"
        )
    _check_genotypes(arrays["genotypes"], samples)
    pairs = arrays["pairs"]
    if (wrong := (pairs >= samples).any(axis=2) | (pairs[:, :, 0] == pairs[:, :, 1])).any():
        a, b = pairs[wrong][0]
        raise ShardError(f"its pairs must be two different haplotypes from 0 to {samples - 1}, got ({a}, {b})")
    if not np.isfinite(arrays["log_tmrca"]).all():
        raise ShardError("it holds targets that are not finite")
    for name in ("index", "start", "mask_offset"):
        if name in arrays and (wrong := (arrays[name] < 0) | (arrays[name] > MAX_SHARD_BASES)).any():
            raise ShardError(f"its {name} must be from 0 to {MAX_SHARD_BASES}, got {arrays[name][_first_index(wrong)]}")
    index = arrays["index"]
    if (wrong := (index % 10 == 0) != (attributes["split"] == "test")).any():
        raise ShardError(f"it holds simulation {index[_first_index(wrong)]}, which does not belong to {attributes['split']}")
    indices, regions = np.unique(index, return_counts=True)
    if (wrong := regions != attributes["regions_per_simulation"]).any():
        raise ShardError(f"it holds {regions[_first_index(wrong)]} regions of simulation {indices[_first_index(wrong)]}")
    for name in ("mutation_rate", "recombination_rate"):
        unknown = np.isnan(arrays[name]) if name == "recombination_rate" else False
        if not (unknown | (np.isfinite(arrays[name]) & (arrays[name] >= 0))).all():
            raise ShardError(f"its {name} has a value that is not a rate")
    if attributes["missing"] and length % 8 and (arrays["mask"][:, -1] >> length % 8).any():
        raise ShardError("its mask has bits beyond its end")


def _check_genotypes(genotypes: np.ndarray, samples: int) -> None:
    if samples % 8 and (genotypes[:, -1] >> samples % 8).any():
        raise ShardError(f"its genotypes have bits beyond the {samples} samples")
    derived = np.bitwise_count(genotypes).sum(axis=1, dtype=np.int32)
    if ((derived < 1) | (derived >= samples)).any():
        raise ShardError("it has sites at which the samples do not differ")
