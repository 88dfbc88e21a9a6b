# Imports, the checked configuration, and every helper function of the rules.

import os
import re
import sys

from cxt.workflow import jobs, lineages, paths, settings
from cxt.workflow.resources import (
    evaluation_memory_mb,
    preprocessing_memory_mb,
    request_gpus,
    training_memory_mb,
    training_minutes,
    training_threads,
)
from cxt.config.file import merge, resolve
from cxt.config.models import build_training_config, get_parent
from cxt.config.yaml import read_yaml
from cxt.workflow.costs import LOCAL_COSTS, Costs
from cxt.errors import BadRequest, suggest_nearest


def checked(config):
    """The configuration with defaults and what is known of costs, or exit status 2 and one message before anything runs."""
    try:
        if IS_MODULE:
            check_module()
            if workflow.modifier.skip_configfile:  # the module has a `config:` of its own
                config = merge(read_yaml(default_configfile()), config)
        else:
            for path in workflow.configfiles:
                read_yaml(path)  # refuses keys given twice, which Snakemake does not
        config = resolve(config)
        jobs.check_plan(config)
        if not IS_MODULE:
            check_targets(config)
        costs = Costs([LOCAL_COSTS] if LOCAL_COSTS.exists() else [])
    except BadRequest as error:
        print(f"cxt: {error}", file=sys.stderr)
        sys.exit(2)
    return config, costs


def check_module():
    """Refuse a `prefix:` of the module."""
    if workflow.modifier.path_modifier.replace_prefix("results/") != "results/":
        raise BadRequest(
            "a module of this workflow cannot have `prefix:` or `replace_prefix:`, because the run directories of training are no "
            "outputs that Snakemake could move; remove it, and use --directory to choose where results/ is"
        )


def check_targets(config):
    """Refuse a checkpoint, evaluation or dataset on the command line that the configuration does not have."""
    for target in sys.argv[1:]:
        for pattern, section in (
            (r"results/([^/]+)\.ckpt", "models"),
            (r"results/evaluation/([^/]+)\.json", "models"),
            (r"results/settings/models/([^/]+)\.yaml", "models"),
            (r"results/datasets/([^/]+)/.*", "datasets"),
        ):
            match = re.fullmatch(pattern, target)
            if match and match[1] not in config[section]:
                raise BadRequest(
                    f"unknown {section[:-1]} '{match[1]}'{suggest_nearest(match[1], config[section])}"
                )
        if match := re.fullmatch(r"results/simulations/([^/]+)/(\d+)\.trees\.batch", target):
            variants = [
                variant.name for variant in jobs.collect_variants(config, list(config["scenarios"]))
            ]
            if match[1] not in variants:
                raise BadRequest(
                    f"unknown variant '{match[1]}'{suggest_nearest(match[1], variants)}"
                )
            jobs.batch_count(config, jobs.find_variant(config, match[1]), int(match[2]))


IS_MODULE = not workflow.modifier.is_main_snakefile()
"""Whether another workflow uses these rules by `module`: then command line, configuration files and partitions are its own."""

jobs.put_package_on_path()
if not IS_MODULE:
    # Read by the Slurm executor. An absolute path, so that it is found from any working directory.
    os.environ.setdefault(
        "SNAKEMAKE_SLURM_PARTITIONS",
        str(ROOT / "workflow" / "profiles" / "slurm" / "partitions.yaml"),
    )
config, costs = checked(config)


def one_of(names):
    """A regular expression for a wildcard that must be one of *names*."""
    return "|".join(map(re.escape, names))


wildcard_constraints:
    variant=one_of(
        [variant.name for variant in jobs.collect_variants(config, list(config["scenarios"]))]
    ),
    start=r"\d+",
    dataset=one_of(config["datasets"]),
    model=one_of(config["models"]),
    kind=one_of(settings.KINDS),


def variant_and_start(wildcards):
    return jobs.find_variant(config, wildcards.variant), int(wildcards.start)


def find_batch_map(wildcards):
    """The genetic map of a batch, or exit status 2 and one message if it cannot be had."""
    try:
        return paths.find_batch_map(*variant_and_start(wildcards))
    except BadRequest as error:
        print(f"cxt: {error}", file=sys.stderr)
        sys.exit(2)


def map_spec(wildcards):
    """The parameters of a variant that needs a genetic map."""
    return paths.variant_with_map(config, f"results/maps/{wildcards.map}.json").spec


def preprocess_memory(wildcards):
    variant, start = variant_and_start(wildcards)
    cost, simulations = simulation_cost(wildcards)
    size = 100e6 if cost is None else cost["bytes"]
    return preprocessing_memory_mb(config, wildcards.dataset, simulations, size)


def simulation_cost(wildcards):
    """The measured cost of one simulation, and how many there are in the batch."""
    variant, start = variant_and_start(wildcards)
    return costs.simulation(variant.spec), jobs.batch_count(config, variant, start)


def simulate_minutes(wildcards):
    """Time to ask the scheduler for: three times what was measured, and 4 hours where nothing was."""
    cost, simulations = simulation_cost(wildcards)
    return 240 if cost is None else max(30, round(simulations * cost["seconds"] / 20))


def simulate_memory(wildcards):
    """One simulation at a time: some twenty times its file."""
    cost, _ = simulation_cost(wildcards)
    return 4000 if cost is None else max(2000, 1000 + round(20 * cost["bytes"] / 1e6))


def batch_count(wildcards):
    return jobs.batch_count(config, *variant_and_start(wildcards))


def batch_lineage(wildcards):
    variant, start = variant_and_start(wildcards)
    return lineages.batch_lineage(config, variant, start, jobs.batch_count(config, variant, start))


def shard_lineage(wildcards):
    return lineages.shard_lineage(config, wildcards.dataset, *variant_and_start(wildcards))


def mask_of_dataset(dataset):
    """The mask file of a dataset as a list of inputs: one file or none."""
    path = paths.mask_path(config, dataset)
    return [] if path is None else [path]


def mask_flag(wildcards, input):
    """The flag and file of a mask, for a job whose input `mask` has it, or nothing."""
    return ["--mask", *input.mask] if input.mask else []


def used_datasets():
    """The datasets that a model is trained on."""
    return sorted({model["dataset"] for model in config["models"].values()})


def dataset_of(model):
    return config["models"][model]["dataset"]


def gpu_resources(count):
    """The resources of a rule that request as many GPUs as *count* says for its wildcards."""
    return {
        name: lambda wildcards, name=name: request_gpus(config, count(wildcards))[name]
        for name in request_gpus(config, 0)
    }


def training_devices(wildcards):
    return jobs.get_device_count(config, wildcards.model)


def evaluation_devices(wildcards):
    return min(1, training_devices(wildcards))


def parent_of(model):
    """The checkpoint that a model starts from as a list of inputs: one file or none."""
    parent = get_parent(config["models"][model])
    return [] if parent is None else [paths.checkpoint_path(parent)]


def parent_flag(wildcards, input):
    """The flag and file of the checkpoint to start from, or nothing."""
    flag = (
        "--checkpoint" if "checkpoint" in config["models"][wildcards.model] else "--resume-adapter"
    )
    return [flag, *input.parent] if input.parent else []
