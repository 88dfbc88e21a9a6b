"""List the workflow's run directories, and remove those that the configuration no longer uses; tables and comparisons of runs.

cxt runs [--configfile my.yaml]             list them
cxt runs --prune                            remove those of other lineages, after confirmation
cxt runs --curves RUN --out FILE.png        draw the training curves of one
cxt runs table DIR --out FILE.csv           the training logs of all runs below a directory, as one table
cxt runs compare A B [--out FILE.png]       what differs between two runs: settings, data, results
"""

import argparse
import sys
from pathlib import Path

from cxt.console import counted, exit_on_bad_request
from cxt.errors import BadRequest, suggest_nearest

SUBCOMMANDS = ("table", "compare")


def _draw_curves(run: Path, out: Path) -> None:
    from cxt.checkpoints.run_directory import RunDirectory
    from cxt.checkpoints.training_log import read_log
    from cxt.drawing import check_figure_file
    from cxt.evaluation.figures import draw_losses  # imported late so that --help is quick

    check_figure_file(out, flag="--out")
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
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        if argv[0] not in SUBCOMMANDS:
            raise BadRequest(f"unknown command 'cxt runs {argv[0]}'{suggest_nearest(argv[0], SUBCOMMANDS)}")
        (_make_table if argv[0] == "table" else _compare)(argv[1:])
        return
    parser = argparse.ArgumentParser(
        prog="cxt runs",
        description="List or remove run directories of the workflow. `cxt runs table DIR` writes the training logs of many "
        "runs as one table, `cxt runs compare A B` shows what differs between two.",
    )
    parser.add_argument("--configfile", nargs="+", default=[], help="overlays on the default configuration")
    parser.add_argument("--directory", type=Path, help="default: `cluster.runs` of the configuration, or results/runs")
    parser.add_argument("--prune", action="store_true", help="remove the runs that the configuration does not use")
    parser.add_argument("--yes", action="store_true", help="with --prune: do not ask for confirmation")
    parser.add_argument("--curves", type=Path, metavar="RUN", help="draw the curves of a run, or of its training log, to --out")
    parser.add_argument("--out", type=Path, help="with --curves: the figure to write, FILE.png, .pdf or .svg")
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


def _make_table(argv: list[str]) -> None:
    """Run `cxt runs table`."""
    from cxt.logs import read_runs

    parser = argparse.ArgumentParser(prog="cxt runs table", description="Write the training logs of many runs as one table.")
    parser.add_argument("directory", type=Path, help="a run directory, or one with runs below it, such as results/runs")
    parser.add_argument("--out", type=Path, required=True, help="FILE.csv; with --per-run, a directory")
    parser.add_argument("--per-run", action="store_true", help="one file for each run")
    parser.add_argument("--metrics", nargs="+", help="columns of the training log (default: all)")
    args = parser.parse_args(argv)
    logs = read_runs(args.directory).select(metrics=args.metrics)
    files = logs.to_csv(args.out, per_run=args.per_run)
    print(f"{counted(len(logs.rows), 'value')} of {counted(len(logs.runs), 'run')}: {', '.join(map(str, files))}")


def _compare(argv: list[str]) -> None:
    """Run `cxt runs compare`."""
    from cxt.io import format_columns
    from cxt.logs import compare_runs

    parser = argparse.ArgumentParser(prog="cxt runs compare", description="Show what differs between two runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="two run directories")
    parser.add_argument("--out", type=Path, help="draw the curves of both to this file, FILE.png, .pdf or .svg")
    args = parser.parse_args(argv)
    args.runs = [path for path in args.runs if path.suffix != ".lock"]  # a pattern of the shell finds them beside the runs
    if len(args.runs) != 2:
        raise BadRequest(f"cxt runs compare takes two run directories, got {len(args.runs)}: {' '.join(map(str, args.runs))}")
    if args.out is not None:
        from cxt.drawing import check_figure_file  # imported late so that --help is quick

        check_figure_file(args.out, flag="--out")
    comparison = compare_runs(*args.runs)
    names = [run.name for run in args.runs]
    for title, part in (
        ("settings that differ", comparison.settings),
        ("data and parents that differ", comparison.inputs),
        ("results", comparison.results),
    ):
        rows = [(name, *("-" if value is None else _as_text(value) for value in both)) for name, both in part.items()]
        print(f"{title}{'' if rows else ': none'}")
        for line in format_columns([("", *names), *rows], left=1, separator="  ") if rows else []:
            print(f"  {line}".rstrip())
    if args.out is not None:
        from cxt.checkpoints.run_directory import RunDirectory
        from cxt.checkpoints.training_log import read_log
        from cxt.evaluation.figures import draw_comparison  # imported late so that --help is quick

        logs = {run.name: read_log(RunDirectory(run).log) for run in args.runs}
        draw_comparison(logs, args.out)


def _as_text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
    print(f"{counted(removed, 'run')} removed")


if __name__ == "__main__":
    exit_on_bad_request(main)
