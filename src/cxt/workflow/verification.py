"""Verification that a checkpoint is intact and matches the configuration."""

from pathlib import Path

from cxt.checkpoints.inspection import read_verified_checkpoint
from cxt.errors import Failed
from cxt.io import file_sha256
from cxt.lineage import snakemake_command


def _devices(record: dict) -> str:
    """Describe the devices on which a checkpoint was trained, and its effective batch."""
    training = record["training"]
    effective = training["batch_size"] * training["grad_accum"] * record["devices"]
    return f"{record['devices']} {record['accelerator']}, effective batch {effective}"


def _effective_batch(config: dict, name: str) -> int:
    """Examples per optimizer step of a model of the configuration."""
    from cxt.config.models import build_training_config
    from cxt.workflow.jobs import get_world_size

    training = build_training_config(config, name)
    return training.batch_size * training.grad_accum * get_world_size(config, name)


def verify(path, *, configfiles) -> str:
    """Check that a checkpoint is intact, finite and of the configuration's lineage; return a line about what was checked.

    Weights of the original package and quantised ones have no lineage, so that it is not checked.

    Raises
    ------
    BadRequest
        If it cannot be read, its weights do not fit its network, or the configuration is not valid.
    Failed
        If a weight is not finite, or the checkpoint does not match the configuration.
    """
    from cxt.checkpoints.parents import read_parent_file
    from cxt.config.file import load
    from cxt.config.models import get_parent, get_parent_file
    from cxt.config.on_the_fly import is_on_the_fly
    from cxt.config.repeats import list_repeats
    from cxt.workflow.jobs import get_device_count, get_world_size
    from cxt.workflow.lineages import dataset_lineage, model_lineage
    from cxt.workflow.paths import checkpoint_path, settings_path

    checkpoint = read_verified_checkpoint(path)
    if "published" in checkpoint.record:
        file = checkpoint.record["published"]["file"]
        return f"{path}: intact and finite; imported from {file}, so there is no configuration to compare it with"
    if (quantization := checkpoint.record.get("quantization")) is not None:
        return (
            f"{path}: intact and finite; quantised, so there is no configuration to compare it with; verify its source, of "
            f"sha256 {quantization['source']}"
        )
    name, lineage = checkpoint.record["name"], checkpoint.record["lineage"]
    config = load(configfiles, read_parent=read_parent_file)
    if names := list_repeats(config, name):
        raise Failed(
            f"{path}: the weights are intact, but the configuration repeats '{name}', so that its models are "
            f"{', '.join(names)}; compare the checkpoint of one of them"
        )
    if name not in config["models"]:
        raise Failed(f"{path}: the weights are intact, but the configuration has no model '{name}' to compare it with")
    now = model_lineage(config, name)
    with_files = ["--configfile", *map(str, configfiles)] if configfiles else []
    # The settings file, too: --touch may have marked it as up to date.
    again = [settings_path("models", name), checkpoint_path(name)]
    command = snakemake_command(checkpoint_path(name), "--forcerun", *again, *with_files)
    make_again = f"`{command}` makes it again"
    if lineage != now:
        raise Failed(
            f"{path}: the weights are intact, but it does not match the configuration: its lineage is {lineage}, that of "
            f"'{name}' is {now}; {make_again}"
        )
    model = config["models"][name]
    parent_name = get_parent(model)
    record = checkpoint.record
    recorded = {
        "dataset": record["dataset"].get("lineage"),
        "parent": record["parent"] and record["parent"].get("lineage"),
        "devices": _devices(record),
    }
    file = get_parent_file(config, name)
    if file is not None:  # the digest of the file that was given, where the checkpoint was trained from an import of it
        recorded["parent"] = record["parent"] and (record["parent"].get("published") or record["parent"]["sha256"])
    kind = "gpu" if get_device_count(config, name) else "cpu"
    expected = {
        # Examples that are simulated on the fly have no lineage of their own; that of the model covers them.
        "dataset": None if is_on_the_fly(config["datasets"][model["dataset"]]) else dataset_lineage(config, model["dataset"]),
        "parent": file.sha256 if file is not None else parent_name and model_lineage(config, parent_name),
        "devices": f"{get_world_size(config, name)} {kind}, effective batch {_effective_batch(config, name)}",
    }
    if differences := [
        f"{key} {recorded[key]} instead of {expected[key]}" for key in recorded if recorded[key] != expected[key]
    ]:
        raise Failed(
            f"{path}: the weights are intact, but it was not trained as its lineage says: {', '.join(differences)}; "
            f"{make_again}"
        )
    message = f"{path}: intact, finite, and the lineage of '{name}' in the configuration"
    parent = record["parent"]
    if file is not None:
        message += f"; its parent is {file.path}"
    elif parent is not None and (parent_file := Path(path).parent / f"{parent_name}.ckpt").is_file():
        if file_sha256(parent_file) != parent["sha256"]:
            raise Failed(
                f"{path}: {parent_file} is not the parent that it was trained from; one of the two was replaced; {make_again}"
            )
        message += f"; its parent is {parent_file}"
    return message
