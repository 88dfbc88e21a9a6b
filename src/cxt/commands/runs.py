"""List the workflow's run directories, and remove those that the configuration no longer uses."""

import argparse
from pathlib import Path

from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest


def main(argv: list[str] | None = None) -> None:
    """Run `cxt runs`: list run directories, or remove those that the configuration no longer uses.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt runs", description="List or remove run directories of the workflow.")
    parser.add_argument("--configfile", nargs="+", default=[], help="overlays on the default configuration")
    parser.add_argument("--directory", type=Path, default=Path("results/runs"), help="default: results/runs")
    parser.add_argument("--prune", action="store_true", help="remove the runs that the configuration does not use")
    parser.add_argument("--yes", action="store_true", help="with --prune: do not ask for confirmation")
    args = parser.parse_args(argv)
    if args.yes and not args.prune:
        raise BadRequest("--yes cannot be used without --prune")

    from cxt.config.file import load  # imported late so that --help is quick
    from cxt.workflow.runs import format_runs, list_runs, prune

    runs = list_runs(args.directory, load(args.configfile))
    if args.prune:
        prune(runs, yes=args.yes)
    else:
        print(format_runs(runs) if runs else f"there are no runs in {args.directory}")


if __name__ == "__main__":
    exit_on_bad_request(main)
