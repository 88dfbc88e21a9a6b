"""List the workflow's run directories, and remove those that the configuration no longer uses.

cxt runs [--configfile my.yaml]             list them
cxt runs --prune                            remove those of other lineages, after confirmation
cxt runs --curves RUN --out FILE.png        draw the training curves of one
"""

import argparse
import sys
from pathlib import Path

from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest


def _draw_curves(run: Path, out: Path) -> None:
    from cxt.checkpoints.run_directory import RunDirectory
    from cxt.checkpoints.training_log import read_log
    from cxt.evaluation.figures import draw_losses  # imported late so that --help is quick

    log = run if run.is_file() else RunDirectory(run).log
    if not log.is_file():
        raise BadRequest(f"{run} has no {log.name}; give a run directory, such as those that `cxt runs` lists")
    draw_losses(read_log(log), out, title=run.name.removesuffix(".csv"))


def main(argv: list[str] | None = None) -> None:
    """Run `cxt runs`: list run directories, or remove those that the configuration no longer uses.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt runs", description="List or remove run directories of the workflow.")
    parser.add_argument("--configfile", nargs="+", default=[], help="overlays on the default configuration")
    parser.add_argument("--directory", type=Path, help="default: `cluster.runs` of the configuration, or results/runs")
    parser.add_argument("--prune", action="store_true", help="remove the runs that the configuration does not use")
    parser.add_argument("--yes", action="store_true", help="with --prune: do not ask for confirmation")
    parser.add_argument("--curves", type=Path, metavar="RUN", help="draw the curves of a run, or of its training log, to --out")
    parser.add_argument("--out", type=Path, help="with --curves: the figure to write, FILE.png")
    args = parser.parse_args(argv)
    if args.yes and not args.prune:
        raise BadRequest("--yes cannot be used without --prune")
    if (args.curves is None) != (args.out is None):
        raise BadRequest("--curves RUN and --out FILE.png must be given together")
    if args.curves is not None:
        _draw_curves(args.curves, args.out)
        return

    from cxt.checkpoints.parents import read_parent_file
    from cxt.config.file import load  # imported late so that --help is quick
    from cxt.workflow.paths import runs_directory
    from cxt.workflow.runs import format_runs, list_runs

    config = load(args.configfile, read_parent=read_parent_file)
    directory = args.directory or Path(runs_directory(config))
    runs = list_runs(directory, config)
    if args.prune:
        prune(runs, yes=args.yes)
    else:
        print(format_runs(runs) if runs else f"there are no runs in {directory}")
        if not args.configfile and any(run.model is None for run in runs):
            print("Name your overlays, --configfile mine.yaml, if some of these runs are theirs.")


def prune(runs: list, *, yes: bool) -> None:
    """Remove the runs that no model uses and no trainer holds, after asking on the terminal unless *yes*."""
    from cxt.workflow.runs import format_runs, remove_run

    unused = [run for run in runs if run.model is None and not run.in_use]
    if not unused:
        print("nothing to remove")
        return
    size = sum(run.bytes for run in unused) / 1e6
    print(
        f"Runs to remove ({size:.1f} MB). If another overlay still uses one, cancel and pass that overlay with --configfile:\n"
        f"{format_runs(unused)}"
    )
    if not yes:
        if not sys.stdin.isatty():
            raise BadRequest("--prune asks for confirmation, but there is no terminal; add --yes to remove without asking")
        if input("Remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    removed = 0
    for run in unused:
        try:
            remove_run(run)
            removed += 1
        except (BadRequest, OSError) as error:  # a trainer may have started while waiting for the answer
            print(f"not removed: {error}")
    print(f"{removed} removed")


if __name__ == "__main__":
    exit_on_bad_request(main)
