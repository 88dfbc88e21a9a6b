"""What a configuration asks for: batches, masks, shards, datasets, checkpoints and evaluations, each with its lineage.

The workflow's rules ask these functions for their inputs and params, and nothing else decides what is stale.
Paths are relative to the working directory.
"""

import functools
import os
import sys

from cxt.config.file import lineage_of_parents, model_config, parent_of, training_config, training_settings
from cxt.config.schema import REPOSITORY
from cxt.config.settings import change_no_result, steps_per_epoch
from cxt.config.variants import Variant, scenario_of, variants
from cxt.data.manifest import dataset_lineage_of, planned_shards
from cxt.data.masks import describe_mask, read_mask
from cxt.errors import BadRequest
from cxt.io import file_sha256
from cxt.lineage import stage_lineage
from cxt.scenarios.indices import EVALUATION_START, SPLITS, batches, split_size
from cxt.scenarios.registry import check_scenarios
from cxt.scenarios.seeds import check_shared_ancestry
from cxt.scenarios.stdpopsim_models import catalogue_lineage, check_map_can_be_had

SHAPE = ("window_size", "sequence_length", "samples", "scales")


def variants_of(config: dict, scenarios: list[str]) -> list[Variant]:
    """The variants of several scenarios."""
    return [variant for name in scenarios for variant in variants(name, config["scenarios"][name])]


def variant_of(config: dict, name: str) -> Variant:
    """The variant called *name*."""
    return next(variant for variant in variants_of(config, [scenario_of(name)]) if variant.name == name)


def check_plan(config: dict) -> None:
    """Checks that need more than the configuration's text: stdpopsim's catalogue, masks, enough items for each model.

    Raises
    ------
    BadRequest
        If a scenario cannot be simulated or has no training simulation for a dataset, two simulations would have the same
        ancestry, or a model has less than one batch.
    """
    check_scenarios(config)
    counted = [(variant.spec, _all_batches(config, variant)) for variant in variants_of(config, list(config["scenarios"]))]
    check_shared_ancestry(counted, seed=config["seed"])
    for name, dataset in config["datasets"].items():
        for variant in variants_of(config, dataset["scenarios"]):
            if not split_size(0, variant.simulations, "train"):
                raise BadRequest(
                    f"datasets.{name}: scenario '{variant.name}' has no training simulation: "
                    f"`simulations: {variant.simulations}` is index 0 alone, and every index that is a multiple of 10 is held "
                    "out; give it 2 or more"
                )
        if "path" in dataset.get("mask", {}):
            settings = dataset["mask"]
            mask = read_mask(settings["path"], key=settings["key"], contig=settings.get("contig"), marks=settings["marks"])
            print(f"cxt: datasets.{name}: {describe_mask(settings['path'], mask)}", file=sys.stderr)
            if len(mask) < dataset["sequence_length"]:
                raise BadRequest(
                    f"datasets.{name}.mask: {settings['path']} covers {len(mask)} bp, fewer than sequence_length "
                    f"{dataset['sequence_length']}"
                )
    for name, model in config["models"].items():
        training = training_config(config, name)
        try:
            steps_per_epoch(
                items=items(config, model["dataset"], "train"),
                batch_size=training.batch_size,
                grad_accum=training.grad_accum,
                world=max(1, devices(config, name)),
            )
        except BadRequest as error:
            raise BadRequest(f"models.{name}: {error}") from None


def items(config: dict, dataset: str, split: str) -> int:
    """Training examples in one split of a dataset."""
    entry = config["datasets"][dataset]
    simulations = sum(split_size(0, variant.simulations, split) for variant in variants_of(config, entry["scenarios"]))
    return items_per_simulation(config, dataset) * simulations


def items_per_simulation(config: dict, dataset: str) -> int:
    """Training examples that a dataset takes from one simulation: pairs of each region."""
    entry = config["datasets"][dataset]
    return entry["pairs"] * entry["regions_per_simulation"]


def put_package_on_path() -> None:
    """Let the jobs of this process find this package, whatever environment they run in, and this python.

    A conda environment, where one is used, comes before it and needs the dependencies only.
    """
    before = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "src"), *before])
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


# Stage 1


def batch_path(variant: str, start: int) -> str:
    return f"results/simulations/{variant}/{start}.trees.batch"


def batch_count(config: dict, variant: Variant, start: int) -> int:
    """Simulations in the batch of *variant* that begins at *start*; BadRequest if no batch begins there."""
    counts = dict(_all_batches(config, variant))
    if start not in counts:
        raise BadRequest(f"no batch of '{variant.name}' begins at {start}; there are {', '.join(map(str, counts))}")
    return counts[start]


def _all_batches(config: dict, variant: Variant) -> list[tuple[int, int]]:
    """(first index, count) of the batches of a variant, those for evaluation last."""
    return batches(simulations=variant.simulations, batch=variant.batch) + evaluation_starts(config, variant)


def evaluation_starts(config: dict, variant: Variant) -> list[tuple[int, int]]:
    """(first index, count) of the evaluation batches of a variant."""
    evaluation = config["evaluation"]
    simulations = evaluation["simulations_of"].get(scenario_of(variant.name), evaluation["simulations"])
    return batches(simulations=simulations, batch=variant.batch, start=EVALUATION_START)


def batch_lineage(config: dict, variant: Variant, start: int, count: int) -> str:
    catalogue = [catalogue_lineage(variant.spec)] if variant.spec["kind"] == "stdpopsim" else []
    return stage_lineage("simulate", variant.spec, config["seed"], start, count, *catalogue)


def map_path(spec: dict) -> str:
    """The file that says that a variant's genetic map is in stdpopsim's cache, wherever that is."""
    return f"results/maps/{spec['species']}-{spec['genetic_map']}.json"


def variant_with_map(config: dict, path: str) -> Variant:
    """A variant that needs the genetic map of `map_path` *path*."""
    mapped = [variant for variant in variants_of(config, list(config["scenarios"])) if "genetic_map" in variant.spec]
    return next(variant for variant in mapped if map_path(variant.spec) == path)


def map_of_batch(variant: Variant, start: int) -> list[str]:
    """The genetic map that a batch needs, as a list of inputs: one file or none.

    Raises
    ------
    BadRequest
        If the batch is still to be simulated and the map can neither be found nor fetched.
    """
    if "genetic_map" not in variant.spec:
        return []
    if not os.path.exists(batch_path(variant.name, start)):
        check_map_can_be_had(variant.spec, fetched=map_path(variant.spec))
    return [map_path(variant.spec)]


# Stage 2


def dataset_spec(config: dict, name: str) -> dict:
    """What decides the content of a shard, beside its batch and mask: shape and pairs."""
    dataset = config["datasets"][name]
    return {key: value for key, value in dataset.items() if key not in ("scenarios", "mask")}


def mask_path(config: dict, name: str) -> str | None:
    """The accessibility mask of a dataset: the user's, the synthetic one's path, or None."""
    mask = config["datasets"][name].get("mask")
    return None if mask is None else mask.get("path", f"results/masks/{name}.npz")


def mask_spec(config: dict, name: str) -> dict:
    """Settings of a dataset's synthetic mask."""
    mask = config["datasets"][name]["mask"]
    return {key: mask[key] for key in ("length", "accessible_run", "inaccessible_run")}


def mask_arguments(config: dict, name: str) -> list[str]:
    """How the stages are told of a dataset's mask, and of what it must be, as command-line words after the path."""
    mask = config["datasets"][name].get("mask", {})
    words = []
    if "path" in mask and mask["path"].endswith(".npz"):
        words += ["--mask-key", mask["key"]]
    if "contig" in mask:
        words += ["--mask-contig", mask["contig"]]
    if "path" in mask:
        words += ["--mask-marks", mask["marks"]]
        words += ["--mask-sha256", _external_digest(mask["path"])]
    elif "mask" in config["datasets"][name]:
        words += ["--mask-lineage", mask_lineage(config, name)]
    return words


@functools.cache
def _external_digest(path: str) -> str:
    return file_sha256(path)


def mask_lineage(config: dict, name: str) -> str | None:
    mask = config["datasets"][name].get("mask")
    if mask is None:
        return None
    if "path" in mask:
        return stage_lineage("preprocess", _external_digest(mask["path"]), mask["key"], mask.get("contig"), mask["marks"])
    return stage_lineage("preprocess", mask_spec(config, name), config["seed"])


def shard_lineage(config: dict, dataset: str, variant: Variant, start: int, split: str) -> str:
    count = batch_count(config, variant, start)
    batch = batch_lineage(config, variant, start, count)
    return stage_lineage("preprocess", dataset_spec(config, dataset), split, batch, mask_lineage(config, dataset))


def variant_table(config: dict, dataset: str) -> dict[str, tuple[int, int]]:
    """{variant: (simulations, batch)} of a dataset."""
    return {
        variant.name: (variant.simulations, variant.batch)
        for variant in variants_of(config, config["datasets"][dataset]["scenarios"])
    }


def variant_table_with_lineages(config: dict, dataset: str) -> dict[str, tuple[int, int, str]]:
    """{variant: (simulations, batch, lineage of its shards)} of a dataset."""
    variants = variants_of(config, config["datasets"][dataset]["scenarios"])
    return {
        variant.name: (variant.simulations, variant.batch, dataset_lineage_of(shard_lineages(config, dataset, variant)))
        for variant in variants
    }


def shard_lineages(config: dict, dataset: str, variant: Variant) -> list[str]:
    """The lineages of all shards of a variant in a dataset."""
    return [
        shard_lineage(config, dataset, variant, start, split)
        for start, count in batches(simulations=variant.simulations, batch=variant.batch)
        for split in SPLITS
        if split_size(start, count, split)
    ]


def dataset_directory(name: str) -> str:
    return f"results/datasets/{name}"


def shard_paths(config: dict, dataset: str) -> list[str]:
    """All shards of a dataset."""
    planned = planned_shards(variant_table(config, dataset))
    return [f"{dataset_directory(dataset)}/{name}" for names in planned.values() for name in names]


def dataset_lineage(config: dict, name: str) -> str:
    """Digest of all shards, in no particular order of scenarios."""
    variants = variants_of(config, config["datasets"][name]["scenarios"])
    return dataset_lineage_of([lineage for variant in variants for lineage in shard_lineages(config, name, variant)])


def preprocessing_memory_mb(config: dict, dataset: str, simulations: int, tree_bytes: float) -> int:
    """Memory that a shard asks the scheduler for: what is kept of all its simulations, and one tree sequence at work.

    A target takes 4 bytes in the simulation and as many in each of two copies while the shard is written; sites take 16.
    """
    entry = config["datasets"][dataset]
    windows = entry["sequence_length"] // entry["window_size"]
    kept = simulations * entry["regions_per_simulation"] * (16 * entry["pairs"] * windows + 16 * 20_000)
    return 2000 + int((1.5 * kept + 20 * tree_bytes) / 1e6)


# Stage 3


def checkpoint_path(model: str) -> str:
    return f"results/{model}.ckpt"


def devices(config: dict, model: str) -> int:
    """GPUs that a model's train rule asks for; 0 = CPU."""
    return config["models"][model].get("training", {}).get("devices", config["training"]["devices"])


def model_lineage(config: dict, name: str) -> str:
    """Digest of everything that checkpoint *name* depends on, its ancestors included."""
    model = config["models"][name]
    parent = parent_of(model)
    inherited = (
        None if parent is None else ["checkpoint" if "checkpoint" in model else "resume_adapter", model_lineage(config, parent)]
    )
    settings = training_settings(config, name)
    settings = {key: value for key, value in settings.items() if key not in change_no_result(settings)}
    return stage_lineage("train", settings, devices(config, name), dataset_lineage(config, model["dataset"]), inherited)


def run_directory(config: dict, name: str) -> str:
    return f"results/runs/{name}-{model_lineage(config, name)}"


def training_memory_mb(config: dict, name: str) -> int:
    """Memory that training asks the scheduler for: torch, the network and batches on each device, and the dataset once.

    Per region, as `PairDataset` holds it: some 9 bits a target, a bit a genotype (20 000 sites are many), counts of windows.
    """
    dataset = config["datasets"][config["models"][name]["dataset"]]
    simulations = sum(variant.simulations for variant in variants_of(config, dataset["scenarios"]))
    windows, samples = dataset["sequence_length"] // dataset["window_size"], dataset["samples"]
    per_region = 1.2 * dataset["pairs"] * windows + 20_000 * (samples / 8 + 1) + 2 * windows * samples
    return 4000 * max(1, devices(config, name)) + int(1.2 * simulations * dataset["regions_per_simulation"] * per_region / 1e6)


def training_threads(config: dict, name: str) -> int:
    """CPU threads of all processes of a model's training, those that make batches among them."""
    training = training_config(config, name)
    return (training.threads + training.workers) * max(1, devices(config, name))


def settings_path(model: str) -> str:
    return f"results/config/{model}.yaml"


def settings_file(config: dict, name: str) -> dict:
    """What the file `settings_path` holds: a model's settings, and the lineage of the checkpoint they are for."""
    return training_settings(config, name) | {"settings_lineage": model_lineage(config, name)}


def lineages_to_train_on(config: dict, name: str) -> list[str]:
    """The lineages that a model's dataset and parent must have, as command-line words."""
    words = ["--dataset-lineage", dataset_lineage(config, config["models"][name]["dataset"])]
    parent = parent_of(config["models"][name])
    return words if parent is None else [*words, "--parent-lineage", model_lineage(config, parent)]


def parent_flag(config: dict, name: str) -> list[str]:
    """The verb and file of a model's parent, as command-line words."""
    model = config["models"][name]
    if "checkpoint" in model:
        return ["--checkpoint", checkpoint_path(model["checkpoint"])]
    if "resume_adapter" in model:
        return ["--resume-adapter", checkpoint_path(model["resume_adapter"])]
    return []


def ancestors(config: dict, name: str) -> list[str]:
    """The parents of a model, nearest first."""
    return lineage_of_parents(config, name)[1:]


# Stage 4


def evaluation_scenarios(config: dict, model: str) -> list[str]:
    entry = config["models"][model]
    return entry.get("evaluation", config["datasets"][entry["dataset"]]["scenarios"])


def evaluation_batches(config: dict, model: str) -> list[dict]:
    """[{path, scenario, start, count, lineage}, …] of everything that a model is evaluated on."""
    return [
        {
            "path": batch_path(variant.name, start),
            "scenario": variant.name,
            "start": start,
            "count": count,
            "lineage": batch_lineage(config, variant, start, count),
        }
        for scenario in evaluation_scenarios(config, model)
        for variant in variants(scenario, config["scenarios"][scenario])
        for start, count in evaluation_starts(config, variant)
    ]


def evaluation_spec(config: dict, model: str) -> dict:
    dataset = config["datasets"][config["models"][model]["dataset"]]
    evaluation = config["evaluation"]
    return {key: dataset[key] for key in SHAPE} | {
        "pairs": evaluation["pairs"],
        "replicates": evaluation["replicates"],
        "batch_size": evaluation["batch_size"],
        "seed": config["seed"],
    }


def evaluation_lineage(config: dict, model: str) -> str:
    used = sorted(batch["lineage"] for batch in evaluation_batches(config, model))
    dataset = config["models"][model]["dataset"]
    return stage_lineage(
        "evaluate", evaluation_spec(config, model), used, mask_lineage(config, dataset), model_lineage(config, model)
    )


def table_lineage(config: dict) -> str:
    return stage_lineage("evaluate", sorted(evaluation_lineage(config, model) for model in config["models"]))


def evaluation_memory_mb(config: dict, model: str) -> int:
    """Memory that evaluation asks for: torch and the network, the counts of one variant's pairs, and a batch's decoding."""
    entry, evaluation = config["models"][model], config["evaluation"]
    dataset = config["datasets"][entry["dataset"]]
    network = model_config(config, model)
    simulations = max([evaluation["simulations"], *evaluation["simulations_of"].values()])
    counts = 2 * len(dataset["scales"]) * network.windows * dataset["samples"] * 4
    decoding = evaluation["batch_size"] * evaluation["replicates"] * network.windows
    decoding *= 4 * (2 * network.layers * network.width + 2 * network.bins)
    return 4000 + int((2 * simulations * evaluation["pairs"] * counts + 1.5 * decoding) / 1e6)
