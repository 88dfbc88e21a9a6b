"""Where windows are drawn: segments of contigs side by side on one axis, several windows to a column where there are many."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cxt.errors import BadRequest
from cxt.genotypes.records import Region
from cxt.translation.tracks import Tracks


class Segment(NamedTuple):
    """Windows [first, last) of a contig, without a gap between them, that cover [start, end) in base pairs."""

    contig: str
    first: int
    last: int
    start: int
    end: int

    @property
    def name(self) -> str:
        """The contig, and where it is."""
        return f"{self.contig}:{self.start + 1:,}-{self.end:,}"


class Layout(NamedTuple):
    """Segments side by side, cut into columns.

    segments : in the order in which they are drawn
    step : windows of a column; the last column of a segment may have fewer
    edges : float64 (columns + 1,), where columns begin and end, in base pairs from the start of the first segment without the
        gaps between segments
    columns : number of columns of each segment
    """

    segments: list[Segment]
    step: int
    edges: np.ndarray
    columns: list[int]

    @property
    def breaks(self) -> list[float]:
        """Where segments meet, on the scale of *edges*."""
        return list(self.edges[np.cumsum(self.columns)[:-1]])


def find_segments(tracks: Tracks, region: Region | None = None) -> list[Segment]:
    """The segments of all contigs, or those within a region.

    Raises
    ------
    BadRequest
        If there are no windows in the region.
    """
    segments = []
    names = [name for name, _ in tracks.contigs] if region is None else [region.contig]
    for name in names:
        start, end = (np.asarray(tracks.array(name, key)[:]) for key in ("start", "end"))
        chosen = np.arange(len(start))
        if region is not None:
            chosen = np.flatnonzero((end > region.start) & (start < (np.inf if region.end is None else region.end)))
            if not len(chosen):
                where = f"{start[0] + 1:,} to {end[-1]:,}" if len(start) else "nowhere"
                raise BadRequest(f"the region has no windows; on {name}, the tracks have windows from {where}")
        if len(chosen):
            cuts = np.flatnonzero(start[chosen][1:] != end[chosen][:-1]) + 1
            segments += [
                Segment(name, int(part[0]), int(part[-1]) + 1, int(start[part[0]]), int(end[part[-1]]))
                for part in np.split(chosen, cuts)
            ]
    return segments


def lay_out(segments: Sequence[Segment], *, most: int, window_size: int) -> Layout:
    """Cut segments into columns of as many windows as needed for about *most* columns in all."""
    step = max(1, -(-sum(segment.last - segment.first for segment in segments) // most))
    widths, columns = [], []
    for segment in segments:
        lengths = np.diff(np.append(np.arange(segment.start, segment.end, step * window_size), segment.end))
        widths.append(lengths)
        columns.append(len(lengths))
    return Layout(list(segments), step, np.concatenate([[0.0], np.cumsum(np.concatenate(widths))]), columns)


def read_columns(tracks: Tracks, layout: Layout, rows: Sequence[int], levels: Sequence[float]) -> np.ndarray:
    """Quantiles of ln TMRCA in the columns of a layout: the mean of those of their windows that are not missing.

    Parameters
    ----------
    tracks : Tracks
    layout : Layout
    rows : sequence of int
        Pairs.
    levels : sequence of float
        Probabilities.

    Returns
    -------
    float64 array (pairs, columns, levels)
        NaN where all windows are missing.
    """
    places = [tracks.quantile_levels.index(level) for level in levels]
    out = np.full((len(rows), sum(layout.columns), len(places)), np.nan)
    begin = 0
    for segment, columns in zip(layout.segments, layout.columns, strict=True):
        array = tracks.array(segment.contig, "quantiles")
        ends = list(range(segment.first, segment.last, layout.step * 1024))
        for left in ends:
            right = min(left + layout.step * 1024, segment.last)
            part = np.asarray(array.oindex[list(rows), slice(left, right)])[:, :, places].astype(np.float64)
            starts = np.arange(0, right - left, layout.step)
            known = ~np.isnan(part)
            count = np.add.reduceat(known, starts, axis=1, dtype=np.int64)
            sums = np.add.reduceat(np.where(known, part, 0.0), starts, axis=1)
            with np.errstate(invalid="ignore"):
                at = begin + (left - segment.first) // layout.step
                out[:, at : at + len(starts)] = np.where(count > 0, sums / count, np.nan)
        begin += columns
    return out
