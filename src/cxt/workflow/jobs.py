"""The jobs of a configuration: its variants, batches, datasets and evaluations, and checks that all can be made.

The workflow's rules get their inputs and params from this module, `paths`, `lineages`, `arguments` and `resources`; nothing
else decides what is made and what is stale.
"""

import os
import sys
import tempfile
from pathlib import Path

from cxt.config.ensembles import list_ensembles, list_members
from cxt.config.learning import is_readable
from cxt.config.models import build_region_plan, build_training_config, get_max_steps, list_files
from cxt.config.on_the_fly import MARK, is_on_the_fly, list_stored_datasets
from cxt.config.training import steps_per_epoch
from cxt.config.variants import Variant, get_scenario_name, list_variants
from cxt.console import ON_STDERR, get_logger
from cxt.data.masks import describe_mask, read_mask
from cxt.errors import BadRequest
from cxt.scenarios.indices import EVALUATION_START, count_in_split, simulation_batches
from cxt.scenarios.registry import check_scenarios
from cxt.scenarios.seeds import check_shared_ancestry
from cxt.scenarios.tree_pieces import count_held_out_pieces
from cxt.workflow.frozen import derived_once

logger = get_logger(__name__)

SHAPE = ("window_size", "sequence_length", "samples", "scales")


def collect_variants(config: dict, scenarios: list[str]) -> list[Variant]:
    """The variants of several scenarios."""
    return [variant for name in scenarios for variant in list_variants(name, config["scenarios"][name])]


@derived_once
def find_variant(config: dict, name: str) -> Variant:
    """The variant called *name*."""
    return next(variant for variant in collect_variants(config, [get_scenario_name(name)]) if variant.name == name)


def check_plan(config: dict) -> None:
    """Run the checks that need more than the configuration's text: stdpopsim's catalogue, masks, examples for each model.

    Raises
    ------
    BadRequest
        If a scenario cannot be simulated or has no training simulation for a dataset, two simulations would have the same
        ancestry, a scenario of files has fewer pieces than `evaluation.simulations_of` asks for, or a model has fewer examples
        than one batch.
    """
    check_scenarios(config)
    for name, asked in config["evaluation"]["simulations_of"].items():
        for variant in collect_variants(config, [name]):
            if variant.spec["kind"] == "trees" and asked > (held_out := count_held_out_pieces(variant.spec)):
                raise BadRequest(
                    f"evaluation.simulations_of.{name}: {asked} requested, but the files of '{name}' have only {held_out} "
                    "held-out pieces, one of ten; lower it, or add files"
                )
    variants = collect_variants(config, list(config["scenarios"]))
    counted = [(variant.spec, list_batches(config, variant)) for variant in variants if variant.spec["kind"] != "trees"]
    check_shared_ancestry(counted, seed=config["seed"])
    for name in list_stored_datasets(config):
        dataset = config["datasets"][name]
        for variant in collect_variants(config, dataset["scenarios"]):
            if not count_in_split(0, variant.simulations, "train"):
                raise BadRequest(
                    f"datasets.{name}: scenario '{variant.name}' has no training simulation: "
                    f"`simulations: {variant.simulations}` is only index 0, and every index that is a multiple of 10 is held "
                    "out; set simulations to 2 or more"
                )
        if "path" in dataset.get("mask", {}):
            settings = dataset["mask"]
            mask = read_mask(settings["path"], key=settings["key"], contig=settings.get("contig"), marks=settings["marks"])
            logger.info(f"cxt: datasets.{name}: {describe_mask(settings['path'], mask)}", extra=ON_STDERR)
            if len(mask) < dataset["sequence_length"]:
                raise BadRequest(
                    f"datasets.{name}.mask: {settings['path']} covers {len(mask)} bp, fewer than sequence_length "
                    f"{dataset['sequence_length']}"
                )
    for name in config["models"]:
        for key, file in list_files(config, name).items():
            logger.info(f"cxt: models.{name}.{key}: {file.describe()}", extra=ON_STDERR)
        training = build_training_config(config, name)
        try:
            steps_per_epoch(
                examples=count_model_examples(config, name, "train"),
                batch_size=training.batch_size,
                grad_accum=training.grad_accum,
                world=get_world_size(config, name),
                plan=build_region_plan(config, name),
            )
        except BadRequest as error:
            raise BadRequest(f"models.{name}: {error}") from None


def count_examples(config: dict, name: str, split: str) -> int:
    """Examples in one split of a dataset."""
    dataset = config["datasets"][name]
    simulations = sum(
        count_in_split(0, variant.simulations, split) for variant in collect_variants(config, dataset["scenarios"])
    )
    return count_examples_per_simulation(config, name) * simulations


def count_model_examples(config: dict, model: str, split: str) -> int:
    """Examples that a model is trained on, or validated with: those of its dataset, or those that it simulates."""
    name = config["models"][model]["dataset"]
    if not is_on_the_fly(config["datasets"][name]):
        return count_examples(config, name, split)
    if split == "test":
        return config["datasets"][name][MARK]
    training, max_steps = build_training_config(config, model), get_max_steps(config, model)
    assert max_steps is not None
    return max_steps * training.batch_size * training.grad_accum * get_world_size(config, model)


def count_examples_per_simulation(config: dict, name: str) -> int:
    """Examples that a dataset takes from one simulation: the pairs of each region."""
    dataset = config["datasets"][name]
    return dataset["pairs"] * dataset["regions_per_simulation"]


def put_package_on_path() -> None:
    """Let the jobs of this process find this package, in any environment they run in, and this python.

    A conda environment, if one is used, comes first on the path and needs the dependencies only.
    """
    package = Path(__file__).resolve().parents[1]
    source = package.parent
    if not (source.parent / "pyproject.toml").is_file():  # installed beside its dependencies, which would hide those of conda
        source = Path(".snakemake", "cxt").absolute()
        link_package(package, source / "cxt")
    before = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(source), *before])
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


def link_package(package: Path, link: Path) -> None:
    """Make *link* a symbolic link to *package*, in a directory that holds nothing else; several processes may do so at once."""
    if link.is_symlink() and link.readlink() == package:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=link.parent) as directory:
        Path(directory, "cxt").symlink_to(package)
        os.replace(Path(directory, "cxt"), link)


# Stage 1


def batch_count(config: dict, variant: Variant, start: int) -> int:
    """Simulations in the batch of *variant* that begins at *start*; BadRequest if no batch begins there."""
    counts = _batch_counts(config, variant.name)
    if start not in counts:
        raise BadRequest(
            f"no simulation batch of '{variant.name}' begins at {start}; choose from {', '.join(map(str, counts))}"
        )
    return counts[start]


@derived_once
def _batch_counts(config: dict, variant: str) -> dict[int, int]:
    """{first index: count} of all batches of a variant."""
    return dict(list_batches(config, find_variant(config, variant)))


def list_batches(config: dict, variant: Variant) -> list[tuple[int, int]]:
    """(first index, count) of all batches of a variant, those for evaluation last."""
    return simulation_batches(simulations=variant.simulations, batch=variant.batch) + list_evaluation_batches(config, variant)


def list_evaluation_batches(config: dict, variant: Variant) -> list[tuple[int, int]]:
    """(first index, count) of the evaluation batches of a variant."""
    evaluation = config["evaluation"]
    simulations = evaluation["simulations_of"].get(get_scenario_name(variant.name), evaluation["simulations"])
    if variant.spec["kind"] == "trees":
        simulations = min(simulations, count_held_out_pieces(variant.spec))
    return simulation_batches(simulations=simulations, batch=variant.batch, start=EVALUATION_START)


# Stage 2


def dataset_spec(config: dict, name: str) -> dict:
    """The settings that determine the content of a shard, besides its batch and mask: shape and pairs."""
    dataset = config["datasets"][name]
    return {key: value for key, value in dataset.items() if key not in ("scenarios", "mask")}


def mask_spec(config: dict, name: str) -> dict:
    """Settings of a dataset's synthetic mask."""
    mask = config["datasets"][name]["mask"]
    return {key: mask[key] for key in ("length", "accessible_run", "inaccessible_run")}


def variant_table(config: dict, dataset: str) -> dict[str, tuple[int, int]]:
    """{variant: (simulations, batch)} of a dataset."""
    return {
        variant.name: (variant.simulations, variant.batch)
        for variant in collect_variants(config, config["datasets"][dataset]["scenarios"])
    }


# Stage 3


def get_device_count(config: dict, model: str) -> int:
    """GPUs of each machine that a model's train rule requests; 0 = CPU."""
    return config["models"][model].get("training", {}).get("devices", config["training"]["devices"])


def get_machine_count(config: dict, model: str) -> int:
    """Machines that train a model together."""
    return config["models"][model].get("training", {}).get("nodes", config["training"]["nodes"])


def get_world_size(config: dict, model: str) -> int:
    """Devices, on all machines, among which a model's batches are distributed."""
    return max(1, get_device_count(config, model)) * get_machine_count(config, model)


# Stage 4


def evaluated_models(config: dict) -> list[str]:
    """The models that can be evaluated: those from which times can be read."""
    return [name for name in config["models"] if is_readable(build_training_config(config, name).objective)]


def list_evaluations(config: dict) -> list[str]:
    """Everything that is evaluated: models, and the ensembles of some of them."""
    return [*evaluated_models(config), *list_ensembles(config)]


def evaluation_scenarios(config: dict, name: str) -> list[str]:
    """Names of the scenarios that a model is evaluated on, its own or its dataset's; of an ensemble, its first member's."""
    model = config["models"][list_members(config, name)[0]]
    return model.get("evaluation", config["datasets"][model["dataset"]]["scenarios"])


def evaluation_dataset(config: dict, name: str) -> str:
    """The dataset whose shape and mask an evaluation has: that of the model, or of an ensemble's first member."""
    return config["models"][list_members(config, name)[0]]["dataset"]


def evaluation_spec(config: dict, name: str) -> dict:
    """The settings that determine an evaluation, besides its checkpoints, batches and mask."""
    dataset = config["datasets"][evaluation_dataset(config, name)]
    evaluation = config["evaluation"]
    shape, model = {key: dataset[key] for key in SHAPE}, config["models"][list_members(config, name)[0]]
    if "windows" in model:  # the first part of each simulation
        shape["sequence_length"] = model["windows"] * shape["window_size"]
    return shape | {
        "pairs": evaluation["pairs"],
        "replicates": evaluation["replicates"],
        "batch_size": evaluation["batch_size"],
        "seed": config["seed"],
        "reading": evaluation["reading"],
    }
