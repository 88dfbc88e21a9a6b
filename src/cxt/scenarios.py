"""Scenarios: the kinds there are, sweeps, seeds, batches of indices, and the rule of what is held out.

A simulation is a pure function of the workflow seed, the leaf scenario (name and parameters) and its index.
"""

import dataclasses
import functools
import hashlib
import itertools
import warnings
from collections.abc import Callable

import msprime
import numpy as np
import tskit

from cxt.errors import BadRequest, nearest
from cxt.lineage import canonical

EVALUATION_START = 1_000_000_000
"""First index of evaluation simulations; datasets use indices from 0, and the schema keeps them below."""

NOT_PARAMETERS = ("simulations", "batch")
"""Keys of a scenario that say how many simulations there are, not what they are."""

ANCIENT_MODELS = ("AncientEurasia_9K19", "PapuansOutOfAfrica_10J19", "AncientEurope_4A21")
"""Catalogue models built around ancient samples, which the published training set leaves out."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One combination of a scenario's sweep: its name, its parameters, and how many simulations in which batches."""

    name: str
    spec: dict
    simulations: int
    batch: int


def leaves(name: str, entry: dict) -> list[Leaf]:
    """The leaf scenarios of *entry* (a checked scenario of the config): one for each combination of listed parameters.

    A scenario without a list is its own leaf. Others are named `<scenario>-<parameter>=<value>…`, in the order of the keys
    sorted by name.
    """
    parameters = {key: value for key, value in entry.items() if key not in NOT_PARAMETERS}
    swept = sorted(key for key, value in parameters.items() if isinstance(value, list) and key != "models")
    result = []
    for values in itertools.product(*(parameters[key] for key in swept)):
        chosen = dict(zip(swept, values, strict=True))
        leaf = "-".join([name, *(f"{key}={value}" for key, value in chosen.items())])
        spec = {"name": leaf, **parameters, **chosen}
        result.append(Leaf(leaf, spec, entry["simulations"], entry["batch"]))
    return result


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


def _engine_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 2**32))  # what msprime accepts


def _infinite_sites(spec: dict, demography: msprime.Demography, samples, rng) -> tuple[tskit.TreeSequence, dict]:
    """Hudson coalescent and infinite-sites mutations at real positions, both seeded from *rng*."""
    ts = msprime.sim_ancestry(
        samples=samples,
        demography=demography,
        sequence_length=spec["sequence_length"],
        recombination_rate=spec["recombination_rate"],
        random_seed=_engine_seed(rng),
    )
    ts = msprime.sim_mutations(
        ts,
        rate=spec["mutation_rate"],
        discrete_genome=False,
        model=msprime.BinaryMutationModel(),
        random_seed=_engine_seed(rng),
    )
    return ts, {"mutation_rate": spec["mutation_rate"]}


def _constant(spec, rng):
    demography = msprime.Demography()
    demography.add_population(name="A", initial_size=spec["population_size"])
    return _infinite_sites(spec, demography, {"A": spec["individuals"]}, rng)


# (time in generations, growth rate times the denominator); the first denominator is always 4e4, the others magnitude·1e4.
ZIGZAG = (
    (20, 6437.7516497364), (30, -378.691273513906), (200, -643.77516497364), (300, 37.8691273513906),
    (2_000, 64.377516497364), (3_000, -3.78691273513906), (20_000, -6.4377516497364), (30_000, 0.378691273513906),
    (200_000, 0.64377516497364), (300_000, -0.0378691273513906), (2_000_000, -0.064377516497364),
    (3_000_000, 0.00378691273513906),
)  # fmt: skip


def _sawtooth(spec, rng):
    demography = msprime.Demography()
    demography.add_population(name="A", initial_size=spec["population_size"])
    for i, (time, rate) in enumerate(ZIGZAG):
        denominator = 4e4 if i == 0 else spec["magnitude"] * 1e4
        demography.add_population_parameters_change(time=time, growth_rate=rate / denominator, population="A")
    demography.add_population_parameters_change(
        time=20_000_000, growth_rate=0, initial_size=spec["population_size"], population="A"
    )
    return _infinite_sites(spec, demography, {"A": spec["individuals"]}, rng)


def island_samples(individuals: int) -> tuple[int, int, int]:
    """Individuals per deme: 60, 20 and 20 % rounded down, the rest to the first deme."""
    small = individuals * 20 // 100
    return individuals - 2 * small, small, small


def _island(spec, rng):
    size = spec["population_size"]
    demography = msprime.Demography.island_model([size, size / 2, size / 2], migration_rate=spec["migration_rate"])
    counts = island_samples(spec["individuals"])
    return _infinite_sites(spec, demography, {f"pop_{i}": n for i, n in enumerate(counts) if n}, rng)


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
    chosen = spec.get("models", [model for model in known if model not in ANCIENT_MODELS])
    for model in chosen:
        if not sampled_today(_catalogue_model(species.id, model)):
            raise BadRequest(f"scenario '{spec['name']}': no population of '{model}' can be sampled at time 0")
    return list(chosen)


def get_species(spec: dict):
    """The stdpopsim species of a scenario; BadRequest with the nearest name if there is none."""
    import stdpopsim

    known = [species.id for species in stdpopsim.all_species()]
    if spec["species"] not in known:
        raise BadRequest(f"scenario '{spec['name']}': unknown species '{spec['species']}'{nearest(spec['species'], known)}")
    return stdpopsim.get_species(spec["species"])


def sampled_today(model) -> list[str]:
    """Names of the populations of a catalogue model that can be sampled at time 0."""
    return [p.name for p in model.populations if p.allow_samples and not p.default_sampling_time]


def autosomes(spec: dict) -> list:
    """Nuclear chromosomes of two copies that are no sex chromosomes and long enough for the segment."""
    species = get_species(spec)
    long_enough = [
        chromosome
        for chromosome in species.genome.chromosomes
        if chromosome.ploidy == 2
        and chromosome.id.upper() not in ("X", "Y", "Z", "W")
        and chromosome.length >= spec["sequence_length"]
    ]
    if not long_enough:
        raise BadRequest(
            f"scenario '{spec['name']}': no autosome of {species.id} is as long as sequence_length {spec['sequence_length']}"
        )
    return long_enough


@functools.cache
def _catalogue_model(species: str, model: str):
    """A catalogue model, built once a process: building one costs more than a short simulation."""
    import stdpopsim

    return stdpopsim.get_species(species).get_demographic_model(model)


def _stdpopsim(spec, rng):
    import stdpopsim

    species = get_species(spec)
    models = catalogue_models(spec)
    if models:
        name = models[rng.integers(len(models))]
        model = _catalogue_model(species.id, name)
        populations = sampled_today(model)
        counts = rng.multinomial(spec["individuals"], np.full(len(populations), 1 / len(populations)))
        samples = {p: int(n) for p, n in zip(populations, counts, strict=True) if n}
        rate = model.mutation_rate
    else:
        size = spec.get("population_size", species.population_size)
        name, rate = f"constant size {size:g}", None
        model = stdpopsim.PiecewiseConstantSize(size)
        samples = {"pop_0": spec["individuals"]}
    candidates = autosomes(spec)
    chromosome = candidates[rng.integers(len(candidates))]
    left = int(rng.integers(0, int(chromosome.length) - spec["sequence_length"] + 1))
    contig = species.get_contig(chromosome.id, left=left, right=left + spec["sequence_length"], mutation_rate=rate)
    ts = stdpopsim.get_engine("msprime").simulate(model, contig, samples, seed=_engine_seed(rng))
    made = {"model": name, "chromosome": chromosome.id, "left": left, "samples": samples, "mutation_rate": contig.mutation_rate}
    return ts.trim(), made


KINDS: dict[str, Callable] = {"constant": _constant, "sawtooth": _sawtooth, "island": _island, "stdpopsim": _stdpopsim}
"""The kinds of scenario: a function of (leaf spec, generator) to (tree sequence, what was drawn)."""


def check_scenarios(config: dict) -> None:
    """Ask stdpopsim's catalogue for every species, model and segment that *config* names; BadRequest otherwise."""
    for name, entry in config["scenarios"].items():
        for leaf in leaves(name, entry):
            if leaf.spec["kind"] == "stdpopsim":
                catalogue_models(leaf.spec)
                autosomes(leaf.spec)


def simulate_one(spec: dict, *, index: int, seed: int) -> tskit.TreeSequence:
    """Simulation *index* of the leaf scenario *spec*, with its identity and mutation rate in its metadata.

    Parameters
    ----------
    spec : parameters of a leaf, as `leaves` gives them
    index : index of the simulation
    seed : seed of the workflow

    Returns
    -------
    tskit.TreeSequence
        ``ts.metadata["cxt"]`` holds scenario, index, seed, spec, and what was drawn (mutation rate; for stdpopsim also
        model, chromosome, left end and samples).
    """
    rng = random_generator(seed=seed, spec=spec, index=index, purpose="simulate")
    with warnings.catch_warnings():
        # Published recipe: the catalogue model's mutation rate with the chromosome's recombination rate.
        warnings.filterwarnings("ignore", message=".*demographic model has .* rate.*")
        ts, made = KINDS[spec["kind"]](spec, rng)
    tables = ts.dump_tables()
    tables.metadata_schema = tskit.MetadataSchema.permissive_json()
    tables.metadata = {"cxt": {"scenario": spec["name"], "index": index, "seed": seed, "spec": spec, **made}}
    return tables.tree_sequence()
