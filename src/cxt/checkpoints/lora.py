"""Checkpoints of LoRA, which hold low-rank matrices only and need the checkpoint of their base.

The record's `parent` identifies the base by its name and the sha256 of its file, wherever that file is.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from cxt.checkpoints.file import Checkpoint, check_weights, load_weights, read_checkpoint, write_checkpoint
from cxt.errors import BadRequest
from cxt.io import check_writable, file_sha256
from cxt.model.adapter import build_model
from cxt.model.parametrizations import attach, list_lora_tensors, merge


def find_base(path: Path, record: dict, directories: Sequence[Path]) -> Path:
    """The file of the base of a LoRA.

    It is looked up by its name beside the LoRA and in *directories*, and finally under any name beside the LoRA, or in
    `parents/` there, where the workflow puts copies of the files that models start from.

    Parameters
    ----------
    path : Path
        The LoRA's file.
    record : dict
        Its record.
    directories : sequence of Path
        Where else to look.

    Raises
    ------
    BadRequest
        If there is no such file with the recorded digest. The message says where it was looked for.
    """
    name, digest = record["parent"]["name"], record["parent"]["sha256"]
    named = list(dict.fromkeys(directory / f"{name}.ckpt" for directory in (path.parent, *directories)))
    beside = [*sorted(path.parent.glob("*.ckpt")), *sorted((path.parent / "parents").glob("*.ckpt"))]
    others = [file for file in beside if file not in named and file != path]
    for file in (*named, *others):
        if file.is_file() and file_sha256(file) == digest:
            return file
    places = ", ".join(f"{file} ({'another checkpoint' if file.is_file() else 'not there'})" for file in named)
    raise BadRequest(
        f"checkpoint {path} is a LoRA of '{name}' with sha256 {digest}, which was looked for as {places}; put that file beside "
        "it, or its directory into $CXT_CHECKPOINT_CACHE"
    )


def merge_lora(path: Path, lora: Checkpoint, base_path: Path) -> Checkpoint:
    """Merge a LoRA into its base: the checkpoint of a plain model, with the base's tensors by the same names.

    Parameters
    ----------
    path, lora : Path, Checkpoint
        The LoRA's file and content.
    base_path : Path
        From `find_base`.

    Raises
    ------
    BadRequest
        If one of the two cannot be read, or their tensors do not fit the network.
    """
    base = read_checkpoint(base_path)
    with torch.device("meta"):  # before memory is allocated for it
        model = build_model(lora.model)
        check_weights(model.state_dict(), base.state_dict, name=base_path)
        attach(model, lora=lora.lora)
        check_weights(list_lora_tensors(model.state_dict()), lora.state_dict, name=path)
    model = build_model(lora.model)
    load_weights(model, base.state_dict, name=base_path)
    attach(model, lora=lora.lora)
    model.load_state_dict(lora.state_dict, strict=False)
    merge(model)
    record = {key: value for key, value in lora.record.items() if key != "lora"}
    return Checkpoint(model.state_dict(), lora.model, None, record)


def read_merged_checkpoint(path, directories: Sequence[Path]) -> Checkpoint:
    """Read a checkpoint; that of a LoRA is merged into its base, which is looked for beside it and in *directories*.

    Raises
    ------
    BadRequest
        As for `read_checkpoint`, or if the base is missing or another one.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.lora is None:
        return checkpoint
    return merge_lora(Path(path), checkpoint, find_base(Path(path), checkpoint.record, directories))


def write_merged(path: Path, out, directories: Sequence[Path]) -> Path:
    """Write a LoRA, merged into its base, as a plain checkpoint *out*; return the file of the base.

    Raises
    ------
    BadRequest
        If *path* is not a LoRA, its base is missing, or *out* is one of the two or cannot be written.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.lora is None:
        raise BadRequest(f"{path} is not a LoRA: there is nothing to merge, use it as it is")
    base = find_base(path, checkpoint.record, directories)
    for file in (path, base):
        if Path(out).exists() and Path(out).samefile(file):
            raise BadRequest(f"{out} is {file}, which would be overwritten; choose another name for the merged checkpoint")
    check_writable(out)
    merged = merge_lora(path, checkpoint, base)
    write_checkpoint(out, merged.state_dict, merged.record)
    return base
