"""Scenarios: the kinds there are, sweeps, seeds, batches of indices, and the rule of what is held out.

A simulation is a pure function of the workflow seed, the leaf scenario (name and parameters) and its index.
"""

import dataclasses
import hashlib
import itertools

import numpy as np

from cxt.errors import BadRequest
from cxt.lineage import canonical

EVALUATION_START = 1_000_000_000
"""First index of evaluation simulations; datasets use indices from 0, and the schema keeps them below."""

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


def engine_seed(rng: np.random.Generator) -> int:
    """A seed that msprime accepts."""
    return int(rng.integers(1, 2**32))


def unique_seed(*, seed: int, spec: dict, index: int) -> int:
    """A seed for msprime that no other index of the same leaf has.

    An affine permutation of the 2^32 - 1 seeds that there are (its factor is a prime that does not divide their number),
    shifted for each leaf, so that simulations with a single seed cannot collide; drawn ones would, now and then.
    """
    shift = int(random_generator(seed=seed, spec=spec, index=0, purpose="engine").integers(2**32 - 1))
    return 1 + (shift + 2654435761 * index) % (2**32 - 1)
