"""Tree sequences as other programs write them: SLiM's before and after recapitation, tsinfer's, msprime's."""

import warnings
from pathlib import Path

import msprime
import numpy as np
import tskit

SLIM_METADATA = tskit.MetadataSchema(
    {"codec": "json", "type": "object", "properties": {"SLiM": {"type": "object"}}, "required": ["SLiM"]}
)


def simulate_forwards(*, individuals=40, generations=30, length=60_000, seed=1, crossovers=0.02) -> tskit.TreeSequence:
    """Wright-Fisher populations simulated forwards in ticks, as SLiM writes them: there are several roots.

    Two populations, `p1` and `p2`, that exchange no migrants; all individuals of the last generation are samples.
    """
    rng = np.random.default_rng(seed)
    tables = tskit.TableCollection(length)
    tables.time_units = "ticks"
    tables.metadata_schema = SLIM_METADATA
    tables.metadata = {"SLiM": {"model_type": "WF", "tick": generations}}
    tables.populations.metadata_schema = tskit.MetadataSchema.permissive_json()
    tables.nodes.metadata_schema = tskit.MetadataSchema.permissive_json()
    for name in ("p1", "p2"):
        tables.populations.add_row(metadata={"name": name, "slim_id": int(name[1])})

    def generation(time: int, population: int) -> list[tuple[int, int]]:
        made = []
        for _ in range(individuals):
            individual = tables.individuals.add_row(flags=65536)
            made.append(
                tuple(
                    tables.nodes.add_row(
                        flags=tskit.NODE_IS_SAMPLE if time == 0 else 0, time=time, population=population, individual=individual,
                        metadata={"slim_id": len(tables.nodes), "is_null": False},
                    )
                    for _ in range(2)
                )
            )  # fmt: skip
        return made

    alive = [generation(generations, population) for population in range(2)]
    for time in range(generations - 1, -1, -1):
        born = [generation(time, population) for population in range(2)]
        for population in range(2):
            for child in born[population]:
                for node in child:
                    first, second = rng.permutation(alive[population][rng.integers(individuals)]).tolist()
                    cut = float(rng.integers(1, length)) if rng.random() < crossovers else float(length)
                    tables.edges.add_row(0, cut, first, node)
                    if cut < length:
                        tables.edges.add_row(cut, length, second, node)
        alive = born
    tables.sort()
    return tables.tree_sequence().simplify(keep_input_roots=True)


def recapitate(ts: tskit.TreeSequence, *, seed=1) -> tskit.TreeSequence:
    """The same with its founders' ancestry, as `pyslim.recapitate` makes it."""
    demography = msprime.Demography.from_tree_sequence(ts, initial_size=200)
    demography.add_population(name="ancestral", initial_size=200)
    oldest = float(ts.nodes_time.max())
    demography.add_population_split(time=np.nextafter(oldest, 2 * oldest), derived=["p1", "p2"], ancestral="ancestral")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", msprime.TimeUnitsMismatchWarning)
        return msprime.sim_ancestry(initial_state=ts, demography=demography, recombination_rate=1e-6, random_seed=seed)


def as_tsinfer(ts: tskit.TreeSequence) -> tskit.TreeSequence:
    """The same genealogies as tsinfer writes them: times are ranks, in no units, and branches of no support are collapsed."""
    tables = ts.dump_tables()
    _, ranks = np.unique(tables.nodes.time, return_inverse=True)
    tables.nodes.time = ranks / max(1, ranks.max())
    tables.mutations.time = np.full(tables.mutations.num_rows, tskit.UNKNOWN_TIME)
    tables.time_units = "uncalibrated"
    return tables.tree_sequence()


def as_tsdate(ts: tskit.TreeSequence, *, generations: float = 10_000) -> tskit.TreeSequence:
    """The same after dating: times in generations."""
    tables = as_tsinfer(ts).dump_tables()
    tables.nodes.time = tables.nodes.time * generations
    tables.time_units = "generations"
    return tables.tree_sequence()


def write_own_trees(directory) -> None:
    """The file that config/examples/trees.yaml takes as given in a working directory, shorter."""
    path = Path(directory, "results", "trees", "mine.trees")
    path.parent.mkdir(parents=True)
    msprime.sim_ancestry(25, sequence_length=2.2e6, population_size=1e3, recombination_rate=1e-8, random_seed=1).dump(path)
