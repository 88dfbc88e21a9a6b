"""The whole configuration: its sections, and the entries of `models`."""

from typing import Annotated

from pydantic import Field

from cxt.config.bounds import PositiveInteger, Seed, Text, integer_validator
from cxt.config.datasets import Dataset, ScenarioNames
from cxt.config.network import Adapter, Architecture, Preset
from cxt.config.scenarios import AnyScenario
from cxt.config.section import Section
from cxt.config.training import TrainingOverrides, TrainingSection
from cxt.config.type_descriptions import Expected

Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+]{0,99}$")]
"""Of a scenario, dataset or model: it is part of the names of files, and a hyphen ends a scenario's in a variant's."""

EvaluationSimulations = Annotated[int, Field(strict=True, ge=1, le=1_000_000), integer_validator]


class Model(Section):
    """One checkpoint."""

    preset: Preset
    """Published architecture to start from."""
    dataset: Text
    """Name of the dataset to train on."""
    checkpoint: Text | None = None
    """Parent model whose weights it starts from (new optimizer, step 0)."""
    resume_adapter: Text | None = None
    """Parent adapter model whose backbone and adapter weights it starts from. Excludes `checkpoint`."""
    adapter: Adapter | None = None
    """Sample-size adapter in front of a mostly frozen backbone; its presence makes this an adapter model."""
    architecture: Architecture | None = None
    """Sizes of the network, where they differ from the preset's."""
    training: TrainingOverrides | None = None
    """Training settings that differ from the top-level `training`."""
    evaluation: ScenarioNames | None = None
    """Scenarios to evaluate on, or sets of them. Without it, those of its dataset."""


class Evaluation(Section):
    """Held-out evaluation of every checkpoint by autoregressive decoding."""

    simulations: EvaluationSimulations = 10
    """Simulations per variant, from an index range that no dataset reaches."""
    simulations_of: dict[Text, EvaluationSimulations] = {}
    """Other numbers for single scenarios, by name."""
    pairs: PositiveInteger = 10
    """Random pairs per simulation."""
    replicates: PositiveInteger = 12
    """Decoded sequences per pair, whose predictive distributions are averaged."""
    batch_size: PositiveInteger = 40
    """Pairs decoded together."""


class Configuration(Section):
    """The configuration of cxt."""

    seed: Seed = 1
    """Seed of the whole workflow. Every simulation, pair and mask offset is a pure function of it, of the variant and of the
    simulation index."""
    scenarios: dict[Name, AnyScenario]
    """Demographic models to simulate from, by name. `kind` chooses the model; the keys below it depend on the kind. A list in
    place of a single number is a sweep, and each combination becomes a variant of its own, named
    `<scenario>-<parameter>=<value>…`."""
    scenario_sets: dict[Name, Annotated[list[Text], Field(strict=True), Expected("a list of names of scenarios")]] = {}
    """Lists of scenarios, by name, for datasets and evaluations to name instead of repeating them. Scenarios that an overlay
    removes by `null` leave every set."""
    datasets: dict[Name, Dataset]
    """Preprocessed sets, by name. Simulation i of a variant is held out (`test`) if and only if i is a multiple of 10, in every
    dataset."""
    models: dict[Name, Model]
    """Checkpoints to train, by name. Each becomes one Snakemake rule with one output, `results/<name>.ckpt`."""
    training: TrainingSection = TrainingSection()
    """Training settings of all models; a model's own `training` overrides single keys."""
    evaluation: Evaluation = Evaluation()
    """Held-out evaluation of every checkpoint by autoregressive decoding."""
