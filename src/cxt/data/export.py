"""Describing, verifying and exporting a dataset on disk."""

import collections
import shutil
import tempfile
from pathlib import Path

import numpy as np

from cxt.console import ON_STDERR, counted, get_logger
from cxt.data.features import compute_missing_fraction, compute_pair_counts, write_missingness
from cxt.data.manifest import read_manifest
from cxt.data.shards import check_content, read_shard
from cxt.errors import BadRequest
from cxt.io import check_writable, format_columns, json_text
from cxt.scenarios.indices import SPLITS

logger = get_logger(__name__)


def describe_dataset(path) -> str:
    """Describe a dataset as text: its shape, its ranges, and a table of its variants."""
    manifest = read_manifest(path)
    shape = {
        key: manifest[key]
        for key in (
            "windows",
            "window_size",
            "sequence_length",
            "samples",
            "pairs",
            "scales",
            "regions_per_simulation",
            "missing",
        )
    }
    ranges = [
        f"{name.replace('_', ' ')} {pair[0]:.3g} to {pair[1]:.3g}"
        for name, pair in manifest["ranges"].items()
        if pair is not None
    ]
    lines = [
        f"{path}, schema version {manifest['schema_version']}",
        ", ".join(f"{k} {v}" for k, v in shape.items()),
        f"training simulations: {', '.join(ranges)}",
        "",
    ]
    table = [("scenario", "split", "simulations", "examples", "sites/simulation", "kB/simulation", "shards")]
    for split in SPLITS:
        rows: dict[str, list[dict]] = collections.defaultdict(list)
        for row in manifest["splits"][split]["shards"]:
            rows[row["scenario"]].append(row)
        for scenario, shards in [*rows.items(), ("all", manifest["splits"][split]["shards"])]:
            simulations, examples, sites, size = (
                sum(row[key] for row in shards) for key in ("simulations", "items", "sites", "bytes")
            )
            mean_sites, mean_size = (f"{total / simulations:,.0f}" if simulations else "" for total in (sites, size / 1000))
            table.append((scenario, split, f"{simulations:,}", f"{examples:,}", mean_sites, mean_size, f"{len(shards):,}"))
    lines += [line.rstrip() for line in format_columns(table, left=2)]
    total = sum(manifest["splits"][split]["bytes"] for split in SPLITS)
    return "\n".join([*lines, "", f"{total / 1e6:,.1f} MB in total"])


def verify_dataset(path, *, progress=None) -> None:
    """Read every shard of a dataset and check it against the manifest; *progress* is called with a line for each split.

    Raises
    ------
    BadRequest
        Naming every shard that is missing, damaged, from another dataset, or has other counts than in the manifest.
    """
    manifest = read_manifest(path)
    wrong = []
    for split in SPLITS:
        for row in manifest["splits"][split]["shards"]:
            shard = Path(path) / row["path"]
            try:
                arrays, attributes = read_shard(shard, sha256=row["sha256"])
                check_content(shard, arrays, attributes, row=row, shape=manifest)
            except BadRequest as error:
                wrong.append(str(error))
        if progress is not None:
            part = manifest["splits"][split]
            progress(f"{path} {split}: {counted(len(part['shards']), 'shard')}, {part['bytes'] / 1e6:,.1f} MB read")
    if wrong:
        raise BadRequest("\n".join(wrong))
    if progress is not None:
        progress(f"{path}: every shard matches the manifest")


def _compute_dense_counts(arrays: dict, row: int, attributes: dict) -> np.ndarray:
    """Raw counts of one row of a shard: (pairs, 2, scales, windows, samples) float32, with missingness in bin 0."""
    sites = slice(arrays["site_offsets"][row], arrays["site_offsets"][row + 1])
    window_size, length = attributes["window_size"], attributes["sequence_length"]
    counts = compute_pair_counts(
        arrays["genotypes"][sites], arrays["positions"][sites], arrays["pairs"][row], window_size=window_size,
        windows=length // window_size, samples=attributes["samples"], scales=attributes["scales"], dtype=np.float32,
    )  # fmt: skip
    if attributes["missing"]:
        mask = np.unpackbits(arrays["mask"][row], count=length, bitorder="little")
        write_missingness(
            counts, compute_missing_fraction(mask, window_size=window_size, sequence_length=length, scales=attributes["scales"])
        )
    return counts


def export_dataset(path, out, *, splits=SPLITS, limit: int | None = None, dtype: str = "float16") -> int:
    """Write X.npy, y.npy, pairs.npy and meta.json of each simulation below *out*, and return the number of simulations.

    Files are in `<out>/<split>/<variant>/<simulation>/`, in the layout of the published code: X (pairs, 2, scales, windows,
    samples) raw counts, y (pairs, windows) ln TMRCA, both of *dtype*, pairs (pairs, 2) int32. Bin 0 of X is 0, or exp(f)
    and exp(1 - f) with missingness. Directories of regions after the first end in `_r1`, `_r2`, ….

    Raises
    ------
    BadRequest
        If *out* exists or cannot be written, there is nothing to export or too little disk space, a shard is damaged, or a
        count is too large for *dtype*.
    """
    manifest, out = read_manifest(path), Path(out)
    if out.exists():
        raise BadRequest(f"{out} already exists; choose a new directory")
    if limit is not None and limit < 1:
        raise BadRequest(f"--limit must be positive, got {limit}")
    taken = collections.Counter()
    selected = []
    for split in dict.fromkeys(splits):
        for row in manifest["splits"][split]["shards"]:
            key = split, row["scenario"]
            take = row["simulations"] if limit is None else min(row["simulations"], limit - taken[key])
            taken[key] += take
            if take:
                selected.append((split, row, take))
    simulations = sum(take for _, _, take in selected)
    if not simulations:
        raise BadRequest(f"{path} has no simulation in {' or '.join(splits)}; there is nothing to export")
    shape = (manifest["pairs"], 2, len(manifest["scales"]), manifest["windows"], manifest["samples"])
    size = simulations * manifest["regions_per_simulation"] * int(np.prod(shape)) * np.dtype(dtype).itemsize
    check_writable(out)
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    if size > free:
        raise BadRequest(
            f"{simulations} simulations take {size / 1e9:.1f} GB as dense arrays, but {parent} has only {free / 1e9:.1f} GB "
            "left; export fewer with --split or --limit"
        )
    logger.info(f"{counted(simulations, 'simulation')}, {size / 1e6:,.1f} MB, to {out}", extra=ON_STDERR)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
    rounded = 0
    try:
        for split, row, take in selected:
            rounded += _export_shard(Path(path) / row["path"], row, manifest, temporary / split, take=take, dtype=dtype)
            logger.info(f"{row['path']}: {counted(take, 'simulation')}", extra=ON_STDERR)
        temporary.chmod(0o755)
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if rounded:
        logger.warning(f"note: {rounded} counts above 2048 were rounded to {dtype}; --dtype float32 keeps them")
    return simulations


def _export_shard(shard: Path, row: dict, manifest: dict, directory: Path, *, take: int, dtype: str) -> int:
    """Export the first *take* simulations of a shard; return the number of counts that were rounded."""
    arrays, attributes = read_shard(shard, sha256=row["sha256"])
    check_content(shard, arrays, attributes, row=row, shape=manifest)
    rounded = 0
    for i in range(take * manifest["regions_per_simulation"]):
        index, region = int(arrays["index"][i]), i % manifest["regions_per_simulation"]
        target = directory / row["scenario"] / (f"ts_{index:08d}_i{index}" + (f"_r{region}" if region else ""))
        target.mkdir(parents=True)
        counts = _compute_dense_counts(arrays, i, attributes)
        if counts.max() > np.finfo(dtype).max:
            raise BadRequest(
                f"{shard}, simulation {index}: a count of {counts.max():.0f} is too large for {dtype}; use float32"
            )
        dense = counts.astype(dtype)
        rounded += int((dense[..., 1:] != counts[..., 1:]).sum())
        np.save(target / "X.npy", dense)
        np.save(target / "y.npy", arrays["log_tmrca"][i].astype(dtype))
        np.save(target / "pairs.npy", arrays["pairs"][i].astype(np.int32))
        meta = {
            "source_file": row["path"], "id": f"{row['scenario']}/{index}", "split": attributes["split"],
            "scenario": row["scenario"], "num_pairs": manifest["pairs"], "window_size": manifest["window_size"],
            "sequence_length": manifest["sequence_length"], "num_samples": manifest["samples"], "dtype": dtype,
            "y_transform": "log", "global_seed": attributes["seed"], "file_index": index,
            "start": int(arrays["start"][i]), "mutation_rate": float(arrays["mutation_rate"][i]),
        }  # fmt: skip
        (target / "meta.json").write_text(json_text(meta), encoding="utf-8")
    return rounded
