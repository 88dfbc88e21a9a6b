"""The seeds of a simulation: from workflow seed, variant and index to generators and msprime's seeds."""

import dataclasses
import hashlib

import numpy as np

from cxt.errors import BadRequest
from cxt.io import canonical_json
from cxt.seeds import hash_key, msprime_seeds

LAST_INDEX = 2**32 - 2
"""Last index that there can be: msprime has no more seeds."""


def random_generator(*, seed: int, spec: dict, index: int, purpose: str) -> np.random.Generator:
    """The generator of everything random about simulation *index* of a variant, for one *purpose*.

    Keyed on the workflow seed, the variant's name and parameters, and the index; never on an order or a count.
    """
    key = hashlib.sha256(canonical_json([spec, purpose]).encode()).digest()
    words = np.frombuffer(key, dtype=np.uint32).tolist()
    return np.random.default_rng(np.random.SeedSequence([seed, index, *words]))


@dataclasses.dataclass(frozen=True)
class EngineSeeds:
    """The two seeds that msprime is given for a simulation, each from 1 to 2^32 - 1."""

    ancestry: int
    mutations: int


def engine_seeds(*, seed: int, spec: dict, index: int) -> EngineSeeds:
    """Seeds for msprime; no other index of the same variant has the same ancestry seed, or the same mutation seed.

    Each is a permutation of the 2^32 - 1 seeds that there are, applied to the index (0 to 2^32 - 2; datasets, evaluation and
    simulation on the fly use those below 4e9). The permutations of two variants, and of two workflow seeds, are unrelated, so
    that a simulation may by chance have a seed that one of another variant has, for other parameters; `check_shared_ancestry`
    finds where the same ancestry would come of it.
    """
    if not 0 <= index <= LAST_INDEX:
        raise BadRequest(f"'{spec['name']}', index {index}: expected 0 to {LAST_INDEX}")
    ancestry, mutations = (int(msprime_seeds(index, key=hash_key(seed, spec, use))) for use in ("ancestry", "mutations"))
    return EngineSeeds(ancestry, mutations)


def check_shared_ancestry(counted: list[tuple[dict, list[tuple[int, int]]]], *, seed: int) -> None:
    """BadRequest if simulations of two variants with the same demography would have the same ancestry.

    They need the same ancestry seed for that, and parameters that differ in name and mutation rate only.

    Parameters
    ----------
    counted : parameters of each variant, and (first index, count) of its batches
    seed : seed of the workflow
    """
    alike: dict[str, list] = {}
    for spec, ranges in counted:
        alike.setdefault(canonical_json({k: v for k, v in spec.items() if k not in ("name", "mutation_rate")}), []).append(
            (spec, ranges)
        )
    for group in alike.values():
        seen: dict[int, tuple[str, int]] = {}
        for spec, ranges in group if len(group) > 1 else []:
            indices = np.concatenate([np.arange(start, start + count) for start, count in ranges])
            found = msprime_seeds(indices, key=hash_key(seed, spec, "ancestry"))
            for index, value in zip(indices.tolist(), found.tolist(), strict=True):
                name, other = seen.setdefault(value, (spec["name"], index))
                if name != spec["name"]:
                    raise BadRequest(
                        f"simulation {index} of '{spec['name']}' and simulation {other} of '{name}' would have the same "
                        "ancestry: their parameters are the same, and by chance so are their seeds (msprime has 2^32); "
                        "rename one of the scenarios, or change `seed`"
                    )
