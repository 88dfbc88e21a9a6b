"""Repeats of a run outside the workflow: several runs, one after another, that differ in their seed only.

    cxt train --dataset-path data --epochs 2 --run-dir runs/broad --repeats 3

trains `broad.r0`, `broad.r1` and `broad.r2` in `runs/broad/r0`, `runs/broad/r1` and `runs/broad/r2`, as `repeats: 3` of a model
does in the workflow.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cxt.config.repeats import Repeats, name_repeat
from cxt.console import add_verbosity_flags, get_logger
from cxt.errors import BadRequest, Failed
from cxt.signals import OUT_OF_TIME, listen
from cxt.trainer.options import TrainingOptions, build_parser, parse_flags

logger = get_logger(__name__)

REPEAT_PROCESS = ("-m", "cxt.trainer.repeat_process")
"""What Python runs to train one repeat."""

OF_ONE_RUN = ("prolong", "lineage", "settings_lineage")
"""Options that belong to one run."""


def parse_repeated(argv: Sequence[str]):
    """Parse the flags of `cxt train`: those of the trainer, `--repeats`, and how much to print."""
    parser = build_parser()
    parser.add_argument(
        "--repeats",
        type=int | None,
        help="train this many runs one after another, with the seeds s, s + 1, …, in <run-dir>/r0, <run-dir>/r1, …",
    )
    add_verbosity_flags(parser)
    return parse_flags(list(argv), parser, repeats=Repeats)


def list_repeat_options(options: TrainingOptions, repeats: int) -> list[TrainingOptions]:
    """The options of each repeat: its name, its seed, its run directory, and the files that it publishes.

    Raises
    ------
    BadRequest
        If there is no run directory, or an option belongs to one run or to several machines.
    """
    if options.run_dir is None:
        raise BadRequest("--repeats needs --run-dir DIRECTORY; the repeats are trained in DIRECTORY/r0, DIRECTORY/r1 and so on")
    given = [f"--{name.replace('_', '-')}" for name in OF_ONE_RUN if getattr(options, name) is not None]
    if isinstance(options.resume, str) and options.resume not in ("latest", "auto"):
        given.append(f"--resume {options.resume}")
    if options.nodes > 1:
        given.append("--nodes")
    if given:
        raise BadRequest(
            f"{', '.join(given)} cannot be used with --repeats; train the repeats one by one, with --name and --seed"
        )
    return [
        dataclasses.replace(
            options,
            name=_check_name(name_repeat(options.checkpoint_name, number)),
            run_dir=str(Path(options.run_dir) / f"r{number}"),
            out=_name_file(options.out, number),
            log_out=_name_file(options.log_out, number),
            training=options.training.replace(seed=options.training.seed + number),
        )
        for number in range(repeats)
    ]


def _check_name(name: str) -> str:
    if len(name) > 100:
        raise BadRequest(f"the name of a repeat has at most 100 characters, got {name!r}; give a shorter --name")
    return name


def _name_file(path: str | None, number: int) -> str | None:
    """The file of a repeat for that of a run: `m.r0.ckpt` for `m.ckpt`."""
    if path is None:
        return None
    file = Path(path)
    return str(file.with_name(f"{name_repeat(file.stem, number)}{file.suffix}"))


def train_repeats(argv: Sequence[str], options: TrainingOptions, repeats: int, *, began: float) -> None:
    """Train repeats one after another, and end with the first that fails; the same call continues with the unfinished one.

    Each is trained by a process of its own, because the processes of several devices cannot be joined twice. With a profiler
    only the first is trained, since it measures the same in all of them.

    Parameters
    ----------
    argv : sequence of str
        The flags of the command.
    options : TrainingOptions
        Their options, of the run to repeat.
    repeats : int
        How many.
    began : float
        Time of `time.monotonic` from which `max_minutes`, of all repeats together, is counted.

    Raises
    ------
    BadRequest
        If the options cannot be fulfilled.
    Failed
        If a repeat could not be finished, with the status of its process.
    """
    every = list_repeat_options(options, repeats)
    if options.training.profiler != "none" and repeats > 1:
        logger.info(f"--profiler {options.training.profiler}: only the first of {repeats} repeats is trained")
        every = every[:1]
    for number, one in enumerate(every):
        words = list(argv)
        if options.max_minutes is not None:
            left = options.max_minutes - (time.monotonic() - began) / 60
            if left <= 0:
                raise Failed(f"the time is up before {one.name}; run the same command again to continue", status=OUT_OF_TIME)
            words.append(f"--max-minutes={left}")
        logger.info(f"{one.name}: repeat {number + 1} of {len(every)}, seed {one.training.seed}, in {one.run_dir}")
        if status := _run_process([*REPEAT_PROCESS, str(os.getpid()), str(number), *words]):
            raise Failed(
                f"{one.name} ended with status {status}, see above; it and the repeats after it are not finished, and the same "
                "command continues with it",
                status=status,
            )


def _run_process(words: list[str]) -> int:
    """Run a command, to which signals are passed on, and return its exit status."""
    heard: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame=None) -> None:
        heard.append(number)
        if process is not None and process.poll() is None:
            process.send_signal(number)

    before = listen(pass_on)
    try:
        # A session of its own, so that Ctrl-C in a terminal reaches it once.
        process = subprocess.Popen([sys.executable, *words], start_new_session=True)
        if heard:  # while it was started
            process.send_signal(heard[0])
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
