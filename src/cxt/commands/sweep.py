"""Search settings of a training: many trials, chosen by their results.

cxt sweep --model broad --dataset-path DIR --sweep sweep.yaml --count 50 --out DIR
"""

import sys
import time
from pathlib import Path

from cxt.config.bounds import PositiveInteger, Seed
from cxt.config.flags import check_flags
from cxt.console import add_verbosity_flags, exit_on_bad_request, get_logger, progress_only, set_verbosity
from cxt.errors import BadRequest

logger = get_logger(__name__)

OWN = ("--sweep", "--count", "--out", "--sampler-seed", "--log-level")
"""Flags of the command that are not the trainer's, or mean something else."""

BEGAN = time.monotonic()
"""Approximate time at which this process began."""


def build_parser():
    """The parser of `cxt sweep`: the trainer's, with the flags of the sweep."""
    from cxt.trainer.options import build_parser

    parser = build_parser()
    parser.prog, parser.usage = "cxt sweep", "cxt sweep --sweep FILE.yaml --out DIRECTORY [options, also those of cxt train]"
    parser.description = "Search settings of a training: many trials on one dataset, with all other settings the same."
    for action in parser._actions:
        if "--out" in action.option_strings:
            action.help = "directory of the sweep; the same command continues the sweep in it"
    parser.add_argument("--sweep", type=str | None, help="YAML file in the format of Weights & Biases: what to search, and how")
    parser.add_argument("--count", type=int | None, help="number of trials (default: run_cap of the sweep file)")
    parser.add_argument("--sampler-seed", type=int, default=1, help="seed of the trials' values")
    add_verbosity_flags(parser)
    return parser


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split *argv* into the flags of the sweep and those of the trainer."""
    own, others, words = [], [], iter(argv)
    for word in words:
        flag, _, value = word.partition("=")
        if flag in ("-v", "--verbose", "-q", "--quiet"):
            own.append(word)
        elif flag not in OWN:
            others.append(word)
        else:
            own += [word] if value else [word, *([following] if (following := next(words, None)) is not None else [])]
    return own, others


def main(argv: list[str] | None = None) -> None:
    """Run `cxt sweep`: search settings of a training.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    own, others = split_flags(argv)
    if {"-h", "--help"} & {*argv}:
        parser.parse_args(["--help"])
    args = parser.parse_args(own)
    set_verbosity(args)
    if args.sweep is None or args.out is None:
        missing = " and ".join(flag for flag, value in (("--sweep", args.sweep), ("--out", args.out)) if value is None)
        raise BadRequest(f"{missing} must be given; `cxt sweep --help` describes the flags")
    check_flags(args, count=PositiveInteger, sampler_seed=Seed)

    import optuna  # noqa: F401  without it, say so before anything else

    from cxt.sweeps.settings import read_fixed
    from cxt.sweeps.space import read_sweep
    from cxt.sweeps.worker import run_sweep

    sweep, notes = read_sweep(args.sweep)
    count = args.count or sweep.run_cap
    if count is None:
        raise BadRequest("--count must be given, the number of trials (or `run_cap` in the sweep file)")
    fixed = read_fixed(others, sweep)
    for note in notes:
        logger.warning(f"note: {args.sweep}: {note}")
    with progress_only():
        run_sweep(Path(args.out), sweep, fixed, count=count, seed=args.sampler_seed, began=BEGAN)


if __name__ == "__main__":
    exit_on_bad_request(main)
