"""Sampling bins from predictive distributions, with random numbers that do not depend on the batch.

Each random number is a hash of (seed, example, replicate, window), so that an example gets the same numbers in any batch and
on any device. The hash is SplitMix64's finalizer, applied to the seed and again after each further part of the key is added.
"""

import numpy as np
import torch

from cxt.random_seeds import GOLDEN, check_seed, mix_bits


def draw_uniforms(seed: int, examples, *, replicates: int, windows: int) -> np.ndarray:
    """Draw uniform numbers in [0, 1), (examples, replicates, windows) float64, each a function of seed and its indices only.

    Parameters
    ----------
    seed : int
        From 0 to 2^63 - 1.
    examples : integer sequence (examples,)
        Numbers that identify examples, such as their positions in a dataset.
    replicates, windows : int
        Decoded sequences per example, and windows of each.

    Returns
    -------
    float64 array (examples, replicates, windows)

    Raises
    ------
    BadRequest
        If the seed is out of range.
    """
    with np.errstate(over="ignore"):
        state = mix_bits(np.uint64(check_seed(seed)) + np.uint64(GOLDEN))
        for places in (np.asarray(examples).astype(np.uint64), *(np.arange(n, dtype=np.uint64) for n in (replicates, windows))):
            state = mix_bits(state[..., None] + (places + np.uint64(1)) * np.uint64(GOLDEN))
    return (state >> np.uint64(11)) * 2.0**-53


def top_k_filter(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Set all but the *top_k* largest of the logits (…, bins) to -inf; None keeps all."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    kept = logits.topk(top_k).indices
    return torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))


def sample_bins(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample bins by inverting the cumulative distribution.

    Parameters
    ----------
    probabilities : tensor (…, bins)
        Need not sum to 1.
    uniform : float64 tensor (…)
        Random numbers in [0, 1).

    Returns
    -------
    int64 tensor (…)
        Never a bin of probability 0.
    """
    cumulative = probabilities.double().cumsum(-1)
    target = (uniform * cumulative[..., -1]).unsqueeze(-1)
    # By rounding, `target` may reach the sum; the second term is the last bin with positive probability.
    return torch.minimum((cumulative <= target).sum(-1), (cumulative < cumulative[..., -1:]).sum(-1))
