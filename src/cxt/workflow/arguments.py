"""Arguments that the workflow's rules pass to the stages: command-line arguments and settings files."""

from cxt.config.models import build_training_settings, get_parent
from cxt.workflow.lineages import dataset_lineage, file_digest, mask_lineage, model_lineage
from cxt.workflow.paths import checkpoint_path


def mask_arguments(config: dict, name: str) -> list[str]:
    """Command-line arguments about a dataset's mask, after its path: how to read it, and its expected lineage or digest."""
    mask = config["datasets"][name].get("mask", {})
    words = []
    if "path" in mask and mask["path"].endswith(".npz"):
        words += ["--mask-key", mask["key"]]
    if "contig" in mask:
        words += ["--mask-contig", mask["contig"]]
    if "path" in mask:
        words += ["--mask-marks", mask["marks"]]
        words += ["--mask-sha256", file_digest(mask["path"])]
    elif "mask" in config["datasets"][name]:
        words += ["--mask-lineage", mask_lineage(config, name)]
    return words


def settings_file(config: dict, name: str) -> dict:
    """The content of the file `settings_path`: a model's settings, and the lineage of its checkpoint."""
    return build_training_settings(config, name) | {"settings_lineage": model_lineage(config, name)}


def lineages_to_train_on(config: dict, name: str) -> list[str]:
    """The expected lineages of a model's dataset and parent, as command-line arguments."""
    words = ["--dataset-lineage", dataset_lineage(config, config["models"][name]["dataset"])]
    parent = get_parent(config["models"][name])
    return words if parent is None else [*words, "--parent-lineage", model_lineage(config, parent)]


def parent_flag(config: dict, name: str) -> list[str]:
    """The flag and file of a model's parent, as command-line arguments."""
    model = config["models"][name]
    if "checkpoint" in model:
        return ["--checkpoint", checkpoint_path(model["checkpoint"])]
    if "resume_adapter" in model:
        return ["--resume-adapter", checkpoint_path(model["resume_adapter"])]
    return []
