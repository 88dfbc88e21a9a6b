"""What the model predicts: ln TMRCA of a pair in each window, and its place on the grid of log times."""

from dataclasses import dataclass

import numpy as np
import tskit

from cxt.errors import BadRequest
from cxt.features import check_pairs, num_windows

START_TOKEN = 1
SPECIAL_TOKENS = 2
"""Token 0 is unused, token 1 starts a sequence; bin b of the grid is token b + 2."""


def check_genealogies(ts: tskit.TreeSequence) -> None:
    """Refuse a tree sequence whose pairwise TMRCA is not half its divergence.

    Raises
    ------
    BadRequest
        If a sample is not at time 0, or a local tree has several roots (its samples have no common ancestor).
    """
    times = ts.nodes_time[ts.samples()]
    if np.any(times != 0):
        raise BadRequest(
            f"{int(np.sum(times != 0))} of {ts.num_samples} samples are not at time 0 (the oldest at {times.max():g}); "
            "the TMRCA of ancient samples is not defined here: sample every population at time 0"
        )
    for tree in ts.trees():
        if tree.num_roots != 1:
            raise BadRequest(
                f"the tree on [{tree.interval.left:g}, {tree.interval.right:g}) has {tree.num_roots} roots, expected 1; "
                "simulate until every sample has coalesced"
            )


def pair_log_tmrca(ts: tskit.TreeSequence, pairs, *, window_size, sequence_length):
    """Natural log of the span-weighted mean TMRCA, in generations, of pairs of samples in windows.

    The value in window k is ln((1/s)·Σ overlap(tree, window k)·tmrca(tree)). With all samples at time 0, branch-mode
    divergence is twice that mean (Ralph, Thornton & Kelleher 2020, Genetics 215:779), and tskit computes it in C.

    Parameters
    ----------
    ts : tskit.TreeSequence
        Single-rooted, samples at time 0, at least *sequence_length* long.
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
        If a sample is ancient, a tree has several roots, or *ts* is shorter than *sequence_length*.
    """
    pairs = check_pairs(pairs, ts.num_samples)
    if ts.sequence_length < sequence_length:
        raise BadRequest(
            f"the tree sequence is {ts.sequence_length:.0f} bp long, {sequence_length:.0f} were asked for; "
            "lower the dataset's sequence_length or simulate longer sequences"
        )
    check_genealogies(ts)
    windows = num_windows(window_size=window_size, sequence_length=sequence_length)
    edges = np.append(np.arange(windows) * float(window_size), float(sequence_length))
    if ts.sequence_length > sequence_length:  # tskit wants windows to the end
        edges = np.append(edges, ts.sequence_length)
    used, index = np.unique(pairs, return_inverse=True)
    sample_sets = [[node] for node in ts.samples()[used]]
    divergence = ts.divergence(
        sample_sets, indexes=[tuple(p) for p in index.reshape(pairs.shape)], windows=edges, mode="branch"
    )
    return np.log(divergence[:windows].T / 2)


@dataclass(frozen=True)
class Grid:
    """The grid of ln generations: *bins* values from *low* to *high*, each the lower edge of its bin."""

    low: float = 3.0
    high: float = 17.0
    bins: int = 324

    @property
    def step(self) -> float:
        return (self.high - self.low) / (self.bins - 1)

    @property
    def centres(self):
        """(bins,) float64: the middle of each bin, in ln generations."""
        return np.linspace(self.low, self.high, self.bins) + self.step / 2

    @property
    def edges(self):
        """(bins + 1,) float64."""
        return np.append(np.linspace(self.low, self.high, self.bins), self.high + self.step)

    def tokens(self, log_tmrca):
        """Bins of *log_tmrca* (..., windows) as tokens (..., windows + 1), int64, start token first.

        Values outside the grid go to its first or last bin.
        """
        log_tmrca = np.asarray(log_tmrca)
        grid = np.linspace(self.low, self.high, self.bins)
        bins = np.clip(np.searchsorted(grid, log_tmrca, side="right") - 1, 0, self.bins - 1)
        tokens = np.empty((*log_tmrca.shape[:-1], log_tmrca.shape[-1] + 1), dtype=np.int64)
        tokens[..., 0] = START_TOKEN
        tokens[..., 1:] = bins + SPECIAL_TOKENS
        return tokens
