"""Paths of the workflow's files, relative to the working directory."""

import os

from cxt.config.models import get_parent, get_parent_file, list_files
from cxt.config.parent_files import list_parent_files
from cxt.config.variants import Variant
from cxt.data.manifest import plan_shards
from cxt.data.soft_targets import soft_targets_path
from cxt.errors import BadRequest
from cxt.io import expand_path
from cxt.scenarios.genetic_maps import check_map_available
from cxt.workflow.jobs import collect_variants, variant_table


def batch_path(variant: str, start: int) -> str:
    """The simulation batch of a variant that starts at index *start*."""
    return f"results/simulations/{variant}/{start}.trees.batch"


RUNS = "results/runs"
"""Directory of the run directories, unless `cluster.runs` names another one."""


def runs_directory(config: dict) -> str:
    """Directory of the run directories: that of `cluster.runs`, or one in the working directory.

    Raises
    ------
    BadRequest
        If `cluster.runs` has a variable that is not set, or is no absolute path.
    """
    runs = config["cluster"].get("runs")
    if runs is None:
        return RUNS
    path = expand_path(runs, setting="cluster.runs")
    if not os.path.isabs(path):
        raise BadRequest(f"cluster.runs: the path must be absolute, because jobs may run in other directories, got '{runs}'")
    return path


def map_path(spec: dict) -> str:
    """The file that records that a variant's genetic map is in stdpopsim's cache."""
    return f"results/maps/{spec['species']}-{spec['genetic_map']}.json"


def variant_with_map(config: dict, path: str) -> Variant:
    """A variant that needs the genetic map with the `map_path` *path*."""
    mapped = [variant for variant in collect_variants(config, list(config["scenarios"])) if "genetic_map" in variant.spec]
    return next(variant for variant in mapped if map_path(variant.spec) == path)


def find_batch_map(variant: Variant, start: int, *, stored_elsewhere: bool = False) -> list[str]:
    """The inputs for the genetic map of a simulation batch: one file, or none.

    Parameters
    ----------
    variant, start : the batch
    stored_elsewhere : whether a storage provider keeps the results, where this does not look for the batch: if there is no map,
        the job that fetches it fails

    Raises
    ------
    BadRequest
        If the batch has not been simulated yet and the map can neither be found nor fetched.
    """
    if "genetic_map" not in variant.spec:
        return []
    if not stored_elsewhere and not os.path.exists(batch_path(variant.name, start)):
        check_map_available(variant.spec, fetched=map_path(variant.spec))
    return [map_path(variant.spec)]


def mask_path(config: dict, name: str) -> str | None:
    """The accessibility mask of a dataset: the user's file, the path of a synthetic one, or None."""
    mask = config["datasets"][name].get("mask")
    return None if mask is None else mask.get("path", f"results/masks/{name}.npz")


def dataset_directory(name: str) -> str:
    """The directory of a dataset: dataset.json, train/ and test/."""
    return f"results/datasets/{name}"


def shard_paths(config: dict, dataset: str) -> list[str]:
    """All shards of a dataset."""
    planned = plan_shards(variant_table(config, dataset))
    return [f"{dataset_directory(dataset)}/{name}" for names in planned.values() for name in names]


def soft_target_directory(model: str) -> str:
    """The directory of the soft targets that a model's teacher makes."""
    return f"results/soft_targets/{model}"


def soft_target_paths(config: dict, model: str) -> list[str]:
    """All files of soft targets for a model: one for each shard of its dataset; none without a teacher."""
    if "teacher" not in config["models"][model]:
        return []
    planned = plan_shards(variant_table(config, config["models"][model]["dataset"]))
    return [str(soft_targets_path(soft_target_directory(model), name)) for names in planned.values() for name in names]


def checkpoint_path(model: str) -> str:
    """The finished checkpoint of a model."""
    return f"results/{model}.ckpt"


def copied_parent_path(label: str) -> str:
    """The workflow's copy of a file that models start or learn from, by its label (`ParentFile.label`)."""
    return f"results/parents/{label}.ckpt"


def parent_path(config: dict, model: str) -> str | None:
    """The checkpoint that a model starts from: that of another model, the copy of a file, or None."""
    if (file := get_parent_file(config, model)) is not None:
        return copied_parent_path(file.label)
    parent = get_parent(config["models"][model])
    return None if parent is None else checkpoint_path(parent)


def teacher_path(config: dict, model: str) -> str:
    """The checkpoint of a model's teacher: that of another model, or the copy of a file."""
    file = list_files(config, model).get("teacher")
    return checkpoint_path(config["models"][model]["teacher"]) if file is None else copied_parent_path(file.label)


def parent_sources(config: dict) -> dict[str, str]:
    """{label: file} of all files that models start or learn from; of several with the same content, the first."""
    return {file.label: file.file for file in reversed(list_parent_files(config))}


def settings_path(kind: str, name: str) -> str:
    """The settings file of a variant, dataset or model; *kind* is one of `settings.KINDS`."""
    return f"results/settings/{kind}/{name}.yaml"
