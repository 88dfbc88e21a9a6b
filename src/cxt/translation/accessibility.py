"""How much of each window of a contig can be read: bases outside the mask, and not in a gap without any variant."""

from typing import NamedTuple

import numpy as np

GAP_WINDOWS = 25
"""An inner stretch without variants counts as inaccessible if it is this many windows long, and `GAP_SPACINGS` as well."""

END_WINDOWS = 2
"""The same for the stretch before the first variant and the one after the last, where a file may have been cut."""

GAP_SPACINGS = 50
"""Mean distances between variants that a stretch without any must be long to count as a gap."""

CHUNK_BASES = 2**20
"""Bases of a mask that are summed at once, because a cumulative sum takes eight times the memory of the mask."""


class GapRule(NamedTuple):
    """Which stretches without variants count as gaps; all numbers are of bases outside the mask.

    spacing : mean distance between variants of what was read, in base pairs; None if that has fewer than two
    inner, ends : least base pairs of a gap between two variants, and of one before the first or after the last; None: none is
    """

    spacing: float | None
    inner: float | None
    ends: float | None


class Windows(NamedTuple):
    """Accessible bases of the windows of a contig, counted from its start.

    accessible : int64 (windows,)
    widths : int64 (windows,); the last window may be shorter than the others
    gaps : list of (start, end) in base pairs, without variants and for that reason taken as inaccessible
    """

    accessible: np.ndarray
    widths: np.ndarray
    gaps: list[tuple[int, int]]


def find_gaps(
    positions: np.ndarray,
    *,
    start: int,
    end: int,
    window_size: int,
    mask: np.ndarray | None = None,
    max_gap: int | None = None,
) -> tuple[list[tuple[int, int]], GapRule]:
    """Stretches of [start, end) without variants that are too long to be due to chance.

    A file of variants does not say where nothing could be called. With ten haplotypes or more, a stretch that is many times
    as long as the mean distance between variants has none because it was not read: a centromere, a gap of the assembly,
    or the part of the chromosome that the file leaves out.

    The mean distance is that of the variants in [start, end), so that it may differ between a part of a contig and the whole.

    Parameters
    ----------
    positions : int64 (sites,)
        Positions of all variants in [start, end), ascending.
    start, end : int
        In base pairs.
    window_size : int
        Base pairs of a window.
    mask : bool array, optional
        True = *in*accessible, for each base of the contig; what is beyond its end is inaccessible. Only accessible bases count,
        in distances and in lengths.
    max_gap : int, optional
        Base pairs without variants that count as a gap; 0: none do. By default the larger of 25 windows (2 windows at the
        ends) and 50 times the mean distance between variants.

    Returns
    -------
    list of (int, int)
        [start, end) of each gap.
    GapRule
        What was applied.
    """
    if not len(positions):
        return [] if max_gap == 0 else [(start, end)], GapRule(None, max_gap or None, max_gap or None)
    edges = np.concatenate([[start - 1], positions, [end]])
    lengths = np.diff(edges) - 1  # bases between two variants
    if mask is not None:
        lengths -= _count_masked(positions, start=start, end=end, mask=mask)
    # Within the variants, so that a file that was cut does not change the mean.
    spacing = (int(lengths[1:-1].sum()) + len(positions) - 1) / (len(positions) - 1) if len(positions) > 1 else None
    if max_gap is not None:
        rule = GapRule(spacing, max_gap or None, max_gap or None)
    else:
        by_chance = GAP_SPACINGS * (spacing or 0)
        rule = GapRule(spacing, max(GAP_WINDOWS * window_size, by_chance), max(END_WINDOWS * window_size, by_chance))
    if rule.inner is None:
        return [], rule
    limits = np.full(len(lengths), rule.inner)
    limits[[0, -1]] = rule.ends
    return [(int(edges[i]) + 1, int(edges[i + 1])) for i in np.flatnonzero(lengths >= limits)], rule


def _count_masked(positions: np.ndarray, *, start: int, end: int, mask: np.ndarray) -> np.ndarray:
    """Inaccessible bases before the first of *positions*, between each and the next, and after the last, (positions + 1,)."""
    edges = np.concatenate([[start], positions, [end]])
    known = np.minimum(edges, len(mask))
    before = np.zeros(len(known), dtype=np.int64)  # inaccessible bases from the start to each edge
    total = 0
    for begin in range(int(known[0]), int(known[-1]), CHUNK_BASES):
        sums = np.cumsum(mask[begin : min(begin + CHUNK_BASES, int(known[-1]))], dtype=np.int64)
        left, right = np.searchsorted(known, [begin + 1, begin + len(sums) + 1])
        before[left:right] = total + sums[known[left:right] - begin - 1]
        total += int(sums[-1])
    masked = np.diff(before + edges - known)
    sites = np.ones(len(positions), dtype=np.int64)  # each is the first base of what follows it
    inside = positions < len(mask)
    sites[inside] = mask[positions[inside]]
    masked[1:] -= sites
    return masked


def count_accessible(
    *, length: int, window_size: int, start: int, end: int, mask: np.ndarray | None, gaps: list[tuple[int, int]]
) -> Windows:
    """Accessible bases of each window of a contig, of which [start, end) was read.

    Parameters
    ----------
    length : int
        Base pairs of the contig.
    window_size : int
        Base pairs of a window.
    start, end : int
        What was read of it; the rest is inaccessible.
    mask : bool array, optional
        True = *in*accessible, for each base; what is beyond its end is inaccessible.
    gaps : list of (int, int)
        From `find_gaps`.

    Returns
    -------
    Windows
    """
    windows = -(-length // window_size)
    starts = np.arange(windows, dtype=np.int64) * window_size
    ends = np.minimum(starts + window_size, length)
    accessible = np.clip(np.minimum(ends, end) - np.maximum(starts, start), 0, None)
    if mask is not None:
        # Summed within windows, because a cumulative sum over bases would take eight times the memory of the mask.
        whole = min(len(mask), length) // window_size
        covered = np.zeros(windows, dtype=np.int64)
        covered[:whole] = window_size - mask[: whole * window_size].reshape(whole, window_size).sum(axis=1)
        if whole < windows:
            covered[whole] = np.count_nonzero(~mask[whole * window_size : length])
        for k in {start // window_size, (end - 1) // window_size} & set(range(windows)):  # windows that were read in part
            left, right = max(start, int(starts[k])), min(end, int(ends[k]))
            covered[k] = np.count_nonzero(~mask[left:right])
        accessible = np.minimum(accessible, covered)
    for left, right in gaps:
        first, last = left // window_size, min(-(-right // window_size), windows)
        for k in {first, last - 1}:
            a, b = max(left, int(starts[k]), start), min(right, int(ends[k]), end)
            if b > a:
                inside = b - a if mask is None else np.count_nonzero(~mask[a:b])
                accessible[k] -= min(inside, accessible[k])
        accessible[first + 1 : last - 1] = 0
    return Windows(accessible, ends - starts, gaps)
