"""Scenarios from stdpopsim's catalogue: species, models, segments of chromosomes, and genetic maps.

python -m cxt.catalogue --species HomSap --genetic-map HapMapII_GRCh38     fetch a map into stdpopsim's cache
"""

import argparse
import functools
import importlib.metadata
import sys
import types
import warnings
from pathlib import Path

import msprime
import numpy as np
import tskit

from cxt.demographies import Simulated, ancestry_model
from cxt.errors import BadRequest, exit_on_bad_request, nearest
from cxt.files import atomic_write
from cxt.jsontext import json_text
from cxt.scenarios import scenario_of

ANCIENT_MODELS = ("AncientEurasia_9K19", "PapuansOutOfAfrica_10J19", "AncientEurope_4A21")
"""Catalogue models built around ancient samples, which the published training set leaves out."""

SEX_CHROMOSOMES = {"AnoCar": ("LGb",), "GasAcu": ("19",), "HelMel": ("21",)}
"""Sex chromosomes whose names in the catalogue do not say so: X of the anole, X of the stickleback, Z of the butterfly."""

DRAWS = 10_000
"""Segments that are tried before a genetic map is said to have none of the length asked for."""


@functools.cache
def catalogue():
    """The module stdpopsim, imported when it is first needed, since that takes as long as msprime does.

    Half of it would go into second copies of all models, by which only stdpopsim's own tests check the first.
    """
    sys.modules.setdefault("stdpopsim.qc", types.ModuleType("stdpopsim.qc"))
    import stdpopsim

    return stdpopsim


def get_species(spec: dict):
    """The stdpopsim species of a scenario; BadRequest with the nearest name if there is none."""
    stdpopsim = catalogue()
    known = [species.id for species in stdpopsim.all_species()]
    if spec["species"] not in known:
        raise BadRequest(f"scenario '{spec['name']}': unknown species '{spec['species']}'{nearest(spec['species'], known)}")
    return stdpopsim.get_species(spec["species"])


def sampled_today(model) -> list[str]:
    """Names of the populations of a catalogue model that can be sampled at time 0."""
    return [p.name for p in model.populations if p.allow_samples and not p.default_sampling_time]


def catalogue_models(spec: dict) -> list[str]:
    """Catalogue models that a stdpopsim scenario draws from; empty for a constant size.

    Raises
    ------
    BadRequest
        If stdpopsim has no such species or model, or a model has no population that can be sampled at time 0.
    """
    species = get_species(spec)
    known = [model.id for model in species.demographic_models]
    for model in spec.get("models", []):
        if model not in known:
            raise BadRequest(f"scenario '{spec['name']}': {species.id} has no model '{model}'{nearest(model, known)}")
    if known and spec.get("models") != [] and "population_size" in spec:
        raise BadRequest(
            f"scenario '{spec['name']}': population_size is for a constant size, but {species.id} has catalogue models; "
            "add `models: []` for the size, or take population_size away"
        )
    chosen = spec.get("models", [model for model in known if model not in ANCIENT_MODELS])
    for model in chosen:
        if not sampled_today(_model(species.id, model)):
            raise BadRequest(f"scenario '{spec['name']}': no population of '{model}' can be sampled at time 0")
    return list(chosen)


@functools.cache
def _model(species: str, model: str):
    """A catalogue model, built once a process: building one costs more than a short simulation."""
    return catalogue().get_species(species).get_demographic_model(model)


def autosomes(spec: dict) -> list:
    """Nuclear chromosomes of two copies that are no sex chromosomes and long enough for the segment."""
    species = get_species(spec)
    sex = ("X", "Y", "Z", "W", *SEX_CHROMOSOMES.get(species.id, ()))
    usable = [c for c in species.genome.chromosomes if c.ploidy == 2 and c.id.upper() not in map(str.upper, sex)]
    if not usable:
        raise BadRequest(f"scenario '{spec['name']}': {species.id} has no chromosome of two copies; cxt simulates diploids")
    long_enough = [chromosome for chromosome in usable if chromosome.length >= spec["sequence_length"]]
    if not long_enough:
        longest = max((chromosome.length for chromosome in usable), default=0)
        raise BadRequest(
            f"scenario '{spec['name']}': no autosome of {species.id} is as long as sequence_length {spec['sequence_length']}; "
            f"the longest has {longest:.0f} bp"
        )
    return long_enough


# Genetic maps


def genetic_map(spec: dict):
    """stdpopsim's genetic map of a scenario; BadRequest with the nearest name if there is none."""
    species = get_species(spec)
    known = [m.id for m in species.genetic_maps]
    if spec["genetic_map"] not in known:
        at = f"scenario '{spec['name']}': {species.id} has no genetic map '{spec['genetic_map']}'"
        raise BadRequest(at + nearest(spec["genetic_map"], known))
    return species.get_genetic_map(spec["genetic_map"])


def catalogue_lineage(spec: dict) -> list[str]:
    """What decides a stdpopsim scenario beside its parameters: the catalogue's version, and its map's checksum."""
    return [importlib.metadata.version("stdpopsim"), *([genetic_map(spec).sha256] if "genetic_map" in spec else [])]


def without_map(spec: dict) -> str:
    """How to go on without a genetic map that cannot be had, in words."""
    fetch = (
        f"Fetch it where there is a network (`python -m cxt.catalogue --species {spec['species']} --genetic-map "
        f"{spec['genetic_map']}`) and copy stdpopsim's cache here (STDPOPSIM_CACHE says where it is)"
    )
    if "kind" not in spec:  # asked for by hand, not by a scenario
        return fetch
    scenario = scenario_of(spec["name"])
    return (
        f"{fetch}; or go on with the chromosomes' average rates (`scenarios: {{{scenario}: {{genetic_map: null}}}}` in an "
        f"overlay) or without the scenario (`scenarios: {{{scenario}: null}}`)"
    )


def _not_there(spec: dict, reason: str) -> BadRequest:
    found = genetic_map(spec)
    return BadRequest(
        f"scenario '{spec['name']}' needs the genetic map {found.id} of {spec['species']}, which is not in stdpopsim's cache "
        f"({found.map_cache_dir}){reason}. {without_map(spec)}"
    )


@functools.cache
def _answer(url: str) -> str:
    """Why *url* cannot be fetched, or "" if it can."""
    import http.client  # here, because every job pays for what is imported above
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            return ""
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        return f" and cannot be fetched ({getattr(error, 'reason', error)})"


def check_map_can_be_had(spec: dict, *, fetched=None) -> None:
    """BadRequest if a scenario's genetic map is neither cached nor answered for by its server; fetches nothing.

    *fetched* is a file that says that the map was fetched; if it is there and the map is not, nothing would fetch it again.
    """
    found = genetic_map(spec)
    if found.is_cached():
        return
    if reason := _answer(found.url):
        raise _not_there(spec, reason)
    if fetched is not None and Path(fetched).exists():
        raise _not_there(spec, f", although {fetched} says that it was fetched: delete that file to fetch it again")


def fetch_map(spec: dict) -> None:
    """Put a scenario's genetic map into stdpopsim's cache, unless it is there; BadRequest if that fails."""
    from http.client import HTTPException

    found = genetic_map(spec)
    if found.is_cached():
        return
    try:
        found.download()
    except (OSError, ValueError, EOFError, HTTPException) as error:
        # No network; another checksum than the catalogue's; a cut archive.
        raise _not_there(spec, f" and could not be fetched ({error})") from None
    if not found.is_cached():
        raise _not_there(spec, ": something else is in its place; delete that")


def write_record(spec: dict, path) -> None:
    """Write down that a scenario's genetic map is in stdpopsim's cache: which, and its checksum."""
    record = {"species": spec["species"], "genetic_map": spec["genetic_map"], "sha256": genetic_map(spec).sha256}
    atomic_write(path, json_text(record).encode())


@functools.lru_cache(maxsize=64)
def _rates(species: str, name: str, chromosome: str) -> msprime.RateMap | None:
    """The map of one chromosome, read once a process; None if the map does not cover the chromosome."""
    found = catalogue().get_species(species).get_genetic_map(name)
    # stdpopsim would put a flat map in the place of one that is not there, with a warning.
    if not (found.map_cache_dir / found.file_pattern.format(id=chromosome)).is_file():
        return None
    return found.get_chromosome_map(chromosome)


def mapped_autosomes(spec: dict) -> list:
    """The usable chromosomes that a scenario's genetic map covers; BadRequest if the map is not cached, or there is none."""
    found = genetic_map(spec)
    if not found.is_cached():
        raise _not_there(spec, "")
    covered = [chromosome for chromosome in autosomes(spec) if _rates(spec["species"], found.id, chromosome.id) is not None]
    if not covered:
        raise BadRequest(
            f"scenario '{spec['name']}': the genetic map {found.id} in {found.map_cache_dir} covers no autosome of "
            f"{spec['species']} as long as sequence_length {spec['sequence_length']}; delete that directory if it is damaged"
        )
    return covered


def _covers(rates: msprime.RateMap, left: int, right: int) -> bool:
    """Whether the map has a rate everywhere in [left, right)."""
    inside = (rates.left < right) & (rates.right > left)
    return not np.isnan(rates.rate[inside]).any()


def draw_segment(spec: dict, rng: np.random.Generator) -> tuple[str, int, msprime.RateMap | None]:
    """(chromosome, left end, genetic map or None): uniform, with a map drawn again until it has rates everywhere."""
    length = spec["sequence_length"]
    mapped = "genetic_map" in spec
    candidates = mapped_autosomes(spec) if mapped else autosomes(spec)
    for _ in range(DRAWS):
        chromosome = candidates[rng.integers(len(candidates))]
        left = int(rng.integers(0, int(chromosome.length) - length + 1))
        rates = _rates(spec["species"], spec["genetic_map"], chromosome.id) if mapped else None
        if rates is None or _covers(rates, left, left + length):
            return chromosome.id, left, rates
    raise BadRequest(
        f"scenario '{spec['name']}': {DRAWS} random segments of {length} bp were tried, and the genetic map "
        f"{spec['genetic_map']} has rates throughout none of them; lower sequence_length"
    )


def stdpopsim_segment(spec: dict, rng: np.random.Generator, *, seed: int) -> Simulated:
    """A random segment under a random model; the engine's one *seed* must be unique within the scenario."""
    stdpopsim = catalogue()
    species = get_species(spec)
    models = catalogue_models(spec)
    if models:
        name = models[rng.integers(len(models))]
        model = _model(species.id, name)
        populations = sampled_today(model)
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
            # As get_contig does, which would read the map's file again for every simulation.
            contig.recombination_map = rates.slice(left=left, right=right)
        if spec.get("ancestry_model") == "smc_prime":
            ts = _smc_prime(model, contig, samples, spec, seed)
        else:
            ts = stdpopsim.get_engine("msprime").simulate(model, contig, samples, seed=seed)
    made = {
        "model": name,
        "chromosome": chromosome,
        "left": left,
        "samples": samples,
        "mutation_rate": contig.mutation_rate,
        "stdpopsim": stdpopsim.__version__,
    }
    tables = ts.dump_tables()
    tables.trim()
    return tables, made


def _smc_prime(model, contig, samples: dict, spec: dict, seed: int) -> tskit.TreeSequence:
    """What stdpopsim's engine does, with SMC(k): its own choice of models has only msprime's old, slow SMC'."""
    seeds = np.random.default_rng(seed).integers(1, 2**31 - 1, size=2)
    ts = msprime.sim_ancestry(
        samples=model.get_sample_sets(samples, ploidy=contig.ploidy),
        demography=model.model,
        recombination_rate=contig.recombination_map,
        ploidy=contig.ploidy,
        random_seed=seeds[0],
        model=ancestry_model(spec),
    )
    return msprime.sim_mutations(ts, rate=contig.mutation_rate, random_seed=seeds[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cxt.catalogue", description="Fetch a genetic map into stdpopsim's cache.")
    parser.add_argument("--species", required=True, help="stdpopsim's identifier, such as HomSap")
    parser.add_argument("--genetic-map", required=True, help="the map's identifier, such as HapMapII_GRCh38")
    parser.add_argument("--scenario", help="scenario that needs it, named in messages (default: the species)")
    parser.add_argument("--out", type=Path, help="also write down here, as JSON, that it is in the cache")
    args = parser.parse_args()
    spec = {"name": args.species, "species": args.species, "genetic_map": args.genetic_map}
    if args.scenario is not None:
        spec |= {"name": args.scenario, "kind": "stdpopsim"}
    fetch_map(spec)
    if args.out is not None:
        write_record(spec, args.out)
    print(f"{args.species} {args.genetic_map}: in {genetic_map(spec).map_cache_dir}")


if __name__ == "__main__":
    exit_on_bad_request(main)
