"""The windowed joint counts of pairs of haplotypes, the input of the model.

A site with derived allele count c, at which the two haplotypes of a pair differ (XOR) or agree (XNOR), adds one to
bin c of that channel in every window that covers it. Windows of several widths ("scales") start at each base window
and extend to the right. All scales are differences of one cumulative sum, and XNOR counts are those of all sites minus XOR.
Training on a stored dataset counts through `cxt.data.kernels.fill_batch`, by the same compiled loops.
"""

import numbers
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from cxt.data.kernels import count_pairs, pack_haplotype_words

SCALES = (2, 8, 32, 64)
"""Window widths of the published model, in multiples of the base window."""


def count_windows(*, window_size: int, sequence_length: float) -> int:
    """Number of base windows on [0, sequence_length); the last may be shorter.

    Raises
    ------
    ValueError
        If *window_size* is not a positive whole number, or *sequence_length* not a positive number.
    """
    for name, value in (("window_size", window_size), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number of base pairs, got {value!r}")
    if not (1 <= window_size < np.inf and window_size == int(window_size)):
        raise ValueError(f"window_size must be a positive whole number of base pairs, got {window_size}")
    if not 0 < sequence_length < np.inf:
        raise ValueError(f"sequence_length must be a positive number of base pairs, got {sequence_length}")
    return int(np.ceil(sequence_length / window_size))


def _locate_first(wrong: np.ndarray) -> tuple[int, int]:
    """Site and haplotype of the first True value of an array (sites, haplotypes)."""
    site, haplotype = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return int(site), int(haplotype)


def check_genotypes(genotypes, *, stacklevel: int) -> np.ndarray:
    """Check that *genotypes* contain allele codes of haplotypes and nothing else; return them as an integer array.

    *stacklevel*: which caller a warning names, as in `warnings.warn`.

    Raises
    ------
    ValueError
        Naming the first value that is not an allele code (NaN, a fraction, missing data as -1 or 255), or if the array looks
        like diploid dosages.
    """
    if np.ma.is_masked(genotypes):
        site, haplotype = _locate_first(np.ma.getmaskarray(genotypes)) if genotypes.ndim == 2 else (0, 0)
        raise ValueError(f"genotypes are masked at site {site}, haplotype {haplotype}; remove sites with missing data")
    genotypes = np.asarray(genotypes)
    if genotypes.ndim != 2:
        raise ValueError(f"genotypes must have shape (sites, haplotypes), got {genotypes.shape}")
    if genotypes.dtype == bool:
        return genotypes.astype(np.int8)
    if not np.issubdtype(genotypes.dtype, np.integer):
        expected = "genotypes must be whole numbers, 0 for the ancestral allele and 1 for the derived one"
        if np.issubdtype(genotypes.dtype, np.floating) and (wrong := ~(genotypes == np.floor(genotypes))).any():
            site, haplotype = _locate_first(wrong)
            if np.isnan(genotypes[site, haplotype]):
                raise ValueError(
                    f"genotypes hold NaN at site {site}, haplotype {haplotype}, which stands for missing data; remove such "
                    "sites, and pass a mask of the positions where genotypes cannot be called"
                )
            raise ValueError(f"{expected}, got {genotypes[site, haplotype]} at site {site}, haplotype {haplotype}")
        raise ValueError(f"{expected}, got type {genotypes.dtype}. Convert them, as with `.astype('int8')`")
    for wrong in (genotypes < 0, genotypes == 255):
        if wrong.any():
            site, haplotype = _locate_first(wrong)
            raise ValueError(
                f"genotypes hold {genotypes[site, haplotype]} at site {site}, haplotype {haplotype}, which stands for missing "
                "data; remove such sites, and pass a mask of the positions where genotypes cannot be called"
            )
    above = (genotypes > 1).any(axis=1)
    if len(above) >= 20 and above.mean() > 0.25 and genotypes.max() == 2:
        raise ValueError(
            f"genotypes must have one column for each haplotype, of phased genotypes, but hold a 2 at {above.mean():.0%} of "
            "the sites, like dosages of diploid individuals"
        )
    if above.any() and above.mean() > 0.1:
        warnings.warn(
            f"dropping {above.sum()} of {len(above)} sites, which have more than two alleles (codes above 1); if these are "
            "dosages of diploid individuals, pass their phased haplotypes instead",
            stacklevel=stacklevel,
        )
    return genotypes


def check_positions(positions, *, start: float, sequence_length: float) -> np.ndarray:
    """Check *positions*, and return them relative to *start* as float64.

    Raises
    ------
    ValueError
        If a position is not finite, they do not ascend, most are outside [start, start + sequence_length), or the last one is
        exactly at the end, which suggests that positions are counted from 1.
    """
    if np.ma.is_masked(positions):
        raise ValueError("some positions are masked; remove their sites")
    positions = np.asarray(positions, dtype=np.float64)
    if not np.isfinite(positions).all():
        wrong = int(np.argmax(~np.isfinite(positions)))
        raise ValueError(f"the position of site {wrong} must be a finite number, got {positions[wrong]}")
    if np.any(np.diff(positions) < 0):
        wrong = int(np.argmax(np.diff(positions) < 0)) + 1
        raise ValueError(f"site positions must ascend: {positions[wrong]:g} comes after {positions[wrong - 1]:g}")
    end = start + sequence_length
    outside = (positions < start) | (positions >= end)
    if outside.sum() > 0.5 * len(positions):
        raise ValueError(
            f"{outside.sum()} of {len(positions)} sites are outside the region from {start:.0f} to {end:.0f} bp: positions go "
            f"from {positions[0]:.0f} to {positions[-1]:.0f}. Pass start= if the region begins elsewhere, or select its sites"
        )
    if len(positions) and positions[-1] == end:
        raise ValueError(
            f"the last site is at {positions[-1]:.0f}, which is just outside the region from {start:.0f} to {end:.0f} bp. "
            "Positions must be counted from 0: subtract 1 from those of a VCF file"
        )
    return positions - start


def check_mask(mask, *, start: float, sequence_length: float) -> np.ndarray:
    """Convert *mask* to a bool array; ValueError unless it holds bool, or 0 and 1, and begins at *start*."""
    mask = np.asarray(mask)
    if mask.dtype != bool and not (np.issubdtype(mask.dtype, np.integer) and ((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"mask must hold True (inaccessible) and False, or 1 and 0, one for each base, got values of type {mask.dtype}"
        )
    if start and mask.ndim == 1 and len(mask) > sequence_length:
        raise ValueError(
            f"mask must have {sequence_length:.0f} values, got {len(mask)}: with start=, it must begin there, too; pass "
            f"mask[{start:.0f}:{start + sequence_length:.0f}] of a mask of the whole sequence"
        )
    return mask.astype(bool, copy=False)


def select_usable_sites(genotypes, positions, *, sequence_length, mask=None):
    """Select the sites that are counted: biallelic, segregating, inside [0, sequence_length) and accessible.

    Parameters
    ----------
    genotypes : integer array (sites, samples)
        Allele codes as in tskit.
    positions : float array (sites,)
        In base pairs, ascending.
    sequence_length : float
        In base pairs.
    mask : bool array (>= sequence_length,), optional
        True = *in*accessible, for each base.

    Returns
    -------
    genotypes : uint8 array (usable sites, samples)
        0 for the ancestral and 1 for the derived allele.
    positions : float64 array (usable sites,)

    Raises
    ------
    ValueError
        If shapes disagree, positions are unsorted, genotypes hold missing data, or the mask is too short.
    """
    genotypes = np.asarray(genotypes)
    positions = np.asarray(positions, dtype=np.float64)
    if genotypes.ndim != 2 or positions.shape != (genotypes.shape[0],):
        raise ValueError(
            f"genotypes and positions must have shapes (sites, samples) and (sites,), got {genotypes.shape} and "
            f"{positions.shape}"
        )
    if not np.isfinite(positions).all() or np.any(np.diff(positions) < 0):
        raise ValueError("site positions must be finite and ascend")
    if genotypes.size and genotypes.min() < 0:
        raise ValueError("genotypes must not have missing data (code -1)")
    inside = (positions >= 0) & (positions < sequence_length)
    if mask is not None:
        mask = np.asarray(mask, dtype=bool)
        if mask.ndim != 1 or len(mask) < sequence_length:
            raise ValueError(f"mask of shape {mask.shape} is shorter than the sequence of {sequence_length:.0f} bp")
        inside[inside] = ~mask[positions[inside].astype(np.int64)]
    genotypes, positions = genotypes[inside], positions[inside]
    if not len(positions):
        return genotypes.astype(np.uint8), positions
    derived = genotypes.sum(axis=1, dtype=np.int64)
    # A count of 0 (a back mutation) would fall into bin 0, which is never used.
    keep = (genotypes.max(axis=1) <= 1) & (derived >= 1) & (derived < genotypes.shape[1])
    return np.ascontiguousarray(genotypes[keep], dtype=np.uint8), positions[keep]


def find_first_sites(positions, *, window_size: int, windows: int):
    """Index of the first site of each base window, followed by the number of sites: (windows + 1,) int32.

    Window k is [k·window_size, (k+1)·window_size); the last window includes all sites that follow.
    """
    edges = np.arange(1, windows, dtype=np.float64) * window_size
    inner = np.searchsorted(positions, edges, side="left")
    return np.concatenate([[0], inner, [len(positions)]]).astype(np.int32)


def compute_missing_fraction(mask, *, window_size: int, sequence_length: int, scales=SCALES):
    """Fraction of inaccessible bases in each window: (scales, windows) float64.

    *mask* is True where a base is inaccessible. Windows are cut at the right end, and the fraction refers to the part that is
    left.
    """
    length = int(sequence_length)
    windows = count_windows(window_size=window_size, sequence_length=length)
    first = np.arange(windows)
    left = first * window_size
    # Summed within base windows first, because a cumulative sum over bases would take sixteen times the memory of the mask.
    mask = np.asarray(mask[:length], dtype=bool)
    whole = length // window_size
    in_window = mask[: whole * window_size].reshape(whole, window_size).sum(axis=1)
    rest = [mask[whole * window_size :].sum()] if windows > whole else []
    covered = np.concatenate([[0], np.cumsum([*in_window, *rest])])
    fractions = np.empty((len(scales), windows))
    for i, scale in enumerate(np.minimum(scales, windows)):
        right = np.minimum(left + scale * window_size, length)
        fractions[i] = (covered[np.minimum(first + scale, windows)] - covered[first]) / (right - left)
    return fractions


def count_inaccessible(mask, *, window_size: int):
    """Number of inaccessible bases in each base window, (windows,) int64; the length of *mask* is a multiple of them."""
    return np.asarray(mask, dtype=bool).reshape(-1, window_size).sum(axis=1)


def compute_region_missing_fraction(inaccessible, *, window_size: int, scales):
    """The same as `compute_missing_fraction`, (scales, windows), of a region whose base windows have *inaccessible* bases."""
    windows = len(inaccessible)
    first = np.arange(windows)
    covered = np.concatenate([[0], np.cumsum(inaccessible, dtype=np.int64)])
    fractions = np.empty((len(scales), windows))
    for i, scale in enumerate(np.minimum(scales, windows)):
        end = np.minimum(first + scale, windows)
        fractions[i] = (covered[end] - covered[first]) / ((end - first) * window_size)
    return fractions


def pack_haplotypes(genotypes):
    """Pack 0 and 1 (sites, samples) into (sites, ceil(samples / 8)) uint8; haplotype h is bit h % 8 of byte h // 8."""
    return np.packbits(np.asarray(genotypes, dtype=np.uint8), axis=1, bitorder="little")


def compute_pair_counts(packed, positions, pairs, *, window_size, windows, samples, scales=SCALES, out=None, dtype=np.int32):
    """Raw joint counts of several pairs of one simulation, as in `pair_features`, but from packed usable sites.

    Parameters
    ----------
    packed : uint8 array (sites, ceil(samples / 8))
        From `pack_haplotypes`.
    positions : float64 array (sites,)
        In base pairs, ascending.
    pairs : integer array (pairs, 2)
        Haplotype indices.
    window_size : int
        Base pairs of a base window.
    windows, samples : int
        Numbers of base windows and of haplotypes.
    scales : sequence of int
        Widths of windows, in base windows.
    out : array (pairs, 2, scales, windows, samples), optional
        Array to fill in place.
    dtype : numpy dtype
        Type of the result, if *out* is not given.

    Returns
    -------
    array (pairs, 2, scales, windows, samples)
        Frequency bin 0 is 0.
    """
    scales = np.minimum(np.asarray(scales, dtype=np.int64), windows)  # wider windows end at the same place, with less memory
    if out is None:
        out = np.empty((len(pairs), 2, len(scales), windows, samples), dtype=dtype)
    words = np.empty((samples, -(-len(packed) // 64)), dtype=np.uint64)
    pack_haplotype_words(packed, words)
    derived = np.bitwise_count(packed).sum(axis=1, dtype=np.int32)
    first_site = find_first_sites(positions, window_size=window_size, windows=windows)
    # An int16 result is also counted in int16, which is correct whenever it can hold the counts.
    total = np.empty(windows * samples, dtype=np.int16 if out.dtype == np.int16 else np.int32)
    count_pairs(words, derived, first_site, np.asarray(pairs, dtype=np.int64), scales, total, out)
    return out


def write_missingness(features, fraction):
    """Write missing fractions (scales, windows) into frequency bin 0 of raw *features*, in place.

    exp(f) in the XOR channel and exp(1 - f) in the XNOR channel, as in the published model.
    """
    features[..., 0, :, :, 0] = np.exp(fraction)
    features[..., 1, :, :, 0] = np.exp(1.0 - fraction)


def check_pairs(pairs, samples: int):
    """Convert *pairs* to an (n, 2) int64 array; ValueError unless each has two different haplotypes below *samples*."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"pairs must be an integer array of shape (pairs, 2), got {pairs.dtype} {pairs.shape}")
    if len(pairs) and (pairs.min() < 0 or pairs.max() >= samples or np.any(pairs[:, 0] == pairs[:, 1])):
        raise ValueError(f"each pair must be two different haplotypes from 0 to {samples - 1}")
    return pairs.astype(np.int64)


def pair_features(
    genotypes: ArrayLike,
    positions: ArrayLike,
    pairs: ArrayLike,
    *,
    window_size: int,
    sequence_length: int,
    start: float = 0,
    mask: np.ndarray | None = None,
    scales: Sequence[int] = SCALES,
) -> np.ndarray:
    """Raw windowed joint counts of pairs of haplotypes.

    Parameters
    ----------
    genotypes : (sites, samples) integer or bool array
        Allele codes of haplotypes, as in tskit: 0 ancestral, 1 derived. Sites with an allele code above 1 (with a warning if
        these are more than a tenth), and sites at which all samples carry the same allele, are dropped.
    positions : (sites,) array
        Site positions in base pairs, counted from 0, ascending. Sites outside the region are ignored if they are at most half.
    pairs : (pairs, 2) integer array
        Haplotype indices.
    window_size : int
        Width s of a base window in base pairs.
    sequence_length : int
        Length L of the region; there are ceil(L / s) windows.
    start : float
        Start of the region in the coordinates of *positions*: the region is [start, start + L).
    mask : (>= L,) bool array, optional
        True = *in*accessible, for each base of the region. Sites there are dropped, and bin 0 carries the missingness.
    scales : sequence of int
        Widths in multiples of *window_size*. Window k at scale m is [k·s, min(k·s + m·s, L)).

    Returns
    -------
    float32 array (pairs, 2, scales, windows, samples)
        [:, 0] counts sites at which the pair differs, [:, 1] sites at which it agrees, by derived allele count
        among all samples. Bin 0 is 0, or with a mask exp(f) and exp(1 - f), f the missing fraction of the window.

    Raises
    ------
    ValueError
        If genotypes hold anything but allele codes of haplotypes, positions are not finite, do not ascend or lie mostly
        outside the region, shapes disagree, the mask is too short, or a pair names a haplotype that does not exist.
    """
    windows = count_windows(window_size=window_size, sequence_length=sequence_length)
    if not len(scales) or not all(scale >= 1 and scale == int(scale) for scale in scales):
        raise ValueError(f"scales must be positive whole numbers of windows, got {scales}")
    genotypes = check_genotypes(genotypes, stacklevel=3)
    positions = check_positions(positions, start=start, sequence_length=sequence_length)
    if mask is not None:
        mask = check_mask(mask, start=start, sequence_length=sequence_length)
    usable_genotypes, usable_positions = select_usable_sites(genotypes, positions, sequence_length=sequence_length, mask=mask)
    samples = usable_genotypes.shape[1]
    pairs = check_pairs(pairs, samples)
    features = compute_pair_counts(
        pack_haplotypes(usable_genotypes),
        usable_positions,
        pairs,
        window_size=window_size,
        windows=windows,
        samples=samples,
        scales=scales,
        dtype=np.float32,
    )
    if mask is not None:
        write_missingness(
            features,
            compute_missing_fraction(mask, window_size=window_size, sequence_length=sequence_length, scales=scales),
        )
    return features
