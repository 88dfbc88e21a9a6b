"""What is read and estimated of each contig: regions in base pairs and windows, accessible bases, panels, and blocks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cxt.config.translation import Translation
from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.genotypes.records import Region
from cxt.genotypes.selection import format_region
from cxt.genotypes.store import GenotypeStore
from cxt.model.transformer import CoalescenceModel
from cxt.translation.accessibility import GapRule, Windows, count_accessible, find_gaps
from cxt.translation.blocks import Block, choose_flank, list_blocks
from cxt.translation.request import check_haplotypes, check_short_contig

logger = get_logger(__name__)

LEAST_PRESENT = 0.5
"""Haplotypes with fewer called genotypes on a contig than this share are not drawn into panels: a male's second X, say."""


class ContigPlan(NamedTuple):
    """One contig of a translation.

    regions : windows [from, to) that are estimated
    called : float64 (pairs,), share of the sites at which both haplotypes of each pair are called
    candidates : columns of the haplotypes that panels are drawn from
    gap_rules : (start, end, rule) of each part that was read
    """

    name: str
    length: int
    place: int
    regions: list[tuple[int, int]]
    windows: Windows
    called: np.ndarray
    candidates: np.ndarray
    blocks: list[Block]
    gap_rules: list[tuple[int, int, GapRule]]

    @property
    def kept(self) -> np.ndarray:
        """All windows that are estimated, ascending."""
        return np.concatenate([np.arange(low, high) for low, high in self.regions])


def extend_regions(regions: Sequence[Region], *, context: int) -> list[Region]:
    """The regions with *context* base pairs on each side, merged where they overlap."""
    merged: list[Region] = []
    for region in sorted(regions, key=lambda r: (r.contig, r.start)):
        start = max(0, region.start - context)
        end = None if region.end is None else region.end + context
        last = merged[-1] if merged else None
        if last is not None and last.contig == region.contig and (last.end is None or start <= last.end):
            merged[-1] = Region(last.contig, last.start, None if None in (last.end, end) else max(last.end, end))
        else:
            merged.append(Region(region.contig, start, end))
    return merged


def plan_contigs(
    store: GenotypeStore,
    model: CoalescenceModel,
    request: Translation,
    *,
    pairs: np.ndarray,
    regions: Sequence[Region],
    read_mask: Callable[[str], np.ndarray | None],
) -> list[ContigPlan]:
    """Plan each contig of *store*.

    Parameters
    ----------
    store : GenotypeStore
    model : CoalescenceModel
    request : Translation
    pairs : integer array (pairs, 2)
        Columns of the genotypes.
    regions : sequence of Region
        To estimate; empty: all of every contig.
    read_mask : callable
        The accessibility mask of a contig by its name (True = inaccessible), or None.

    Raises
    ------
    BadRequest
        If all contigs have too few haplotypes, or are too short for the network; otherwise such contigs are left out.
    """
    size, network_windows = model.config.window_size, model.config.windows
    flank = choose_flank(network_windows, request.flank)
    plans = []
    refusals: list[str] = []  # of contigs such as a Y chromosome, which must not stop the others
    for place, (name, length) in enumerate(store.contigs):
        wanted = [region for region in regions if region.contig == name] or [Region(name)]
        assert length is not None
        check_starts(wanted, length)
        total = -(-length // size)
        try:
            check_short_contig(model, contig=name, windows=total, name=request.model)
        except BadRequest as error:
            refusals.append(str(error))
            continue
        read = extend_regions(wanted, context=network_windows * size)
        accessible = np.zeros(total, dtype=np.int64)
        gaps: list[tuple[int, int]] = []
        rules: list[tuple[int, int, GapRule]] = []
        mask = read_mask(name)
        positions = store.positions(name)
        for _, start, end in read:
            end = length if end is None else min(end, length)
            inside = positions[np.searchsorted(positions, start) : np.searchsorted(positions, end)]
            found, rule = find_gaps(inside, start=start, end=end, window_size=size, mask=mask, max_gap=request.max_gap)
            rules.append((start, end, rule))
            counted = count_accessible(length=length, window_size=size, start=start, end=end, mask=mask, gaps=found)
            accessible += counted.accessible
            widths, gaps = counted.widths, gaps + found
        called, present = share_called(store, place, pairs)
        candidates = np.flatnonzero(present >= LEAST_PRESENT)
        candidates = np.union1d(candidates, pairs[called > 0])
        try:
            check_haplotypes(model, len(candidates), where=f"contig {name}", name=request.model)
        except BadRequest as error:
            refusals.append(str(error))
            continue
        windows = merge_windows(wanted, size=size, total=total)
        blocks = list_blocks(
            place, total=total, regions=windows, read=find_segments(accessible > 0, flank), windows=network_windows, flank=flank
        )
        readable = accessible >= np.maximum(request.min_accessible * widths, 1)
        blocks = [block for block in blocks if readable[block.keep_from : block.keep_to].any()]  # others are missing
        if not blocks:
            logger.warning(f"contig {name} is left out: no window has enough accessible bases (see min_accessible, max_gap)")
            continue
        accessibility = Windows(accessible, widths, gaps)
        plans.append(ContigPlan(name, length, place, windows, accessibility, called, candidates, blocks, rules))
    if not plans and refusals:
        raise BadRequest(refusals[0])
    for text in refusals:
        logger.warning(f"left out: {text}")
    if not plans:
        raise BadRequest(
            "no window has enough accessible bases; lower min_accessible, or set max_gap to 0 if sites are that rare"
        )
    return plans


def check_starts(regions: Sequence[Region], length: int) -> None:
    """BadRequest for a region that begins past the end of its contig, whose length was not known before it was read."""
    for region in regions:
        if region.start >= length:
            raise BadRequest(
                f"region {format_region(region)} begins past the end of contig {region.contig}: the file does not say how long "
                f"it is, and it is taken to end with the last record read, at {length:,}"
            )


def merge_windows(regions: Sequence[Region], *, size: int, total: int) -> list[tuple[int, int]]:
    """Windows [from, to) that lie in the regions of one contig, in part or as a whole; ascending and disjoint."""
    merged: list[tuple[int, int]] = []
    for region in sorted(regions, key=lambda r: r.start):
        low, high = region.start // size, total if region.end is None else min(-(-region.end // size), total)
        if low >= high:
            raise BadRequest(f"region {region.contig}:{region.start + 1}-{region.end} is empty")
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def find_segments(has_data: np.ndarray, closing: int) -> list[tuple[int, int]]:
    """Windows [from, to) with data; those that are less than *closing* windows apart are one segment."""
    steps = np.diff(np.concatenate([[0], has_data.astype(np.int8), [0]]))
    segments: list[tuple[int, int]] = []
    for low, high in zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True):
        if segments and low - segments[-1][1] < closing:
            segments[-1] = (segments[-1][0], int(high))
        else:
            segments.append((int(low), int(high)))
    return segments


def share_called(store: GenotypeStore, place: int, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of the sites of a contig at which both haplotypes of each pair, and each haplotype, are called."""
    both, each, sites = np.zeros(len(pairs), dtype=np.int64), np.zeros(len(store.haplotypes), dtype=np.int64), 0
    for chunk in store.iterate_missing(place):
        sites += len(chunk)
        present = ~chunk
        each += present.sum(axis=0)
        if chunk.any():
            both += np.array([np.count_nonzero(present[:, a] & present[:, b]) for a, b in pairs])
        else:
            both += len(chunk)
    return both / max(sites, 1), each / max(sites, 1)
