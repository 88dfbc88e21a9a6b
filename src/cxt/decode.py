"""From a trained model to estimates: decoding, and summaries of the predictive distribution of each window."""

from typing import NamedTuple

import numpy as np
import torch

from cxt.dataset import model_input
from cxt.model import CoalescenceModel
from cxt.targets import Grid


class Posterior(NamedTuple):
    """Summaries of each window's predictive distribution of ln TMRCA, each (items, windows) float64."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def decode(
    model: CoalescenceModel, counts, missing, *, grid: Grid, replicates: int, batch_size: int, seed: int, device="cpu"
) -> Posterior:
    """Posterior mean and central 95 % interval of each window, from the average of the replicates' distributions.

    Averaging predictive distributions is better than averaging sampled values: each replicate contributes all that its
    past implies for a window, not one draw of it.

    Parameters
    ----------
    model : in eval mode, on *device*
    counts : (items, 2, scales, windows, samples) raw counts, integer
    missing : (items, scales, windows) missing fractions, or None
    grid : the model's
    replicates : decoded sequences per item
    batch_size : items decoded together
    seed : of the sampling
    """
    generator = torch.Generator(device).manual_seed(seed)
    parts = []
    for start in range(0, len(counts), batch_size):
        part = slice(start, start + batch_size)
        part_missing = None if missing is None else torch.as_tensor(missing[part], dtype=torch.float32, device=device)
        x = model_input(torch.as_tensor(counts[part], device=device), part_missing)
        _, probabilities = model.generate(x, replicates=replicates, generator=generator)
        distribution = probabilities.mean(dim=1, dtype=torch.float64).cpu().numpy()  # (items, windows, bins)
        quantiles = [posterior_quantile(distribution, grid, q) for q in (0.025, 0.975)]
        parts.append((posterior_mean(distribution, grid), *quantiles))
    return Posterior(*map(np.concatenate, zip(*parts, strict=True)))


def posterior_mean(distribution: np.ndarray, grid: Grid) -> np.ndarray:
    """Posterior mean of ln TMRCA, bins at their centres: (..., bins) -> (...).

    It is the estimate with the least expected squared error of ln TMRCA. Its exponential is not the posterior mean of TMRCA.
    """
    return distribution @ grid.centres


def posterior_quantile(distribution: np.ndarray, grid: Grid, q: float) -> np.ndarray:
    """Quantile *q* of ln TMRCA, linear within its bin: (..., bins) -> (...)."""
    cumulative = np.cumsum(distribution, axis=-1)
    target = q * cumulative[..., -1:]
    bin_ = np.minimum((cumulative < target).sum(axis=-1), grid.bins - 1)[..., None]
    mass = np.take_along_axis(distribution, bin_, axis=-1)
    below = np.take_along_axis(cumulative, bin_, axis=-1) - mass
    inside = np.divide(target - below, mass, out=np.full_like(mass, 0.5), where=mass > 0)
    return (grid.edges[bin_] + grid.step * np.clip(inside, 0, 1))[..., 0]
