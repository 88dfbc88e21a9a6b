"""Whether a checkpoint is whole, and what the configuration would make today."""

from pathlib import Path

from cxt.checkpoints.inspection import read_verified_checkpoint
from cxt.errors import Failed
from cxt.io import file_sha256
from cxt.lineage import snakemake_command


def _devices(record: dict) -> str:
    """On what a checkpoint was trained, and with how many items to a step."""
    training = record["training"]
    effective = training["batch_size"] * training["grad_accum"] * record["devices"]
    return f"{record['devices']} {record['accelerator']}, effective batch {effective}"


def _effective_batch(config: dict, name: str) -> int:
    """Items of an optimizer step, as the configuration asks for."""
    from cxt.config.models import build_training_config
    from cxt.workflow.jobs import get_device_count

    training = build_training_config(config, name)
    return training.batch_size * training.grad_accum * max(1, get_device_count(config, name))


def verify(path, *, configfiles) -> str:
    """What was checked of a checkpoint: readable, whole, finite, and of the lineage that the configuration asks for.

    Weights of the original package have no lineage: of them, all but that is checked.

    Raises
    ------
    BadRequest
        If it cannot be read, its weights do not fit its network, or the configuration is not valid.
    Failed
        If a weight is not finite, or it is not what the configuration would make today.
    """
    from cxt.config.file import load
    from cxt.config.models import get_parent
    from cxt.workflow.jobs import get_device_count
    from cxt.workflow.lineages import dataset_lineage, model_lineage
    from cxt.workflow.paths import checkpoint_path, settings_path

    checkpoint = read_verified_checkpoint(path)
    if "published" in checkpoint.record:
        file = checkpoint.record["published"]["file"]
        return f"{path}: whole and finite; imported from {file}, so that no configuration says what it ought to be"
    name, lineage = checkpoint.record["name"], checkpoint.record["lineage"]
    config = load(configfiles)
    if name not in config["models"]:
        raise Failed(f"{path}: the weights are whole, but the configuration has no model '{name}' to compare with")
    now = model_lineage(config, name)
    with_files = ["--configfile", *map(str, configfiles)] if configfiles else []
    # Its settings, too: they are all that another learning rate changes, and may have been taken as they are by --touch.
    command = snakemake_command(checkpoint_path(name), "--forcerun", settings_path(name), f"train_{name}", *with_files)
    make_again = f"`{command}` makes it command"
    if lineage != now:
        raise Failed(
            f"{path}: the weights are whole, but it is not what the configuration asks for: its lineage is {lineage}, that of "
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
    wanted = get_device_count(config, name)
    expected = {
        "dataset": dataset_lineage(config, model["dataset"]),
        "parent": parent_name and model_lineage(config, parent_name),
        "devices": f"{max(1, wanted)} {'gpu' if wanted else 'cpu'}, effective batch {_effective_batch(config, name)}",
    }
    if differences := [
        f"{key} {recorded[key]} instead of {expected[key]}" for key in recorded if recorded[key] != expected[key]
    ]:
        raise Failed(
            f"{path}: the weights are whole, but it was not trained as its lineage says: {', '.join(differences)}; {make_again}"
        )
    message = f"{path}: whole, finite, and the lineage of '{name}' in the configuration"
    parent = record["parent"]
    if parent is not None and (file := Path(path).parent / f"{parent_name}.ckpt").is_file():
        if file_sha256(file) != parent["sha256"]:
            raise Failed(
                f"{path}: {file} is not the parent that it was trained from; one of the two was replaced by hand; {make_again}"
            )
        message += f"; trained from the {file} that is there"
    return message
