"""Random numbers for decoding that depend on what is decoded, not on the order or company in which it is.

Each number is a hash of (seed, item, replicate, window), so that an item gets the same ones in any batch and on any device.
The hash is SplitMix64's finalizer (Steele, Lea and Flood 2014), applied once for each part of the key.
"""

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    state = (state ^ (state >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return state ^ (state >> np.uint64(31))


def uniforms(seed: int, items, *, replicates: int, windows: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (items, replicates, windows) float64, each a function of seed and its place only.

    Parameters
    ----------
    seed : any whole number; its lowest 64 bits count
    items : (items,) numbers that tell items apart, such as their positions in a dataset
    """
    with np.errstate(over="ignore"):
        state = _mixed(np.uint64(seed % 2**64) + np.uint64(GOLDEN) + np.asarray(items).astype(np.uint64))
        for size in (replicates, windows):
            step = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(GOLDEN)
            state = _mixed(state[..., None] + step)
    return (state >> np.uint64(11)) * 2.0**-53


def limited_to(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """*logits* (…, bins) with all but the *top_k* largest at -inf; all of them if it is None."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    kept = logits.topk(top_k).indices
    return torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Bins (…) of the inverse cumulative distribution of probabilities (…, bins) at uniform (…) float64; never one of 0."""
    cumulative = probabilities.double().cumsum(-1)
    wanted = (uniform * cumulative[..., -1]).unsqueeze(-1)
    # Rounding may take `wanted` up to the sum; the last bin that has any probability is where the sum is reached.
    return torch.minimum((cumulative <= wanted).sum(-1), (cumulative < cumulative[..., -1:]).sum(-1))
