"""The terms of the loss: functions of logits and true bins.

Each takes logits (N, V) in float32 and labels (N,), tokens, and returns the mean or the sum over the N windows. The order of
bins matters to all but cross-entropy and z-loss: being wrong by one bin is better than being wrong by many.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from cxt.config.learning import SMOOTHING_WIDTH, LossTerm
from cxt.config.network import SPECIAL_TOKENS
from cxt.data.grid import Grid
from cxt.data.soft_targets import LEVELS, UNIT

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits (N, V), labels (N,)) -> loss of each window (N,)."""


def smoothed_targets(grid: Grid, sigma: float) -> torch.Tensor:
    """Target distributions of `label_smoothing`: row t is a normal density around the centre of token t's bin, over all tokens.

    Parameters
    ----------
    grid : Grid
    sigma : float
        Standard deviation in ln generations.

    Returns
    -------
    float32 tensor (V, V)
        Rows of special tokens, which are never labels, are zero, and so are their columns.
    """
    difference = grid.centres[:, None] - grid.centres
    density = np.exp(-0.5 * (difference / sigma) ** 2)
    table = np.zeros((grid.bins + SPECIAL_TOKENS,) * 2)
    table[SPECIAL_TOKENS:, SPECIAL_TOKENS:] = density / density.sum(axis=1, keepdims=True)
    return torch.from_numpy(table.astype(np.float32))


def bin_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of the bins given that the token is one, as in decoding: (N, V) -> (N, bins)."""
    return logits[:, SPECIAL_TOKENS:].softmax(-1)


def spread_over_bins(quantiles: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The distribution over bins whose cumulative distribution is linear between quantiles at `cxt.data.soft_targets.LEVELS`.

    Probability outside of the grid is added to its first or last bin; that outside of the outermost quantiles, 0.0005 in all,
    is left out.

    Parameters
    ----------
    quantiles : float32 tensor (N, levels)
        In ln generations, ascending.
    grid : Grid

    Returns
    -------
    float32 tensor (N, bins)
    """
    levels = torch.from_numpy((LEVELS - LEVELS[0]) / (LEVELS[-1] - LEVELS[0])).to(quantiles)
    edges = torch.from_numpy(grid.edges[1:-1]).to(quantiles).expand(len(quantiles), -1).contiguous()
    after = torch.searchsorted(quantiles.contiguous(), edges, right=True).clamp(1, len(levels) - 1)  # (N, bins - 1)
    low, high = quantiles.gather(1, after - 1), quantiles.gather(1, after)
    share = ((edges - low) / (high - low).clamp(min=UNIT)).clamp(0, 1)
    cumulative = torch.lerp(levels[after - 1], levels[after], share)
    return F.pad(F.pad(cumulative, (1, 0), value=0.0), (0, 1), value=1.0).diff(dim=1)


def compute_distillation_loss(logits: torch.Tensor, target: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """T² times the divergence KL(teacher ‖ student) at temperature T (Hinton, Vinyals and Dean 2015), mean over windows.

    At temperature T, logarithms of probabilities are divided by T, and distributions normalised again.

    Parameters
    ----------
    logits : tensor (N, V)
        The student's.
    target : tensor (N, bins)
        The teacher's distributions.
    temperature : float
        T; 1 compares the distributions as they are.
    """
    target = target.clamp(min=0) ** (1 / temperature)
    target = target / target.sum(-1, keepdim=True)
    student = (logits[:, SPECIAL_TOKENS:] / temperature).log_softmax(-1)
    divergence = (torch.xlogy(target, target) - target * student).sum(-1)
    return temperature**2 * divergence.mean()


class Criterion:
    """The weighted terms of a loss.

    Called with logits (N, V), labels (N,) and `reduction="mean"` or `"sum"`, it returns the value of each term, (terms,),
    without its weight.

    Parameters
    ----------
    terms : sequence of LossTerm
    grid : Grid
        The grid of the tokens.
    """

    def __init__(self, terms: Sequence[LossTerm], grid: Grid):
        self.terms = terms
        self.names = [term.name for term in terms]
        self.grid = grid
        self._centres = torch.from_numpy(grid.centres.astype(np.float32))
        self._tables = {term.sigma: smoothed_targets(grid, term.sigma or SMOOTHING_WIDTH) for term in terms}

    def to(self, device: torch.device) -> "Criterion":
        """Move the tables to a device, once, so that a step does not copy them."""
        self._centres = self._centres.to(device)
        self._tables = {sigma: table.to(device) for sigma, table in self._tables.items()}
        return self

    def weights(self, progress: float) -> list[float]:
        """Weight of each term when a fraction *progress* of the optimizer steps is done."""
        return [interpolate_weight(term, progress) for term in self.terms]

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
        """Return the mean or the sum of each term over the N windows, (terms,)."""
        values = []
        for term in self.terms:
            if term.name == "cross_entropy":
                values.append(F.cross_entropy(logits, labels, reduction=reduction))
            else:
                each = getattr(self, f"_{term.name}")(term, logits, labels)  # (N,)
                values.append(each.mean() if reduction == "mean" else each.sum())
        return torch.stack(values)

    def _label_smoothing(self, term: LossTerm, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -(self._tables[term.sigma][labels] * logits.log_softmax(-1)).sum(-1)

    def _emd(self, term: LossTerm, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        bins = torch.arange(self.grid.bins, device=logits.device)
        reached = bins >= (labels - SPECIAL_TOKENS).unsqueeze(-1)  # (N, bins)
        return ((bin_probabilities(logits).cumsum(-1) - reached.float()) ** 2).sum(-1) * self.grid.step

    def _mse(self, term: LossTerm, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (bin_probabilities(logits) @ self._centres - self._centres[labels - SPECIAL_TOKENS]) ** 2

    def _z_loss(self, term: LossTerm, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.logsumexp(-1) ** 2


def interpolate_weight(term: LossTerm, progress: float) -> float:
    """The weight of a term when a fraction *progress* of the optimizer steps is done."""
    start, end = term.weight, term.final_weight
    if end is None:
        return float(start)
    if term.weight_schedule == "exponential":
        return float(start * (end / start) ** progress)
    share = 0.5 * (1 - math.cos(math.pi * progress)) if term.weight_schedule == "cosine" else progress
    return float(start + (end - start) * share)
