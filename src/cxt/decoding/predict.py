"""Prediction of pairwise TMRCA from genotypes or a tree sequence.

Everything between a genotype matrix and a posterior happens here: the region is cut into pieces of the length that the model
reads, haplotypes are drawn where there are more than it reads, and windowed counts are computed, decoded and averaged.
"""

import math
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import tskit
from numpy.typing import ArrayLike

from cxt.config.learning import Reading, choose_reading
from cxt.config.network import log_rates
from cxt.console import get_logger
from cxt.data.examples import compute_model_input
from cxt.data.features import (
    SCALES,
    check_genotypes,
    check_mask,
    check_pairs,
    check_positions,
    compute_missing_fraction,
    compute_pair_counts,
    count_windows,
    pack_haplotypes,
    select_usable_sites,
)
from cxt.data.grid import Grid
from cxt.decoding.decode import use_precision
from cxt.decoding.ensembles import build_ensemble_reader, list_models
from cxt.decoding.posterior import Posterior
from cxt.decoding.reading import Reader
from cxt.errors import BadRequest
from cxt.model.inputs import OutsideTraining, check_input, reads_missingness
from cxt.model.rates import find_scale
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import check_seed, hash_key

logger = get_logger(__name__)

PROGRESS_SECONDS = 10
"""Seconds between two lines of progress."""


class _Region(NamedTuple):
    """What `predict` was given, checked; positions and mask begin at 0."""

    genotypes: np.ndarray  # (sites, haplotypes)
    positions: np.ndarray  # (sites,)
    pairs: np.ndarray  # (pairs, 2)
    mask: np.ndarray | None
    length: int


def predict(
    model: CoalescenceModel | Sequence[CoalescenceModel],
    genotypes: ArrayLike,
    positions: ArrayLike,
    pairs: ArrayLike,
    *,
    sequence_length: int,
    start: float = 0,
    window_size: int | None = None,
    mask: np.ndarray | None = None,
    mutation_rate: float | None = None,
    recombination_rate: float | None = None,
    reading: str | None = None,
    replicates: int = 15,
    batch_size: int = 8,
    seed: int = 0,
) -> Posterior:
    """Predict the TMRCA of pairs of haplotypes along a region.

    A region that is longer than the model reads is cut into pieces of that length. The last piece ends where the region ends;
    windows that are in two pieces are taken from the first. If there are more haplotypes than the model reads, it is given the
    two of each pair and a random subset of the others, which depends only on *seed* and the pair. The result for a pair does
    not depend on the other pairs or on *batch_size*, except for rounding.

    Parameters
    ----------
    model : CoalescenceModel or list of CoalescenceModel
        From `cxt.load_model`. Several models with the same input are an ensemble: each is read as it was trained, and their
        predictive distributions are averaged.
    genotypes : (sites, haplotypes) integer or bool array
        Phased alleles: 0 ancestral, 1 derived. Sites with more than two alleles, and those at which all haplotypes carry the
        same allele, are dropped.
    positions : (sites,) array
        Site positions in base pairs, counted from 0, ascending.
    pairs : (pairs, 2) integer array
        Haplotype indices, columns of *genotypes*.
    sequence_length : int
        Length of the region in base pairs, at least what the model reads.
    start : float
        Start of the region in the coordinates of *positions*.
    window_size : int, optional
        Base pairs of a window, to state which one is expected; by default the model's.
    mask : (>= sequence_length,) bool array, optional
        True = *in*accessible, for each base of the region. A model that was trained with missing data needs it.
    mutation_rate, recombination_rate : float, optional
        Per base pair and generation, to be compared with those of the training data. A model with `reads_rates` uses them:
        times are inversely proportional to the mutation rate (if the recombination rate keeps its ratio to it, or is not
        given), and only the ratio of both is compared. The model infers rates that are not given.
    reading : str, optional
        `marginal` reads a pair's windows in one pass, `sampled` averages the predictive distributions of sampled sequences. By
        default the one that the model was trained for.
    replicates : int
        Sequences to sample for each pair, if they are sampled.
    batch_size : int
        Pairs decoded together.
    seed : int
        Seed of the sampling and of the subsets of haplotypes.

    Returns
    -------
    Posterior

    Raises
    ------
    ValueError
        If genotypes, positions, pairs or mask are not valid, see `cxt.pair_features`.
    BadRequest
        If the region is too short, there are fewer haplotypes than the model reads, the window size is not the model's, the
        model reads missing data and there is no mask, several models read different inputs, or a setting is not valid.

    Warns
    -----
    cxt.OutsideTraining
        If diversity, missing data or a given rate is outside the range of the training data.
    """
    return _predict(
        model, genotypes, positions, pairs, sequence_length=sequence_length, start=start, window_size=window_size, mask=mask,
        rates={"mutation_rate": mutation_rate, "recombination_rate": recombination_rate},
        reading=reading, replicates=replicates, batch_size=batch_size, seed=seed,
    )  # fmt: skip


def predict_ts(
    model: CoalescenceModel | Sequence[CoalescenceModel],
    ts: tskit.TreeSequence,
    pairs: ArrayLike,
    *,
    start: float = 0,
    sequence_length: int | None = None,
    window_size: int | None = None,
    mask: np.ndarray | None = None,
    mutation_rate: float | None = None,
    recombination_rate: float | None = None,
    reading: str | None = None,
    replicates: int = 15,
    batch_size: int = 8,
    seed: int = 0,
) -> Posterior:
    """Predict the TMRCA of pairs of samples of a tree sequence, from its genotypes and rates that are given, not its trees.

    Parameters
    ----------
    model : CoalescenceModel or list of CoalescenceModel
        From `cxt.load_model`; several are an ensemble, as in `predict`.
    ts : tskit.TreeSequence
        With mutations.
    pairs : (pairs, 2) integer array
        Indices of samples, from 0 to `ts.num_samples` - 1 (not node ids).
    start : float
        Start of the region in base pairs.
    sequence_length : int, optional
        Length of the region in base pairs; by default, to the end of the tree sequence.
    window_size, mask, mutation_rate, recombination_rate, reading, replicates, batch_size, seed
        As in `predict`.

    Returns
    -------
    Posterior

    Raises
    ------
    BadRequest
        If the tree sequence has no mutations, or the region is not in it; see also `predict`.

    Warns
    -----
    cxt.OutsideTraining
        See `predict`.
    """
    if not isinstance(ts, tskit.TreeSequence):
        raise BadRequest(f"ts must be a tskit.TreeSequence, got {type(ts).__name__}")
    if not ts.num_sites:
        raise BadRequest("the tree sequence has no mutations; add them, as with msprime.sim_mutations")
    length = math.floor(ts.sequence_length - start) if sequence_length is None else sequence_length
    if not 0 <= start < start + length <= ts.sequence_length:
        raise BadRequest(
            f"the region from {start:.0f} to {start + length:.0f} bp is not inside the tree sequence, which ends at "
            f"{ts.sequence_length:.0f} bp"
        )
    left, right = np.searchsorted(ts.sites_position, [start, start + length])
    genotypes = np.empty((right - left, ts.num_samples), dtype=np.int32)
    for row, variant in enumerate(ts.variants(left=start, right=start + length)):
        genotypes[row] = variant.genotypes
    return _predict(
        model, genotypes, ts.sites_position[left:right], pairs, sequence_length=length, start=start, window_size=window_size,
        mask=mask, rates={"mutation_rate": mutation_rate, "recombination_rate": recombination_rate},
        reading=reading, replicates=replicates, batch_size=batch_size, seed=seed,
    )  # fmt: skip


def _predict(
    model,
    genotypes,
    positions,
    pairs,
    *,
    sequence_length,
    start,
    window_size,
    mask,
    rates,
    reading,
    replicates,
    batch_size,
    seed,
) -> Posterior:
    """`predict`, called by it and by `predict_ts`."""
    models = list_models(model)
    model = models[0]  # the others have the same input
    for name, value in (("replicates", replicates), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise BadRequest(f"{name} must be a positive whole number, got {value!r}")
    seed = check_seed(seed)
    readings: list[Reading] = [choose_reading(one.objective, reading) for one in models]
    region = _check_region(model, genotypes, positions, pairs, sequence_length, start, mask)
    size = model.config.window_size
    if window_size is not None and window_size != size:
        raise BadRequest(
            f"this model reads windows of {size} bp, got window_size={window_size}; use a checkpoint that was trained with "
            f"windows of {window_size} bp, or leave window_size out"
        )
    were_training = [one.training for one in models]
    for one in models:
        one.eval()
    try:
        read = build_ensemble_reader(models, readings, replicates=int(replicates), seed=seed)
        distribution, outside = _decode_region(models, read, region, rates, batch_size=int(batch_size), seed=seed)
    finally:
        for one, was_training in zip(models, were_training, strict=True):
            one.train(was_training)
    if outside:
        more = f" (and {len(outside) - 1} more such warnings, for other parts of the input)" if len(outside) > 1 else ""
        warnings.warn(
            outside[0] + more,
            OutsideTraining,
            stacklevel=3,  # the caller of `predict` or `predict_ts`
        )
    edges = start + np.minimum(np.arange(distribution.shape[1] + 1) * float(size), region.length)
    return Posterior(distribution, _get_grid(model, rates), region.pairs, edges)


def _check_region(model, genotypes, positions, pairs, sequence_length, start, mask) -> _Region:
    """Check the input of `predict` against itself and against the model."""
    size, windows = model.config.window_size, model.config.windows
    found = count_windows(window_size=size, sequence_length=sequence_length)
    if sequence_length != int(sequence_length):
        raise BadRequest(f"sequence_length must be a whole number of base pairs, got {sequence_length}")
    if found < windows:
        raise BadRequest(
            f"this model reads {windows} windows of {size} bp, {windows * size} bp in all, but {sequence_length} bp are "
            f"{found} windows. Pass a longer region (it is read in pieces), or train a model on a dataset with "
            f"`sequence_length: {found * size}`"
        )
    genotypes = check_genotypes(genotypes, stacklevel=5)  # the caller of `predict` or `predict_ts`
    haplotypes = genotypes.shape[1]
    if haplotypes < model.samples:
        raise BadRequest(
            f"this model reads {model.samples} haplotypes, got {haplotypes}. Use a checkpoint for fewer, such as broad_adapter "
            f"for 10, or train one: a dataset with `samples: {haplotypes}`, and a model with `adapter: {{}}` and "
            "`checkpoint:` this model"
        )
    positions = np.asarray(positions)
    if positions.shape != genotypes.shape[:1]:
        transposed = "; genotypes must have a row for each site" if positions.shape == genotypes.shape[1:] else ""
        raise BadRequest(
            f"positions must hold one number for each of the {len(genotypes)} sites, got shape {positions.shape}{transposed}"
        )
    positions = check_positions(positions, start=start, sequence_length=sequence_length)
    pairs = check_pairs(pairs, haplotypes)
    if not len(pairs):
        raise BadRequest("pairs is empty")
    if mask is not None:
        mask = check_mask(mask, start=start, sequence_length=sequence_length)
    elif reads_missingness(model):
        raise BadRequest(
            "this model reads missing data; pass mask=, True where a base is inaccessible (all False if none is): "
            f"numpy.zeros({sequence_length}, dtype=bool)"
        )
    return _Region(genotypes, positions, pairs, mask, int(sequence_length))


def _get_grid(model: CoalescenceModel, rates: dict[str, float | None]) -> Grid:
    """The grid of ln TMRCA of a network that was given *rates*."""
    config = model.config
    scale = float(find_scale(np.array(log_rates(**rates)))) if config.reads_rates else 0.0
    return Grid(config.grid_low - scale, config.grid_high - scale, config.bins)


def _decode_region(
    models: list[CoalescenceModel],
    read: Reader,
    region: _Region,
    rates: dict[str, float | None],
    *,
    batch_size: int,
    seed: int,
) -> tuple[np.ndarray, list[str]]:
    """The predictive distributions (pairs, windows, bins) float32 of a region, and the warnings about its input."""
    model = models[0]  # the others have the same input
    size, length = model.config.window_size, model.config.windows
    windows = count_windows(window_size=size, sequence_length=region.length)
    distribution = np.empty((len(region.pairs), windows, model.config.bins), dtype=np.float32)
    device = model.backbone.head.weight.device
    outside: dict[str, None] = {}
    pieces = _cut_into_pieces(region.length, size, length)
    began = reported = time.monotonic()
    done, total, known = 0, len(pieces) * len(region.pairs), 0
    for first in pieces:
        for begin in range(0, len(region.pairs), batch_size):
            rows = slice(begin, begin + batch_size)
            x = _compute_input(model, region, rows, first=first, seed=seed).to(device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for one in models:
                    check_input(one, x, window_size=size, **rates)
            outside |= dict.fromkeys(str(warning.message) for warning in caught)
            ids = [hash_key("predict", first, *sorted(map(int, pair))) - 2**63 for pair in region.pairs[rows]]
            with use_precision(model.precision, device):
                average = read(x, model.repeat_rates(**rates, examples=len(x)), ids)
            # `known` windows come from the pieces before, of which the last piece may repeat some.
            distribution[rows, known : first + length] = average[:, known - first :].float().cpu().numpy()
            done += len(x)
            if time.monotonic() - reported > PROGRESS_SECONDS and done < total:
                reported = time.monotonic()
                left = (reported - began) / done * (total - done)
                logger.info(f"predicted {done / total:.0%}, {left:.0f} s left")
        known = first + length
    return distribution, list(outside)


def _cut_into_pieces(length: int, window_size: int, windows: int) -> list[int]:
    """First window of each piece of *windows* windows: one after another, the last one ending at the end of the region."""
    total = count_windows(window_size=window_size, sequence_length=length)
    return [*range(0, total - windows, windows), total - windows]


def _choose_haplotypes(pair: np.ndarray, *, haplotypes: int, samples: int, seed: int) -> np.ndarray:
    """The two haplotypes of a pair and a random subset of the others, *samples* in ascending order."""
    others = np.setdiff1d(np.arange(haplotypes), pair)
    key = hash_key("haplotypes", seed, *sorted(map(int, pair)))
    return np.sort(np.concatenate([pair, np.random.default_rng(key).choice(others, samples - 2, replace=False)]))


def _compute_input(model: CoalescenceModel, region: _Region, rows: slice, *, first: int, seed: int) -> torch.Tensor:
    """The network's input for the pairs *rows* in the piece that begins at window *first*."""
    size, windows, samples = model.config.window_size, model.config.windows, model.samples
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
