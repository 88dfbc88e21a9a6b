"""The process in which one repeat is trained: a trainer that ends with the command that started it.

    python -m cxt.trainer.repeat_process PARENT NUMBER [flags of cxt train]

PARENT is the id of the command's process.
"""

from cxt.signals import end_with_parent, has_exit_handler, ignore, install_exit_handler, is_started_by_trainer

if __name__ == "__main__":  # before the other imports, which take seconds
    install_exit_handler()

import sys
import time

from cxt.console import exit_on_bad_request, progress_only, set_verbosity

BEGAN = time.monotonic()
"""Approximate time at which this process began."""


def train_repeat() -> None:
    """Train the repeat with the number and the flags of this process's arguments."""
    parent, number, *argv = sys.argv[1:]
    if not is_started_by_trainer():  # a process for another device ends with the first one
        end_with_parent(int(parent))
    from cxt.trainer.launch import train
    from cxt.trainer.options import build_options
    from cxt.trainer.repeats import list_repeat_options, parse_repeated

    args = parse_repeated(argv)
    set_verbosity(args)
    options = list_repeat_options(build_options(vars(args)), args.repeats)[int(number)]
    with progress_only():
        train(options, began=BEGAN)
    if has_exit_handler():
        ignore()  # training is finished: a signal must no longer change the exit status


if __name__ == "__main__":
    exit_on_bad_request(train_repeat)
