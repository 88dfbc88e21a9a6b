"""Scenarios from stdpopsim's catalogue: species, models, segments of chromosomes, and genetic maps.

cxt catalogue --species HomSap --genetic-map HapMapII_GRCh38     fetch a map into stdpopsim's cache
"""

import functools
import importlib.metadata
import math
import sys
import types
import warnings
from pathlib import Path

import msprime
import numpy as np
import tskit

from cxt.config.variants import scenario_of
from cxt.errors import BadRequest, first_line, nearest
from cxt.io import atomic_write, json_text
from cxt.scenarios.msprime_models import Simulated, ancestry_model
from cxt.scenarios.seeds import EngineSeeds

ANCIENT_MODELS = ("AncientEurasia_9K19", "PapuansOutOfAfrica_10J19", "AncientEurope_4A21")
"""Catalogue models built around ancient samples, which the published training set leaves out."""

SEX_CHROMOSOMES = {"AnoCar": ("LGb",), "GasAcu": ("19",), "HelMel": ("21",)}
"""Sex chromosomes whose names in the catalogue do not say so: X of the anole, X of the stickleback, Z of the butterfly."""


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


def other_recombination(spec: dict) -> str:
    """What to say of a scenario whose models were inferred with other recombination rates than it has; "" if none was."""
    inferred = {name: _model(spec["species"], name).recombination_rate for name in catalogue_models(spec)}
    if "genetic_map" in spec:
        source, found = f"the genetic map {spec['genetic_map']}", []
    else:
        source, found = "the chromosomes", [chromosome.recombination_rate for chromosome in autosomes(spec)]
    others = {name: rate for name, rate in inferred.items() if rate is not None and set(found) != {rate}}
    if not others:
        return ""
    rates = (
        f" ({' to '.join(f'{rate:.3g}' for rate in sorted({min(found), max(found)}))} per bp and generation)" if found else ""
    )
    return (
        f"scenario '{spec['name']}' recombines at the rates of {source}{rates}; these of its models were inferred with others: "
        + ", ".join(f"{name} {rate:.3g}" for name, rate in others.items())
    )


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
        f"Fetch it where there is a network (`cxt catalogue --species {spec['species']} --genetic-map "
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


def read_map(path, *, length: float) -> msprime.RateMap:
    """The map of a chromosome of *length* bp from a HapMap file: position and rate (cM/Mb) in its second and third column.

    The rate is missing (NaN) before the first position and beyond the last, and where nothing recombines before the first rate
    above 0 or after the last one: there the map has no data, though its file may say 0.

    Raises
    ------
    BadRequest
        If the file cannot be read, or is no such map.
    """

    def damaged(reason: str) -> BadRequest:
        return BadRequest(
            f"genetic map {path}: {reason}; expected a header line, then lines of chromosome, position (bp), rate (cM/Mb) and "
            "map position"
        )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input contained no data.*")
            table = np.loadtxt(path, skiprows=1, usecols=(1, 2), ndmin=2, encoding="utf-8")
    except OSError as error:
        raise damaged(f"cannot be read ({error.strerror or error})") from None
    except (ValueError, IndexError) as error:  # a line without such columns, or with words in them; not text
        raise damaged(f"is not a table of numbers ({first_line(error)})") from None
    if len(table) < 2:
        raise damaged(f"has {len(table)} lines with a position, expected at least 2")
    position, rate = table.T
    if not np.isfinite(table).all():
        raise damaged("holds NaN or infinite numbers")
    if position[0] < 0 or (np.diff(position) <= 0).any():
        raise damaged("its positions are negative, or not in rising order")
    if (rate < 0).any():
        raise damaged(f"holds a negative rate, {rate.min():g} cM/Mb")
    if rate[-1] != 0:
        raise damaged(f"its last line has the rate {rate[-1]:g} cM/Mb, which has no end; it may be cut")
    (known,) = np.nonzero((rate > 0) & (position < length))
    if not known.size:
        raise damaged(f"has no rate above 0 within the {length:.0f} bp of the chromosome")
    position = np.minimum(position[known[0] : known[-1] + 2], length)
    rate = rate[known[0] : known[-1] + 1] / 1e8  # per bp
    if position[0] > 0:
        position, rate = np.insert(position, 0, 0), np.insert(rate, 0, np.nan)
    if position[-1] < length:
        position, rate = np.append(position, length), np.append(rate, np.nan)
    return msprime.RateMap(position=position, rate=rate)


@functools.lru_cache(maxsize=64)
def _rates(species: str, name: str, chromosome: str) -> msprime.RateMap | None:
    """The map of one chromosome, read once a process; None if the map does not cover the chromosome."""
    of = catalogue().get_species(species)
    found = of.get_genetic_map(name)
    path = found.map_cache_dir / found.file_pattern.format(id=chromosome)
    if not path.is_file():
        return None
    try:
        return read_map(path, length=of.genome.get_chromosome(chromosome).length)
    except BadRequest as error:
        raise BadRequest(f"{error}. Delete {found.map_cache_dir}, and the workflow fetches the map again") from None


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


def _covered(chromosome, rates: msprime.RateMap) -> tuple[int, int]:
    """Left and right end, whole bp, of the part of a chromosome that its map has rates of."""
    (known,) = np.nonzero(~rates.missing)
    return math.ceil(rates.left[known[0]]), min(math.floor(rates.right[known[-1]]), int(chromosome.length))


def draw_segment(spec: dict, rng: np.random.Generator) -> tuple[str, int, msprime.RateMap | None]:
    """(chromosome, left end, genetic map or None): uniform; with a map, within the part of a chromosome that it covers.

    Raises
    ------
    BadRequest
        If the map is not there, is damaged, or covers no part as long as the segment.
    """
    length = spec["sequence_length"]
    if "genetic_map" in spec:
        mapped = [(c, _rates(spec["species"], spec["genetic_map"], c.id)) for c in mapped_autosomes(spec)]
        places = [(chromosome.id, *_covered(chromosome, rates), rates) for chromosome, rates in mapped]
    else:
        places = [(chromosome.id, 0, int(chromosome.length), None) for chromosome in autosomes(spec)]
    long_enough = [place for place in places if place[2] - place[1] >= length]
    if not long_enough:
        name, left, right, _ = max(places, key=lambda place: place[2] - place[1])
        raise BadRequest(
            f"scenario '{spec['name']}': the genetic map {spec['genetic_map']} covers no stretch of {length} bp; "
            f"the longest, on chromosome {name}, has {right - left} bp: lower sequence_length"
        )
    name, left, right, rates = long_enough[rng.integers(len(long_enough))]
    return name, int(rng.integers(left, right - length + 1)), rates


def stdpopsim_segment(spec: dict, seeds: EngineSeeds, *, rng: np.random.Generator) -> Simulated:
    """A random segment under a random model."""
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
    made = {
        "model": name,
        "chromosome": chromosome,
        "left": left,
        "samples": samples,
        "mutation_rate": contig.mutation_rate,
        "recombination_rate": float(contig.recombination_map.mean_rate),
        "stdpopsim": stdpopsim.__version__,
    }
    if model.recombination_rate is not None:
        made["model_recombination_rate"] = model.recombination_rate
    tables = simulated_contig(model, contig, samples, seeds, ancestry_model=ancestry_model(spec)).dump_tables()
    tables.trim()
    return tables, made


def simulated_contig(model, contig, samples: dict, seeds: EngineSeeds, *, ancestry_model=None) -> tskit.TreeSequence:
    """What stdpopsim's msprime engine does for a diploid contig without gene conversion, but with our seeds.

    The engine takes one seed and draws two of 31 bits from it, which collide: among 10 000 simulations two have the same
    ancestry in one case of fifty. Of msprime's models it knows only the old, slow SMC'.
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
