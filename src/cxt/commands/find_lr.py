"""Suggest a learning rate for a run."""

import sys

import jsonargparse

from cxt.console import exit_on_bad_request
from cxt.trainer.options import build_parser, parse_flags


def add_flags(parser: jsonargparse.ArgumentParser) -> None:
    """Turn the trainer's parser into that of `cxt find_lr` by adding the flags of the search."""
    parser.prog, parser.usage = "cxt find_lr", "cxt find_lr [FILE.yaml] [options]"
    parser.description = "Find a learning rate for a run."
    parser.add_argument("--lowest", type=float, default=1e-6, help="first learning rate (default 1e-6)")
    parser.add_argument("--highest", type=float, default=1e-2, help="last learning rate (default 1e-2)")
    parser.add_argument("--num-steps", type=int, default=100, help="optimizer steps to train for (default 100)")
    parser.add_argument("--plot", type=str | None, help="plot loss against learning rate to this file, FILE.png, .pdf or .svg")


def main(argv: list[str] | None = None) -> None:
    """Run `cxt find_lr`: suggest a learning rate for a run.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = build_parser()
    add_flags(parser)
    args = parse_flags(sys.argv[1:] if argv is None else argv, parser)

    from cxt.trainer.find_lr import check_search, draw_search, suggest_rate  # imported late so that --help is quick
    from cxt.trainer.options import build_options
    from cxt.trainer.request import build_request

    search = {"lowest": args.lowest, "highest": args.highest, "num_steps": args.num_steps}
    check_search(**search, plot=args.plot)
    request = build_request(build_options(vars(args)))
    found = suggest_rate(request, **search)
    print(
        f"suggested learning rate: {found.suggestion:.3g} (lr: {found.suggestion:.1e}; min_lr must not be above it)",
        flush=True,
    )
    if args.plot is not None:
        draw_search(request, found, args.plot)
        print(f"drawn: {args.plot}")


if __name__ == "__main__":
    exit_on_bad_request(main)
