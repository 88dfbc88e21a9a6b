"""Scenarios: the kinds there are, sweeps, seeds, batches of indices, and the rule of what is held out.

A simulation is a pure function of the workflow seed, the leaf scenario (name and parameters) and its index.
"""

import dataclasses
import hashlib
import itertools

import numpy as np

from cxt.errors import BadRequest
from cxt.lineage import canonical
from cxt.seeds import key_of, msprime_seeds

EVALUATION_START = 1_000_000_000
"""First index of evaluation simulations; datasets use indices from 0, and the schema keeps them below."""

LAST_INDEX = 2**32 - 2
"""Last index that there can be: msprime has no more seeds."""

NOT_PARAMETERS = ("simulations", "batch", "combinations")
"""Keys of a scenario that say how many simulations and leaves there are, not what they are."""

LONGEST_NAME = 200
"""Characters of a leaf's name: it is part of the names of files, which have 255 at most."""

NEVER_SWEPT = ("models", "history")
"""Parameters whose value is a list by nature."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One combination of a scenario's sweep: its name, its parameters, and how many simulations in which batches."""

    name: str
    spec: dict
    simulations: int
    batch: int


def leaves(name: str, entry: dict) -> list[Leaf]:
    """The leaf scenarios of *entry* (a checked scenario of the config).

    One for each combination of listed parameters and each row of `combinations`. A scenario without either is its own
    leaf. Others are named `<scenario>-<parameter>=<value>…`, in the order of the parameters sorted by name.
    """
    parameters = {key: _plain(value) for key, value in entry.items() if key not in NOT_PARAMETERS}
    if parameters.get("ancestry_model") == "hudson":
        del parameters["ancestry_model"]  # the default, written out
    swept = sorted(key for key, value in parameters.items() if isinstance(value, list) and key not in NEVER_SWEPT)
    rows = _plain(entry.get("combinations", [{}]))
    result = []
    for *values, row in itertools.product(*(parameters[key] for key in swept), rows):
        chosen = dict(zip(swept, values, strict=True)) | row
        leaf = "-".join([name, *(f"{key}={chosen[key]}" for key in sorted(chosen))])
        spec = {"name": leaf, **parameters, **chosen}
        result.append(Leaf(leaf, spec, entry["simulations"], entry["batch"]))
    return result


def scenario_of(leaf: str) -> str:
    """Name of the scenario that the leaf called *leaf* belongs to; names of scenarios hold no hyphen."""
    return leaf.split("-", maxsplit=1)[0]


def _plain(value):
    """*value* with whole numbers as ints, so that 20000, 20000.0 and 2.0e+4 mean the same simulations."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_leaves(name: str, entry: dict) -> None:
    """BadRequest if a parameter is both listed and in `combinations`, rows disagree, or two leaves have one name."""
    at = f"scenarios.{name}"
    rows = entry.get("combinations", [])
    for row in rows:
        if set(row) != set(rows[0]):
            raise BadRequest(
                f"{at}.combinations: one row sets {', '.join(sorted(rows[0]))}, another {', '.join(sorted(row))}; "
                "every row must set the same parameters"
            )
        for key in row:
            if isinstance(entry.get(key), list):
                raise BadRequest(f"{at}: `{key}` is a list and also set by `combinations`; keep one of them")
    found = set()
    for leaf in leaves(name, entry):
        if leaf.name in found:
            raise BadRequest(f"{at}: two leaf scenarios are called '{leaf.name}'; take one of the two away")
        found.add(leaf.name)
        if len(leaf.name) > LONGEST_NAME:
            raise BadRequest(
                f"{at}: the leaf scenario '{leaf.name[:100]}…' has a name of {len(leaf.name)} characters, which names files; "
                f"at most {LONGEST_NAME} can be used: sweep fewer parameters, or give the scenario a shorter name"
            )


def batches(*, simulations: int, batch: int, start: int = 0) -> list[tuple[int, int]]:
    """(first index, count) of each batch of *simulations* consecutive indices; only the last may be shorter."""
    return [(start + i, min(batch, simulations - i)) for i in range(0, simulations, batch)]


def split_of(index: int) -> str:
    """`test` if and only if *index* is a multiple of 10, in every dataset, so that nothing tested on was trained on."""
    return "test" if index % 10 == 0 else "train"


def split_size(start: int, count: int, split: str) -> int:
    """How many of the indices start..start+count-1 belong to *split*."""
    return sum(split_of(i) == split for i in range(start, start + count))


def random_generator(*, seed: int, spec: dict, index: int, purpose: str) -> np.random.Generator:
    """The generator of everything random about simulation *index* of a leaf, for one *purpose*.

    Keyed on the workflow seed, the leaf's name and parameters, and the index; never on an order or a count.
    """
    key = hashlib.sha256(canonical([spec, purpose]).encode()).digest()
    words = np.frombuffer(key, dtype=np.uint32).tolist()
    return np.random.default_rng(np.random.SeedSequence([seed, index, *words]))


@dataclasses.dataclass(frozen=True)
class EngineSeeds:
    """The two seeds that msprime is given for a simulation, each from 1 to 2^32 - 1."""

    ancestry: int
    mutations: int


def engine_seeds(*, seed: int, spec: dict, index: int) -> EngineSeeds:
    """Seeds for msprime; no other index of the same leaf has the same ancestry seed, or the same mutation seed.

    Each is a permutation of the 2^32 - 1 seeds that there are, applied to the index (0 to 2^32 - 2; datasets, evaluation and
    simulation on the fly use those below 4e9). The permutations of two leaves, and of two workflow seeds, are unrelated, so
    that a simulation may by chance have a seed that one of another leaf has, for other parameters; `check_shared_ancestry`
    finds where the same ancestry would come of it.
    """
    if not 0 <= index <= LAST_INDEX:
        raise BadRequest(f"'{spec['name']}', index {index}: expected 0 to {LAST_INDEX}")
    ancestry, mutations = (int(msprime_seeds(index, key=key_of(seed, spec, use))) for use in ("ancestry", "mutations"))
    return EngineSeeds(ancestry, mutations)


def check_shared_ancestry(counted: list[tuple[dict, list[tuple[int, int]]]], *, seed: int) -> None:
    """BadRequest if simulations of two leaves with the same demography would have the same ancestry.

    They need the same ancestry seed for that, and parameters that differ in name and mutation rate only.

    Parameters
    ----------
    counted : parameters of each leaf, and (first index, count) of its batches
    seed : seed of the workflow
    """
    alike: dict[str, list] = {}
    for spec, ranges in counted:
        alike.setdefault(canonical({k: v for k, v in spec.items() if k not in ("name", "mutation_rate")}), []).append(
            (spec, ranges)
        )
    for group in alike.values():
        seen: dict[int, tuple[str, int]] = {}
        for spec, ranges in group if len(group) > 1 else []:
            indices = np.concatenate([np.arange(start, start + count) for start, count in ranges])
            found = msprime_seeds(indices, key=key_of(seed, spec, "ancestry"))
            for index, value in zip(indices.tolist(), found.tolist(), strict=True):
                name, other = seen.setdefault(value, (spec["name"], index))
                if name != spec["name"]:
                    raise BadRequest(
                        f"simulation {index} of '{spec['name']}' and simulation {other} of '{name}' would have the same "
                        "ancestry: their parameters are the same, and by chance so are their seeds (msprime has 2^32); "
                        "rename one of the scenarios, or change `seed`"
                    )
