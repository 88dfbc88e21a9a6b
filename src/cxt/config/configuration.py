"""The whole configuration: its sections, and the entries of `models`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cxt.config.bounds import BasePairs, Flag, PositiveInteger, Samples, Seed, Text, integer_validator
from cxt.config.datasets import Dataset, ScenarioNames
from cxt.config.network import Adapter, Architecture, Lora, Preset
from cxt.config.problems import NAME
from cxt.config.repeats import Repeats
from cxt.config.scenarios import AnyScenario
from cxt.config.section import Section
from cxt.config.training import TrainingOverrides, TrainingSection
from cxt.config.translation import TranslationEntry
from cxt.config.type_descriptions import Expected

Name = Annotated[str, Field(strict=True, pattern=NAME)]
"""Name of a scenario, dataset or model: part of file names, where a hyphen separates a scenario from its parameters."""

GpuRequest = Literal["gpu", "gres"]
EvaluationSimulations = Annotated[int, Field(strict=True, ge=1, le=1_000_000), integer_validator]


class Resources(Section):
    """What a model's training asks of a cluster's scheduler, in place of what is estimated."""

    only_given: ClassVar[bool] = True

    runtime: PositiveInteger | None = None
    """Minutes of each try; training that is not finished by then saves its state, and the next try continues."""
    mem_mb: PositiveInteger | None = None
    """Memory in MB."""


class Cluster(Section):
    """What a cluster's scheduler is asked for; no result depends on it. Partitions and account are in the profile."""

    gpu_request: GpuRequest = "gpu"
    """How jobs ask for GPUs: `gpu` as `--gpus=N`, `gres` as `--gres=gpu:N`, where a site accepts only that."""
    gpu_model: Text | None = None
    """Model of the GPUs to ask for, as the site names it, such as `a100`."""
    constraint: Text | None = None
    """Feature that the machines of GPU jobs must have."""
    runtime: PositiveInteger = 1440
    """Minutes of each try of a training; a model's own `resources` can differ."""
    runs: Text | None = None
    """Existing directory for the run directories of trainings, in place of `results/runs`: an absolute path on a file system
    that all machines share, so that a training continues after its machine was lost also where jobs have no working directory
    in common. `~` and variables such as `$USER` are replaced. One directory for each project."""


class Model(Section):
    """One checkpoint."""

    preset: Preset
    """Published architecture to start from."""
    dataset: Text | None = None
    """Name of the dataset to train on. Every model has either this or `simulate`."""
    simulate: ScenarioNames | None = None
    """Scenarios, or scenario sets, to train on in place of a dataset: every example is simulated when it is needed, and seen
    once. Needs `training: {max_steps: …}` and `eval_samples`."""
    window_size: BasePairs | None = None
    """With `simulate`: width of a base window in base pairs. Default: that of the preset."""
    samples: Samples | None = None
    """With `simulate`: haplotypes to read. Default: all that the scenarios have."""
    eval_samples: PositiveInteger | None = None
    """With `simulate`: simulated examples that are held out for validation."""
    windows: PositiveInteger | None = None
    """With `dataset`: windows that the network reads, at most those of the dataset's examples, from each of which a region of
    so many windows is cut, another one in each epoch. Default: all."""
    checkpoint: Text | None = None
    """Parent model to start from: its weights, with a new optimizer, at step 0. A value with a `/`, or that ends in `.ckpt`, is
    a file (or run directory) in place of a model, relative to the configuration file; also one of the original package."""
    resume_adapter: Text | None = None
    """Parent adapter model to start from, or its file: its backbone and adapter weights. Cannot be combined with
    `checkpoint`."""
    teacher: Text | None = None
    """Model whose distributions it learns, or its file, with the objective `distill`. The teacher has the same windows, and may
    read more haplotypes of the same simulations."""
    adapter: Adapter | None = None
    """Sample-size adapter in front of a mostly frozen backbone; a model with this section is an adapter model."""
    lora_of: Text | None = None
    """Base model, or its file, which stays frozen while low-rank changes of its matrices are trained. The checkpoint holds
    these only, and needs that of the base to be used. Needs `lora`, and cannot be combined with another parent."""
    lora: Lora | None = None
    """Low-rank changes of the base named by `lora_of`; `{}` for the defaults."""
    architecture: Architecture | None = None
    """Sizes of the network that differ from the preset's."""
    training: TrainingOverrides | None = None
    """Training settings that differ from the top-level `training`."""
    resources: Resources | None = None
    """What its training asks of a cluster's scheduler, in place of what is estimated."""
    evaluation: ScenarioNames | None = None
    """Scenarios, or scenario sets, to evaluate on. Default: those of its dataset."""
    repeats: Repeats | None = None
    """Number of trainings that differ in their seed only. A model `m` with `repeats: 3` becomes the models `m.r0`, `m.r1` and
    `m.r2`, with the seeds s, s + 1 and s + 2, where s is the `seed` of its training. The accuracy table has their mean and
    standard deviation."""
    ensemble: Flag | None = None
    """With `repeats`: whether to evaluate the ensemble of its repeats too, as `<name>.ensemble`, see `ensembles`."""


class Evaluation(Section):
    """Held-out evaluation of every checkpoint."""

    simulations: EvaluationSimulations = 10
    """Simulations per variant, with indices that no dataset uses."""
    simulations_of: dict[Text, EvaluationSimulations] = {}
    """Numbers of simulations that differ for single scenarios, by name."""
    pairs: PositiveInteger = 10
    """Random pairs per simulation."""
    reading: Literal["auto", "marginal", "sampled"] = "auto"
    """How to read a checkpoint: `marginal` in one pass, `sampled` from sequences. `auto`: as it was trained (`objective`); a
    `joint` one both ways."""
    replicates: PositiveInteger = 12
    """Sequences that `sampled` decodes for each pair, and whose predictive distributions are averaged."""
    batch_size: PositiveInteger = 40
    """Pairs read together."""


class Configuration(Section):
    """The configuration of cxt."""

    seed: Seed = 1
    """Seed of the whole workflow. Every simulation, pair and mask offset is determined by it, the variant and the simulation
    index."""
    scenarios: dict[Name, AnyScenario]
    """Demographic models to simulate from, by name. `kind` selects the model; the other keys depend on the kind. A list in
    place of a single number is a sweep: each combination becomes a variant of its own, named
    `<scenario>-<parameter>=<value>…`."""
    scenario_sets: dict[Name, Annotated[list[Text], Field(strict=True), Expected("a list of names of scenarios")]] = {}
    """Named lists of scenarios, for use in datasets and evaluations. Scenarios that an overlay removes with `null` are dropped
    from every set."""
    datasets: dict[Name, Dataset]
    """Preprocessed sets, by name. Simulation i of a variant is held out (`test`) if and only if i is a multiple of 10, in every
    dataset."""
    models: dict[Name, Model]
    """Checkpoints to train, by name. Each is published as `results/<name>.ckpt`."""
    ensembles: dict[Name, Annotated[list[Text], Field(strict=True), Expected("a list of names of models")]] | None = None
    """Named lists of models that are evaluated together, as the mean of their predictive distributions:
    `results/evaluation/<name>.json`. A model with `repeats` stands for all its repeats. The members must read the same input;
    scenarios and accessibility mask are those of the first."""
    training: TrainingSection = TrainingSection()
    """Training settings of all models; a model's own `training` overrides single keys."""
    cluster: Cluster = Cluster()
    """What a cluster's scheduler is asked for; no result depends on it. Partitions and account are in the profile."""
    evaluation: Evaluation = Evaluation()
    """Held-out evaluation of every checkpoint."""
    translate: dict[Name, TranslationEntry] = {}
    """Files of genotypes to translate into TMRCA tracks, by name. Each is written to `results/translate/<name>/`."""
