"""Summaries of a whole region: one time for each pair, in place of one for each window."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cxt.data.grid import Grid
from cxt.decoding.posterior import Posterior
from cxt.errors import BadRequest


@dataclass(frozen=True, eq=False)
class RegionSummary:
    """The TMRCA of pairs of haplotypes, averaged over the base pairs of a region.

    Parameters
    ----------
    log_tmrca : float64 array (pairs,)
        Posterior mean of the region's mean ln TMRCA, in ln generations.
    tmrca : float64 array (pairs,)
        Posterior mean of the region's mean TMRCA, in generations. Twice the mutation rate times it is the expected number of
        differences per base pair.
    samples : float64 array (pairs, replicates) or None
        The region's mean ln TMRCA in each sampled sequence; None if the network was read in one pass. That gives the
        distribution of each window, but not how windows vary together, on which the uncertainty of their mean depends.
    distribution : float64 array (pairs, bins)
        Probability of each bin of *grid* at a random base pair of the region. It describes how TMRCA varies along the region,
        besides its uncertainty.
    grid : Grid
        The bins, in ln generations.
    pairs : int64 array (pairs, 2)
        Haplotype indices.
    start, end : float
        The region in base pairs, in the coordinates of the positions that were given.
    """

    log_tmrca: np.ndarray
    tmrca: np.ndarray
    samples: np.ndarray | None
    distribution: np.ndarray
    grid: Grid
    pairs: np.ndarray
    start: float
    end: float

    def __repr__(self) -> str:
        return f"<RegionSummary of {len(self.pairs)} pairs, {self.start:.0f} to {self.end:.0f} bp>"

    @property
    def log_tmrca_sd(self) -> np.ndarray:
        """Posterior standard deviation of the region's mean ln TMRCA, from the sampled sequences: (pairs,) float64.

        Raises
        ------
        BadRequest
            If the network was read in one pass, or only one sequence was sampled.
        """
        if self.samples is None:
            raise BadRequest(
                "the network was read in one pass, which does not give the uncertainty of a region's mean; read a checkpoint "
                "that was trained with `objective: autoregressive` or `joint` with reading='sampled'"
            )
        if self.samples.shape[1] < 2:
            raise BadRequest("a standard deviation needs at least 2 replicates, got 1")
        return self.samples.std(axis=1, ddof=1)

    def quantile_along(self, q: float | Sequence[float]) -> np.ndarray:
        """Quantiles of ln TMRCA at a random base pair of the region, in ln generations.

        Parameters
        ----------
        q : float or sequence of float
            Probabilities from 0 to 1.

        Returns
        -------
        float64 array (pairs,), or (len(q), pairs) for a sequence

        Raises
        ------
        BadRequest
            If a probability is not from 0 to 1.
        """
        whole = Posterior(self.distribution[:, None], self.grid, self.pairs, np.array([self.start, self.end]))
        return whole.quantile(q)[..., 0]


def summarise_region(posterior: Posterior, bins: np.ndarray | None) -> RegionSummary:
    """Average a posterior over the base pairs of its region.

    Parameters
    ----------
    posterior : Posterior
    bins : integer array (pairs, replicates, windows), optional
        The bins of the sampled sequences.

    Returns
    -------
    RegionSummary
    """
    grid, weights = posterior.grid, np.diff(posterior.edges)
    weights = weights / weights.sum()  # (windows,)
    # Window by window, because the distributions of long regions are large.
    distribution = np.zeros(posterior.distribution[:, 0].shape)
    for window, weight in enumerate(weights):
        distribution += weight * posterior.distribution[:, window]
    distribution /= distribution.sum(axis=1, keepdims=True)  # they are rounded to float32
    return RegionSummary(
        log_tmrca=distribution @ grid.centres,
        tmrca=distribution @ np.exp(grid.centres),
        samples=None if bins is None else grid.centres[bins] @ weights,
        distribution=distribution,
        grid=grid,
        pairs=posterior.pairs,
        start=float(posterior.edges[0]),
        end=float(posterior.edges[-1]),
    )
