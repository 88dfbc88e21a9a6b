"""Posterior summaries of pairs in one block."""

from typing import NamedTuple

import numpy as np
import torch

from cxt.config.learning import Reading
from cxt.config.network import log_rates
from cxt.config.translation import DEFAULT_REPLICATES, Translation
from cxt.data.examples import compute_model_input
from cxt.data.features import SCALES
from cxt.data.grid import Grid
from cxt.decoding.decode import use_precision
from cxt.decoding.posterior import posterior_mean, posterior_quantiles
from cxt.decoding.reading import build_reader
from cxt.genotypes.store import Sites
from cxt.model.inputs import describe_outside, measure_input, reads_missingness
from cxt.model.rates import find_scale
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import hash_key
from cxt.translation.blocks import Block
from cxt.translation.pair_input import (
    choose_panel,
    compute_missing,
    count_alleles,
    count_differences,
    count_pair_sites,
    share_compared,
)

LEVELS = (0.025, 0.25, 0.5, 0.75, 0.975)
"""Quantiles that are written."""

COLUMNS = ("mean", "sd", "log_mean", *(f"q{level}" for level in LEVELS))
"""Summaries of ln TMRCA of a window: mean, standard deviation, ln of the mean TMRCA, and quantiles."""


class Reader(NamedTuple):
    """A network and how it is read.

    reading : in one pass or by sampling
    request : with the rates, replicates, panels and seed
    batch_size : pairs that are read together
    share_polarised : share of the sites that are used, because their ancestral allele is known; it lowers the mutation rate
    """

    model: CoalescenceModel
    reading: Reading
    request: Translation
    batch_size: int
    share_polarised: float = 1.0

    @property
    def replicates(self) -> int:
        """Sequences that are sampled for each pair and panel."""
        return DEFAULT_REPLICATES if self.request.replicates is None else self.request.replicates

    @property
    def kept_replicates(self) -> int:
        """Sampled sequences of each pair that are part of the output."""
        return 0 if self.request.replicates is None else self.request.replicates

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.backbone.head.weight.device

    @property
    def rates(self) -> dict[str, float | None]:
        """Keyword arguments with the rates, that of the mutations which can be seen."""
        rate = self.request.mutation_rate
        seen = None if rate is None else rate * self.share_polarised
        return {"mutation_rate": seen, "recombination_rate": self.request.recombination_rate}

    @property
    def scales(self) -> tuple[int, ...]:
        """Widths of the feature windows, in windows."""
        return SCALES if self.model.trained_on is None else self.model.trained_on.scales

    @property
    def grid(self) -> Grid:
        """The grid of ln TMRCA in generations, given the rates."""
        config = self.model.config
        scale = float(find_scale(np.array(log_rates(**self.rates)))) if config.reads_rates else 0.0
        return Grid(config.grid_low - scale, config.grid_high - scale, config.bins)


class Estimates(NamedTuple):
    """Estimates of pairs in the windows of a block that are kept.

    values : float32 (pairs, windows, COLUMNS), NaN where too little is accessible
    differences : int64 (pairs, windows), sites at which the pair differs
    bases : float32 (pairs, windows), accessible bases times the share of sites at which both haplotypes are called
    warnings : texts about input outside of the range of the training data
    bins : uint16 (pairs, replicates, windows), bins of the sampled sequences that are kept, if any
    """

    values: np.ndarray
    differences: np.ndarray
    bases: np.ndarray
    warnings: list[str]
    bins: np.ndarray


def read_block(
    reader: Reader,
    sites: Sites,
    pairs: np.ndarray,
    block: Block,
    *,
    contig: str,
    called: np.ndarray,
    candidates: np.ndarray,
    accessible: np.ndarray,
    widths: np.ndarray,
) -> Estimates:
    """Estimate the TMRCA of pairs in a block.

    Parameters
    ----------
    reader : Reader
    sites : Sites
        Those of the windows that the network reads.
    pairs : integer array (pairs, 2)
        Columns of the genotypes.
    block : Block
    contig : str
        Its name.
    called : float64 array (pairs,)
        Share of its sites at which both haplotypes of each pair are called; pairs with 0 are missing.
    candidates : integer array
        Columns of the haplotypes that panels are drawn from.
    accessible, widths : int64 arrays (windows,)
        Accessible and all bases of the windows that it reads.

    Returns
    -------
    Estimates
    """
    model, request, size = reader.model, reader.request, reader.model.config.window_size
    shape = {"start": block.first * size, "window_size": size, "windows": len(widths)}
    panels = range(request.panels if len(candidates) > model.samples else 1)
    rows = [(row, panel) for row in range(len(pairs)) for panel in panels]
    keep = slice(block.keep_from - block.first, block.keep_to - block.first)
    # To a pair, a site that is not called is what a site in the mask is to all.
    present = 1 - compute_missing(accessible, widths, reader.scales)  # (S, W)
    read = build_reader(model, reader.reading, replicates=reader.replicates, seed=request.seed)
    distribution = np.zeros((len(pairs), keep.stop - keep.start, model.config.bins))
    bins = np.zeros((len(pairs), reader.kept_replicates, keep.stop - keep.start), dtype=np.uint16)
    readable = np.zeros((len(pairs), keep.stop - keep.start))
    needed = np.maximum(request.min_accessible * widths[keep], 1)
    measures = []
    for begin in range(0, len(rows), reader.batch_size):  # only the input of one batch is in memory
        batch = rows[begin : begin + reader.batch_size]
        inputs = []
        for row, panel in batch:
            pair = tuple(pairs[row])
            columns = choose_panel(pair, candidates, samples=model.samples, seed=request.seed, panel=panel)
            inputs.append(count_pair_sites(sites, pair, columns, scales=reader.scales, **shape))
        fractions = None
        if reads_missingness(model):
            fractions = torch.from_numpy(np.stack([1 - present * one.called for one in inputs]).astype(np.float32))
        x = compute_model_input(torch.from_numpy(np.stack([one.counts for one in inputs])), fractions).to(reader.device)
        measures.append(measure_input(model, x, window_size=size, **reader.rates))
        own = np.array([row for row, _ in batch])
        shares = np.stack([one.called_once[keep] for one in inputs])
        np.add.at(readable, own, shares / len(panels))
        # With several panels, a window may be readable in the mean of all.
        most = shares if len(panels) == 1 else np.ones_like(shares)
        if not (most * accessible[keep] * (called[own] > 0)[:, None] >= needed).any():
            continue  # all windows of these pairs are missing
        ids = [hash_key("translate", contig, block.first, panel, *sorted(map(int, pairs[row]))) - 2**63 for row, panel in batch]
        with use_precision(model.precision, reader.device):
            parts, sampled = read(x, model.repeat_rates(**reader.rates, examples=len(x)), ids, None)
        parts, sampled = parts[:, keep].double().cpu().numpy(), sampled[:, : reader.kept_replicates, keep].cpu().numpy()
        for (row, panel), part, sequences in zip(batch, parts, sampled, strict=True):
            distribution[row] += part / len(panels)
            bins[row, panel :: len(panels)] = sequences[panel :: len(panels)]  # of each panel in turn
    values = summarise(torch.from_numpy(distribution), reader.grid)
    readable *= accessible[keep] * (called > 0)[:, None]
    values[readable < needed] = np.nan
    differences = np.stack([count_differences(sites, tuple(pair), **shape)[keep] for pair in pairs])
    totals = count_alleles(sites)
    shares = np.stack([share_compared(sites, tuple(pair), totals, **shape)[keep] for pair in pairs])
    bases = accessible[keep] * shares * (called > 0)[:, None]
    text = describe_outside(model, measures, **reader.rates)  # of all pairs, so that it does not depend on the batches
    return Estimates(values.astype(np.float32), differences, bases.astype(np.float32), [] if text is None else [text], bins)


def summarise(distribution: torch.Tensor, grid: Grid) -> np.ndarray:
    """Summaries of distributions over bins: (..., bins) float64 -> (..., COLUMNS) float64."""
    centres = torch.as_tensor(grid.centres)
    mean = posterior_mean(distribution, grid)
    # Within a bin, the density is uniform.
    variance = (distribution * (centres - mean.unsqueeze(-1)) ** 2).sum(-1) + grid.step**2 / 12
    log_mean = (distribution @ centres.exp()).log()
    quantiles = posterior_quantiles(distribution, grid, LEVELS)
    return torch.cat([torch.stack([mean, variance.sqrt(), log_mean], dim=-1), quantiles], dim=-1).numpy()
