"""Random numbers for decoding that depend on what is decoded, not on the order or company in which it is.

Each number is a hash of (seed, item, replicate, window), so that an item gets the same ones in any batch and on any device.
The hash is SplitMix64's finalizer, applied to the seed alone and again after each further part of the key is added.
"""

import numpy as np
import torch

from cxt.seeds import GOLDEN, check_seed, mix_bits


def draw_uniforms(seed: int, items, *, replicates: int, windows: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (items, replicates, windows) float64, each a function of seed and its place only.

    Parameters
    ----------
    seed : a whole number from 0 to 2^63 - 1
    items : (items,) whole numbers from 0 that tell items apart, such as their positions in a dataset

    Raises
    ------
    BadRequest
        If there is no such seed.
    """
    with np.errstate(over="ignore"):
        state = mix_bits(np.uint64(check_seed(seed)) + np.uint64(GOLDEN))
        for places in (np.asarray(items).astype(np.uint64), *(np.arange(n, dtype=np.uint64) for n in (replicates, windows))):
            state = mix_bits(state[..., None] + (places + np.uint64(1)) * np.uint64(GOLDEN))
    return (state >> np.uint64(11)) * 2.0**-53


def top_k_filter(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """*logits* (…, bins) with all but the *top_k* largest at -inf; all of them if it is None."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    kept = logits.topk(top_k).indices
    return torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))


def sample_bins(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Bins (…) of the inverse cumulative distribution of probabilities (…, bins) at uniform (…) float64; never one of 0."""
    cumulative = probabilities.double().cumsum(-1)
    wanted = (uniform * cumulative[..., -1]).unsqueeze(-1)
    # Rounding may take `wanted` up to the sum; the last bin that has any probability is where the sum is reached.
    return torch.minimum((cumulative <= wanted).sum(-1), (cumulative < cumulative[..., -1:]).sum(-1))
