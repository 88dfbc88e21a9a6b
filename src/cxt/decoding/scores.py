"""Scores of predictive distributions of ln TMRCA against the truth, window by window and in summary."""

from typing import NamedTuple

import numpy as np
import torch

from cxt.data.grid import Grid

CONFIDENCE_CLASSES = 15
"""Classes of equal width, of the probability of the most probable bin, in the expected calibration error."""


class WindowScores(NamedTuple):
    """How the distribution of each window does, arrays (..., windows).

    Attributes
    ----------
    true_probability : float64
        Probability of the bin of the true ln TMRCA.
    confidence : float64
        Probability of the most probable bin.
    bins_away : int64
        Bins from the most probable one to the true one.
    crps : float64
        Continuous ranked probability score, in ln generations.
    """

    true_probability: np.ndarray
    confidence: np.ndarray
    bins_away: np.ndarray
    crps: np.ndarray


def score_windows(distribution: torch.Tensor, grid: Grid, log_tmrca: torch.Tensor) -> WindowScores:
    """Score the distribution of each window.

    The continuous ranked probability score is the integral over ln TMRCA of the squared difference between the distribution
    function, linear within bins, and that of the truth, a step (Gneiting & Raftery 2007, equation 20). Truths outside of the
    grid are taken as at its nearest end.

    Parameters
    ----------
    distribution : float64 tensor (..., bins)
    grid : Grid
    log_tmrca : tensor (...)
        True ln TMRCA.

    Returns
    -------
    WindowScores
    """
    position = ((log_tmrca.double() - grid.low) / grid.step).clamp(0, grid.bins)  # in bins from the lower end
    true_bin = position.floor().clamp(max=grid.bins - 1).long().unsqueeze(-1)
    confidence, mode = distribution.max(-1)
    upper = distribution.cumsum(-1) / distribution.sum(-1, keepdim=True)
    lower = torch.nn.functional.pad(upper[..., :-1], (1, 0))
    # Integrals over bins of F², below the truth, and of (1 - F)², above it, where F is linear from `lower` to `upper`.
    number = torch.arange(grid.bins, device=distribution.device)
    below = torch.where(number < true_bin, integrate_square(lower, upper), 0.0).sum(-1)
    above = torch.where(number > true_bin, integrate_square(1 - lower, 1 - upper), 0.0).sum(-1)
    first, last = (edge.gather(-1, true_bin)[..., 0] for edge in (lower, upper))
    share = position - true_bin[..., 0]
    at_truth = first + share * (last - first)
    within = share * integrate_square(first, at_truth) + (1 - share) * integrate_square(1 - at_truth, 1 - last)
    scores = (
        distribution.gather(-1, true_bin)[..., 0],
        confidence,
        (mode.unsqueeze(-1) - true_bin)[..., 0].abs(),
        grid.step * (below + above + within),
    )
    return WindowScores(*(score.cpu().numpy() for score in scores))


def integrate_square(start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Mean of the square of a function that is linear from *start* to *end*."""
    return (start**2 + start * end + end**2) / 3


def score_distributions(scores: WindowScores) -> dict[str, float]:
    """Summarise the scores of all windows.

    Returns
    -------
    dict
        `accuracy` and `within_one_bin`, the shares of windows whose most probable bin is the true one, or at most one away;
        `perplexity`, the exponential of the mean of minus ln of the probability of the true bin; `crps`, the mean continuous
        ranked probability score; `ece`, the expected calibration error of the most probable bin: the difference between its
        mean probability and the share of windows in which it is the true one, averaged over classes of that probability,
        weighted by their windows (Guo et al. 2017).
    """
    # Networks compute in 32 bits, in which smaller probabilities are 0.
    likely = np.maximum(scores.true_probability, np.finfo(np.float32).tiny)
    correct, confidence = (scores.bins_away == 0).ravel(), scores.confidence.ravel()
    group = np.minimum((confidence * CONFIDENCE_CLASSES).astype(int), CONFIDENCE_CLASSES - 1)
    differences = np.bincount(group, correct - confidence, CONFIDENCE_CLASSES)
    return {
        "accuracy": float(correct.mean()),
        "within_one_bin": float((scores.bins_away <= 1).mean()),
        "perplexity": float(np.exp(-np.log(likely).mean())),
        "crps": float(scores.crps.mean()),
        "ece": float(np.abs(differences).sum() / len(correct)),
    }
