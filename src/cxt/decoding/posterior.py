"""The predictive distribution of ln TMRCA in each window, and its summaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cxt.data.grid import Grid
from cxt.errors import BadRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def posterior_mean(distribution: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Posterior mean of ln TMRCA, with bins at their centres: (..., bins) float64 -> (...).

    It is the estimate with the smallest expected squared error of ln TMRCA. Its exponential is not the posterior mean of TMRCA.
    """
    return distribution @ torch.as_tensor(grid.centres, device=distribution.device)


def posterior_quantile(distribution: torch.Tensor, grid: Grid, q: float) -> torch.Tensor:
    """Quantile *q* of ln TMRCA, linear within its bin: (..., bins) float64 -> (...)."""
    cumulative = distribution.cumsum(-1)
    target = q * cumulative[..., -1:]
    bin_ = (cumulative < target).sum(-1, keepdim=True).clamp(max=grid.bins - 1)
    mass = distribution.gather(-1, bin_)
    below = cumulative.gather(-1, bin_) - mass
    inside = torch.where(mass > 0, (target - below) / mass, 0.5).clamp(0, 1)
    edges = torch.as_tensor(grid.edges, device=distribution.device)
    return (edges[bin_] + grid.step * inside)[..., 0]


def posterior_quantiles(distribution: torch.Tensor, grid: Grid, levels: Sequence[float]) -> torch.Tensor:
    """Several quantiles of ln TMRCA, as `posterior_quantile`, at once: (..., bins) float64 -> (..., levels)."""
    cumulative = distribution.cumsum(-1)
    targets = torch.as_tensor(levels, dtype=cumulative.dtype, device=cumulative.device) * cumulative[..., -1:]  # (..., levels)
    bins = torch.searchsorted(cumulative, targets).clamp(max=grid.bins - 1)
    mass = distribution.gather(-1, bins)
    below = cumulative.gather(-1, bins) - mass
    inside = torch.where(mass > 0, (targets - below) / mass, 0.5).clamp(0, 1)
    return torch.as_tensor(grid.edges, device=distribution.device)[bins] + grid.step * inside


def posterior_rank(distribution: torch.Tensor, grid: Grid, log_tmrca: torch.Tensor) -> torch.Tensor:
    """Probability of a smaller ln TMRCA than *log_tmrca* (...), linear within its bin: (..., bins) float64 -> (...).

    The central interval of level p holds a value if and only if its rank is from (1 - p) / 2 to (1 + p) / 2.
    """
    position = ((log_tmrca.double() - grid.low) / grid.step).clamp(0, grid.bins)
    bin_ = position.floor().clamp(max=grid.bins - 1).long().unsqueeze(-1)
    mass = distribution.gather(-1, bin_)
    below = distribution.cumsum(-1).gather(-1, bin_) - mass
    return ((below + mass * (position.unsqueeze(-1) - bin_)) / distribution.sum(-1, keepdim=True))[..., 0]


@dataclass(frozen=True, eq=False)
class Posterior:
    """The distribution of the time to the most recent common ancestor (TMRCA) of pairs of haplotypes, window by window.

    Parameters
    ----------
    distribution : float32 array (pairs, windows, bins)
        Probability of each bin of *grid*.
    grid : Grid
        The bins, in ln generations.
    pairs : int64 array (pairs, 2)
        Haplotype indices.
    edges : float64 array (windows + 1,)
        Ends of the windows in base pairs, in the coordinates of the positions that were given.
    """

    distribution: np.ndarray
    grid: Grid
    pairs: np.ndarray
    edges: np.ndarray

    def __repr__(self) -> str:
        pairs, windows = self.distribution.shape[:2]
        return f"<Posterior of {pairs} pairs in {windows} windows, {self.edges[0]:.0f} to {self.edges[-1]:.0f} bp>"

    @property
    def log_tmrca(self) -> np.ndarray:
        """Posterior mean of ln TMRCA, in ln generations: (pairs, windows) float64."""
        return posterior_mean(torch.from_numpy(self.distribution).double(), self.grid).numpy()

    @property
    def tmrca(self) -> np.ndarray:
        """Posterior median of the TMRCA, in generations: (pairs, windows) float64."""
        return np.exp(self.quantile(0.5))

    def quantile(self, q: float | Sequence[float]) -> np.ndarray:
        """Quantiles of ln TMRCA, in ln generations.

        Parameters
        ----------
        q : float or sequence of float
            Probabilities from 0 to 1.

        Returns
        -------
        float64 array (pairs, windows), or (len(q), pairs, windows) for a sequence

        Raises
        ------
        BadRequest
            If a probability is not from 0 to 1.
        """
        probabilities = np.asarray(q, dtype=float)
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise BadRequest(f"q must be from 0 to 1, got {q}")
        distribution = torch.from_numpy(self.distribution).double()
        values = [posterior_quantile(distribution, self.grid, float(p)).numpy() for p in probabilities.ravel()]
        return values[0] if probabilities.ndim == 0 else np.stack(values)

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the central interval of ln TMRCA that holds a share *level* of the probability, each (pairs, windows)."""
        if not 0 < level < 1:
            raise BadRequest(f"level must be between 0 and 1, got {level}")
        low, high = self.quantile([(1 - level) / 2, (1 + level) / 2])
        return low, high

    def plot(self, pair: int = 0, *, truth: np.ndarray | None = None, ax: "Axes | None" = None) -> "Axes":
        """Plot the posterior median and the 95% interval of one pair's TMRCA along the region.

        Parameters
        ----------
        pair : int
            Which of *pairs*, counted from 0.
        truth : float array (windows,), optional
            True ln TMRCA, as from `cxt.pair_log_tmrca`, to draw beside it.
        ax : matplotlib axes, optional
            Where to draw; a new figure by default.

        Returns
        -------
        matplotlib axes
        """
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=(9, 3), layout="constrained")
        if not -len(self.pairs) <= pair < len(self.pairs):
            raise BadRequest(f"pair must be from 0 to {len(self.pairs) - 1}, got {pair}")
        one = Posterior(self.distribution[pair][None], self.grid, self.pairs[pair][None], self.edges)
        low, high = (np.exp(bound[0]) for bound in one.interval())
        edges = self.edges / 1000
        ax.stairs(high, edges, baseline=low, fill=True, alpha=0.25, color="#1f6fb4", label="95% interval")
        ax.stairs(one.tmrca[0], edges, baseline=None, color="#1f6fb4", lw=1.4, label="posterior median")
        if truth is not None:
            ax.stairs(np.exp(truth), edges, baseline=None, color="#222222", lw=1.0, label="truth")
        ax.set_yscale("log")
        ax.set_xlabel("position (kb)")
        ax.set_ylabel("TMRCA (generations)")
        ax.set_title(f"haplotypes {self.pairs[pair][0]} and {self.pairs[pair][1]}", loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
        return ax
