"""Suggest a learning rate for a run."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import jsonargparse

from cxt.config.bounds import MAX_COUNT
from cxt.console import exit_on_bad_request
from cxt.errors import BadRequest, Failed, try_drawing
from cxt.io import check_writable
from cxt.trainer.options import build_parser, parse_flags

if TYPE_CHECKING:
    from cxt.trainer.learning_rate_search import Search
    from cxt.trainer.request import RunRequest


def add_flags(parser: jsonargparse.ArgumentParser) -> None:
    """Turn the trainer's parser into that of `cxt find_lr` by adding the flags of the search."""
    parser.prog, parser.usage = "cxt find_lr", "cxt find_lr [FILE.yaml] [options]"
    parser.description = "Find a learning rate for a run."
    parser.add_argument("--lowest", type=float, default=1e-6, help="first learning rate (default 1e-6)")
    parser.add_argument("--highest", type=float, default=1e-2, help="last learning rate (default 1e-2)")
    parser.add_argument("--num-steps", type=int, default=100, help="optimizer steps to train for (default 100)")
    parser.add_argument("--plot", type=str | None, help="plot loss against learning rate to this .png file")


def draw(request: RunRequest, search: Search, suggestion: float, path) -> None:
    """Draw the figure of a search."""
    from cxt.evaluation.figures import draw_learning_rates

    title = f"{request.name}: suggested learning rate {suggestion:.2g}"
    draw_learning_rates(search.rates, search.losses, suggestion, path, title=title)


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
    if not 0 < args.lowest < args.highest < math.inf:
        raise BadRequest(
            "--lowest and --highest must be finite, positive and in rising order, "
            f"got --lowest {args.lowest:g} --highest {args.highest:g}"
        )
    if not 20 <= args.num_steps <= MAX_COUNT:
        raise BadRequest(f"--num-steps must be a whole number from 20 to {MAX_COUNT}, got {args.num_steps}")
    if args.plot is not None:
        check_writable(args.plot)

    from cxt.trainer.learning_rate_search import find_lr  # imported late so that --help is quick
    from cxt.trainer.options import build_options
    from cxt.trainer.request import build_request

    request = build_request(build_options(vars(args)))
    search = find_lr(request, lowest=args.lowest, highest=args.highest, num_steps=args.num_steps)
    suggestion = search.suggestion()
    if suggestion is None:
        raise Failed(
            f"the loss diverged after {len(search.losses)} of {args.num_steps} steps, too few to suggest a learning rate; "
            "raise --num-steps, or lower --highest"
        )
    print(
        f"suggested learning rate: {suggestion:.3g} (lr: {suggestion:.1e}; min_lr must not be above it)",
        flush=True,
    )
    if args.plot is not None:
        lost = try_drawing(lambda: draw(request, search, suggestion, args.plot))
        if lost:
            raise Failed(f"{args.plot} could not be drawn ({lost})")
        print(f"drawn: {args.plot}")


if __name__ == "__main__":
    exit_on_bad_request(main)
