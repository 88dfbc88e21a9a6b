"""The manifest of a dataset, `dataset.json`: its shape, its shards with their checksums, and the ranges of its data."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cxt.data.shard_checks import MAX_SHARD_BASES
from cxt.data.shards import (
    LARGEST_COUNT,
    MANIFEST,
    SCHEMA_VERSION,
    SHAPE_KEYS,
    check_schema_version,
    check_shape,
    open_shard,
    read_arrays,
)
from cxt.errors import BadRequest
from cxt.io import atomic_write, json_text
from cxt.lineage import check_lineage, check_planned, combine_shard_lineages, how_to_remake
from cxt.scenarios.indices import SPLITS, count_in_split, simulation_batches


def write_manifest(
    directory, shards: dict[str, list[str]], *, lineages: dict[str, str] | None = None, lineage: str | None = None
) -> dict:
    """Check the shards of a dataset, and write its manifest `dataset.json`.

    Parameters
    ----------
    directory : path-like
        Directory of the dataset.
    shards : dict of str to list of str
        Paths of the shards of each split, relative to *directory*.
    lineages : dict of str to str, optional
        The planned lineage of each variant's shards, from `combine_shard_lineages`. The manifest's own lineage combines those
        of all shards; it has none if a shard has none.
    lineage : str, optional
        The planned lineage of the dataset.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    BadRequest
        If a shard is damaged or of another lineage, shards disagree in shape, or there is no training simulation.
    """
    directory = Path(directory)
    shape: dict | None = None
    splits = {}
    shard_lineages: dict[str, list[str | None]] = {}
    ranges: list[dict[str, list[float] | None]] = []
    for split in SPLITS:
        rows = []
        for name in shards[split]:
            with open_shard(directory / name) as (group, data):
                attributes = dict(group.attrs)
                shape = shape or {key: attributes[key] for key in SHAPE_KEYS}
                check_shape(directory / name, attributes, shape)
                if attributes["split"] != split:
                    raise BadRequest(f"shard {directory / name} belongs to {attributes['split']}, not to {split}")
                arrays = read_arrays(directory / name, group)
                index, sites = arrays["index"], len(arrays["positions"])
                if split == "train":
                    ranges.append(compute_ranges(arrays, attributes))
                shard_lineages.setdefault(attributes["scenario"], []).append(attributes.get("lineage"))
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
    for variant, planned in (lineages or {}).items():
        actual_lineage = combine_shard_lineages(shard_lineages.get(variant, []))
        check_lineage(
            f"{directory}: a shard of '{variant}'", actual=actual_lineage, planned=planned, target=directory / MANIFEST
        )
    if not splits["train"]["simulations"]:
        raise BadRequest(f"{directory} has no training simulation: every index is a multiple of 10; raise `simulations`")
    combined = combine_shard_lineages([one for variant_lineages in shard_lineages.values() for one in variant_lineages])
    check_planned(combined, lineage, target=directory / MANIFEST)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        **({} if combined is None else {"lineage": combined}),
        **shape,
        "windows": shape["sequence_length"] // shape["window_size"],
        "ranges": merge_ranges(ranges),
        "splits": splits,
    }
    atomic_write(directory / MANIFEST, json_text(manifest).encode())
    return manifest


def read_manifest(directory) -> dict:
    """Read dataset.json of the dataset at *directory*.

    Raises
    ------
    BadRequest
        If the directory, train/, test/ or the manifest is missing, or the manifest is newer than this package.
    """
    directory = Path(directory)
    file = directory / MANIFEST
    if not directory.is_dir():
        raise BadRequest(f"there is no dataset directory {directory}; {how_to_remake(file)}")
    missing = [split for split in SPLITS if not (directory / split).is_dir()]
    if missing:
        if directory.name in SPLITS and (directory.parent / MANIFEST).is_file():
            raise BadRequest(f"{directory} is one of the two splits of a dataset; give the dataset, {directory.parent}")
        content = ", ".join(sorted(p.name for p in directory.iterdir())[:10]) or "nothing"
        raise BadRequest(
            f"{directory} has no {' and no '.join(m + '/' for m in missing)} (found: {content}); {how_to_remake(file)}"
        )
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise BadRequest(
            f"{directory} has no {MANIFEST}; {how_to_remake(file)}, or create it from the existing shards with "
            f"`python -m cxt.preprocess manifest --dataset {directory}`"
        ) from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise BadRequest(f"{directory / MANIFEST} is damaged: {error}; {how_to_remake(file, delete='it')}") from None
    if isinstance(manifest, dict) and isinstance(manifest.get("schema_version"), int):
        check_schema_version(str(file), manifest["schema_version"], remedy=how_to_remake(file, delete="it"))
    fault = _find_fault(manifest)
    if fault is not None:
        raise BadRequest(f"{directory / MANIFEST} is damaged: {fault}; {how_to_remake(file, delete='it')}")
    return manifest


def _find_fault(manifest) -> str | None:
    """Describe what is wrong with the content of a manifest, or return None; readers of shards compare these with it."""
    try:
        numbers = [manifest[key] for key in ("window_size", "sequence_length", "samples", "pairs", "regions_per_simulation")]
        if (
            not all(type(n) is int and 0 < n <= MAX_SHARD_BASES for n in [*numbers, *manifest["scales"]])
            or not manifest["scales"]
        ):
            return f"a size is not a whole number from 1 to {MAX_SHARD_BASES}"
        if not 2 <= manifest["samples"] <= 65_535 or manifest["pairs"] > math.comb(manifest["samples"], 2):
            return f"{manifest['pairs']} pairs cannot be taken from {manifest['samples']} samples"
        if not _are_ranges(manifest["ranges"]):
            return "its ranges are not pairs of numbers"
        if manifest["windows"] != manifest["sequence_length"] // manifest["window_size"]:
            return f"windows {manifest['windows']} is not sequence_length / window_size"
        if not isinstance(manifest.get("lineage"), str | None):
            return "its lineage is not text"
        if not isinstance(manifest["missing"], bool) or not isinstance(manifest["schema_version"], int):
            return "`missing` or `schema_version` is of the wrong type"
        for split in SPLITS:
            part = manifest["splits"][split]
            rows = part["shards"]
            for key in ("simulations", "items", "sites", "bytes"):
                counts = [row[key] for row in rows]
                if not all(type(n) is int and 0 <= n <= LARGEST_COUNT for n in counts) or part[key] != sum(counts):
                    return f"the {key} of {split} are not the sum over its shards"
            names = [row["path"] for row in rows]
            if len(set(names)) < len(names):
                return f"a shard of {split} is listed twice"
            for row in rows:
                if row["items"] % (manifest["pairs"] * manifest["regions_per_simulation"]):
                    return f"{row['items']} examples of {row['path']} are not {manifest['pairs']} pairs per region"
                if Path(row["path"]).parts[0] != split or ".." in Path(row["path"]).parts:
                    return f"{row['path']} is not a shard of {split}"
                if (
                    not isinstance(row["scenario"], str)
                    or not isinstance(row["sha256"], str)
                    or "/" in row["scenario"]
                    or row["scenario"] in ("", ".", "..")
                ):
                    return f"the entry of {row['path']} is not valid"
        if not manifest["splits"]["train"]["simulations"]:
            return "it has no training simulation"
    except KeyError as error:
        return f"it has no {error}"
    except (TypeError, IndexError, ZeroDivisionError, AttributeError):
        return "a value is of the wrong type"
    return None


def _are_ranges(ranges) -> bool:
    """Whether *ranges* are valid: for each name the smallest and largest value, two finite numbers, or None."""

    def is_range(pair) -> bool:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(n) in (int, float) and math.isfinite(n) for n in pair)
        return pair is None or (is_pair and 0 <= pair[0] <= pair[1])

    return isinstance(ranges, dict) and ranges.keys() == set(RANGES) and all(map(is_range, ranges.values()))


def plan_shards(variants: dict[str, tuple]) -> dict[str, list[str]]:
    """{split: shard names} of a dataset of *variants* {name: (simulations, batch, …)}; empty splits have no shard."""
    return {
        split: [
            f"{split}/{variant}-{start}.zarr.zip"
            for variant, (simulations, batch, *_) in variants.items()
            for start, count in simulation_batches(simulations=simulations, batch=batch)
            if count_in_split(start, count, split)
        ]
        for split in SPLITS
    }


RANGES = ("diversity", "mutation_rate", "recombination_rate", "missingness")


def compute_ranges(arrays: Mapping[str, np.ndarray], attributes: Mapping) -> dict[str, list[float] | None]:
    """Smallest and largest value over the simulations, or regions, of a shard; None if no value is known.

    *diversity* is the mean number of differences between two haplotypes per accessible base pair (Nei & Li 1979), at usable
    sites; *missingness* is the fraction of inaccessible bases.
    """
    samples, length = attributes["samples"], attributes["sequence_length"]
    rows = len(arrays["index"])
    missing = np.zeros(rows)
    if attributes["missing"]:
        missing = np.bitwise_count(arrays["mask"]).sum(axis=1, dtype=np.int64) / length
    derived = np.bitwise_count(arrays["genotypes"]).sum(axis=1, dtype=np.float64)
    differing = derived * (samples - derived) / (samples * (samples - 1) / 2)  # fraction of pairs that differ
    site_rows = np.repeat(np.arange(rows), np.diff(arrays["site_offsets"]))
    accessible = length * (1 - missing)
    with np.errstate(invalid="ignore", divide="ignore"):
        diversity = np.bincount(site_rows, weights=differing, minlength=rows) / accessible
    values = {
        "diversity": diversity[accessible > 0],
        "mutation_rate": arrays["mutation_rate"],
        "recombination_rate": arrays["recombination_rate"][~np.isnan(arrays["recombination_rate"])],  # NaN: unknown
        "missingness": missing,
    }
    return {
        name: [float(known_values.min()), float(known_values.max())] if len(known_values) else None
        for name, known_values in values.items()
    }


def merge_ranges(ranges: list[dict[str, list[float] | None]]) -> dict[str, list[float] | None]:
    """Combine the ranges of several shards."""
    result: dict[str, list[float] | None] = {}
    for name in RANGES:
        known_ranges = [shard_ranges[name] for shard_ranges in ranges if shard_ranges[name] is not None]
        result[name] = [min(low for low, _ in known_ranges), max(high for _, high in known_ranges)] if known_ranges else None
    return result
