"""Prediction of pairwise TMRCA from genotypes or a tree sequence.

Everything that is given is checked here, before `cxt.decoding.pieces` reads it.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import tskit
from numpy.typing import ArrayLike

from cxt.config.learning import Reading, choose_reading
from cxt.config.network import log_rates
from cxt.data.features import check_genotypes, check_mask, check_pairs, check_positions, count_windows
from cxt.data.grid import Grid
from cxt.decoding.ensembles import build_ensemble_reader, list_models
from cxt.decoding.pieces import Region, read_region
from cxt.decoding.posterior import Posterior
from cxt.decoding.region_summary import RegionSummary, summarise_region
from cxt.errors import BadRequest
from cxt.model.inputs import OutsideTraining, reads_missingness
from cxt.model.rates import find_scale
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import check_seed

Summary = Literal["windows", "region"]


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
    summarise: Summary = "windows",
) -> Posterior | RegionSummary:
    """Predict the TMRCA of pairs of haplotypes along a region.

    A region that is longer than the model reads is cut into pieces of that length. The last piece ends where the region ends;
    windows that are in two pieces are taken from the first. If there are more haplotypes than the model reads, it is given the
    two of each pair and a random subset of the others, which depends only on *seed* and the pair. The result for a pair does
    not depend on the other pairs or on *batch_size*, except for rounding.

    Sequences of a model that was trained with `carry` continue from one piece to the next: the first window of a piece is
    predicted from the bin that was sampled for the window before it.

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
        Length of the region in base pairs, at least the shortest that the model was trained with.
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
    summarise : {"windows", "region"}
        `region` gives one mean for each pair over the whole region, in place of the times of all windows.

    Returns
    -------
    Posterior
        Or, with `summarise="region"`, a `RegionSummary`.

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
        reading=reading, replicates=replicates, batch_size=batch_size, seed=seed, summarise=summarise,
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
    summarise: Summary = "windows",
) -> Posterior | RegionSummary:
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
    window_size, mask, mutation_rate, recombination_rate, reading, replicates, batch_size, seed, summarise
        As in `predict`.

    Returns
    -------
    Posterior or RegionSummary
        As `predict`.

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
        reading=reading, replicates=replicates, batch_size=batch_size, seed=seed, summarise=summarise,
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
    summarise,
) -> Posterior | RegionSummary:
    """`predict`, called by it and by `predict_ts`."""
    models = list_models(model)
    model = models[0]  # the others have the same input
    for name, value in (("replicates", replicates), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise BadRequest(f"{name} must be a positive whole number, got {value!r}")
    if summarise not in get_args(Summary):
        raise BadRequest(f"summarise must be {' or '.join(get_args(Summary))}, got {summarise!r}")
    seed = check_seed(seed)
    readings: list[Reading] = [choose_reading(one.objective, reading) for one in models]
    shortest = max(one.shortest_region for one in models)
    region = _check_region(model, genotypes, positions, pairs, sequence_length, start, mask, shortest=shortest)
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
        distribution, bins, outside = read_region(models, read, region, rates, batch_size=int(batch_size), seed=seed)
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
    posterior = Posterior(distribution, _get_grid(model, rates), region.pairs, edges)
    if summarise == "windows":
        return posterior
    return summarise_region(posterior, bins if all(one == "sampled" for one in readings) else None)


def _check_region(model, genotypes, positions, pairs, sequence_length, start, mask, *, shortest: int) -> Region:
    """Check the input of `predict` against itself and against the model."""
    size, windows = model.config.window_size, model.config.windows
    found = count_windows(window_size=size, sequence_length=sequence_length)
    if sequence_length != int(sequence_length):
        raise BadRequest(f"sequence_length must be a whole number of base pairs, got {sequence_length}")
    if found < shortest:
        fewest = f"at least {shortest}" if shortest < windows else str(windows)
        raise BadRequest(
            f"this model reads {fewest} windows of {size} bp, {shortest * size} bp in all, but "
            f"{sequence_length} bp are {found} windows. Pass a longer region (it is read in pieces), or train a model on a "
            f"dataset with `sequence_length: {found * size}`"
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
    return Region(genotypes, positions, pairs, mask, int(sequence_length))


def _get_grid(model: CoalescenceModel, rates: dict[str, float | None]) -> Grid:
    """The grid of ln TMRCA of a network that was given *rates*."""
    config = model.config
    scale = float(find_scale(np.array(log_rates(**rates)))) if config.reads_rates else 0.0
    return Grid(config.grid_low - scale, config.grid_high - scale, config.bins)
