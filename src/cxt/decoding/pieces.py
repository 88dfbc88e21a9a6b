"""Reading a region of any length: it is cut into pieces of the length that a network reads.

Where there are more haplotypes than the network reads, it is given the two of each pair and a random subset of the others.
"""

import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cxt.console import get_logger
from cxt.data.examples import compute_model_input
from cxt.data.features import (
    SCALES,
    compute_missing_fraction,
    compute_pair_counts,
    count_windows,
    pack_haplotypes,
    select_usable_sites,
)
from cxt.decoding.decode import use_precision
from cxt.decoding.reading import Reader
from cxt.model.inputs import check_input
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import hash_key

logger = get_logger(__name__)

PROGRESS_SECONDS = 10
"""Seconds between two lines of progress."""


class Region(NamedTuple):
    """Genotypes and pairs to read, checked; positions and mask begin at 0."""

    genotypes: np.ndarray  # (sites, haplotypes)
    positions: np.ndarray  # (sites,)
    pairs: np.ndarray  # (pairs, 2)
    mask: np.ndarray | None
    length: int


def read_region(
    models: Sequence[CoalescenceModel],
    read: Reader,
    region: Region,
    rates: dict[str, float | None],
    *,
    batch_size: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read a region piece by piece.

    Parameters
    ----------
    models : sequence of CoalescenceModel
        One, or the members of an ensemble, with the same input.
    read : Reader
        From `build_ensemble_reader`.
    region : Region
    rates : dict
        mutation_rate and recombination_rate.
    batch_size : int
        Pairs read together.
    seed : int
        Seed of the subsets of haplotypes.

    Returns
    -------
    distribution : float32 array (pairs, windows, bins)
        The predictive distributions.
    bins : int32 array (pairs, replicates, windows)
        Those of the sampled sequences; without replicates if nothing was sampled.
    outside : list of str
        Warnings about the input.
    """
    model = models[0]
    size, windows = model.config.window_size, count_windows(window_size=model.config.window_size, sequence_length=region.length)
    length = min(model.config.windows, windows)
    distribution = np.empty((len(region.pairs), windows, model.config.bins), dtype=np.float32)
    bins = np.empty((len(region.pairs), 0, windows), dtype=np.int32)
    device = model.backbone.head.weight.device
    outside: dict[str, None] = {}
    pieces = _cut_into_pieces(region.length, size, length)
    began = reported = time.monotonic()
    done, total, known = 0, len(pieces) * len(region.pairs), 0
    for first in pieces:
        for begin in range(0, len(region.pairs), batch_size):
            rows = slice(begin, begin + batch_size)
            x = _compute_input(model, region, rows, first=first, length=length, seed=seed).to(device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for one in models:
                    check_input(one, x, window_size=size, **rates)
            outside |= dict.fromkeys(str(warning.message) for warning in caught)
            ids = [hash_key("predict", first, *sorted(map(int, pair))) - 2**63 for pair in region.pairs[rows]]
            previous = torch.from_numpy(bins[rows, :, first - 1].astype(np.int64)).to(device) if first else None
            with use_precision(model.precision, device):
                average, sampled = read(x, model.repeat_rates(**rates, examples=len(x)), ids, previous)
            if sampled.shape[1] != bins.shape[1]:  # the first batch tells how many sequences are sampled
                bins = np.empty((len(region.pairs), sampled.shape[1], windows), dtype=np.int32)
            # `known` windows come from the pieces before, of which the last piece may repeat some.
            distribution[rows, known : first + length] = average[:, known - first :].float().cpu().numpy()
            bins[rows, :, known : first + length] = sampled[:, :, known - first :].cpu().numpy()
            done += len(x)
            if time.monotonic() - reported > PROGRESS_SECONDS and done < total:
                reported = time.monotonic()
                left = (reported - began) / done * (total - done)
                logger.info(f"predicted {done / total:.0%}, {left:.0f} s left")
        known = first + length
    return distribution, bins, list(outside)


def _cut_into_pieces(length: int, window_size: int, windows: int) -> list[int]:
    """First window of each piece of *windows* windows: one after another, the last one ending at the end of the region."""
    total = count_windows(window_size=window_size, sequence_length=length)
    return [*range(0, total - windows, windows), total - windows]


def _choose_haplotypes(pair: np.ndarray, *, haplotypes: int, samples: int, seed: int) -> np.ndarray:
    """The two haplotypes of a pair and a random subset of the others, *samples* in ascending order."""
    others = np.setdiff1d(np.arange(haplotypes), pair)
    key = hash_key("haplotypes", seed, *sorted(map(int, pair)))
    return np.sort(np.concatenate([pair, np.random.default_rng(key).choice(others, samples - 2, replace=False)]))


def _compute_input(model: CoalescenceModel, region: Region, rows: slice, *, first: int, length: int, seed: int) -> torch.Tensor:
    """The network's input for the pairs *rows* in the piece of *length* windows that begins at window *first*."""
    size, windows, samples = model.config.window_size, length, model.samples
    scales = SCALES if model.trained_on is None else model.trained_on.scales
    begin, end = first * size, min((first + windows) * size, region.length)
    left, right = np.searchsorted(region.positions, [begin, end])
    genotypes, positions = region.genotypes[left:right], region.positions[left:right] - begin
    mask = None if region.mask is None else region.mask[begin:end]

    def count(columns, pairs):
        usable, at = select_usable_sites(genotypes[:, columns], positions, sequence_length=end - begin, mask=mask)
        packed = pack_haplotypes(usable)
        return compute_pair_counts(packed, at, pairs, window_size=size, windows=windows, samples=samples, scales=scales)

    pairs, haplotypes = region.pairs[rows], region.genotypes.shape[1]
    if haplotypes == samples:
        counts = count(slice(None), pairs)
    else:
        parts = []
        for pair in pairs:
            columns = _choose_haplotypes(pair, haplotypes=haplotypes, samples=samples, seed=seed)
            parts.append(count(columns, np.searchsorted(columns, pair)[None]))
        counts = np.concatenate(parts)
    missing = None
    if mask is not None:
        fraction = compute_missing_fraction(mask, window_size=size, sequence_length=end - begin, scales=scales)
        missing = torch.from_numpy(np.broadcast_to(fraction, (len(pairs), *fraction.shape)).astype(np.float32))
    return compute_model_input(torch.from_numpy(counts), missing)
