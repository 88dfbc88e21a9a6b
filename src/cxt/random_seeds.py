"""Seeds: their range, and how the seeds of msprime and torch are derived from them.

msprime uses 32 bits of a seed, and so does torch's CPU generator, which ignores the others. Sums and products of seeds and
counters collide (1_000_003 · 1 + 1_000_003 = 1_000_003 · 2), and 32 random bits collide among 100 000. Here seeds are hashed
before anything is combined with them, and a counter goes through a permutation of the 32-bit words, so that two different
values of it never give the same seed.
"""

import hashlib
import operator

import numpy as np

from cxt.errors import BadRequest
from cxt.io import canonical_json

LARGEST_SEED = 2**63 - 1
"""Largest seed of a workflow, a training run or a decoding; the smallest is 0."""

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def check_seed(seed, *, name: str = "seed") -> int:
    """Check that a seed is a whole number from 0 to `LARGEST_SEED`.

    Parameters
    ----------
    seed : int or any integer type
    name : str
        Name of the seed in the message.

    Returns
    -------
    int

    Raises
    ------
    BadRequest
        If it is not a whole number, or out of range.
    """
    try:
        value = operator.index(seed)
    except TypeError:
        raise BadRequest(f"{name} must be a whole number from 0 to {LARGEST_SEED}, got {seed!r}") from None
    if not 0 <= value <= LARGEST_SEED:
        raise BadRequest(f"{name} must be a whole number from 0 to {LARGEST_SEED}, got {value}")
    return value


def mix_bits(state):
    """SplitMix64's finalizer (Steele, Lea and Flood 2014), a permutation of the 64-bit words.

    Parameters
    ----------
    state : uint64 scalar or array

    Returns
    -------
    uint64 scalar or array of the same shape
    """
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
        state = (state ^ (state >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return state ^ (state >> np.uint64(31))


def hash_key(*parts) -> int:
    """A 64-bit key for JSON-able *parts*: the first 8 bytes of their sha256."""
    return int.from_bytes(hashlib.sha256(canonical_json(parts).encode()).digest()[:8], "big")


def permute_words(words, *, key: int) -> np.ndarray:
    """Permute 32-bit words by a permutation that depends on *key* (64 bits) and is unrelated for different keys.

    A Feistel network of four rounds on halves of 16 bits, which is a permutation for any round function.

    Parameters
    ----------
    words : whole number below 2^32, or an array of them

    Returns
    -------
    uint64 array of the shape of *words*, values below 2^32
    """
    words = np.asarray(words, dtype=np.uint64)
    left, right = words >> np.uint64(16), words & np.uint64(0xFFFF)
    with np.errstate(over="ignore"):
        for step in range(4):
            hashed = mix_bits(np.uint64(key) + (right + np.uint64((step + 1) << 16)) * np.uint64(GOLDEN))
            left, right = right, left ^ (hashed >> np.uint64(48))
    return np.asarray((left << np.uint64(16)) | right)


def msprime_seeds(indices, *, key: int) -> np.ndarray:
    """Seeds for msprime (1 to 2^32 - 1), different for all *indices* (0 to 2^32 - 2) under one *key*.

    `permute_words` on 1 to 2^32 - 1. Where it gives 0, which is not a valid seed, it is applied once more; the result is still
    a permutation.
    """
    seeds = permute_words(np.asarray(indices, dtype=np.uint64) + np.uint64(1), key=key)
    return np.where(seeds == 0, permute_words(0, key=key), seeds)


def torch_seed(*parts, number: int = 0) -> int:
    """A 64-bit seed for torch: a hash of *parts* in the upper half, and a permutation of *number* (below 2^32) in the lower.

    For the same *parts*, two numbers differ in the lower 32 bits, which are all that the CPU generator uses.
    """
    key = hash_key(*parts)
    return (key >> 32 << 32) | int(permute_words(number, key=key))
