"""Checkpoint files as parents in the workflow: what their children inherit, and the copies that children are trained from."""

import shutil
from pathlib import Path

from cxt.config.parent_files import ParentFile
from cxt.errors import BadRequest, Failed
from cxt.io import atomic_file, check_writable, file_sha256


def read_parent_file(path: str) -> ParentFile:
    """Read what children inherit from a checkpoint file.

    Parameters
    ----------
    path : str
        A checkpoint, a training state, a run directory, or a file of the original package.

    Raises
    ------
    BadRequest
        If it is missing or damaged, or holds weights that nothing can be trained from by themselves: those of a LoRA, or
        rounded ones.
    """
    import torch  # takes seconds; most configurations name no file

    from cxt.checkpoints.file import check_weights, read_checkpoint
    from cxt.checkpoints.load import find_checkpoint
    from cxt.checkpoints.published import find_nearest_preset
    from cxt.checkpoints.safetensors import CONFIG
    from cxt.model.adapter import build_model

    file = find_checkpoint(path)
    if file.name == CONFIG:
        raise BadRequest(f"{path} is an exported directory, for other programs; name the checkpoint that it was exported from")
    checkpoint = read_checkpoint(file)
    record = checkpoint.record
    if (quantization := record.get("quantization")) is not None:
        raise BadRequest(
            f"{file} is quantised: its weights were rounded to {quantization['bits']} bits, to be used and not to be trained "
            f"from; start from its source, the checkpoint of sha256 {quantization['source']}"
        )
    if checkpoint.lora is not None:
        raise BadRequest(
            f"{file} is a LoRA of '{record['parent']['name']}', which holds low-rank changes only; merge the two "
            "(cxt checkpoint merge) and name the merged checkpoint"
        )
    with torch.device("meta"):
        expected = build_model(checkpoint.model, checkpoint.adapter).state_dict()
    check_weights(expected, checkpoint.state_dict, name=file)
    sha256 = file_sha256(file)
    is_published = record.get("published", {}).get("sha256") == sha256  # not one that was imported from such a file
    preset = find_nearest_preset(checkpoint.model) + ("" if checkpoint.adapter is None else "_adapter")
    return ParentFile(
        path=path,
        file=str(file),
        sha256=sha256,
        name=preset if is_published else record["name"] or preset,
        published=is_published,
        network=checkpoint.model,
        adapter=checkpoint.adapter,
        scales=list(record["dataset"]["scales"]),
        objective=(record["training"] or {}).get("objective", "autoregressive"),
    )


def import_parent(path, out, *, sha256: str) -> None:
    """Make the copy of a parent that the workflow trains its children from.

    A checkpoint of cxt is copied byte for byte, and a file of the original package is imported. The copy depends on the content
    of the file only, not on its name.

    Raises
    ------
    BadRequest
        If the file is not the one that was planned, by its *sha256*, or cannot be a parent.
    Failed
        If its weights are not finite.
    """
    from cxt.checkpoints.file import write_checkpoint
    from cxt.checkpoints.inspection import read_verified_checkpoint

    parent = read_parent_file(str(path))
    if parent.sha256 != sha256:
        raise BadRequest(
            f"{path} was replaced since this job was planned: its sha256 is {parent.sha256}; run the command again"
        )
    checkpoint = read_verified_checkpoint(parent.file)
    check_writable(out)
    if parent.published:
        published = checkpoint.record["published"] | {"file": "a published file"}
        write_checkpoint(out, checkpoint.state_dict, checkpoint.record | {"name": parent.name, "published": published})
        return
    with open(parent.file, "rb") as source, atomic_file(out) as copy:
        shutil.copyfileobj(source, copy)
    if file_sha256(out) != sha256:
        Path(out).unlink()
        raise Failed(f"{path} was replaced while it was copied; run the command again")
