"""Seeds of simulations, derived from workflow seed, variant and index."""

import dataclasses
import hashlib

import numpy as np

from cxt.errors import BadRequest
from cxt.io import canonical_json
from cxt.random_seeds import hash_key, msprime_seeds

LAST_INDEX = 2**32 - 2
"""Largest index of a simulation, limited by msprime's seeds."""


def build_random_generator(*, seed: int, spec: dict, index: int, purpose: str) -> np.random.Generator:
    """The random generator of simulation *index* of a variant for one *purpose*.

    It depends only on the workflow seed, the variant's name and parameters, the index and the purpose, not on order or counts.

    Parameters
    ----------
    seed : int
        Seed of the workflow.
    spec : dict
        The variant: its name and parameters.
    index : int
        Index of the simulation.
    purpose : str
        What is drawn, such as "pairs"; generators for different purposes are independent.

    Returns
    -------
    numpy.random.Generator
    """
    key = hashlib.sha256(canonical_json([spec, purpose]).encode()).digest()
    words = np.frombuffer(key, dtype=np.uint32).tolist()
    return np.random.default_rng(np.random.SeedSequence([seed, index, *words]))


@dataclasses.dataclass(frozen=True)
class EngineSeeds:
    """The two seeds that are passed to msprime for a simulation, each from 1 to 2^32 - 1."""

    ancestry: int
    mutations: int


def derive_engine_seeds(*, seed: int, spec: dict, index: int) -> EngineSeeds:
    """Seeds for msprime; no two indices of a variant share an ancestry seed or a mutation seed.

    Each is a permutation of the 2^32 - 1 possible seeds, applied to the index (0 to 2^32 - 2; datasets, evaluation and
    simulation on the fly use those below 4e9). The permutations of two variants, and of two workflow seeds, are unrelated.
    Simulations of two variants may therefore have the same seed by chance; `check_shared_ancestry` finds the cases in which
    they would also have the same ancestry.
    """
    if not 0 <= index <= LAST_INDEX:
        raise BadRequest(f"'{spec['name']}': the index must be from 0 to {LAST_INDEX}, got {index}")
    ancestry, mutations = (int(msprime_seeds(index, key=hash_key(seed, spec, use))) for use in ("ancestry", "mutations"))
    return EngineSeeds(ancestry, mutations)


def check_shared_ancestry(variant_batches: list[tuple[dict, list[tuple[int, int]]]], *, seed: int) -> None:
    """BadRequest if simulations of two variants with the same demography would have the same ancestry.

    This requires the same ancestry seed, and parameters that differ in name and mutation rate only.

    Parameters
    ----------
    variant_batches : parameters of each variant, and (first index, count) of its simulation batches
    seed : seed of the workflow
    """
    same_demography: dict[str, list] = {}
    for spec, ranges in variant_batches:
        same_demography.setdefault(
            canonical_json({k: v for k, v in spec.items() if k not in ("name", "mutation_rate")}), []
        ).append((spec, ranges))
    for group in same_demography.values():
        seen: dict[int, tuple[str, int]] = {}
        for spec, ranges in group if len(group) > 1 else []:
            indices = np.concatenate([np.arange(start, start + count) for start, count in ranges])
            ancestry_seeds = msprime_seeds(indices, key=hash_key(seed, spec, "ancestry"))
            for index, ancestry_seed in zip(indices.tolist(), ancestry_seeds.tolist(), strict=True):
                other_name, other_index = seen.setdefault(ancestry_seed, (spec["name"], index))
                if other_name != spec["name"]:
                    raise BadRequest(
                        f"simulation {index} of '{spec['name']}' and simulation {other_index} of '{other_name}' would have the "
                        "same ancestry, because they have the same parameters and, by chance, the same seed (of msprime's "
                        "2^32); rename one of the scenarios, or change `seed`"
                    )
