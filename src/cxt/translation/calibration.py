"""Calibration of tracks with a mutation rate.

A track of TMRCAs T implies that a pair differs at 2 µ Σ T · (accessible bases) sites. Calibration adds a constant to ln TMRCA
over a whole contig, so that this is the number of sites at which the pair does differ.
"""

from typing import Literal, NamedTuple

import numpy as np

from cxt.random_seeds import hash_key

Method = Literal["none", "diversity", "gamma"]


class Diversity(NamedTuple):
    """Differences of pairs on a contig.

    observed : int64 (pairs,), sites at which the two haplotypes differ, in windows that have an estimate
    implied : float64 (pairs,), expected number given the estimates and the mutation rate
    """

    observed: np.ndarray
    implied: np.ndarray


def compute_implied(log_mean_tmrca: np.ndarray, bases: np.ndarray, *, mutation_rate: float) -> np.ndarray:
    """Expected differences 2 µ Σ E[T] · bases of each pair: (pairs, windows) ln generations and bp -> (pairs,).

    Windows without an estimate (NaN) do not count.
    """
    return 2 * mutation_rate * np.nansum(np.exp(log_mean_tmrca.astype(np.float64)) * bases, axis=1)


def compute_offsets(
    diversity: Diversity, *, method: Method, seed: int, names: list[tuple[str, str]], contig: str
) -> np.ndarray:
    """What is added to ln TMRCA of each pair, (pairs,) float64.

    Parameters
    ----------
    diversity : Diversity
        Of the pairs on one contig.
    method : str
        `none`: 0. `diversity`: ln(observed / implied); a pair without differences is given half of one. `gamma`: ln c, with c
        drawn from a gamma distribution of shape observed + 1 and scale 1 / implied, so that it also has the uncertainty of the
        number of mutations.
    seed : int
        Seed of the draws, which depend on it, the names of the pair (in any order) and the contig only.
    names : list of (str, str)
        Haplotypes of each pair.
    contig : str

    Returns
    -------
    float64 array (pairs,)
        0 for pairs without any estimate.
    """
    observed, implied = diversity
    offsets = np.zeros(len(observed))
    known = implied > 0
    if method == "diversity":
        offsets[known] = np.log(np.maximum(observed[known], 0.5) / implied[known])
    elif method == "gamma":
        for i in np.flatnonzero(known):
            rng = np.random.default_rng(hash_key("calibration", seed, contig, *sorted(names[i])))
            offsets[i] = np.log(rng.gamma(observed[i] + 1) / implied[i])
    return offsets
