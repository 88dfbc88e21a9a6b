"""Stage 3: train one checkpoint.

    python -m cxt.train --model broad --dataset-path results/datasets/processed --epochs 2

`--checkpoint X` starts a new run from the weights of X, `--resume-adapter X` from its backbone and adapter weights, and
`--resume` continues an existing run. Without any of these, training starts from random weights.
"""

from cxt.signals import has_exit_handler, ignore, install_exit_handler

if __name__ == "__main__":  # before the other imports, which take a second
    install_exit_handler()

import sys
import time

from cxt.console import exit_on_bad_request, progress_only, set_verbosity
from cxt.trainer.repeats import parse_repeated, train_repeats

BEGAN = time.monotonic()
"""Approximate time at which this process began."""


def main(argv: list[str] | None = None) -> None:
    """Run `cxt train`: train one checkpoint, or print the settings it would be trained with.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_repeated(argv)
    set_verbosity(args)

    from cxt.trainer.launch import train  # imported late so that --help is quick
    from cxt.trainer.options import build_options
    from cxt.trainer.request import resolve_settings

    options = build_options(vars(args))
    if args.print_config:
        import yaml

        print(yaml.safe_dump(resolve_settings(options), sort_keys=True), end="")
    else:
        with progress_only():
            if args.repeats is None:
                train(options, began=BEGAN)
            else:
                train_repeats(argv, options, args.repeats, began=BEGAN)
    if has_exit_handler():
        ignore()  # training is finished: a signal must no longer change the exit status


if __name__ == "__main__":
    exit_on_bad_request(main)
