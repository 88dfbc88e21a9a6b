"""How far diversity, rates and missingness of training data reach: what a checkpoint can be expected to be right about."""

from collections.abc import Mapping

import numpy as np

RANGES = ("diversity", "mutation_rate", "recombination_rate", "missingness")


def ranges_of(arrays: Mapping[str, np.ndarray], attributes: Mapping) -> dict[str, list[float] | None]:
    """Least and largest value over the simulations, or regions, of a shard; None where no value is known.

    *diversity* is the mean number of differences of two haplotypes per accessible base pair (Nei & Li 1979), at the usable
    sites; *missingness* is the share of inaccessible bases.
    """
    samples, length = attributes["samples"], attributes["sequence_length"]
    rows = len(arrays["index"])
    missing = np.zeros(rows)
    if attributes["missing"]:
        missing = np.bitwise_count(arrays["mask"]).sum(axis=1, dtype=np.int64) / length
    derived = np.bitwise_count(arrays["genotypes"]).sum(axis=1, dtype=np.float64)
    differing = derived * (samples - derived) / (samples * (samples - 1) / 2)  # share of pairs that differ
    row_of = np.repeat(np.arange(rows), np.diff(arrays["site_offsets"]))
    accessible = length * (1 - missing)
    with np.errstate(invalid="ignore", divide="ignore"):
        diversity = np.bincount(row_of, weights=differing, minlength=rows) / accessible
    values = {
        "diversity": diversity[accessible > 0],
        "mutation_rate": arrays["mutation_rate"],
        "recombination_rate": arrays["recombination_rate"],
        "missingness": missing,
    }
    return {name: [float(found.min()), float(found.max())] if len(found) else None for name, found in values.items()}


def overall_ranges(ranges: list[dict[str, list[float] | None]]) -> dict[str, list[float] | None]:
    """The ranges of several shards together."""
    result: dict[str, list[float] | None] = {}
    for name in RANGES:
        known = [found[name] for found in ranges if found[name] is not None]
        result[name] = [min(low for low, _ in known), max(high for _, high in known)] if known else None
    return result
