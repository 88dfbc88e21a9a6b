"""Simulating random segments of a species' genome under models of stdpopsim's catalogue."""

import warnings

import msprime
import numpy as np
import tskit

from cxt.errors import BadRequest
from cxt.scenarios.genetic_maps import find_covered_interval, list_mapped_autosomes, read_chromosome_map
from cxt.scenarios.msprime_models import SimulationResult, build_ancestry_model
from cxt.scenarios.seeds import EngineSeeds
from cxt.scenarios.stdpopsim_catalogue import (
    build_catalogue_model,
    get_species,
    import_stdpopsim,
    list_autosomes,
    list_sampled_populations,
    select_models,
)


def draw_segment(spec: dict, rng: np.random.Generator) -> tuple[str, int, msprime.RateMap | None]:
    """Draw the segment to simulate: a chromosome, and a uniform position on it.

    With a genetic map, segments lie within the part of a chromosome that the map covers.

    Returns
    -------
    chromosome : str
    left : int
        Left end, in base pairs.
    rates : msprime.RateMap or None
        The chromosome's genetic map.

    Raises
    ------
    BadRequest
        If the map is missing or damaged, or covers no part as long as the segment.
    """
    length = spec["sequence_length"]
    if "genetic_map" in spec:
        mapped = [(c, read_chromosome_map(spec["species"], spec["genetic_map"], c.id)) for c in list_mapped_autosomes(spec)]
        places = [(chromosome.id, *find_covered_interval(chromosome, rates), rates) for chromosome, rates in mapped]
    else:
        places = [(chromosome.id, 0, int(chromosome.length), None) for chromosome in list_autosomes(spec)]
    long_enough = [place for place in places if place[2] - place[1] >= length]
    if not long_enough:
        name, left, right, _ = max(places, key=lambda place: place[2] - place[1])
        raise BadRequest(
            f"scenario '{spec['name']}': the genetic map {spec['genetic_map']} covers no interval of {length} bp; "
            f"the longest, on chromosome {name}, has {right - left} bp: lower sequence_length"
        )
    name, left, right, rates = long_enough[rng.integers(len(long_enough))]
    return name, int(rng.integers(left, right - length + 1)), rates


def simulate_segment(spec: dict, seeds: EngineSeeds, *, rng: np.random.Generator) -> SimulationResult:
    """Simulate a random segment of a chromosome under a random model of the catalogue."""
    stdpopsim = import_stdpopsim()
    species = get_species(spec)
    models = select_models(spec)
    if models:
        name = models[rng.integers(len(models))]
        model = build_catalogue_model(species.id, name)
        populations = list_sampled_populations(model)
        counts = rng.multinomial(spec["individuals"], np.full(len(populations), 1 / len(populations)))
        samples = {p: int(n) for p, n in zip(populations, counts, strict=True) if n}
        rate = model.mutation_rate
    else:
        size = spec.get("population_size", species.population_size)
        name, rate = f"constant size {size:g}", None
        model = stdpopsim.PiecewiseConstantSize(size)
        samples = {"pop_0": spec["individuals"]}
    chromosome, left, rates = draw_segment(spec, rng)
    right = left + spec["sequence_length"]
    with warnings.catch_warnings():
        # Published recipe: the catalogue model's mutation rate with the chromosome's recombination rate.
        warnings.filterwarnings("ignore", message=".*demographic model has .* rate.*")
        contig = species.get_contig(chromosome, left=left, right=right, mutation_rate=rate)
    if rates is not None:
        # As in get_contig, which would read the map's file again for every simulation.
        contig.recombination_map = rates.slice(left=left, right=right)
    properties = {
        "model": name,
        "chromosome": chromosome,
        "left": left,
        "samples": samples,
        "mutation_rate": contig.mutation_rate,
        "recombination_rate": float(contig.recombination_map.mean_rate),
        "stdpopsim": stdpopsim.__version__,
    }
    if model.recombination_rate is not None:
        properties["model_recombination_rate"] = model.recombination_rate
    tables = simulate_contig(model, contig, samples, seeds, ancestry_model=build_ancestry_model(spec)).dump_tables()
    tables.trim()
    return tables, properties


def simulate_contig(model, contig, samples: dict, seeds: EngineSeeds, *, ancestry_model=None) -> tskit.TreeSequence:
    """Simulate a diploid contig without gene conversion like stdpopsim's msprime engine, but with separate seeds.

    The engine takes one seed and draws two of 31 bits from it, which can collide: among 10 000 simulations, two have the same
    ancestry with a probability of about 1/50. Of msprime's ancestry models, it supports only the old, slow SMC'.
    """
    ts = msprime.sim_ancestry(
        samples=model.get_sample_sets(samples, ploidy=contig.ploidy),
        demography=model.model,
        recombination_rate=contig.recombination_map,
        ploidy=contig.ploidy,
        random_seed=seeds.ancestry,
        model=ancestry_model,
    )
    return msprime.sim_mutations(ts, rate=contig.mutation_rate, random_seed=seeds.mutations)
