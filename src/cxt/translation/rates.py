"""Coalescence rates through time, and the effective population size Ne(t) that they imply, for each pair of populations.

With S(t) the share of the genome whose TMRCA is above t, the rate of coalescence from t to u is ln(S(t) / S(u)) / (u - t), and
Ne is 1 / (2 rate) in diploid individuals. S is the mean over windows of the posterior probability of a TMRCA above t. That
differs from counting windows whose estimate is above t: estimates vary less than what they estimate, since each is drawn to the
mean, so that their distribution is too narrow.
"""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cxt.data.kernels import compiled
from cxt.io import atomic_write
from cxt.translation.tracks import CHUNK_PAIRS, CHUNK_WINDOWS, Tracks

EDGES = 10.0 ** (np.arange(9 * 12 + 1) / 12)
"""Ends of intervals of time in generations, twelve to a factor of ten. They are those of all tracks, which can be compared."""

FEWEST = 0.005, 0.01
"""The first interval ends where at most the first share of the genome of each pair of populations is younger, and the last one
begins where less than the second share of each is older."""

TAIL = 0.6
"""Length of the tails of a posterior beyond its outer quantiles, as a share of the distance to the next quantile. With levels
of 0.025 and 0.25, the tails of a normal distribution then have their mean where it is."""


class Rates(NamedTuple):
    """Coalescence rates of a pair of populations.

    populations : their names, in alphabetical order
    edges : float64 (epochs,), beginnings of the intervals, in generations; the first is 0, and the last interval has no end
    rate : float64 (epochs,), per generation; NaN where nothing is left to coalesce
    share : float64 (epochs,), share of the genome of the pairs whose TMRCA is in each interval
    """

    populations: tuple[str, str]
    edges: np.ndarray
    rate: np.ndarray
    share: np.ndarray

    @property
    def ne(self) -> np.ndarray:
        """Effective population size in diploid individuals, 1 / (2 rate); infinite where nothing coalesces."""
        with np.errstate(divide="ignore"):
            return 1 / (2 * self.rate)


@compiled
def _add_shares(knots, masses, weights, log_edges, whole, whole_time, above, above_time):
    """Add the weighted probability of a value above each edge, and the expectation of exp(value) there.

    Each row of *knots* (rows, segments + 1), ascending ln times, has the probabilities *masses* (segments,) between them,
    evenly spread. A segment counts as a whole at all edges below it: it is added to *whole* and *whole_time* (edges + 1,) at
    the number of these. Its part above an edge that it contains is added to *above* and *above_time* (edges,) at this edge.
    """
    for i in range(len(knots)):
        if np.isnan(knots[i, 0]):
            continue
        for j in range(len(masses)):
            low, high = knots[i, j], knots[i, j + 1]
            mass = weights[i] * masses[j]
            k = np.searchsorted(log_edges, low, side="right")
            whole[k] += mass
            if high - low < 1e-9:
                whole_time[k] += mass * np.exp(low)
                continue
            density = mass / (high - low)
            whole_time[k] += density * (np.exp(high) - np.exp(low))
            while k < len(log_edges) and log_edges[k] < high:
                above[k] += density * (high - log_edges[k])
                above_time[k] += density * (np.exp(high) - np.exp(log_edges[k]))
                k += 1


def extend_quantiles(quantiles: np.ndarray, levels: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Piecewise-uniform distributions from quantiles.

    Parameters
    ----------
    quantiles : float array (..., levels)
        Ascending.
    levels : sequence of float
        Their probabilities.

    Returns
    -------
    knots : float64 array (..., levels + 2)
        The quantiles with an end on each side, `TAIL` of the distance to the next quantile away.
    masses : float64 array (levels + 1,)
        Probability between knots.
    """
    values = np.maximum.accumulate(quantiles.astype(np.float64), axis=-1)
    first = values[..., :1] - TAIL * (values[..., 1:2] - values[..., :1])
    last = values[..., -1:] + TAIL * (values[..., -1:] - values[..., -2:-1])
    return np.concatenate([first, values, last], axis=-1), np.diff([0.0, *levels, 1.0])


class Shares(NamedTuple):
    """How much of the genome has a TMRCA above given times.

    groups : pairs of populations, in alphabetical order
    above : float64 (groups, edges), share of the genome with a TMRCA above each edge
    mean_time : float64 (groups, edges), mean TMRCA of that share in generations; NaN if there is none
    """

    groups: list[tuple[str, str]]
    above: np.ndarray
    mean_time: np.ndarray


def compute_shares(tracks: Tracks, edges: np.ndarray) -> Shares:
    """Share of the genome with a TMRCA above each edge, for each pair of populations that has an estimate anywhere.

    Parameters
    ----------
    tracks : Tracks
    edges : float64 array (edges,)
        In generations, positive and ascending.

    Returns
    -------
    Shares
    """
    pairs = tracks.population_pairs
    groups = sorted(set(pairs))
    number_of = {group: number for number, group in enumerate(groups)}
    log_edges = np.log(edges)
    whole, whole_time = np.zeros((2, len(groups), len(edges) + 1))
    above, above_time = np.zeros((2, len(groups), len(edges)))
    for name, _ in tracks.contigs:
        quantiles, start, end = (tracks.array(name, key) for key in ("quantiles", "start", "end"))
        widths = (np.asarray(end[:]) - np.asarray(start[:])).astype(np.float64)
        for begin in range(0, len(pairs), CHUNK_PAIRS):
            for left in range(0, len(widths), 16 * CHUNK_WINDOWS):
                part = np.asarray(quantiles[begin : begin + CHUNK_PAIRS, left : left + 16 * CHUNK_WINDOWS])
                width = widths[left : left + 16 * CHUNK_WINDOWS]
                for row, values in enumerate(part):
                    knots, masses = extend_quantiles(values, tracks.quantile_levels)
                    g = number_of[pairs[begin + row]]
                    _add_shares(knots, masses, width, log_edges, whole[g], whole_time[g], above[g], above_time[g])
    total = whole.sum(axis=1)
    above += whole[:, ::-1].cumsum(axis=1)[:, -2::-1]
    above_time += whole_time[:, ::-1].cumsum(axis=1)[:, -2::-1]
    known = total > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_time = (above_time / above)[known]
    return Shares(
        [group for group, is_known in zip(groups, known, strict=True) if is_known], above[known] / total[known, None], mean_time
    )


def rates_from_shares(above: np.ndarray, edges: np.ndarray, mean_time: float) -> tuple[np.ndarray, np.ndarray]:
    """Rates of coalescence, and the share of the genome that coalesces, in the interval that begins at each edge.

    Parameters
    ----------
    above : float array (epochs,)
        Share of the genome with a TMRCA above each edge.
    edges : float array (epochs,)
        In generations, from 0.
    mean_time : float
        Mean TMRCA of what is above the last edge. The rate after it is the inverse of the mean time to coalescence from there.

    Returns
    -------
    rate, share : float64 arrays (epochs,)
    """
    above = np.where(above < 1e-12, 0.0, above)  # what rounding has left
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.log(above[:-1] / above[1:]) / np.diff(edges)  # infinite where all that is left coalesces
    rate = np.where(above[:-1] > 0, np.maximum(rate, 0.0), np.nan)
    last = 1 / (mean_time - edges[-1]) if above[-1] > 0 else np.nan
    return np.append(rate, last), np.append(above[:-1] - above[1:], above[-1])


def coalescence_rates(tracks: Tracks) -> list[Rates]:
    """Rates of coalescence of each pair of populations.

    Parameters
    ----------
    tracks : Tracks

    Returns
    -------
    list of Rates
        In alphabetical order, all with the same intervals; empty if every window is missing.
    """
    groups, above, mean_time = compute_shares(tracks, EDGES)
    if not groups:
        return []
    first = int(np.argmax((above < 1 - FEWEST[0]).any(axis=0))) - 1  # the last edge with almost nothing below it
    last = int(np.argmax((above < FEWEST[1]).all(axis=0)))  # the first one with almost nothing above it
    chosen = slice(max(first, 0), last + 1 if last else len(EDGES))
    edges = np.append(0.0, EDGES[chosen])
    found = []
    for group, shares, times in zip(groups, above, mean_time, strict=True):
        values = rates_from_shares(np.append(1.0, shares[chosen]), edges, times[chosen][-1])
        found.append(Rates(group, edges, *values))
    return found


def write_ne(tracks: Tracks, path) -> None:
    """Write the rates of coalescence and Ne of each pair of populations as CSV.

    The columns are population_1, population_2, time_from, time_to (in generations; `inf` for the end of the last interval),
    coalescence_rate (per generation), ne (diploid individuals), and share: of the genome, how much coalesces in the interval.

    Parameters
    ----------
    tracks : Tracks
    path : path-like
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["population_1", "population_2", "time_from", "time_to", "coalescence_rate", "ne", "share"])
    for one in coalescence_rates(tracks):
        ends = np.append(one.edges[1:], np.inf)
        for row in zip(one.edges, ends, one.rate, one.ne, one.share, strict=True):
            writer.writerow([*one.populations, *(f"{value:.6g}" for value in row)])
    atomic_write(path, out.getvalue().encode())
