"""TODO cxt.evaluation.baselines"""

import numpy as np

from cxt.data.features import first_sites
from cxt.data.shards import Entry
from cxt.evaluation.metrics import known, pearson_per_pair

BASELINE_WIDTHS = (1, 3, 5, 9, 15, 25, 41, 65, 101, 161, 257, 401)
"""Odd widths, in base windows and centred, among which the heterozygosity baseline takes its best."""


def differences(entry: Entry, *, window_size: int, windows: int) -> np.ndarray:
    """Sites at which each pair differs, per base window: (pairs, windows) int64."""
    window = np.repeat(np.arange(windows), np.diff(first_sites(entry.positions, window_size=window_size, windows=windows)))
    result = np.empty((len(entry.pairs), windows), dtype=np.int64)
    bits = np.unpackbits(entry.genotypes, axis=1, bitorder="little")
    for row, (a, b) in enumerate(entry.pairs):
        result[row] = np.bincount(window[bits[:, a] != bits[:, b]], minlength=windows)
    return result


def accessible_bases(entry: Entry, *, window_size: int, windows: int) -> np.ndarray:
    """Accessible bases per base window: (windows,) float64."""
    if entry.mask is None:
        return np.full(windows, float(window_size))
    return (~entry.mask).reshape(windows, window_size).sum(axis=1).astype(np.float64)


def heterozygosity_estimate(entry: Entry, width: int, *, window_size: int, windows: int, constant: float) -> np.ndarray:
    """ln((d + 1/2) / (2 mu (l + l0))), d differences on l accessible bases in *width* windows around each: (pairs, windows).

    Windows are cut at the ends. Half a difference is added so that windows without any have a logarithm, and the l0 bases on
    which half a difference is expected, l0 = 1/2 / (2 mu exp(*constant*)), so that few bases say little: where none is
    accessible, the estimate is *constant*, the ln TMRCA that one would take without any data.
    """
    half = width // 2
    left = np.maximum(np.arange(windows) - half, 0)
    right = np.minimum(np.arange(windows) + half + 1, windows)

    def summed(values):
        cumulative = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
        return cumulative[..., right] - cumulative[..., left]

    found = summed(differences(entry, window_size=window_size, windows=windows))
    bases = summed(accessible_bases(entry, window_size=window_size, windows=windows))
    return np.log((found + 0.5) / (2 * entry.mutation_rate * bases + 0.5 * np.exp(-constant)))


def best_window(entries: list[Entry], *, window_size: int, windows: int) -> dict:
    """The heterozygosity baseline at its best: the least MSE, and the largest r, over all widths, each on its own.

    It knows the best constant as well, the mean true ln TMRCA of these pairs, and falls back to it where there are few bases.
    """
    truth = np.concatenate([entry.log_tmrca for entry in entries])
    constant = float(truth.mean())
    result = {"mse": np.inf, "mse_width": None, "r": None, "r_width": None}
    for width in (w for w in BASELINE_WIDTHS if w == 1 or w // 2 < windows):
        estimate = np.concatenate(
            [
                heterozygosity_estimate(entry, width, window_size=window_size, windows=windows, constant=constant)
                for entry in entries
            ]
        )
        mse, r = float(((estimate - truth) ** 2).mean()), known(pearson_per_pair(truth, estimate))
        if mse < result["mse"]:
            result |= {"mse": mse, "mse_width": width * window_size}
        if r is not None and (result["r"] is None or r > result["r"]):
            result |= {"r": r, "r_width": width * window_size}
    return result
