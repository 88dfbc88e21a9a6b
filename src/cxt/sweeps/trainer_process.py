"""The process in which a trial trains: a trainer that ends with the sweep that started it.

    python -m cxt.sweeps.trainer_process PARENT [flags of the trainer]

PARENT is the id of the sweep's process. It is a process of its own so that its memory is freed at its end, whatever ends it.
"""

from cxt.signals import end_with_parent, has_exit_handler, ignore, install_exit_handler, is_started_by_trainer

if __name__ == "__main__":  # before the other imports, which take seconds
    install_exit_handler()

import sys
import time

from cxt.console import exit_on_bad_request, progress_only

BEGAN = time.monotonic()
"""Approximate time at which this process began."""


def run_trainer() -> None:
    """Train as `python -m cxt.train` does with the arguments after the first."""
    if not is_started_by_trainer():  # a process for another device ends with the first one
        end_with_parent(int(sys.argv[1]))
    from cxt.trainer.launch import train
    from cxt.trainer.options import read_options

    with progress_only():
        train(read_options(sys.argv[2:]), began=BEGAN)
    if has_exit_handler():
        ignore()  # training is finished: a signal must no longer change the exit status


if __name__ == "__main__":
    exit_on_bad_request(run_trainer)
