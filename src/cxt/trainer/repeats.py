"""Repeats of a run outside the workflow: several runs, one after another, that differ in their seed only.

    cxt train --dataset-path data --epochs 2 --run-dir runs/broad --repeats 3

trains `broad.r0`, `broad.r1` and `broad.r2` in `runs/broad/r0`, `runs/broad/r1` and `runs/broad/r2`, as `repeats: 3` of a model
does in the workflow.
"""

import dataclasses
import os
from pathlib import Path

from cxt.config.repeats import name_repeat
from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.signals import is_started_by_trainer
from cxt.trainer.launch import restored_environment, train
from cxt.trainer.options import TrainingOptions

logger = get_logger(__name__)

REPEAT_VARIABLE = "CXT_REPEAT"
"""Environment variable: number of the present repeat, for the processes that are started for other devices."""

OF_ONE_RUN = ("prolong", "lineage", "settings_lineage")
"""Options that belong to one run."""


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


def train_repeats(options: TrainingOptions, repeats: int, *, began: float) -> list[Path]:
    """Train repeats one after another, and end with the first that fails; the same call continues with the unfinished one.

    Only the first is trained with a profiler, which measures the same in all of them.

    Parameters
    ----------
    options : TrainingOptions
        Of the run to repeat.
    repeats : int
        How many.
    began : float
        Time of `time.monotonic` from which `max_minutes`, of all repeats together, is counted.

    Returns
    -------
    list of Path
        The run directories.

    Raises
    ------
    BadRequest
        If the options cannot be fulfilled.
    Failed
        If a repeat was started but could not be finished.
    """
    every = list_repeat_options(options, repeats)
    if is_started_by_trainer():
        return [train(every[int(os.environ[REPEAT_VARIABLE])], began=began)]
    if options.training.profiler != "none" and repeats > 1:
        logger.info(f"--profiler {options.training.profiler}: only the first of {repeats} repeats is trained")
        every = every[:1]
    directories = []
    for number, one in enumerate(every):
        logger.info(f"{one.name}: repeat {number + 1} of {len(every)}, seed {one.training.seed}, in {one.run_dir}")
        with restored_environment():
            os.environ[REPEAT_VARIABLE] = str(number)
            directories.append(train(one, began=began))
    return directories
