"""Putting the blocks of a contig together, by chunks of pairs and stretches of windows.

Memory grows with neither: the files of the blocks are read twice, once for sums over the contig, which the calibration needs,
and once to write the tracks.
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxt.errors import Failed
from cxt.translation.calibration import Diversity, compute_implied
from cxt.translation.estimates import COLUMNS
from cxt.translation.job import Unit, describe_kind
from cxt.translation.tracks import CHUNK_WINDOWS

MEAN, SD, LOG_MEAN, QUANTILES = 0, 1, 2, slice(3, len(COLUMNS))

WIDE = 5.0
"""Length in ln TMRCA of a 95% interval that is uninformative: in a population of constant size, without any data, it is
4.98."""


class UnitEstimates(NamedTuple):
    """What was written of a unit; arrays as in `cxt.translation.estimates.Estimates`."""

    values: np.ndarray
    differences: np.ndarray
    bases: np.ndarray
    warnings: list[str]
    bins: np.ndarray | None


class Sums(NamedTuple):
    """Sums over a contig of a chunk of pairs.

    diversity : differences of each pair, observed and implied
    missing : pairs times windows without an estimate
    wide : of those with one, how many have a 95% interval longer than `WIDE`
    mean_time, wide_time : sum over windows of the mean TMRCA in generations times the bases, and the part that wide ones have
    """

    diversity: Diversity
    missing: int
    wide: int
    mean_time: float
    wide_time: float


class Stretch(NamedTuple):
    """Estimates of a chunk of pairs in consecutive windows [windows.start, windows.stop) of those of a contig.

    values : float32 (pairs, windows, COLUMNS), NaN where there is no estimate
    bins : uint16 (pairs, replicates, windows) of the sampled sequences, or None
    """

    windows: slice
    values: np.ndarray
    bins: np.ndarray | None


def group_units(units: list[Unit]) -> dict[tuple[int, int], list[Unit]]:
    """{contig and first pair: units along the contig}."""
    groups: dict[tuple[int, int], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.plan.place, unit.from_pair), []).append(unit)
    return dict(sorted(groups.items()))


def load_unit(unit: Unit, *, work: Path) -> UnitEstimates:
    """Read the file of a unit; Failed if it is missing or damaged."""
    path = work / unit.file_name
    try:
        with np.load(path) as arrays:
            return UnitEstimates(
                arrays["values"], arrays["differences"], arrays["bases"], arrays["warnings"].tolist(),
                arrays.get("bins"),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Failed(f"{path}, a part of this translation, is missing or damaged ({error}); delete it and run again") from None


def add_up(chunk: list[Unit], *, work: Path, mutation_rate: float, warnings: dict[str, int]) -> Sums:
    """Sums over the units of a chunk of pairs; count the *warnings* of the units, by one example of each kind.

    Windows of the contig that are in no unit do not count as missing here.
    """
    known = {describe_kind(text): text for text in warnings}
    pairs = chunk[0].to_pair - chunk[0].from_pair
    observed, implied = np.zeros(pairs, dtype=np.int64), np.zeros(pairs)
    missing, wide, mean_time, wide_time = 0, 0, 0.0, 0.0
    for unit in chunk:
        one = load_unit(unit, work=work)
        has_estimate = ~np.isnan(one.values[..., MEAN])
        observed += (one.differences * has_estimate).sum(axis=1)
        implied += compute_implied(one.values[..., LOG_MEAN], one.bases, mutation_rate=mutation_rate)
        missing += int((~has_estimate).sum())
        quantiles = one.values[..., QUANTILES]
        is_wide = quantiles[..., -1] - quantiles[..., 0] > WIDE  # False where missing
        wide += int(is_wide.sum())
        times = np.exp(one.values[..., LOG_MEAN].astype(np.float64)) * one.bases
        mean_time += float(times[has_estimate].sum())
        wide_time += float(times[is_wide].sum())
        for kind, text in {describe_kind(text): text for text in reversed(one.warnings)}.items():
            example = known.setdefault(kind, text)
            warnings[example] = warnings.get(example, 0) + 1
    return Sums(Diversity(observed, implied), missing, wide, mean_time, wide_time)


def iterate_stretches(chunk: list[Unit], kept: np.ndarray, *, work: Path, replicates: int) -> Iterator[Stretch]:
    """Yield the estimates of a chunk of pairs by as many windows as are in a chunk on disk.

    Parameters
    ----------
    chunk : list of Unit
        Of the same pairs, along the contig.
    kept : int64 (windows,)
        All windows of the contig that are part of the output, ascending.
    work : Path
    replicates : int
        Sampled sequences that are kept.
    """
    pairs = chunk[0].to_pair - chunk[0].from_pair
    starts = [int(np.searchsorted(kept, unit.block.keep_from)) for unit in chunk]
    first = 0
    for begin in range(0, len(kept), CHUNK_WINDOWS):
        end = min(begin + CHUNK_WINDOWS, len(kept))
        values = np.full((pairs, end - begin, len(COLUMNS)), np.nan, dtype=np.float32)
        bins = np.zeros((pairs, replicates, end - begin), dtype=np.uint16) if replicates else None
        number = first
        while number < len(chunk) and starts[number] < end:
            block = chunk[number].block
            start, stop = starts[number], starts[number] + block.keep_to - block.keep_from
            one = load_unit(chunk[number], work=work)
            left, right = max(start, begin), min(stop, end)
            values[:, left - begin : right - begin] = one.values[:, left - start : right - start]
            if bins is not None and one.bins is not None:
                bins[:, :, left - begin : right - begin] = one.bins[:, :, left - start : right - start]
            if stop <= end:
                first = number + 1
            number += 1
        yield Stretch(slice(begin, end), values, bins)
