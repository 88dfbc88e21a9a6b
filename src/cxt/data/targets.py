"""The targets of the model: ln TMRCA of a pair in each window."""

import numpy as np
import tskit
from numpy.typing import ArrayLike

from cxt.data.features import check_pairs, count_windows
from cxt.data.kernels import compiled, count_bits, find_lowest_bit
from cxt.errors import BadRequest


@compiled
def _add_span(total, time, left, right, window_size):
    """Add *time* times its overlap with each window to *total* (windows,) for [left, right)."""
    k = int(left / window_size)
    while left < right:
        end = min(right, (k + 1) * window_size)
        total[k] += time * (end - left)
        left = end
        k += 1


@compiled
def _group_partners(pairs, samples):
    """The pairs grouped by sample: their numbers, the other sample of each, and the start of each sample's group."""
    begin = np.zeros(samples + 1, dtype=np.int64)
    for p in range(len(pairs)):
        for i in range(2):
            begin[pairs[p, i] + 1] += 1
    begin = np.cumsum(begin)
    free = begin[:-1].copy()
    number, other = np.empty(begin[-1], dtype=np.int64), np.empty(begin[-1], dtype=np.int64)
    for p in range(len(pairs)):
        for i in range(2):
            sample = pairs[p, i]
            number[free[sample]], other[free[sample]] = p, pairs[p, 1 - i]
            free[sample] += 1
    return number, other, begin


@compiled
def _sweep(edges, insertion, removal, times, samples, pairs, sequence_length, window_size, total):
    """Fill *total* (pairs, windows) with the integral of each pair's TMRCA over each window.

    It moves from tree to tree, maintaining the set of samples below each node (64 per word), and searches for a new common
    ancestor only where it can have changed: for pairs with exactly one sample below an inserted edge. *edges* holds left,
    right, parent and child of each edge; *pairs* index *samples*. Returns the left end of the first tree with several roots,
    or -1.
    """
    lefts, rights, edge_parents, edge_children = edges
    words = (len(samples) + 63) // 64
    parent = np.full(len(times), -1, dtype=np.int32)
    below = np.zeros((len(times), words), dtype=np.uint64)
    everyone = np.zeros(words, dtype=np.uint64)
    for i in range(len(samples)):
        below[samples[i], i >> 6] |= np.uint64(1) << np.uint64(i & 63)
        everyone[i >> 6] |= np.uint64(1) << np.uint64(i & 63)
    number, other, begin = _group_partners(pairs, len(samples))
    time = np.zeros(len(pairs))
    since = np.zeros(len(pairs))
    seen = np.full(len(pairs), -1, dtype=np.int64)  # the last tree in which a pair was visited
    some = np.empty(words, dtype=np.uint64)
    left, at_in, at_out, tree = 0.0, 0, 0, 0
    while left < sequence_length:
        while at_out < len(removal) and rights[removal[at_out]] == left:
            child = edge_children[removal[at_out]]
            node = parent[child]
            parent[child] = -1
            while node != -1:
                for w in range(words):
                    below[node, w] &= ~below[child, w]
                node = parent[node]
            at_out += 1
        inserted = at_in
        while at_in < len(insertion) and lefts[insertion[at_in]] == left:
            child, node = edge_children[insertion[at_in]], edge_parents[insertion[at_in]]
            parent[child] = node
            while node != -1:
                for w in range(words):
                    below[node, w] |= below[child, w]
                node = parent[node]
            at_in += 1
        root = samples[0]
        while parent[root] != -1:
            root = parent[root]
        for w in range(words):
            if below[root, w] != everyone[w]:
                return left
        for e in range(inserted, at_in):
            child = edge_children[insertion[e]]
            few = 0
            for w in range(words):
                few += count_bits(below[child, w])
            few_below = 2 * few <= len(samples)
            for w in range(words):  # either side of the split contains one sample of each such pair; use the smaller one
                some[w] = below[child, w] if few_below else everyone[w] & ~below[child, w]
            for w in range(words):
                left_over = some[w]
                while left_over:
                    sample = 64 * w + find_lowest_bit(left_over)
                    left_over &= left_over - np.uint64(1)
                    for q in range(begin[sample], begin[sample + 1]):
                        p, mate = number[q], other[q]
                        word, bit = mate >> 6, np.uint64(1) << np.uint64(mate & 63)
                        if some[word] & bit or seen[p] == tree:
                            continue
                        seen[p] = tree
                        node = parent[samples[sample]]
                        while not below[node, word] & bit:
                            node = parent[node]
                        if times[node] != time[p]:
                            _add_span(total[p], time[p], since[p], left, window_size)
                            time[p] = times[node]
                            since[p] = left
        left = sequence_length
        if at_in < len(insertion):
            left = min(left, lefts[insertion[at_in]])
        if at_out < len(removal):
            left = min(left, rights[removal[at_out]])
        tree += 1
    for p in range(len(pairs)):
        _add_span(total[p], time[p], since[p], sequence_length, window_size)
    return -1.0


_HOW_TO_CONVERT = {
    "years": "divide node and mutation times by the years per generation, and set `tables.time_units = 'generations'`",
    "ticks": "SLiM counts in ticks: multiply node and mutation times by the generations per tick (1 in a Wright-Fisher model "
    "without a changed tick cycle), and set `tables.time_units = 'generations'`",
    "uncalibrated": "its times are only an order, as those of tsinfer: date it first, for example with tsdate",
    "unknown": "if its times are in generations, set `tables.time_units = 'generations'`",
}
"""Advice on tree sequences whose times are in other units."""


def check_times(ts: tskit.TreeSequence) -> None:
    """BadRequest unless times are in generations before the samples, which are all at time 0."""
    if ts.time_units != "generations":
        remedy = _HOW_TO_CONVERT.get(ts.time_units, "convert its times, and set `tables.time_units = 'generations'`")
        raise BadRequest(f"the times of the tree sequence must be in 'generations', got '{ts.time_units}': {remedy}")
    times = ts.nodes_time
    if not np.isfinite(times).all():
        raise BadRequest("the tree sequence has nodes without a finite time; date them first")
    if len(times) and times.min() < 0:
        raise BadRequest(
            f"the tree sequence has nodes at negative times ({times.min():g}): old versions of SLiM and pyslim count from the "
            "start of the simulation, but times must count backwards from its end. Convert it with a current pyslim "
            "(`pyslim.update`), or shift all times so that the samples are at 0"
        )
    times = times[ts.samples()]
    if np.any(times != 0):
        raise BadRequest(
            f"{int(np.sum(times != 0))} of {ts.num_samples} samples are not at time 0 (the oldest at {times.max():g}); "
            "ancient samples are not supported: sample every population at time 0"
        )


def pair_log_tmrca(ts: tskit.TreeSequence, pairs: ArrayLike, *, window_size: int, sequence_length: float) -> np.ndarray:
    """Natural logarithm of the span-weighted mean TMRCA of pairs of samples, in generations, in windows.

    The value in window k is ln((1/s)·Σ overlap(tree, window k)·tmrca(tree)). The mean is half the branch-mode divergence of
    the two samples (Ralph, Thornton & Kelleher 2020, Genetics 215:779) if all samples are at time 0 and have a common root.

    Parameters
    ----------
    ts : tskit.TreeSequence
        Single-rooted on [0, *sequence_length*), times in generations, samples at time 0, at least *sequence_length* long.
    pairs : (pairs, 2) integer array
        Indices into ``ts.samples()``.
    window_size, sequence_length : int
        In base pairs; windows [k·s, min((k+1)·s, L)).

    Returns
    -------
    float64 array (pairs, windows)

    Raises
    ------
    BadRequest
        If times are not in generations, a sample is ancient, a tree has several roots, or *ts* is shorter than
        *sequence_length*.
    """
    total, lengths = _integrate(ts, pairs, ts.nodes_time, window_size=window_size, sequence_length=sequence_length)
    return np.log(total / lengths)


def pair_log_moments(
    ts: tskit.TreeSequence, pairs: ArrayLike, *, window_size: int, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of ln TMRCA over the base pairs of each window, and its variance over all base pairs, of pairs of samples.

    With the TMRCA T(x) of a pair at base pair x, these are the mean of ln T(x) in each window (not the logarithm of the mean,
    as `pair_log_tmrca`), and the mean of (ln T(x))² less the squared mean of ln T(x).

    Parameters
    ----------
    ts, pairs, window_size, sequence_length
        As for `pair_log_tmrca`, which raises the same.

    Returns
    -------
    means : float64 array (pairs, windows)
    variances : float64 array (pairs,)
    """
    with np.errstate(divide="ignore"):  # -inf of the samples, which are ancestors of no pair
        logarithms = np.log(ts.nodes_time)
    total, lengths = _integrate(ts, pairs, logarithms, window_size=window_size, sequence_length=sequence_length)
    squares, _ = _integrate(ts, pairs, logarithms**2, window_size=sequence_length, sequence_length=sequence_length)
    mean = total.sum(axis=1) / sequence_length
    return total / lengths, np.maximum(squares[:, 0] / sequence_length - mean**2, 0.0)


def _integrate(
    ts: tskit.TreeSequence, pairs: ArrayLike, values: np.ndarray, *, window_size: int, sequence_length: float
) -> tuple[np.ndarray, np.ndarray]:
    """Integrals over each window of the value of each pair's most recent common ancestor, given *values* of all nodes.

    Returns
    -------
    integrals : array (pairs, windows)
    lengths : array (windows,)
        Base pairs of each window.
    """
    pairs = check_pairs(pairs, ts.num_samples)
    windows = count_windows(window_size=window_size, sequence_length=sequence_length)
    if ts.sequence_length < sequence_length:
        raise BadRequest(
            f"the tree sequence is {ts.sequence_length:.0f} bp long, but {sequence_length:.0f} bp were requested; "
            "lower the dataset's sequence_length or simulate longer sequences"
        )
    check_times(ts)
    total = np.zeros((len(pairs), windows))
    several_roots_at = _sweep(
        (ts.edges_left, ts.edges_right, ts.edges_parent, ts.edges_child),
        ts.indexes_edge_insertion_order,
        ts.indexes_edge_removal_order,
        values,
        ts.samples(),
        pairs,
        float(sequence_length),
        float(window_size),
        total,
    )
    if several_roots_at >= 0:
        tree = ts.at(several_roots_at)
        raise BadRequest(
            f"the tree on [{tree.interval.left:g}, {tree.interval.right:g}) must have one root, got {tree.num_roots}; "
            "simulate until all samples have coalesced"
        )
    edges = np.minimum(np.arange(total.shape[1] + 1) * float(window_size), float(sequence_length))
    return total, np.diff(edges)
