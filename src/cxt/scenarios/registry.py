"""The kinds of scenario, and simulating any of them: from a variant, an index and a seed to a tree sequence."""

import dataclasses
from collections.abc import Callable

import tskit

from cxt.config.variants import list_variants
from cxt.errors import BadRequest
from cxt.random_seeds import check_seed
from cxt.scenarios import msprime_models, tree_pieces
from cxt.scenarios.genetic_maps import get_genetic_map
from cxt.scenarios.seeds import build_random_generator, derive_engine_seeds
from cxt.scenarios.stdpopsim_catalogue import list_autosomes, select_models
from cxt.scenarios.stdpopsim_models import simulate_segment

METADATA = tskit.MetadataSchema.permissive_json()


@dataclasses.dataclass(frozen=True)
class ScenarioKind:
    """How to simulate a kind of scenario, and how to check a variant before anything runs.

    *inspect* is a check that takes longer, done once when a workflow is planned.
    """

    simulate: Callable
    check: Callable[[dict], None] = lambda spec: None
    inspect: Callable[[dict], None] = lambda spec: None


def _check_catalogue(spec: dict) -> None:
    select_models(spec)
    list_autosomes(spec)
    if "genetic_map" in spec:
        get_genetic_map(spec)


SIMULATORS = {
    "constant": ScenarioKind(msprime_models.simulate_constant),
    "sawtooth": ScenarioKind(msprime_models.simulate_sawtooth),
    "island": ScenarioKind(msprime_models.simulate_island),
    "hard_sweep": ScenarioKind(msprime_models.simulate_hard_sweep, msprime_models.check_sweep),
    "stdpopsim": ScenarioKind(simulate_segment, _check_catalogue),
    "demes": ScenarioKind(msprime_models.simulate_demes, msprime_models.check_demes),
    "msprime": ScenarioKind(msprime_models.simulate_piecewise, msprime_models.check_history),
    "trees": ScenarioKind(tree_pieces.take_piece, inspect=tree_pieces.inspect_files),
}
"""The kinds of scenario, by name."""


def check_variant(spec: dict) -> None:
    """BadRequest if a variant cannot be simulated, as far as this can be checked without simulating."""
    SIMULATORS[spec["kind"]].check(spec)


def check_scenarios(config: dict) -> None:
    """Run `check_variant` for every variant of *config*, and inspect the files of those that have some."""
    for name, scenario in config["scenarios"].items():
        for variant in list_variants(name, scenario):
            check_variant(variant.spec)
            SIMULATORS[scenario["kind"]].inspect(variant.spec)


def identify_simulations(spec: dict, *, start: int, count: int) -> dict:
    """What consecutive simulations of a variant depend on besides seed and indices: its parameters, and digests of files."""
    return tree_pieces.identify_pieces(spec, start=start, count=count) if spec["kind"] == "trees" else spec


def simulate_tables(spec: dict, *, index: int, seed: int) -> tskit.TableCollection:
    """Simulate *index* of the variant *spec* as tables, which avoids a copy if they are only written.

    Parameters, metadata and errors are as in `simulate_tree_sequence`.
    """
    seed = check_seed(seed)
    own = tree_pieces.drop_content(spec) if spec["kind"] == "trees" else spec
    seeds = derive_engine_seeds(seed=seed, spec=own, index=index)
    if spec["kind"] == "stdpopsim":  # draws a model, a segment and samples
        random = {"rng": build_random_generator(seed=seed, spec=spec, index=index, purpose="simulate")}
    elif spec["kind"] == "trees":
        random = {"rng": build_random_generator(seed=seed, spec=own, index=index, purpose="simulate"), "index": index}
    else:
        random = {}
    tables, properties = SIMULATORS[spec["kind"]].simulate(spec, seeds, **random)
    if tables.sequence_length != spec["sequence_length"]:
        raise BadRequest(
            f"'{spec['name']}', index {index}: {tables.sequence_length:g} bp simulated instead of {spec['sequence_length']}"
        )
    tables.metadata_schema = METADATA
    identity = {"scenario": spec["name"], "index": index, "seed": seed, "spec": own}
    if spec["kind"] != "trees":
        identity["ancestry_model"] = spec.get("ancestry_model", "hudson")
    tables.metadata = {"cxt": identity | properties}
    return tables


def simulate_tree_sequence(spec: dict, *, index: int, seed: int) -> tskit.TreeSequence:
    """Simulate *index* of the variant *spec*, with its identity and rates in the metadata.

    Parameters
    ----------
    spec : dict
        Parameters of a variant, from `cxt.config.variants.list_variants`.
    index : int
        Index of the simulation.
    seed : int
        Seed of the workflow, 0 to 2^63 - 1.

    Returns
    -------
    tskit.TreeSequence
        ``ts.metadata["cxt"]`` holds scenario, index, seed, spec, ancestry model, mutation rate, recombination rate (the mean
        over the sequence), and for stdpopsim also the drawn model, chromosome, left end and samples, the recombination rate
        that the model was inferred with, if it has one, and stdpopsim's version.

    Raises
    ------
    BadRequest
        If the seed or index is out of range, or a genetic map is missing, damaged or too short.
    """
    return simulate_tables(spec, index=index, seed=seed).tree_sequence()
