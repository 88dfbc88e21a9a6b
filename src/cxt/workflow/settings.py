"""Settings files: what each stage is to do, written when the workflow is planned.

A job reads its settings from such a file, not from the configuration, which may be edited between the moment when the job is
planned and the moment when it starts. The keys are the names of the stage's flags (`--config FILE`).
"""

import yaml

from cxt.config.models import build_teaching_spec, build_training_settings, get_parent, get_parent_file, list_files
from cxt.config.on_the_fly import FIXED_TRAINING, is_on_the_fly
from cxt.config.training import drop_later_defaults, list_result_neutral_settings
from cxt.workflow.jobs import (
    dataset_spec,
    evaluation_dataset,
    evaluation_spec,
    find_variant,
    get_device_count,
    get_machine_count,
    mask_spec,
)
from cxt.workflow.lineages import (
    dataset_lineage,
    evaluation_batches,
    file_digest,
    mask_lineage,
    model_lineage,
    soft_targets_lineage,
    variant_table_with_lineages,
)
from cxt.workflow.translations import build_translation_settings


def write_settings(config: dict, kind: str, name: str) -> str:
    """The text of the settings file `paths.settings_path(kind, name)`."""
    return yaml.safe_dump(KINDS[kind](config, name), sort_keys=True)


def _simulation(config: dict, variant: str) -> dict:
    return {"spec": find_variant(config, variant).spec, "seed": config["seed"]}


def _mask(config: dict, dataset: str) -> dict:
    return {"spec": mask_spec(config, dataset), "seed": config["seed"]}


def _dataset(config: dict, dataset: str) -> dict:
    """For preprocessing: not the simulations, so that more of them do not make the present shards stale."""
    return {"spec": dataset_spec(config, dataset), "seed": config["seed"]} | _mask_flags(config, dataset)


def _shards(config: dict, dataset: str) -> dict:
    return {"shards": variant_table_with_lineages(config, dataset), "lineage": dataset_lineage(config, dataset)}


def _model(config: dict, model: str) -> dict:
    settings = build_training_settings(config, model)
    settings = {key: value for key, value in settings.items() if key not in list_result_neutral_settings(settings)}
    settings = drop_later_defaults(settings)
    settings |= {
        "devices": get_device_count(config, model),
        "settings_lineage": model_lineage(config, model),
    }
    dataset = config["models"][model]["dataset"]
    if not is_on_the_fly(config["datasets"][dataset]):
        settings["dataset_lineage"] = dataset_lineage(config, dataset)
    if (machines := get_machine_count(config, model)) > 1:
        settings["nodes"] = machines
    if "teacher" in config["models"][model]:
        settings["soft_targets_lineage"] = soft_targets_lineage(config, model)
    if (file := get_parent_file(config, model)) is not None:
        return settings | {"parent_sha256": file.sha256}
    parent = get_parent(config["models"][model])
    return settings if parent is None else settings | {"parent_lineage": model_lineage(config, parent)}


def _teaching(config: dict, model: str) -> dict:
    spec = build_teaching_spec(config, model)
    if (file := list_files(config, model).get("teacher")) is not None:
        return {"spec": spec, "checkpoint_sha256": file.sha256}
    return {"spec": spec, "checkpoint_lineage": model_lineage(config, config["models"][model]["teacher"])}


def _evaluation(config: dict, model: str) -> dict:
    mask = _mask_flags(config, evaluation_dataset(config, model))
    return {"spec": evaluation_spec(config, model), "batches": evaluation_batches(config, model)} | mask


def _mask_flags(config: dict, dataset: str) -> dict:
    """How to read a dataset's mask, and its expected digest or lineage; the file is an input of the job."""
    mask = config["datasets"][dataset].get("mask")
    if mask is None:
        return {}
    if "path" not in mask:
        return {"mask_lineage": mask_lineage(config, dataset)}
    flags = {"mask_contig": mask.get("contig"), "mask_marks": mask["marks"], "mask_sha256": file_digest(mask["path"])}
    if mask["path"].endswith(".npz"):
        flags["mask_key"] = mask["key"]
    return {key: value for key, value in flags.items() if value is not None}


KINDS = {
    "simulations": _simulation,
    "masks": _mask,
    "datasets": _dataset,
    "shards": _shards,
    "teachings": _teaching,
    "models": _model,
    "evaluations": _evaluation,
    "translations": build_translation_settings,
}
"""{kind: function that builds the content of a settings file of that kind}."""


def neutral_training_flags(config: dict, model: str) -> list[str]:
    """The settings of training that change no result, as flags: they are not in the settings file, and start no job."""
    settings = build_training_settings(config, model)
    fixed = FIXED_TRAINING if is_on_the_fly(config["datasets"][config["models"][model]["dataset"]]) else ()
    words = []
    for key in list_result_neutral_settings(settings):
        flag, value = f"--{key.replace('_', '-')}", settings.get(key)
        if key in fixed:
            continue
        if isinstance(value, list):
            words += [flag, *value] if value else []
        elif value is not None:
            words.append(f"{flag}={value}")
    return words
