"""Scenarios of the configuration: a section for each kind of demographic model."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from cxt.config.bounds import (
    BasePairs,
    Different,
    NonEmpty,
    NonNegative,
    Number,
    Positive,
    PositiveInteger,
    PositiveRate,
    Rate,
    Text,
    integer_validator,
)
from cxt.config.problems import refuse
from cxt.config.section import Section
from cxt.config.type_descriptions import Expected
from cxt.config.variants import NOT_PARAMETERS
from cxt.errors import BadRequest

PositiveRateOrSweep = PositiveRate | NonEmpty[PositiveRate]
RateOrSweep = Rate | NonEmpty[Rate]
PositiveOrSweep = Positive | NonEmpty[Positive]

Combination = Annotated[dict[Text, Number], Field(min_length=1)]
Individuals = Annotated[int, Field(strict=True, ge=1, le=30_000), integer_validator]


class Scenario(Section):
    """A demographic model to simulate from."""

    simulations: Annotated[int, Field(strict=True, ge=0, le=10**8), integer_validator]
    """Simulations of each variant for datasets. Raising it keeps all complete batches. 0 = for evaluation only."""
    batch: Annotated[int, Field(strict=True, ge=10, multiple_of=10), integer_validator] = 100
    """Simulations per file, and thus per job; `cxt plan` estimates how long such a job takes."""
    sequence_length: BasePairs = 1_000_000
    """Length of a simulation in base pairs."""


class Coalescent(Section):
    """Keys of scenarios whose whole ancestry is a coalescent with recombination."""

    ancestry_model: Literal["hudson", "smc_prime"] | None = None
    """Coalescent with recombination: `hudson` (the default) or `smc_prime`, msprime's SMC(k) with k = 1, an approximation that
    is faster for large, unstructured populations."""


class Combined(Section):
    """Keys of scenarios whose parameters can be set in combinations."""

    combinations: Annotated[NonEmpty[Combination], Expected("a list of mappings from parameters to numbers")] | None = None
    """Combinations of values to simulate, such as `[{mutation_rate: 1.0e-8, recombination_rate: 5.0e-8}, …]`, for a sweep over
    these instead of all combinations. Lists of other parameters are combined with each of them."""

    @model_validator(mode="wrap")
    @classmethod
    def _take_from_rows(cls, values: Any, handler: ModelWrapValidatorHandler) -> Any:
        """Allow a required parameter to be missing if every row of `combinations` sets it."""
        rows = values.get("combinations") if isinstance(values, dict) else None
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            return handler(values)
        given = {
            name: rows[0][name]
            for name, field in cls.model_fields.items()
            if field.is_required() and name not in values and all(name in row for row in rows)
        }
        scenario = handler(values | given)
        scenario.__dict__.update(dict.fromkeys(given))  # keeps them out of the resolved configuration
        return scenario


class Sampled(Section):
    """Keys of scenarios that sample individuals from one population, or in a fixed way from several."""

    individuals: Individuals = 25
    """Diploid individuals sampled at time 0; each gives two haplotypes."""


class Parametric(Sampled, Combined, Scenario):
    """Keys of scenarios that are defined by a few numbers."""

    mutation_rate: PositiveRateOrSweep = 1.29e-8
    """Mutations per base pair and generation (infinite sites)."""
    recombination_rate: RateOrSweep = 1.28e-8
    """Crossovers per base pair and generation."""
    population_size: PositiveOrSweep = 20_000
    """Diploid population size."""


class Constant(Coalescent, Parametric):
    """One population of constant size."""

    kind: Literal["constant"]
    """One population of constant size."""


class Sawtooth(Coalescent, Parametric):
    """One population whose size zig-zags through time (Schiffels & Durbin 2014)."""

    kind: Literal["sawtooth"]
    """One population whose size zig-zags through time."""
    magnitude: PositiveOrSweep = 3
    """Divides the growth rates, so that larger values give a flatter history."""


class Island(Coalescent, Parametric):
    """Three demes of size N, N/2 and N/2 with symmetric migration; 60, 20 and 20% of the individuals."""

    kind: Literal["island"]
    """Three demes with symmetric migration."""
    population_size: PositiveOrSweep = 10_000
    """Diploid size N of the first deme."""
    migration_rate: PositiveOrSweep = 0.1
    """Migration rate between each pair of demes, per generation."""


class HardSweep(Parametric):
    """One population of constant size in which an allele has just swept from one copy to fixation.

    Before the sweep, ancestry follows Hudson's coalescent.
    """

    kind: Literal["hard_sweep"]
    """One population in which an allele has just swept to fixation."""
    selection_coefficient: PositiveOrSweep
    """Selective advantage s of the sweeping allele."""
    position: PositiveOrSweep
    """Position of the sweeping allele in base pairs from the start; below `sequence_length`."""


class Stdpopsim(Sampled, Coalescent, Scenario):
    """A random autosomal segment under a random catalogue model of a stdpopsim species, with the model's own mutation rate.

    Recombination is the chromosome's average, or follows a genetic map.
    """

    kind: Literal["stdpopsim"]
    """A species of stdpopsim's catalogue."""
    species: Text
    """stdpopsim's identifier, such as `HomSap`."""
    models: Annotated[Different[Text], Expected("a list of distinct model names")] | None = None
    """Catalogue models to draw from. Default: all that sample at time 0 and are not built around ancient samples. An empty list
    selects a constant size."""
    genetic_map: Text | None = None
    """A genetic map of the species in stdpopsim's catalogue, such as `HapMapII_GRCh38`. It is downloaded once into stdpopsim's
    cache; segments are drawn from where the map has rates."""
    population_size: Positive | None = None
    """Constant diploid size, used if the species has no catalogue model or `models` is empty. Default: the species' size in the
    catalogue."""


class Demes(Combined, Coalescent, Scenario):
    """A custom demography in the Demes format (https://popsim-consortium.github.io/demes-docs)."""

    kind: Literal["demes"]
    """A demography in the Demes format."""
    demography: Annotated[Text | dict[str, Any], Expected("the path of a Demes file, or its content")]
    """Path of a Demes YAML file (absolute, or relative to the configuration file), or its content."""
    samples: Annotated[
        dict[Text, PositiveInteger],
        Expected("a mapping from demes to numbers of diploid individuals, all sampled at time 0"),
    ]
    """Diploid individuals sampled from each deme at time 0, such as `{north: 15, south: 10}`."""
    mutation_rate: PositiveRateOrSweep
    """Mutations per base pair and generation (infinite sites)."""
    recombination_rate: RateOrSweep
    """Crossovers per base pair and generation."""


class Epoch(Section):
    """The population size from a given time on, backwards in time."""

    time: NonNegative
    """Generations ago."""
    population_size: Positive
    """Diploid individuals."""


class Msprime(Sampled, Combined, Coalescent, Scenario):
    """One population whose size is constant between given times."""

    kind: Literal["msprime"]
    """One population whose size changes at given times."""
    history: Annotated[
        list[Epoch],
        Field(strict=True, min_length=1),
        Expected("a list of {time: generations ago, population_size: diploid individuals}, from time 0 backwards"),
    ]
    """Diploid size from each time on, backwards in time, such as `[{time: 0, population_size: 20000}, {time: 1000,
    population_size: 5000}]`."""
    mutation_rate: PositiveRateOrSweep
    """Mutations per base pair and generation (infinite sites)."""
    recombination_rate: RateOrSweep
    """Crossovers per base pair and generation."""


class Trees(Scenario):
    """Tree sequences of one's own, cut into consecutive pieces of `sequence_length` base pairs, which are the simulations.

    Pieces are numbered in the order of the files. Where the last piece of a file would be shorter, it is left out. Those whose
    number is a multiple of 10 are held out, as in every scenario, and serve the evaluation.
    """

    kind: Literal["trees"]
    """Tree sequences of one's own."""
    files: Annotated[
        Text | NonEmpty[Text], Expected("a path or pattern of .trees or .tsz files, or a list of paths and patterns")
    ]
    """Tree sequences (`.trees`, or `.tsz` compressed by tszip), absolute or relative to the configuration file. A pattern such
    as `slim/*.trees` stands for all files that match, sorted by name."""
    mutations: Literal["overlay", "keep"]
    """`overlay`: mutations of the files are replaced by new ones under the infinite-sites model, at `mutation_rate`. `keep`:
    sites of the files are taken as they are; of these, the biallelic ones are used."""
    mutation_rate: PositiveRate
    """Mutations per base pair and generation: those to overlay, or those that the files were made with."""
    recombination_rate: Rate | None = None
    """Crossovers per base pair and generation that the files were made with, if known, for networks that read rates."""
    generation_time: Positive | None = None
    """Units of time per generation, for files whose times are not in generations: years per generation for `years`, ticks per
    generation for SLiM's `ticks` (1 in a Wright-Fisher model)."""
    individuals: Individuals | None = None
    """Diploid individuals to take, drawn at random for each piece; each gives two haplotypes. Default: 25. Where individuals
    are haploid, or there are none, two sample nodes that follow each other count as one."""
    populations: NonEmpty[Text] | None = None
    """Names or numbers of the populations to draw them from. Default: all."""
    samples: Annotated[
        dict[Text, PositiveInteger] | None,
        Expected("a mapping from populations to numbers of diploid individuals"),
    ] = None
    """Diploid individuals to take from each population, such as `{p1: 15, p2: 10}`, in place of `individuals` and
    `populations`."""
    simulations: Annotated[int, Field(strict=True, ge=0, le=10**8), integer_validator] | None = None
    """Pieces to use, from the first one on; 0 = for evaluation only. Default: all."""

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples is not None and (self.individuals is not None or self.populations is not None):
            raise BadRequest("`samples` cannot be used with `individuals` or `populations`; remove either")
        return self


AnyScenario = Annotated[
    Constant | Sawtooth | Island | HardSweep | Stdpopsim | Demes | Msprime | Trees, Field(discriminator="kind")
]

KIND_SECTIONS: dict[str, type[Scenario]] = {
    "constant": Constant, "sawtooth": Sawtooth, "island": Island, "hard_sweep": HardSweep, "stdpopsim": Stdpopsim,
    "demes": Demes, "msprime": Msprime, "trees": Trees,
}  # fmt: skip


def complete_parameters(kind: str, parameters: dict, *, at: str) -> dict:
    """Check the parameters of a scenario or variant of one *kind* and fill in their defaults.

    `simulations`, `batch` and `combinations` are not parameters. *at* tells in messages where the parameters come from.

    Raises
    ------
    BadRequest
        Naming all unknown or missing parameters and wrong values.
    """
    refuse([f"{at}.{key}: not a parameter of a variant; remove it" for key in NOT_PARAMETERS if key in parameters])
    scenario = KIND_SECTIONS[kind].read(parameters | {"simulations": 0}, at=at).resolved()
    return {key: value for key, value in scenario.items() if key not in NOT_PARAMETERS}
