"""The lineage of each of the workflow's results: the digest that decides whether a file is current."""

import functools

from cxt.config.ensembles import list_ensembles, list_members
from cxt.config.models import (
    build_teaching_spec,
    build_training_settings,
    get_parent,
    get_parent_file,
    get_parent_key,
    list_files,
)
from cxt.config.on_the_fly import is_on_the_fly, list_simulated_variants
from cxt.config.parent_files import list_parent_files
from cxt.config.training import drop_later_defaults, list_result_neutral_settings
from cxt.config.variants import Variant, list_variants
from cxt.io import file_sha256
from cxt.lineage import (
    STAGE_VERSION,
    combine_shard_lineages,
    combine_soft_target_lineages,
    derive_batch_lineage,
    derive_evaluation_lineage,
    derive_mask_file_lineage,
    derive_shard_lineage,
    derive_soft_target_lineage,
    derive_synthetic_mask_lineage,
    stage_lineage,
)
from cxt.scenarios.genetic_maps import catalogue_versions
from cxt.scenarios.indices import SPLITS, count_in_split, simulation_batches
from cxt.scenarios.registry import identify_simulations
from cxt.workflow.frozen import derived_once
from cxt.workflow.jobs import (
    batch_count,
    collect_variants,
    dataset_spec,
    evaluation_dataset,
    evaluation_scenarios,
    evaluation_spec,
    get_device_count,
    get_machine_count,
    list_evaluation_batches,
    list_evaluations,
    mask_spec,
)
from cxt.workflow.paths import runs_directory


def batch_lineage(config: dict, variant: Variant, start: int, count: int) -> str:
    """Lineage of *count* simulations of a variant, starting at index *start*."""
    catalogue = catalogue_versions(variant.spec)
    spec = identify_simulations(variant.spec, start=start, count=count)
    return derive_batch_lineage(spec, seed=config["seed"], start=start, count=count, catalogue=catalogue)


@functools.cache
def file_digest(path: str) -> str:
    """sha256 of an external file; each file is read only once."""
    return file_sha256(path)


@derived_once
def mask_lineage(config: dict, name: str) -> str | None:
    """Lineage of a dataset's accessibility mask; None if it has none."""
    mask = config["datasets"][name].get("mask")
    if mask is None:
        return None
    if "path" in mask:
        digest = file_digest(mask["path"])
        return derive_mask_file_lineage(digest, key=mask["key"], contig=mask.get("contig"), marks=mask["marks"])
    return derive_synthetic_mask_lineage(mask_spec(config, name), seed=config["seed"])


def shard_lineage(config: dict, dataset: str, variant: Variant, start: int) -> str:
    """Lineage of the shards of a dataset that are made from one simulation batch."""
    batch = batch_lineage(config, variant, start, batch_count(config, variant, start))
    return derive_shard_lineage(dataset_spec(config, dataset), batch=batch, mask=mask_lineage(config, dataset))


def variant_table_with_lineages(config: dict, dataset: str) -> dict[str, tuple[int, int, str]]:
    """{variant: (simulations, batch, lineage of its shards)} of a dataset."""
    variants = collect_variants(config, config["datasets"][dataset]["scenarios"])
    return {
        variant.name: (variant.simulations, variant.batch, combine_shard_lineages(shard_lineages(config, dataset, variant)))
        for variant in variants
    }


def shard_lineages(config: dict, dataset: str, variant: Variant) -> list[str]:
    """The lineages of all shards of a variant in a dataset."""
    return [
        shard_lineage(config, dataset, variant, start)
        for start, count in simulation_batches(simulations=variant.simulations, batch=variant.batch)
        for split in SPLITS
        if count_in_split(start, count, split)
    ]


@derived_once
def dataset_lineage(config: dict, name: str) -> str:
    """Digest of all shards, independent of the order of scenarios; of the simulations, if a model makes them on the fly."""
    dataset = config["datasets"][name]
    if is_on_the_fly(dataset):
        specs = list_simulated_variants(config, dataset)
        versions = [catalogue_versions(spec) for spec in specs]
        return stage_lineage("preprocess", STAGE_VERSION["simulate"], dataset, specs, versions)
    variants = collect_variants(config, config["datasets"][name]["scenarios"])
    return combine_shard_lineages([lineage for variant in variants for lineage in shard_lineages(config, name, variant)])


@derived_once
def model_lineage(config: dict, name: str) -> str:
    """Digest of everything that checkpoint *name* depends on, including its ancestors."""
    model = config["models"][name]
    parent = get_parent(model)
    inherited = None if parent is None else [get_parent_key(model), model_lineage(config, parent)]
    if (file := get_parent_file(config, name)) is not None:
        inherited = [get_parent_key(model), file.sha256]
    settings = build_training_settings(config, name)
    settings = {key: value for key, value in settings.items() if key not in list_result_neutral_settings(settings)}
    settings = drop_later_defaults(settings)
    taught = [] if "teacher" not in model else [soft_targets_lineage(config, name)]
    devices, machines = get_device_count(config, name), get_machine_count(config, name)
    placement = devices if machines == 1 else [devices, machines]  # as it was before there were several machines
    return stage_lineage("train", settings, placement, dataset_lineage(config, model["dataset"]), inherited, *taught)


def parent_file_digest(config: dict, label: str) -> str:
    """Lineage of the copy of a file that models start from, by its label: the sha256 of the file."""
    return next(file.sha256 for file in list_parent_files(config) if file.label == label)


def soft_target_lineage(config: dict, name: str, variant: Variant, start: int) -> str:
    """Lineage of the soft targets of the shards that are made from one simulation batch, for model *name*."""
    model, file = config["models"][name], list_files(config, name).get("teacher")
    return derive_soft_target_lineage(
        build_teaching_spec(config, name),
        shard=shard_lineage(config, model["dataset"], variant, start),
        checkpoint=model_lineage(config, model["teacher"]) if file is None else file.sha256,
    )


@derived_once
def soft_targets_lineage(config: dict, name: str) -> str:
    """Lineage of all soft targets of model *name*."""
    variants = collect_variants(config, config["datasets"][config["models"][name]["dataset"]]["scenarios"])
    return combine_soft_target_lineages(
        [
            soft_target_lineage(config, name, variant, start)
            for variant in variants
            for start, count in simulation_batches(simulations=variant.simulations, batch=variant.batch)
            for split in SPLITS
            if count_in_split(start, count, split)
        ]
    )


@derived_once
def evaluation_batches(config: dict, model: str) -> list[dict]:
    """[{path below results/simulations, scenario, start, count, lineage}, …] of everything that a model is evaluated on."""
    return [
        {
            "path": f"{variant.name}/{start}.trees.batch",
            "scenario": variant.name,
            "start": start,
            "count": count,
            "lineage": batch_lineage(config, variant, start, count),
        }
        for scenario in evaluation_scenarios(config, model)
        for variant in list_variants(scenario, config["scenarios"][scenario])
        for start, count in list_evaluation_batches(config, variant)
    ]


@derived_once
def evaluation_lineage(config: dict, model: str) -> str:
    """Lineage of the evaluation of a model or an ensemble."""
    members = [model_lineage(config, member) for member in list_members(config, model)]
    return derive_evaluation_lineage(
        evaluation_spec(config, model),
        batches=[batch["lineage"] for batch in evaluation_batches(config, model)],
        mask=mask_lineage(config, evaluation_dataset(config, model)),
        checkpoint=members if model in list_ensembles(config) else members[0],
    )


def table_lineage(config: dict) -> str:
    """Lineage of the table of all evaluations."""
    return stage_lineage("evaluate", sorted(evaluation_lineage(config, model) for model in list_evaluations(config)))


def run_directory(config: dict, name: str) -> str:
    """The run directory of a model: one for each lineage, so that changed settings start a new run."""
    return f"{runs_directory(config)}/{name}-{model_lineage(config, name)}"
