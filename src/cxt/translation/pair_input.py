"""The network's input for pairs of haplotypes in a block, where some genotypes may be missing.

A site at which one of the two haplotypes is missing is left out for that pair. Where others are missing, the frequency of the
derived allele among those that are called is projected to the number of haplotypes that the network reads. A network that
reads missingness is told of the sites that were left out as if the same share of the bases were inaccessible.
"""

from typing import NamedTuple

import numpy as np

from cxt.data.features import find_first_sites
from cxt.data.kernels import count_pairs, pack_haplotype_words
from cxt.genotypes.store import Sites
from cxt.random_seeds import hash_key

LEAST_CALLED = 0.5
"""A site is left out if less than this share of the haplotypes is called."""


class PairInput(NamedTuple):
    """Input of one pair.

    counts : int32 (2, scales, windows, samples)
    called : float64 (scales, windows), share of the segregating sites of each window that are used for this pair
    called_once : float64 (windows,), the same for the windows themselves
    """

    counts: np.ndarray
    called: np.ndarray
    called_once: np.ndarray


def choose_panel(pair: tuple[int, int], candidates: np.ndarray, *, samples: int, seed: int, panel: int) -> np.ndarray:
    """The two haplotypes of a pair and a random subset of the other *candidates*: *samples* indices, ascending.

    It depends on the seed, the pair (in any order) and the number of the *panel* only.
    """
    others = candidates[~np.isin(candidates, pair)]
    key = hash_key("haplotypes", seed, panel, *sorted(map(int, pair)))
    chosen = np.random.default_rng(key).choice(others, samples - 2, replace=False)
    return np.sort(np.concatenate([np.asarray(pair), chosen]))


def count_pair_sites(
    sites: Sites, pair: tuple[int, int], panel: np.ndarray, *, start: int, window_size: int, windows: int, scales
) -> PairInput:
    """Count the sites of a block for one pair.

    Parameters
    ----------
    sites : Sites
        Those of the block.
    pair : (int, int)
        Two columns of the genotypes.
    panel : integer array
        Columns of all haplotypes that the network reads, those of the pair included.
    start : int
        First base of the block.
    window_size, windows : int
        Base pairs of a window, and windows of the block.
    scales : sequence of int
        Widths of the feature windows, in windows.

    Returns
    -------
    PairInput
    """
    samples = len(panel)
    scales = np.minimum(np.asarray(scales, dtype=np.int64), windows)
    missing = sites.missing[:, panel]
    derived = sites.derived[:, panel].sum(axis=1, dtype=np.int64)
    called = samples - missing.sum(axis=1, dtype=np.int64)
    segregating = (derived >= 1) & (derived < called)
    usable = segregating & ~sites.missing[:, pair].any(axis=1) & (called >= LEAST_CALLED * samples)
    frequency = np.rint(derived[usable] * (samples / called[usable])).astype(np.int32)
    frequency = np.clip(frequency, 1, samples - 1)
    positions = (sites.positions[usable] - start).astype(np.float64)
    first_site = find_first_sites(positions, window_size=window_size, windows=windows)
    packed = np.packbits(sites.derived[usable][:, pair], axis=1, bitorder="little")
    words = np.empty((2, -(-len(packed) // 64)), dtype=np.uint64)
    pack_haplotype_words(packed, words)
    counts = np.empty((1, 2, len(scales), windows, samples), dtype=np.int32)
    total = np.empty(windows * samples, dtype=np.int32)
    count_pairs(words, frequency, first_site, np.array([[0, 1]]), scales, total, counts)
    lost = np.bincount((sites.positions[segregating & ~usable] - start) // window_size, minlength=windows)
    called_once, *called_at_scales = _share_called(np.diff(first_site), lost, [1, *scales])
    return PairInput(counts[0], np.stack(called_at_scales), called_once)


def _share_called(used: np.ndarray, lost: np.ndarray, scales) -> np.ndarray:
    """Used sites as a share of used and lost ones, in the windows of each scale: (windows,) twice -> (scales, windows).

    A window without sites has the share of the whole block.
    """
    total = used.sum() + lost.sum()
    shares = np.full((len(scales), len(used)), used.sum() / total if total else 1.0)
    if lost.any():
        for i, scale in enumerate(scales):
            sums = [sum_windows(values, scale) for values in (used, lost)]
            np.divide(sums[0], sums[0] + sums[1], out=shares[i], where=sums[0] + sums[1] > 0)
    return shares


def sum_windows(values: np.ndarray, scale: int) -> np.ndarray:
    """Sums of *scale* windows from each window to the right, cut at the end: (windows,) -> (windows,)."""
    cumulative = np.concatenate([[0], np.cumsum(values)])
    first = np.arange(len(values))
    return cumulative[np.minimum(first + scale, len(values))] - cumulative[first]


def compute_missing(accessible: np.ndarray, widths: np.ndarray, scales) -> np.ndarray:
    """Share of inaccessible bases in the windows of each scale: (windows,) bases twice -> (scales, windows)."""
    return np.stack([1 - sum_windows(accessible, scale) / sum_windows(widths, scale) for scale in scales])


def count_alleles(sites: Sites) -> tuple[np.ndarray, np.ndarray]:
    """Number of derived alleles, and of called haplotypes, at each site: int64 (sites,) each."""
    return sites.derived.sum(axis=1, dtype=np.int64), (~sites.missing).sum(axis=1, dtype=np.int64)


def share_compared(
    sites: Sites,
    pair: tuple[int, int],
    totals: tuple[np.ndarray, np.ndarray],
    *,
    start: int,
    window_size: int,
    windows: int,
) -> np.ndarray:
    """Share of the sites of each window at which both haplotypes of a pair are called, (windows,) float64.

    It is the share of the differences of the pair that `count_differences` can see. It is found from the sites that segregate
    among all other haplotypes. A site that only the pair shows to be one is hidden where a genotype of the pair is missing, so
    that such sites would seem to be called more often than they are.

    Parameters
    ----------
    sites : Sites
    pair : (int, int)
    totals : (int64 (sites,), int64 (sites,))
        From `count_alleles`.
    start, window_size, windows : int
        As in `count_pair_sites`.
    """
    derived, called = totals
    known = ~sites.missing[:, pair]
    others_derived = derived - sites.derived[:, pair].sum(axis=1, dtype=np.int64)
    others_called = called - known.sum(axis=1)
    segregating = (others_derived >= 1) & (others_derived < others_called)
    compared = known.all(axis=1)
    used, lost = (
        np.bincount((sites.positions[chosen] - start) // window_size, minlength=windows)
        for chosen in (segregating & compared, segregating & ~compared)
    )
    return _share_called(used, lost, [1])[0]


def count_differences(sites: Sites, pair: tuple[int, int], *, start: int, window_size: int, windows: int) -> np.ndarray:
    """Sites of each window at which both haplotypes of a pair are called and differ, (windows,) int64."""
    a, b = pair
    differ = (sites.derived[:, a] != sites.derived[:, b]) & ~sites.missing[:, a] & ~sites.missing[:, b]
    return np.bincount((sites.positions[differ] - start) // window_size, minlength=windows)
