"""Coalescence rates through time, and the effective population size Ne(t) that they imply, for each pair of populations.

With S(t) the share of the genome whose TMRCA is above t, the rate of coalescence between t1 and t2 is ln(S(t1) / S(t2)) / (t2 - t1),
and Ne is 1 / (2 rate) in diploid individuals. S is the mean over windows of the posterior probability of a TMRCA above t. That
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

EPOCHS = 41
"""Intervals of time; the last has no end."""

FIRST_EDGE = 100.0
"""Where intervals of equal ratio begin, in generations; the first reaches down to 0."""

TAIL = 0.6
"""Length of the tails of a posterior beyond its outer quantiles, as a share of the distance to the next quantile. With it, and the
levels 0.025 and 0.25, the tails of a normal distribution have their mean where it is."""


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


def choose_edges(largest: float) -> np.ndarray:
    """Edges of the intervals of time: 0, and then of equal ratio from 100 generations to the power of ten below *largest*.

    Parameters
    ----------
    largest : float
        Largest TMRCA in generations. If it is below 1000, the intervals of equal ratio cover the two powers of ten below it.

    Returns
    -------
    float64 array (41,)
    """
    high = np.floor(np.log10(largest))
    low = np.log10(FIRST_EDGE) if high >= 3 else high - 2
    edges = np.logspace(low, high, EPOCHS)
    edges[0] = 0.0
    return edges


@compiled
def _add_shares(knots, masses, weights, log_edges, above, above_time):
    """Add to *above* (edges,) the weighted probability of a value above each edge, and to *above_time* (1,) the mean time there.

    Each row of *knots* (rows, segments + 1), ascending ln times, has the probabilities *masses* (segments,) between them, evenly.
    *above_time* is that of the last edge: the expectation of exp(value) where it is above.
    """
    last = log_edges[-1]
    for i in range(len(knots)):
        if np.isnan(knots[i, 0]):
            continue
        for j in range(len(masses)):
            low, high = knots[i, j], knots[i, j + 1]
            mass = weights[i] * masses[j]
            for k in range(len(log_edges)):
                if log_edges[k] <= low:
                    above[k] += mass
                elif log_edges[k] < high:
                    above[k] += mass * (high - log_edges[k]) / (high - low)
                else:
                    break
            if high > last or low >= last:
                start = max(low, last)
                if high - low > 1e-9:
                    above_time[0] += mass * (np.exp(high) - np.exp(start)) / (high - low)
                else:
                    above_time[0] += mass * np.exp(low)


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


def compute_shares(tracks: Tracks, log_edges: np.ndarray) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    """Share of the genome with a TMRCA above each edge, for each pair of populations.

    Parameters
    ----------
    tracks : Tracks
    log_edges : float64 array (edges,)
        In ln generations, ascending; may begin with -inf.

    Returns
    -------
    groups : list of (str, str)
        Pairs of populations in alphabetical order.
    above : float64 array (groups, edges)
        NaN for a group without any estimate.
    mean_time : float64 array (groups,)
        Mean TMRCA in generations of what is above the last edge.
    """
    pairs = tracks.population_pairs
    groups = sorted(set(pairs))
    above, above_time, total = np.zeros((len(groups), len(log_edges))), np.zeros((len(groups), 1)), np.zeros(len(groups))
    for name, _ in tracks.contigs:
        quantiles, start, end = (tracks.array(name, key) for key in ("quantiles", "start", "end"))
        widths = (np.asarray(end[:]) - np.asarray(start[:])).astype(np.float64)
        for begin in range(0, len(pairs), CHUNK_PAIRS):
            for left in range(0, len(widths), 16 * CHUNK_WINDOWS):
                part = np.asarray(quantiles[begin : begin + CHUNK_PAIRS, left : left + 16 * CHUNK_WINDOWS])
                width = widths[left : left + 16 * CHUNK_WINDOWS]
                knots, masses = extend_quantiles(part, tracks.quantile_levels)
                for row, one in enumerate(knots):
                    group = groups.index(pairs[begin + row])
                    total[group] += width[~np.isnan(one[:, 0])].sum()
                    _add_shares(one, masses, width, log_edges, above[group], above_time[group])
    with np.errstate(invalid="ignore", divide="ignore"):
        return groups, above / total[:, None], above_time[:, 0] / above[:, -1]


def rates_from_shares(above: np.ndarray, edges: np.ndarray, mean_time: float) -> tuple[np.ndarray, np.ndarray]:
    """Rates of coalescence, and the share of the genome that coalesces, in each interval.

    Parameters
    ----------
    above : float array (epochs,)
        Share of the genome with a TMRCA above each edge.
    edges : float array (epochs,)
        In generations.
    mean_time : float
        Mean TMRCA of what is above the last edge.

    Returns
    -------
    rate, share : float64 arrays (epochs,)
    """
    # What is left after rounding of sums is nothing.
    above = np.where(above < 1e-12, 0.0, above)
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.log(above[:-1] / above[1:]) / np.diff(edges)  # infinite where all that is left coalesces
        rate = np.where(above[:-1] > 0, rate, np.nan)
        last = 1 / (mean_time - edges[-1]) if above[-1] > 0 else np.nan
    return np.append(np.maximum(rate, 0.0), last), np.append(above[:-1] - above[1:], above[-1])


def find_largest(tracks: Tracks) -> float | None:
    """Largest posterior median of the TMRCA in generations, or None if every window is missing."""
    largest = -np.inf
    middle = tracks.quantile_levels.index(0.5)
    for name, _ in tracks.contigs:
        quantiles = tracks.array(name, "quantiles")
        for begin in range(0, quantiles.shape[0], CHUNK_PAIRS):
            for left in range(0, quantiles.shape[1], 16 * CHUNK_WINDOWS):
                part = np.asarray(quantiles[begin : begin + CHUNK_PAIRS, left : left + 16 * CHUNK_WINDOWS, middle])
                largest = max(largest, float(np.max(part, initial=-np.inf, where=~np.isnan(part))))
    return float(np.exp(largest)) if np.isfinite(largest) else None


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
    largest = find_largest(tracks)
    if largest is None:
        return []
    edges = choose_edges(largest)
    with np.errstate(divide="ignore"):
        log_edges = np.log(edges)
    groups, above, mean_time = compute_shares(tracks, log_edges)
    found = []
    for group, shares, time in zip(groups, above, mean_time, strict=True):
        if not np.isnan(shares).any():
            found.append(Rates(group, edges, *rates_from_shares(shares, edges, time)))
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
