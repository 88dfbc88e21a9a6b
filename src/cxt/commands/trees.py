"""Extract one tree sequence from a simulation batch."""

import argparse
from pathlib import Path

from cxt.config.bounds import Index
from cxt.config.flags import check_flags
from cxt.console import counted, exit_on_bad_request
from cxt.errors import BadRequest
from cxt.io import atomic_file, check_writable


def main(argv: list[str] | None = None) -> None:
    """Run `cxt trees`: extract one tree sequence from a simulation batch.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt trees", description="Extract one tree sequence from a simulation batch.")
    parser.add_argument("batch", type=Path, help="simulation batch, a file made by cxt.simulate")
    parser.add_argument("--index", type=int, required=True, help="index of the simulation in its variant")
    parser.add_argument("--out", type=Path, required=True, help="FILE.trees to write, for tskit.load")
    args = parser.parse_args(argv)
    check_flags(args, index=Index)
    check_writable(args.out)
    if args.out.name.endswith(".batch") or (args.out.exists() and args.out.samefile(args.batch)):
        raise BadRequest(f"--out {args.out} is a simulation batch; choose another name, such as {args.index}.trees")

    from cxt.scenarios.batches import read_simulation  # imported late so that --help is quick

    ts = read_simulation(args.batch, args.index)
    try:
        with atomic_file(args.out) as file:
            ts.dump(file)
    except OSError as error:
        raise BadRequest(f"{args.out} cannot be written: {error.strerror or error}") from None
    about = ts.metadata["cxt"]
    print(
        f"{args.out}: simulation {args.index} of '{about['scenario']}', {counted(ts.num_trees, 'tree')}, "
        f"{counted(ts.num_sites, 'site')}"
    )


if __name__ == "__main__":
    exit_on_bad_request(main)
