"""What to do about a file of the workflow that cannot be used, as commands that really make it again."""

import os
import shlex
from pathlib import Path

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


def is_of_workflow(path) -> bool:
    """Whether *path* is below a results/ directory, where the workflow makes its files."""
    return any(parent.name == RESULTS for parent in Path(os.path.abspath(path)).parents)


def make_again(target, *, delete: str | None = None) -> str:
    """What makes *target* again; first, what *delete* names has to go, or Snakemake would find nothing to do."""
    gone = f"delete {delete}, then " if delete else ""
    if not is_of_workflow(target):
        return f"{gone}make {target} again as it was made"
    return f"{gone}run `{snakemake_command(target)}` (with your --configfile, if any)"


def plan_again(target) -> str:
    """What makes *target* again where it, or something that it is made from, is of another configuration than the current.

    Snakemake finds that by itself, unless it was told to look at times only, or to take files as up to date.
    """
    if not is_of_workflow(target):
        return f"make {target} again as it was made, or leave the lineages out"
    return (
        f"run `{snakemake_command(target)}` with the current --configfile and without --rerun-triggers; where that finds "
        "nothing to do, as after --touch, add --forceall"
    )
