"""The checkpoints that an evaluation reads: one, or the members of an ensemble."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cxt.checkpoints.file import Checkpoint, read_checkpoint
from cxt.checkpoints.load import find_checkpoint
from cxt.decoding.ensembles import compare_inputs
from cxt.errors import BadRequest
from cxt.lineage import check_lineage


class Member(NamedTuple):
    """A checkpoint, and the file it was read from."""

    path: Path
    checkpoint: Checkpoint


def read_members(checkpoints, *, ensemble: str | None = None, lineages: str | Sequence[str] | None = None) -> list[Member]:
    """Read the checkpoints of an evaluation.

    Parameters
    ----------
    checkpoints : str or path-like, or a list of them
        Name, file, run directory or exported directory of each.
    ensemble : str, optional
        Name of the ensemble that they are the members of, for two or more.
    lineages : str or list of str, optional
        Expected lineage of each.

    Returns
    -------
    list of Member

    Raises
    ------
    BadRequest
        If a checkpoint cannot be read or has another lineage, or several have no name or read different inputs.
    """
    checkpoints = list(checkpoints) if isinstance(checkpoints, list | tuple) else [checkpoints]
    planned = [lineages] if isinstance(lineages, str) else list(lineages or [None] * len(checkpoints))
    if len(planned) != len(checkpoints):
        raise BadRequest(f"{len(checkpoints)} checkpoints, but {len(planned)} lineages to check; give one for each")
    paths = [find_checkpoint(checkpoint) for checkpoint in checkpoints]
    if len(paths) > 1 and ensemble is None:
        raise BadRequest(
            f"{len(paths)} checkpoints: {', '.join(map(str, paths))}; name their ensemble with --ensemble NAME to evaluate the "
            "mean of their distributions, or evaluate them one by one"
        )
    if ensemble is not None and len(paths) < 2:
        raise BadRequest(f"ensemble '{ensemble}': an ensemble has two or more members, got {', '.join(map(str, paths))}")
    if doubled := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise BadRequest(f"ensemble '{ensemble}': {', '.join(doubled)} is given more than once")
    members = [Member(path, read_checkpoint(path)) for path in paths]
    for (path, checkpoint), lineage in zip(members, planned, strict=True):
        check_lineage(f"checkpoint {path}", actual=checkpoint.record.get("lineage"), planned=lineage, target=path)
    if len(members) > 1:
        if any(member.checkpoint.record["name"] == ensemble for member in members):
            raise BadRequest(f"ensemble '{ensemble}': one of its members has this name; choose another name")
        compare_inputs({str(path): describe_input(checkpoint) for path, checkpoint in members})
    return members


def describe_input(checkpoint: Checkpoint) -> dict:
    """The input of a checkpoint's network, which an evaluation must fit."""
    network = checkpoint.model
    return {
        "windows": network.windows,
        "window_size": network.window_size,
        "samples": network.samples if checkpoint.adapter is None else checkpoint.adapter.samples,
        "scales": checkpoint.record["dataset"]["scales"],
        "missingness": checkpoint.record["dataset"]["missing"],
    }
