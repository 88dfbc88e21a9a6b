"""Scenarios simulated with msprime alone: constant and changing sizes, islands, a hard sweep, Demes graphs."""

import functools
import itertools
import json
import math
from collections.abc import Iterable

import demes
import msprime
import tskit

from cxt.errors import BadRequest, suggest_nearest
from cxt.scenarios.seeds import EngineSeeds

SimulationResult = tuple[tskit.TableCollection, dict]
"""The tables of a simulation, and properties to record, with at least mutation_rate and recombination_rate."""


def build_ancestry_model(spec: dict) -> msprime.AncestryModel | None:
    """msprime's model for a scenario's `ancestry_model`; None stands for the Hudson coalescent."""
    return msprime.SMCK(k=1) if spec.get("ancestry_model") == "smc_prime" else None


def _simulate_infinite_sites(
    spec: dict, demography: msprime.Demography, samples, seeds: EngineSeeds, *, model=None
) -> SimulationResult:
    """Simulate ancestry, and infinite-sites mutations at continuous positions."""
    ts = msprime.sim_ancestry(
        samples=samples,
        demography=demography,
        sequence_length=spec["sequence_length"],
        recombination_rate=spec["recombination_rate"],
        random_seed=seeds.ancestry,
        model=build_ancestry_model(spec) if model is None else model,
    )
    ts = msprime.sim_mutations(
        ts,
        rate=spec["mutation_rate"],
        discrete_genome=False,
        model=msprime.BinaryMutationModel(),
        random_seed=seeds.mutations,
    )
    return ts.dump_tables(), {key: float(spec[key]) for key in ("mutation_rate", "recombination_rate")}


def _build_one_population(size: float) -> msprime.Demography:
    demography = msprime.Demography()
    demography.add_population(name="A", initial_size=size)
    return demography


def simulate_constant(spec: dict, seeds: EngineSeeds) -> SimulationResult:
    """One population of constant size."""
    return _simulate_infinite_sites(spec, _build_one_population(spec["population_size"]), {"A": spec["individuals"]}, seeds)


# (time in generations, growth rate times a denominator), where the first denominator is 4e4 and the others magnitude·1e4.
ZIGZAG = (
    (20, 6437.7516497364), (30, -378.691273513906), (200, -643.77516497364), (300, 37.8691273513906),
    (2_000, 64.377516497364), (3_000, -3.78691273513906), (20_000, -6.4377516497364), (30_000, 0.378691273513906),
    (200_000, 0.64377516497364), (300_000, -0.0378691273513906), (2_000_000, -0.064377516497364),
    (3_000_000, 0.00378691273513906),
)  # fmt: skip


def build_zigzag(population_size: float, magnitude: float) -> msprime.Demography:
    """Build a demography whose size zig-zags through time (Schiffels & Durbin 2014), constant beyond 20 million generations."""
    demography = _build_one_population(population_size)
    for i, (time, rate) in enumerate(ZIGZAG):
        denominator = 4e4 if i == 0 else magnitude * 1e4
        demography.add_population_parameters_change(time=time, growth_rate=rate / denominator, population="A")
    demography.add_population_parameters_change(time=20_000_000, growth_rate=0, initial_size=population_size, population="A")
    return demography


def simulate_sawtooth(spec: dict, seeds: EngineSeeds) -> SimulationResult:
    """One population whose size zig-zags through time."""
    return _simulate_infinite_sites(
        spec, build_zigzag(spec["population_size"], spec["magnitude"]), {"A": spec["individuals"]}, seeds
    )


def split_island_samples(individuals: int) -> tuple[int, int, int]:
    """Individuals per deme: 60, 20 and 20%, rounded down, with the rest in the first deme."""
    small = individuals * 20 // 100
    return individuals - 2 * small, small, small


def simulate_island(spec: dict, seeds: EngineSeeds) -> SimulationResult:
    """Three demes of N, N/2 and N/2 with symmetric migration."""
    size = spec["population_size"]
    demography = msprime.Demography.island_model([size, size / 2, size / 2], migration_rate=spec["migration_rate"])
    counts = split_island_samples(spec["individuals"])
    return _simulate_infinite_sites(spec, demography, {f"pop_{i}": n for i, n in enumerate(counts) if n}, seeds)


def simulate_hard_sweep(spec: dict, seeds: EngineSeeds) -> SimulationResult:
    """A sweep from frequency 1/N to 1 - 1/N that ends today, preceded by the Hudson coalescent."""
    size = spec["population_size"]
    sweep = msprime.SweepGenicSelection(
        position=spec["position"],
        start_frequency=1 / size,
        end_frequency=1 - 1 / size,
        s=spec["selection_coefficient"],
        dt=1e-6,
    )
    model = [sweep, msprime.StandardCoalescent()]
    return _simulate_infinite_sites(spec, _build_one_population(size), {"A": spec["individuals"]}, seeds, model=model)


def simulate_piecewise(spec: dict, seeds: EngineSeeds) -> SimulationResult:
    """One population whose size is constant between given times."""
    demography = _build_one_population(spec["history"][0]["population_size"])
    for epoch in spec["history"][1:]:
        demography.add_population_parameters_change(time=epoch["time"], initial_size=epoch["population_size"], population="A")
    return _simulate_infinite_sites(spec, demography, {"A": spec["individuals"]}, seeds)


def simulate_demes(spec: dict, seeds: EngineSeeds) -> SimulationResult:
    """A Demes graph, sampled at time 0."""
    demography = msprime.Demography.from_demes(_build_graph(json.dumps(spec["demography"])))
    return _simulate_infinite_sites(spec, demography, spec["samples"], seeds)


@functools.lru_cache(maxsize=4)
def _build_graph(content: str) -> demes.Graph:
    return demes.Graph.fromdict(json.loads(content))


def check_demes(spec: dict) -> None:
    """BadRequest if the scenario samples a deme that does not exist, or not at time 0, or its lineages may never coalesce."""
    graph = _build_graph(json.dumps(spec["demography"]))
    try:
        msprime.Demography.from_demes(graph)
    except (ValueError, NotImplementedError) as error:
        raise BadRequest(f"scenario '{spec['name']}': msprime cannot simulate this Demes model: {error}") from None
    today = [deme.name for deme in graph.demes if deme.end_time == 0]
    if not spec["samples"]:
        raise BadRequest(f"scenario '{spec['name']}': samples names no deme; choose from {', '.join(today)}")
    for name in spec["samples"]:
        if name not in graph:
            raise BadRequest(f"scenario '{spec['name']}': samples: there is no deme '{name}'{suggest_nearest(name, today)}")
        if name not in today:
            raise BadRequest(
                f"scenario '{spec['name']}': samples: deme '{name}' ended {graph[name].end_time:g} generations ago, but "
                f"samples are taken at time 0; choose from {', '.join(today) or 'none: no deme exists at time 0'}"
            )

    if apart := _find_separated_demes(graph, list(spec["samples"])):
        raise BadRequest(
            f"scenario '{spec['name']}': lineages from {' and '.join(apart)} may never coalesce, so the simulation would not "
            "end; give the demes a common ancestor or migration that never stops backwards in time"
        )


def _find_reachable(start: Iterable[str], moves: dict[str, set[str]]) -> set[str]:
    """All demes that can be reached from *start* by any number of *moves*, including *start*."""
    reached, to_visit = set(), list(start)
    while to_visit:
        name = to_visit.pop()
        if name not in reached:
            reached.add(name)
            to_visit += moves.get(name, ())
    return reached


def _list_migrations(graph: demes.Graph, recent: float, old: float) -> dict[str, set[str]]:
    """Possible migrations of a lineage, backwards in time, between two times without events between: {destination: sources}."""
    moves: dict[str, set[str]] = {}
    for migration in graph.migrations:
        if migration.rate > 0 and migration.end_time <= recent and old <= migration.start_time:
            moves.setdefault(migration.dest, set()).add(migration.source)
    return moves


def _move_past_events(graph: demes.Graph, time: float, where: set[str]) -> set[str]:
    """Demes to which lineages in *where* can have moved after the events at *time*, in msprime's order of events."""

    def to_ancestors(where: set[str], several: bool) -> set[str]:
        begun = {d.name: d for d in graph.demes if d.start_time == time and (len(d.ancestors) > 1) == several}
        moved = {
            a for n in where & begun.keys() for a, p in zip(begun[n].ancestors, begun[n].proportions, strict=True) if p > 0
        }
        return (where - begun.keys()) | moved

    where = to_ancestors(where, several=False)
    for pulse in reversed(graph.pulses):
        if pulse.time == time and pulse.dest in where:
            where = where | {s for s, p in zip(pulse.sources, pulse.proportions, strict=True) if p > 0}
            if math.isclose(sum(pulse.proportions), 1):  # all lineages move
                where = where - {pulse.dest}
    return to_ancestors(where, several=True)


def _find_separated_demes(graph: demes.Graph, sampled: list[str]) -> list[str]:
    """Two of the oldest demes in which lineages of *sampled* demes can remain separated forever; empty if there are none.

    Backwards in time, lineages move from a deme to its ancestors, and from destination to source of pulses and migrations.
    Beyond the last event, they all coalesce if one deme can be reached from every deme that they can be in.
    """
    times = {0.0, *(deme.start_time for deme in graph.demes), *(pulse.time for pulse in graph.pulses)}
    times |= {time for migration in graph.migrations for time in (migration.start_time, migration.end_time)}
    where = set(sampled)
    for recent, old in itertools.pairwise(sorted(times)):
        moves = _list_migrations(graph, recent, old)
        where = _find_reachable(where, moves)
        if not math.isinf(old):
            where = _move_past_events(graph, old, where)
    ends = {name: _find_reachable([name], moves) for name in sorted(where)}
    if set.intersection(*ends.values()):
        return []
    return next([a, b] for a, b in itertools.combinations(ends, 2) if not ends[a] & ends[b])


def check_history(spec: dict) -> None:
    """BadRequest if a history does not begin at time 0 or its times do not rise."""
    times = [epoch["time"] for epoch in spec["history"]]
    if times[0] != 0:
        raise BadRequest(f"scenario '{spec['name']}': history must begin at time 0 (today), got {times[0]:g}")
    for before, after in itertools.pairwise(times):
        if after <= before:
            raise BadRequest(f"scenario '{spec['name']}': history: time {after:g} follows {before:g}; times must rise")


def check_sweep(spec: dict) -> None:
    """BadRequest if the sweeping allele lies outside the sequence."""
    if not spec["position"] < spec["sequence_length"]:
        raise BadRequest(
            f"scenario '{spec['name']}': position {spec['position']:g} is outside the sequence of {spec['sequence_length']} bp"
        )
    if spec["population_size"] <= 2:
        raise BadRequest(
            f"scenario '{spec['name']}': the population_size of a sweep must be above 2, got {spec['population_size']:g}"
        )
