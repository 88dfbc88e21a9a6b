"""Compiled loops for features and loading: bit operations, windowed counts of a pair, and batches of examples.

They are single-threaded and release Python's global lock, so that several threads can load batches in parallel.
"""

import functools
import warnings

import numba
import numpy as np


def compiled(function):
    """Compile *function* with numba on its first call, to run without Python's global lock, and cache it on disk.

    The cache is beside the package, in the user's cache directory or in `NUMBA_CACHE_DIR`. If none of these is writable (as in
    a read-only container), each process compiles again, with one warning.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
    _warn_uncached()
    return numba.njit(nogil=True)(function)


@functools.cache
def _warn_uncached() -> None:
    warnings.warn(
        "compiled code cannot be cached, because neither the package's directory nor the user's cache directory is writable: "
        "each process compiles again; set NUMBA_CACHE_DIR to a writable directory",
        RuntimeWarning,
        stacklevel=2,
    )


_PLACES = np.zeros(64, dtype=np.int64)
_DE_BRUIJN = 0x03F79D71B4CB0A89  # each of its 64 runs of six bits is a different number
for _place in range(64):
    _PLACES[(_DE_BRUIJN << _place & 2**64 - 1) >> 58] = _place


@compiled
def find_lowest_bit(word):
    """Position of the lowest set bit of a uint64, which must not be 0."""
    lowest = word & (~word + np.uint64(1))
    return _PLACES[(lowest * np.uint64(_DE_BRUIJN)) >> np.uint64(58)]


@compiled
def count_bits(word):
    """Number of set bits of a uint64."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def accumulate(cumulative, samples):
    """Sum *cumulative* ((windows + 1) · samples,) over windows in place: row k + 1 initially holds the counts of window k."""
    for end in range(2 * samples, len(cumulative) + 1, samples):
        previous_row, row = cumulative[end - 2 * samples : end - samples], cumulative[end - samples : end]
        for v in range(samples):
            row[v] += previous_row[v]


@compiled
def _accumulate_both(differ, total, agree, samples):
    """Accumulate *differ* over windows in place, and fill *agree* with the sums of *total* - *differ*.

    *total* is (windows · samples,). Rows beyond the last window repeat its sum, so that windows of any scale end inside them.
    """
    differ_sum, agree_sum = np.zeros(samples, differ.dtype), np.zeros(samples, differ.dtype)
    agree[:samples] = 0
    for begin in range(0, len(total), samples):
        all_row = total[begin : begin + samples]
        differ_row, agree_row = differ[begin + samples : begin + 2 * samples], agree[begin + samples : begin + 2 * samples]
        for v in range(samples):
            differ_sum[v] += differ_row[v]
            agree_sum[v] += all_row[v] - differ_row[v]
            differ_row[v], agree_row[v] = differ_sum[v], agree_sum[v]
    for begin in range(len(total) + samples, len(differ), samples):
        differ[begin : begin + samples] = differ_sum
        agree[begin : begin + samples] = agree_sum


@compiled
def _subtract(above, below, out):
    for i in range(len(out)):
        out[i] = above[i] - below[i]


@compiled
def _all_scales(cumulative, scales, first, windows, out):
    """Fill *windows* windows of *out* (scales, …, samples), from *first* on, from the sums of `_accumulate_both`."""
    samples = out.shape[2]
    for m in range(len(scales)):
        counts = out[m].reshape(out.shape[1] * samples)[first * samples : (first + windows) * samples]
        _subtract(cumulative[scales[m] * samples :], cumulative, counts)


@compiled
def _copy(source, out):
    for i in range(len(out)):
        out[i] = source[i]


@compiled
def count_all_sites(derived, first_site, samples, out):
    """Add all sites to *out* (windows · samples,), by window and derived allele count."""
    for k in range(len(first_site) - 1):
        for j in range(first_site[k], first_site[k + 1]):
            out[k * samples + derived[j]] += 1


@compiled
def allocate_sums(total, scales, samples):
    """Scratch memory for `count_pair`: a row for each window of *total*, and one for each window of the widest scale."""
    return np.empty(len(total) + scales.max() * samples, total.dtype)


@compiled
def count_pair(words, derived, first_site, total, a, b, scales, differ, agree, first, out):
    """Fill windows of *out* (2, scales, …, samples), from *first* on, for haplotypes a and b of one simulation; bin 0 is zero.

    *words* (samples, words) holds 64 sites of a haplotype per word; *derived* (sites,) the derived allele counts, *first_site*
    (windows + 1,) the first site of each window; *total* (windows · samples,) is from `count_all_sites`. *differ* and *agree*
    are from `allocate_sums`. All three may be int16: differences are correct even if the sums have wrapped around.

    The windows may be some of the simulation's only: sites before the first and after the last of them are not counted.
    """
    windows, samples = len(first_site) - 1, out.shape[3]
    begin, end = np.int64(first_site[0]), np.int64(first_site[windows])
    differ[:] = 0
    window = 0
    for w in range(begin >> 6, (end + 63) >> 6):
        word = words[a, w] ^ words[b, w]
        if 64 * w < begin:
            word &= ~np.uint64(0) << np.uint64(begin - 64 * w)
        if 64 * w + 64 > end:
            word &= ~np.uint64(0) >> np.uint64(64 * w + 64 - end)
        while word:
            j = 64 * w + find_lowest_bit(word)
            word &= word - np.uint64(1)
            while j >= first_site[window + 1]:
                window += 1
            differ[(window + 1) * samples + derived[j]] += 1
    _accumulate_both(differ, total, agree, samples)
    _all_scales(differ, scales, first, windows, out[0])
    _all_scales(agree, scales, first, windows, out[1])


@compiled
def pack_haplotype_words(packed, words):
    """Fill *words* (samples, ceil(sites / 64)) uint64 from *packed* sites: site j is bit j % 64 of word j // 64."""
    for h in range(len(words)):
        for w in range(words.shape[1]):
            word = np.uint64(0)
            for j in range(64 * w, min(64 * w + 64, len(packed))):
                word |= np.uint64((packed[j, h >> 3] >> (h & 7)) & 1) << np.uint64(j - 64 * w)
            words[h, w] = word


@compiled
def count_pairs(words, derived, first_site, pairs, scales, total, out):
    """Run `count_pair` for several *pairs* of one simulation; *total* is scratch memory of the type to count in."""
    samples = out.shape[4]
    differ, agree = allocate_sums(total, scales, samples), allocate_sums(total, scales, samples)
    total[:] = 0
    count_all_sites(derived, first_site, samples, total)
    for p in range(len(pairs)):
        count_pair(words, derived, first_site, total, pairs[p, 0], pairs[p, 1], scales, differ, agree, 0, out[p])


@compiled
def pack_bins(bins, width, out):
    """Write *bins* (pairs, windows), *width* bits each, one after another into *out* (pairs, words) uint64."""
    out[:] = 0
    for p in range(len(bins)):
        for k in range(bins.shape[1]):
            word, shift = (k * width) >> 6, (k * width) & 63
            value = np.uint64(bins[p, k])
            out[p, word] |= value << np.uint64(shift)
            if shift + width > 64:
                out[p, word + 1] |= value >> np.uint64(64 - shift)


@compiled
def unpack_bins(packed, width, start, out):
    """Unpack bins of one pair, packed by `pack_bins`: of *packed* (words,) those of window *start* and after to *out*."""
    every = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    for k in range(len(out)):
        word, shift = ((start + k) * width) >> 6, ((start + k) * width) & 63
        value = packed[word] >> np.uint64(shift)
        if shift + width > 64:
            value |= packed[word + 1] << np.uint64(64 - shift)
        out[k] = np.int64(value & every)


@compiled
def find_largest_count(cumulative, samples, scale):
    """Largest count of any bin in a window of *scale* base windows, from a cumulative sum; it bounds all counts."""
    most, last = 0, len(cumulative) - samples
    for i in range(last):
        most = max(most, cumulative[min(i + scale * samples, last + i % samples)] - cumulative[i])
    return most


@compiled
def fill_batch(regions, data, scales, width, counts, bins):
    """Counts and bins of several regions at once, into *counts* (B, 2, scales, windows, samples) and *bins* (B, windows).

    Each row of *regions* (regions, 6), int64, is a simulation, the number of a pair in it, the region's first window there and
    its number of windows, and its place: the row of the batch, and its first window in that row. *data* holds the arrays of
    `cxt.data.pair_dataset.PairDataset`.
    """
    words, word_offsets, derived, site_offsets, first_site, totals, total_fits, pairs, packed_bins = data
    samples = counts.shape[4]
    longest = regions[:, 3].max() if len(regions) else 0
    all_total = np.empty(longest * samples, counts.dtype)
    all_differ, all_agree = allocate_sums(all_total, scales, samples), allocate_sums(all_total, scales, samples)
    last, last_start, last_windows = -1, -1, -1
    for i in range(len(regions)):
        row, column, start, windows, place, first = regions[i]
        total = all_total[: windows * samples]
        derived_counts = derived[site_offsets[row] : site_offsets[row + 1]]
        sites = first_site[row, start : start + windows + 1]
        if row != last or start != last_start or windows != last_windows:
            last, last_start, last_windows = row, start, windows
            if total_fits[row]:
                _copy(totals[row, start * samples : (start + windows) * samples], total)
            else:
                total[:] = 0
                count_all_sites(derived_counts, sites, samples, total)
        widths = np.minimum(scales, windows)  # wider windows end at the same place
        used = (windows + widths.max()) * samples
        haplotypes = words[word_offsets[row] : word_offsets[row + 1]].reshape(
            (samples, (word_offsets[row + 1] - word_offsets[row]) // samples)
        )
        a, b = pairs[row, column, 0], pairs[row, column, 1]
        differ, agree = all_differ[:used], all_agree[:used]
        count_pair(haplotypes, derived_counts, sites, total, a, b, widths, differ, agree, first, counts[place])
        unpack_bins(packed_bins[row, column], width, start, bins[place, first : first + windows])
