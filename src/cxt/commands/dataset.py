"""Show, verify and export a dataset."""

import argparse
import sys
from pathlib import Path

from cxt.config.bounds import PositiveInteger
from cxt.config.flags import check_flags
from cxt.console import exit_on_bad_request
from cxt.scenarios.indices import SPLITS


def main(argv: list[str] | None = None) -> None:
    """Run `cxt dataset`: show, verify or export a dataset.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt dataset", description="Show, verify or export a dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "show its sizes and a table of its scenarios"),
        ("verify", "read every shard and check it against the manifest"),
        ("export", "write dense X.npy and y.npy in the published layout, for other tools"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=Path, help="dataset directory, with dataset.json, train/ and test/")
        if name == "export":
            command.add_argument("--out", type=Path, required=True, help="directory to create")
            command.add_argument("--split", choices=SPLITS, nargs="+", default=list(SPLITS), help="default: both")
            command.add_argument("--limit", type=int, help="at most this many simulations of each scenario and split")
            command.add_argument(
                "--dtype", choices=["float16", "float32"], default="float16", help="default: float16, as published"
            )
    args = parser.parse_args(argv)
    check_flags(args, limit=PositiveInteger)

    from cxt.data.export import describe_dataset, export_dataset, verify_dataset  # imported late so that --help is quick

    if args.command == "info":
        print(describe_dataset(args.path))
    elif args.command == "verify":
        verify_dataset(args.path, progress=lambda line: print(line, file=sys.stderr, flush=True))
    else:
        export_dataset(args.path, args.out, splits=args.split, limit=args.limit, dtype=args.dtype)


if __name__ == "__main__":
    exit_on_bad_request(main)
