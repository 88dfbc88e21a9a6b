# Imports, the checked configuration, and every helper function of the rules.

import os
import re
import shlex
import sys

from snakemake_interface_executor_plugins.settings import SharedFSUsage

from cxt.workflow import jobs, lineages, paths, settings, translations
from cxt.workflow.frozen import FrozenConfiguration
from cxt.workflow.prolonging import find_run_to_prolong
from cxt.workflow.resources import (
    check_placement,
    evaluation_memory_mb,
    launch_command,
    preprocessing_memory_mb,
    request_gpus,
    request_machines,
    teaching_memory_mb,
    training_memory_mb,
    training_minutes,
    training_threads,
)
from cxt.config.ensembles import list_ensembles, list_members
from cxt.config.file import locate_files, merge, resolve
from cxt.checkpoints.parents import read_parent_file
from cxt.config.models import (
    build_training_config,
    count_input_samples,
    count_teacher_samples,
    get_parent,
    get_parent_key,
    get_teacher,
)
from cxt.config.on_the_fly import list_stored_datasets
from cxt.config.repeats import refuse_repeated
from cxt.config.yaml import read_yaml
from cxt.workflow.costs import LOCAL_COSTS, Costs
from cxt.errors import BadRequest, suggest_nearest
from cxt.scenarios.indices import SPLITS
from cxt.scenarios.tree_pieces import list_piece_files


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
            config = locate_files(config, workflow.configfiles)
        config = FrozenConfiguration(resolve(config, read_parent=read_parent_file))
        if workflow.is_main_process:  # a job compares lineages, and need not load stdpopsim
            jobs.check_plan(config)
            translations.check_translations(config)
        paths.runs_directory(config)
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


SECTION_ENTRIES = {"models": "model", "datasets": "dataset", "translate": "translation"}


def check_targets(config):
    """Refuse a checkpoint, evaluation or dataset on the command line that the configuration does not have."""
    for target in sys.argv[1:]:
        for pattern, section in (
            (r"results/([^/]+)\.ckpt", "models"),
            (r"results/evaluation/([^/]+)\.json", "models"),
            (r"results/settings/models/([^/]+)\.yaml", "models"),
            (r"results/datasets/([^/]+)/.*", "datasets"),
            (r"results/translate/([^/]+)/.*", "translate"),
        ):
            match = re.fullmatch(pattern, target)
            if match and match[1] not in config[section]:
                if section == "models":
                    refuse_repeated(config, match[1], at=target)
                if match[1] in list_ensembles(config):
                    if target.startswith("results/evaluation/"):
                        continue
                    members = ", ".join(list_members(config, match[1]))
                    raise BadRequest(
                        f"{target}: '{match[1]}' is an ensemble, which has no checkpoint of its own; train its members: {members}"
                    )
                known = list(config[section])
                if target.startswith("results/evaluation/"):
                    known += list_ensembles(config)
                raise BadRequest(
                    f"unknown {SECTION_ENTRIES[section]} '{match[1]}'{suggest_nearest(match[1], known)}"
                )
        evaluation = re.fullmatch(r"results/evaluation/([^/-]+)(\.json|-.*)", target)
        if (
            evaluation
            and evaluation[1] in config["models"]
            and evaluation[1] not in jobs.evaluated_models(config)
        ):
            raise BadRequest(
                f"model '{evaluation[1]}' cannot be evaluated, because its objective predicts no times; evaluate a model that "
                "is trained from it"
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
# Whether a storage provider (`--default-storage-provider`) keeps the results, and files here are copies.
STORED_ELSEWHERE = workflow.storage_settings.default_storage_provider is not None


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
    translation=one_of(config["translate"]),
    part=r"\d+",
    parts=r"\d+",
    kind=one_of(settings.KINDS),
    parent=one_of(paths.parent_sources(config)),


def variant_and_start(wildcards):
    return jobs.find_variant(config, wildcards.variant), int(wildcards.start)


def find_batch_map(wildcards):
    """The genetic map of a batch, or exit status 2 and one message if it cannot be had."""
    try:
        return paths.find_batch_map(
            *variant_and_start(wildcards), stored_elsewhere=STORED_ELSEWHERE
        )
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


def tree_files(wildcards):
    """The user's tree sequences that the simulations of a batch are cut from, where a scenario has some."""
    variant, start = variant_and_start(wildcards)
    if variant.spec["kind"] != "trees":
        return []
    return list_piece_files(variant.spec, start=start, count=batch_count(wildcards))


def simulate_memory(wildcards):
    """One simulation at a time: some twenty times its file, and a file that it is cut from, with copies of its tables."""
    cost, _ = simulation_cost(wildcards)
    largest = max(map(os.path.getsize, tree_files(wildcards)), default=0)
    known = 4000 if cost is None else max(2000, 1000 + round(20 * cost["bytes"] / 1e6))
    return known + round(6 * largest / 1e6)


def batch_count(wildcards):
    return jobs.batch_count(config, *variant_and_start(wildcards))


def batch_lineage(wildcards):
    variant, start = variant_and_start(wildcards)
    return lineages.batch_lineage(config, variant, start, jobs.batch_count(config, variant, start))


def shard_lineage(wildcards):
    return lineages.shard_lineage(config, wildcards.dataset, *variant_and_start(wildcards))


def soft_target_lineage(wildcards):
    return lineages.soft_target_lineage(config, wildcards.model, *variant_and_start(wildcards))


def mask_of_dataset(dataset):
    """The mask file of a dataset as a list of inputs: one file or none."""
    path = paths.mask_path(config, dataset)
    if path is None:
        return []
    # The user's own file is where it is, also with a storage provider.
    return [local(path) if "path" in config["datasets"][dataset]["mask"] else path]


def mask_flag(wildcards, input):
    """The flag and file of a mask, for a job whose input `mask` has it, or nothing."""
    return ["--mask", *input.mask] if input.mask else []


def used_datasets():
    """The datasets that a model is trained on, those that are simulated on the fly left out."""
    stored = list_stored_datasets(config)
    return sorted({model["dataset"] for model in config["models"].values()}.intersection(stored))


def manifest_of(model):
    """The manifest of a model's dataset as a list of inputs; none if its examples are simulated on the fly."""
    dataset = dataset_of(model)
    stored = dataset in list_stored_datasets(config)
    return [f"{paths.dataset_directory(dataset)}/dataset.json"] if stored else []


def shards_of(model):
    """The shards of a model's dataset; none if its examples are simulated on the fly."""
    return paths.shard_paths(config, dataset_of(model)) if manifest_of(model) else []


def dataset_flag(wildcards, input):
    """The flag and directory of the dataset to train on, or nothing."""
    return ["--dataset-path", os.path.dirname(input.manifest[0])] if input.manifest else []


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


def models_by_machines(*, several):
    """The models that several machines train together, or those that one machine trains."""
    return [
        model
        for model in config["models"]
        if (jobs.get_machine_count(config, model) > 1) == several
    ]


def machine_resources():
    """The resources of a rule that requests several machines, by the names that the Slurm executor knows."""
    model = models_by_machines(several=True)[0]
    return {
        name: lambda wildcards, name=name: request_machines(config, wildcards.model)[name]
        for name in request_machines(config, model)
    }


def launcher(wildcards, output):
    """What starts the trainer on each of several machines; nothing for one. (Snakemake does not compare it between runs.)"""
    several = jobs.get_machine_count(config, wildcards.model) > 1
    return launch_command(config, wildcards.model) if several else []


def evaluation_devices(wildcards):
    return min(1, jobs.get_device_count(config, list_members(config, wildcards.model)[0]))


def evaluation_threads(wildcards):
    return build_training_config(config, list_members(config, wildcards.model)[0]).threads


def ensemble_flag(wildcards, output):
    """The flag and name of an ensemble, for an evaluation of one, or nothing. (Snakemake does not compare it between runs.)"""
    return ["--ensemble", wildcards.model] if wildcards.model not in config["models"] else []


def translation_checkpoint(wildcards):
    """The checkpoint of a translation as a list of inputs: one file, and the base of its LoRA.

    Exit status 2 with a storage provider: the jobs of a translation share a directory, which is no output.
    """
    if STORED_ELSEWHERE:
        print(
            "cxt: translate: results in a storage cannot be translated, because the jobs of a translation share files that the "
            "storage does not keep; remove the section, and use `cxt translate` with the checkpoint",
            file=sys.stderr,
        )
        sys.exit(2)
    model = config["translate"][wildcards.translation]["model"]
    path = translations.find_translation_checkpoint(config, wildcards.translation)
    return [path, *(base_of(model) if model in config["models"] else [])]


def translation_devices(wildcards):
    return config["translate"][wildcards.translation]["devices"]


def translation_bigwig(wildcards):
    """Flags of the first step, which refuses contigs that the format cannot hold, and of the last one, which writes the files."""
    return ["--bigwig"] if config["translate"][wildcards.translation]["bigwig"] else []


def translation_parts(wildcards):
    """What says that each part of a translation is done."""
    parts = config["translate"][wildcards.translation]["parts"]
    directory = f"results/translation_steps/{wildcards.translation}"
    return [f"{directory}/part-{part}-of-{parts}" for part in range(1, parts + 1)]


def log_of_tries(wildcards, output):
    """The log of all tries of a training. Snakemake removes that of a job that is tried again."""
    if "runs" in config["cluster"]:
        return f"{lineages.run_directory(config, wildcards.model)}-tries.log"
    return f"results/logs/train/{wildcards.model}-tries.log"


def find_runs(wildcards, output):
    """Shell command of a training that makes the directories of its state, or ends if `cluster.runs` is not there."""
    if "runs" not in config["cluster"]:
        return "mkdir -p results/logs/train"
    directory = shlex.quote(paths.runs_directory(config))
    advice = "mount it on the machines that train, or create it"
    return f'[ -d {directory} ] || {{ echo "cxt: cluster.runs: there is no directory "{directory}" on $(hostname); {advice}"; exit 2; }}'


def prolong_flag(wildcards, output):
    """The flag and run directory of a finished or interrupted training of fewer epochs that this one continues, or nothing."""
    run = find_run_to_prolong(config, wildcards.model)
    return [] if run is None else ["--prolong", run]


def note_on_lost_machine(wildcards, output):
    """A line for the log of a training: what happens if its machine is lost, where its state may be only there."""
    shares_files = SharedFSUsage.INPUT_OUTPUT in workflow.storage_settings.shared_fs_usage
    if "runs" in config["cluster"] or (shares_files and not STORED_ELSEWHERE):
        return ""
    run = os.path.abspath(lineages.run_directory(config, wildcards.model))
    return (
        f"The state of this training is in {run}. If that directory is lost with this machine, the next try starts from the "
        "beginning; `cluster: {runs: …}` in the configuration keeps the state on a shared file system."
    )


def parent_of(model):
    """The checkpoint that a model starts from as a list of inputs: none, or one file and the base of its LoRA."""
    path, parent = paths.parent_path(config, model), get_parent(config["models"][model])
    return [] if path is None else [path, *([] if parent is None else base_of(parent))]


def base_of(model):
    """The checkpoint that is needed to use a model's checkpoint as a list of inputs: that of the base of a LoRA, or none."""
    return [paths.parent_path(config, model)] if "lora_of" in config["models"][model] else []


def base_of_teacher(wildcards):
    """The checkpoint of the base that a model's teacher is a LoRA of as a list of inputs, or none."""
    teacher = get_teacher(config["models"][wildcards.model])
    return [] if teacher is None else base_of(teacher)


def checked_parent(wildcards):
    """The same, or exit status 2 if the machines and GPUs of a model yet to be trained cannot be had.

    An input function, because Snakemake makes exit status 1 of an exit in a resource function.
    """
    path = paths.checkpoint_path(wildcards.model)
    executor = workflow.executor_plugin  # none for --dag, --summary and the like
    is_planned = workflow.is_main_process and executor is not None
    if is_planned and not STORED_ELSEWHERE and not os.path.exists(path):
        limit = workflow.global_resources.get("gpu")
        try:
            check_placement(
                config,
                wildcards.model,
                gpus=None if limit is None else limit.value,
                executor=executor.name,
                partitions=os.environ.get("SNAKEMAKE_SLURM_PARTITIONS"),
            )
        except BadRequest as error:
            print(f"cxt: {error}", file=sys.stderr)
            sys.exit(2)
    return parent_of(wildcards.model)


def teacher_batch(wildcards):
    """The simulation batch of a model's soft targets as a list of inputs; none if the teacher reads what the shards hold."""
    model = wildcards.model
    if count_teacher_samples(config, model) == count_input_samples(config, model):
        return []
    return [paths.batch_path(wildcards.variant, int(wildcards.start))]


def teacher_batch_flags(wildcards, input):
    """The flags and file of that simulation batch, for a job whose input `batch` has it, or nothing."""
    if not input.batch:
        return []
    count = batch_count(wildcards)
    lineage = batch_lineage(wildcards)
    return [
        "--batch",
        *input.batch,
        "--start",
        wildcards.start,
        "--count",
        count,
        "--batch-lineage",
        lineage,
    ]


def taught_shards(wildcards):
    """The shards of a model's dataset that are made from one simulation batch."""
    directory = paths.dataset_directory(dataset_of(wildcards.model))
    return [
        f"{directory}/{split}/{wildcards.variant}-{wildcards.start}.zarr.zip" for split in SPLITS
    ]


def soft_target_flag(wildcards, input):
    """The flag and directory of soft targets, for a model with a teacher, or nothing."""
    if not input.soft_targets:
        return []
    return ["--soft-targets", os.path.dirname(os.path.dirname(input.soft_targets[0]))]


def parent_flag(wildcards, input):
    """The flag and file of the checkpoint to start from, or nothing."""
    if not input.parent:
        return []
    key = get_parent_key(config["models"][wildcards.model])
    return [f"--{key.replace('_', '-')}", input.parent[0]]
