"""Lineages: digests that decide whether a result is current, and advice on recreating one that is not.

A lineage is the digest of a stage's version, its settings, the lineages of its parents, and the digests of external inputs.

A stage's version is raised when a change of code changes its output. tests/workflow/test_stage_outputs.py compares every
stage's output on a small input with a record, and fails after such a change.
"""

import os
import shlex
from pathlib import Path

from cxt.errors import BadRequest
from cxt.io import digest

STAGE_VERSION = {"simulate": 3, "preprocess": 4, "teach": 1, "train": 3, "evaluate": 7, "translate": 2}
"""Raising one of these rebuilds everything from that stage on."""


def stage_lineage(stage: str, *parts) -> str:
    """Digest of a job of *stage*: its version and *parts* (settings, digests of parents and external files)."""
    return digest([stage, STAGE_VERSION[stage], *parts])


def derive_batch_lineage(spec: dict, *, seed: int, start: int, count: int, catalogue: list[str] | None) -> str:
    """Lineage of a simulation batch: of its variant, the workflow's seed, its indices, and stdpopsim's catalogue if used."""
    return stage_lineage("simulate", spec, seed, start, count, *([] if catalogue is None else [catalogue]))


def derive_synthetic_mask_lineage(spec: dict, *, seed: int) -> str:
    """Lineage of a synthetic mask."""
    return stage_lineage("preprocess", spec, seed)


def derive_mask_file_lineage(sha256: str, *, key: str, contig: str | None, marks: str) -> str:
    """Lineage of a mask file: of its bytes, and how they are read."""
    return stage_lineage("preprocess", sha256, key, contig, marks)


def derive_shard_lineage(spec: dict, *, batch: str | None, mask: str | None) -> str:
    """Lineage of the shards of a simulation batch: of the dataset's settings, and the lineages of batch and mask."""
    return stage_lineage("preprocess", spec, batch, mask)


def combine_shard_lineages(shards: list[str | None]) -> str | None:
    """Combine the lineages of shards, in any order, into one; None if a shard has none."""
    return None if None in shards else stage_lineage("preprocess", sorted(map(str, shards)))


def derive_soft_target_lineage(spec: dict, *, shard: str | None, checkpoint: str | None) -> str:
    """Lineage of the soft targets of a shard: of how the teacher is read, and the lineages of shard and teacher."""
    return stage_lineage("teach", spec, shard, checkpoint)


def combine_soft_target_lineages(files: list[str]) -> str:
    """Combine the lineages of all soft targets of a dataset, in any order, into one."""
    return stage_lineage("teach", sorted(files))


def derive_evaluation_lineage(
    spec: dict, *, batches: list[str | None], mask: str | None, checkpoint: str | list[str] | None
) -> str:
    """Lineage of an evaluation: of its settings, and the lineages of its simulation batches, its mask and its checkpoint.

    For an ensemble, *checkpoint* has those of all members.
    """
    return stage_lineage("evaluate", spec, sorted(map(str, batches)), mask, checkpoint)


def check_lineage(what: str, *, actual: str | None, planned: str | None, target) -> None:
    """BadRequest if the lineage of *what* is not the one *planned*; None, as when a stage is run by hand, accepts any.

    *target* is the file to rebuild.
    """
    if planned is not None and actual != planned:
        raise BadRequest(f"{what} is not the planned one: {describe_difference(actual, planned)}; {how_to_replan(target)}")


def check_planned(computed: str | None, planned: str | None, *, target) -> None:
    """BadRequest if what a stage has read gives *target* another lineage than the one *planned*; None accepts any.

    The workflow writes a job's settings to a file when it plans the job, and Snakemake evaluates the configuration once more
    when the job starts. A configuration that was edited in between gives another lineage.
    """
    if planned is not None and computed != planned:
        raise BadRequest(
            f"nothing was written to {target}: its settings and inputs have the lineage {computed}, but the present "
            f"configuration plans {planned}. The configuration was changed after this job was planned, or an input belongs to "
            f"another one; {how_to_replan(target)}"
        )


def describe_difference(actual: str | None, planned: str) -> str:
    """Describe, for a message, the lineage *actual* where *planned* was expected."""
    return f"its lineage must be {planned}, got {actual}" if actual else f"its lineage must be {planned}, but it has none"


RESULTS = "results"


def snakemake_command(target, *options: str) -> str:
    """The command that makes *target*, a file of the workflow, when run from the current directory.

    Snakemake knows targets by their path relative to its working directory, so an absolute path, or one into another
    workflow's results, becomes `--directory` and the path below it. *options* follow the target.
    """
    path = Path(os.path.abspath(target))
    above = [parent for parent in path.parents if parent.name == RESULTS]
    root = above[-1].parent if above else Path.cwd()  # the outermost results/
    elsewhere = [] if root == Path(os.path.abspath(".")) else ["--directory", str(root)]
    # The target comes first, so that options that take lists may follow, including a --configfile that the user adds.
    return shlex.join(["snakemake", "--cores", "2", os.path.relpath(path, root), *elsewhere, *options])


def is_workflow_file(path) -> bool:
    """Whether *path* is below a results/ directory, where the workflow writes its files."""
    return any(parent.name == RESULTS for parent in Path(os.path.abspath(path)).parents)


def how_to_remake(target, *, delete: str | None = None) -> str:
    """Advice on recreating *target*, after deleting the file *delete*: otherwise Snakemake would find nothing to do."""
    gone = f"delete {delete}, then " if delete else ""
    if not is_workflow_file(target):
        return f"{gone}recreate {target} with the command that made it"
    return f"{gone}run `{snakemake_command(target)}` (with your --configfile, if any)"


def how_to_replan(target) -> str:
    """Advice on recreating *target* if it, or one of its inputs, belongs to another configuration than the current one.

    Snakemake notices that by itself, unless it was told to look at file times only or to consider files up to date.
    """
    if not is_workflow_file(target):
        return f"recreate {target} with the command that made it, or omit the lineage flags"
    return (
        f"run `{snakemake_command(target)}` with the current --configfile and without --rerun-triggers; if that finds "
        "nothing to do, as after --touch, add --forceall"
    )
