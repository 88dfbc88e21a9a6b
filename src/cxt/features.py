"""The windowed joint counts of one pair of haplotypes, which are what the model reads.

A site with derived allele count c, in a pair whose two haplotypes differ there (XOR) or agree (XNOR), adds one to
bin c of that channel in every window that covers it. Windows of several widths ("scales") start at each base window
and look to the right. All scales are differences of one cumulative sum, and XNOR is what XOR leaves of all sites.
"""

import numpy as np

from cxt.kernel import haplotype_words, pairs_of_one

SCALES = (2, 8, 32, 64)
"""Window widths of the published model, in multiples of the base window."""


def num_windows(*, window_size: int, sequence_length: float) -> int:
    """Number of base windows on [0, sequence_length); the last may be shorter."""
    return int(np.ceil(sequence_length / window_size))


def usable_sites(genotypes, positions, *, sequence_length, mask=None):
    """Sites that can be counted: biallelic, segregating, inside [0, sequence_length) and accessible.

    Parameters
    ----------
    genotypes : (sites, samples) integer array, allele codes as tskit gives them
    positions : (sites,) float array, ascending, in base pairs
    mask : (>= sequence_length,) bool array or None; True = *in*accessible, per base

    Returns
    -------
    (sites kept, samples) uint8 array of 0 and 1, and their (sites kept,) float64 positions.

    Raises
    ------
    ValueError
        If shapes disagree, positions are unsorted, genotypes hold missing data, or the mask is too short.
    """
    genotypes = np.asarray(genotypes)
    positions = np.asarray(positions, dtype=np.float64)
    if genotypes.ndim != 2 or positions.shape != (genotypes.shape[0],):
        raise ValueError(
            f"genotypes {genotypes.shape} and positions {positions.shape} disagree: expected (sites, samples) and (sites,)"
        )
    if np.any(np.diff(positions) < 0):
        raise ValueError("site positions must ascend")
    if genotypes.size and genotypes.min() < 0:
        raise ValueError("genotypes hold missing data (code -1); simulated genomes are expected to be complete")
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
    # A count of 0 (a back mutation) falls in bin 0 only, which is never used.
    keep = (genotypes.max(axis=1) <= 1) & (derived >= 1) & (derived < genotypes.shape[1])
    return np.ascontiguousarray(genotypes[keep], dtype=np.uint8), positions[keep]


def first_sites(positions, *, window_size: int, windows: int):
    """First site of each base window, and the number of sites: (windows + 1,) int32.

    Window k is [k·window_size, (k+1)·window_size), and the last goes on to the last site.
    """
    edges = np.arange(1, windows, dtype=np.float64) * window_size
    inner = np.searchsorted(positions, edges, side="left")
    return np.concatenate([[0], inner, [len(positions)]]).astype(np.int32)


def missing_fraction(mask, *, window_size: int, sequence_length: int, scales=SCALES):
    """Fraction of inaccessible bases in each window: (scales, windows) float64.

    *mask* is True where a base is inaccessible. Windows are cut, not rescaled, at the right end, and the fraction is of
    what is left of them.
    """
    length = int(sequence_length)
    windows = num_windows(window_size=window_size, sequence_length=length)
    first = np.arange(windows)
    left = first * window_size
    # Summed within base windows first: a sum for every base would take sixteen times the memory of the mask.
    mask = np.asarray(mask[:length], dtype=bool)
    whole = length // window_size
    in_window = mask[: whole * window_size].reshape(whole, window_size).sum(axis=1)
    rest = [mask[whole * window_size :].sum()] if windows > whole else []
    covered = np.concatenate([[0], np.cumsum([*in_window, *rest])])
    fractions = np.empty((len(scales), windows))
    for i, scale in enumerate(scales):
        right = np.minimum(left + scale * window_size, length)
        fractions[i] = (covered[np.minimum(first + scale, windows)] - covered[first]) / (right - left)
    return fractions


def pack_haplotypes(genotypes):
    """(sites, samples) array of 0 and 1 to (sites, ceil(samples / 8)) uint8; haplotype h is bit h % 8 of byte h // 8."""
    return np.packbits(np.asarray(genotypes, dtype=np.uint8), axis=1, bitorder="little")


def pair_counts(packed, positions, pairs, *, window_size, windows, samples, scales=SCALES, out=None, dtype=np.int32):
    """Counts of usable sites for several pairs of one simulation: (pairs, 2, scales, windows, samples), bin 0 zero.

    The fast path under `pair_features`: *packed* from `pack_haplotypes`, *positions* in base pairs. *out* is filled in
    place when given.
    """
    scales = np.asarray(scales, dtype=np.int64)
    if out is None:
        out = np.empty((len(pairs), 2, len(scales), windows, samples), dtype=dtype)
    words = np.empty((samples, -(-len(packed) // 64)), dtype=np.uint64)
    haplotype_words(packed, words)
    derived = np.bitwise_count(packed).sum(axis=1, dtype=np.int32)
    first_site = first_sites(positions, window_size=window_size, windows=windows)
    # A narrow result is counted as narrowly: right wherever it can hold the counts.
    total = np.empty(windows * samples, dtype=np.int16 if out.dtype == np.int16 else np.int32)
    pairs_of_one(words, derived, first_site, np.asarray(pairs, dtype=np.int64), scales, total, out)
    return out


def write_missingness(features, fraction):
    """Write missing fractions (scales, windows) into frequency bin 0 of raw *features*, in place.

    exp(f) in the XOR channel and exp(1 - f) in the XNOR channel, as in the published model.
    """
    features[..., 0, :, :, 0] = np.exp(fraction)
    features[..., 1, :, :, 0] = np.exp(1.0 - fraction)


def check_pairs(pairs, samples: int):
    """*pairs* as an (n, 2) int64 array of two different haplotypes below *samples*; ValueError otherwise."""
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"pairs must be an integer array of shape (pairs, 2), found {pairs.dtype} {pairs.shape}")
    if len(pairs) and (pairs.min() < 0 or pairs.max() >= samples or np.any(pairs[:, 0] == pairs[:, 1])):
        raise ValueError(f"each pair must name two different haplotypes in 0..{samples - 1}")
    return pairs.astype(np.int64)


def pair_features(genotypes, positions, pairs, *, window_size, sequence_length, mask=None, scales=SCALES):
    """Raw windowed joint counts of pairs of haplotypes.

    Parameters
    ----------
    genotypes : (sites, samples) integer array
        Allele codes as tskit gives them. Sites with an allele code above 1, or at which every sample carries the
        derived allele, are dropped.
    positions : (sites,) array
        Site positions in base pairs, ascending; sites at or beyond *sequence_length* are ignored.
    pairs : (pairs, 2) integer array
        Haplotype indices.
    window_size : int
        Width s of a base window in base pairs.
    sequence_length : int
        Length L; there are ceil(L / s) windows.
    mask : (>= L,) bool array, optional
        True = *in*accessible, per base. Sites there are dropped, and frequency bin 0 carries the missingness.
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
        If shapes disagree, the mask is too short, or a pair names a haplotype that is not there.
    """
    kept, at = usable_sites(genotypes, positions, sequence_length=sequence_length, mask=mask)
    samples = kept.shape[1]
    pairs = check_pairs(pairs, samples)
    windows = num_windows(window_size=window_size, sequence_length=sequence_length)
    features = pair_counts(
        pack_haplotypes(kept),
        at,
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
            missing_fraction(mask, window_size=window_size, sequence_length=sequence_length, scales=scales),
        )
    return features
