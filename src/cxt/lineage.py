"""Lineages: digests that decide whether a result is current, and how to make one again that is not.

A lineage is the digest of a stage's version, its settings, the lineages of its parents, and the digests of external inputs.

A stage's version is raised when a change of code changes its output. tests/test_stage_outputs.py holds every stage's output
on a small input, and fails after such a change.
"""

import os
import shlex
from pathlib import Path

from cxt.errors import BadRequest
from cxt.io import digest

STAGE_VERSION = {"simulate": 3, "preprocess": 4, "train": 3, "evaluate": 3}
"""Raise one of these and everything from that stage on is made again."""


def stage_lineage(stage: str, *parts) -> str:
    """Digest of a job of *stage*: its version and *parts* (settings, digests of parents and external files)."""
    return digest([stage, STAGE_VERSION[stage], *parts])


def check_lineage(what: str, *, actual: str | None, planned: str | None, target) -> None:
    """BadRequest if *what* is of another lineage than *planned*; None, as when a stage is run by hand, plans nothing.

    *target* is the file to make again.
    """
    if planned is not None and actual != planned:
        raise BadRequest(
            f"{what} is not the one that was planned: {describe_difference(actual, planned)}; {how_to_replan(target)}"
        )


def describe_difference(actual: str | None, planned: str) -> str:
    """Describe, for a message, the lineage *actual* where *planned* was expected."""
    return f"its lineage is {actual}, expected {planned}" if actual else f"it has no lineage, expected {planned}"


RESULTS = "results"


def snakemake_command(target, *options: str) -> str:
    """The command that makes *target*, a file of the workflow, from the directory where it is asked for.

    Snakemake knows targets by their path from its working directory, so that an absolute path, or one into another workflow's
    results, becomes `--directory` and the path below it. *options* follow the target.
    """
    path = Path(os.path.abspath(target))
    above = [parent for parent in path.parents if parent.name == RESULTS]
    root = above[-1].parent if above else Path.cwd()  # the outermost results/
    elsewhere = [] if root == Path(os.path.abspath(".")) else ["--directory", str(root)]
    # The target first, so that options which take lists may follow, as well as a --configfile that a person adds.
    return shlex.join(["snakemake", "--cores", "2", os.path.relpath(path, root), *elsewhere, *options])


def is_workflow_file(path) -> bool:
    """Whether *path* is below a results/ directory, where the workflow makes its files."""
    return any(parent.name == RESULTS for parent in Path(os.path.abspath(path)).parents)


def how_to_remake(target, *, delete: str | None = None) -> str:
    """Advice on making *target* again, after deleting what *delete* names: otherwise Snakemake would find nothing to do."""
    gone = f"delete {delete}, then " if delete else ""
    if not is_workflow_file(target):
        return f"{gone}make {target} again as it was made"
    return f"{gone}run `{snakemake_command(target)}` (with your --configfile, if any)"


def how_to_replan(target) -> str:
    """Advice on making *target* again where it, or one of its inputs, belongs to another configuration than the current one.

    Snakemake notices that by itself, unless it was told to look at times only, or to take files as up to date.
    """
    if not is_workflow_file(target):
        return f"make {target} again as it was made, or leave the lineages out"
    return (
        f"run `{snakemake_command(target)}` with the current --configfile and without --rerun-triggers; where that finds "
        "nothing to do, as after --touch, add --forceall"
    )
