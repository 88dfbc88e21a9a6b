"""Launching a run: its processes and machines, its run directory and its locks."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cxt.checkpoints.run_directory import RunDirectory, has_versions, newest_version, next_version, target_lock
from cxt.console import get_logger
from cxt.errors import BadRequest, Failed
from cxt.io import check_writable, is_locked
from cxt.signals import call_before_exit, end_with_trainer, is_started_by_trainer
from cxt.trainer.allocation import find_allocation_end
from cxt.trainer.machines import Machines
from cxt.trainer.options import TrainingOptions
from cxt.trainer.request import RunRequest, build_request

if TYPE_CHECKING:  # importing torch takes seconds
    from cxt.trainer.prolonging import Prolonged

logger = get_logger(__name__)

RUN_DIRECTORY_VARIABLE = "CXT_RUN_DIRECTORY"
"""Environment variable: run directory, for the processes that the first one of a machine starts for its other devices."""


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Restore the environment at the end of a `with` block.

    A training process passes information to the processes that it starts in environment variables, which must not remain.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def train(options: TrainingOptions, *, began: float) -> Path:
    """Train one run, from options to a published checkpoint.

    Parameters
    ----------
    options : TrainingOptions
        The options of the run.
    began : float
        Time of `time.monotonic` from which `max_minutes` is counted.

    Returns
    -------
    Path
        The run directory.

    Raises
    ------
    BadRequest
        If the options cannot be fulfilled.
    Failed
        If the run was started but could not be finished.
    """
    if "LOCAL_RANK" in os.environ and RUN_DIRECTORY_VARIABLE not in os.environ:
        raise BadRequest(
            "LOCAL_RANK is set, as by torchrun; start one process on each machine without it, which then starts those for the "
            "other devices (--devices N or --gpus)"
        )
    deadlines = [None if options.max_minutes is None else began + 60 * options.max_minutes, find_allocation_end()]
    deadline = min((time for time in deadlines if time is not None), default=None)
    with restored_environment():
        if is_started_by_trainer():
            return _train_other_device(options, deadline=deadline)
        with Machines(options.nodes, directory=_choose_meeting_place(options)) as machines:
            return _train_on_machine(options, machines, deadline=deadline)


def _choose_meeting_place(options: TrainingOptions) -> Path:
    """A directory that all machines can access before the first one has chosen the run directory."""
    run = options.run_dir or (options.resume if isinstance(options.resume, str) else None)
    return Path(options.log_dir) if run is None else Path(run).absolute().parent


def _train_other_device(options: TrainingOptions, *, deadline: float | None) -> Path:
    """Train in a process that the first one of this machine has started for another device."""
    end_with_trainer()
    from cxt.trainer.fit import build_data, fit

    request = build_request(options)
    run = RunDirectory(os.environ[RUN_DIRECTORY_VARIABLE])
    fit(request, run, build_data(request), deadline=deadline)
    return run.path


def _train_on_machine(options: TrainingOptions, machines: Machines, *, deadline: float | None) -> Path:
    """Train in the first process of a machine; that of the first machine makes all decisions and writes all files."""
    if not options.wait_for_lock >= 0:
        raise BadRequest(f"--wait-for-lock must not be negative, got {options.wait_for_lock:g}")
    for path in (options.out, options.log_out):
        if path is not None:
            check_writable(path)
    request = build_request(options)
    for number, identity in enumerate(machines.gather(request.identity), start=1):
        if identity != request.identity:
            differences = describe_differences(identity, request.identity)
            raise BadRequest(f"machine {number} differs from machine 0: {differences}; start the same command on both")
    if machines.is_first:
        path, wanted_state = choose_run(options)
        machines.share(str(path.absolute()))
    else:
        path, wanted_state = Path(machines.share()), None
    run = RunDirectory(path)
    os.environ[RUN_DIRECTORY_VARIABLE] = str(path)
    with _released_at_the_end(run):
        stale = open_run(options, run, request.identity, deadline=deadline) if machines.is_first else None
        prolonged = None
        if machines.is_first:
            prolonged = _choose_run_to_prolong(options, run, request, stale=stale, wanted_state=wanted_state)
            wanted_state = None if prolonged is not None else wanted_state
        is_finished = machines.share(stale is None and run.finished_checkpoint() is not None)
        if not is_finished:
            _fit(request, run, machines, stale=stale, deadline=deadline, wanted_state=wanted_state, prolonged=prolonged)
        elif wanted_state is not None:
            raise BadRequest(
                f"--resume {wanted_state}: {run.path} is finished; omit the training state, or start afresh with --restart"
            )
        elif machines.is_first:
            logger.info(f"{run.path} is finished: publishing its checkpoint again")
        if machines.is_first:
            logger.info(f"finished: {run.finished_checkpoint()}")
            if options.log_out is not None:
                run.publish_log(options.log_out)
            if options.out is not None:
                run.publish(options.out)
                logger.info(f"published: {options.out}")
        machines.share()  # the other machines wait until the checkpoint is published
    return run.path


def _fit(
    request: RunRequest,
    run: RunDirectory,
    machines: Machines,
    *,
    stale: str | None,
    deadline: float | None,
    wanted_state: Path | None,
    prolonged: "Prolonged | None",
) -> None:
    """Read the data on all machines, then rename the old run directory if it is *stale*, and train.

    *prolonged* is a shorter run, in that directory or another, with whose training state this one begins.
    """
    from cxt.trainer.fit import build_data, fit

    try:
        data = build_data(request)
        machines.gather("read")
    except (BadRequest, Failed):
        if machines.is_first:
            run.discard_if_empty()
        raise
    old = None if stale is None else run.supersede()
    if old is not None:
        prolonged = None if prolonged is None else prolonged.moved(old)
        what = "starting afresh" if prolonged is None else "a longer run"
        why = stale if stale == "--restart" else f"the old run has {stale}"
        logger.info(f"{what} ({why}); the old run is kept as {old}")
    try:
        fit(request, run, data, machines=machines, deadline=deadline, wanted_state=wanted_state, prolonged=prolonged)
    except BaseException:
        if machines.is_first and run.read_record() is None:  # it failed before the new run had begun
            if old is None:
                run.discard_if_empty()
            else:
                run.restore(old)
                logger.info(f"{run.path} holds the old run again")
        raise


def _choose_run_to_prolong(
    options: TrainingOptions, run: RunDirectory, request: RunRequest, *, stale: str | None, wanted_state: Path | None
) -> "Prolonged | None":
    """The shorter run with which the requested one begins: that in its directory, or that of `--prolong`; None without any.

    BadRequest if `--resume` asks for a longer run that cannot be had; otherwise that is said, and training starts afresh.
    """
    if options.restart:
        return None
    record = run.read_record()
    if record is not None and stale is None:
        return None  # this very run, which continues
    from cxt.trainer.prolonging import choose_state_to_prolong, differs_in_length_only  # imports torch

    of_workflow = record is None
    if of_workflow:
        if options.prolong is None:
            return None
        run = RunDirectory(options.prolong)
        record = run.read_record()
        if record is None or is_locked(run.lock_path):
            why = "there is no run in it" if record is None else "another trainer holds it"
            logger.info(f"{request.name}: {run.path} is not prolonged, because {why}; training starts from step 0")
            return None
    if not differs_in_length_only(record["identity"], request.identity, of_workflow=of_workflow):
        if of_workflow:
            differences = describe_differences(record["identity"], request.identity)
            logger.info(f"{request.name}: {run.path} is not prolonged, because of {differences}; training starts from step 0")
        return None
    try:
        return choose_state_to_prolong(run, record, request, wanted=wanted_state)
    except BadRequest as error:
        if options.resume:
            raise
        logger.info(f"{request.name}: {error}")
        return None


def choose_run(options: TrainingOptions) -> tuple[Path, Path | None]:
    """The run directory that the options select, and the training state in it to continue from (None: the newest)."""
    if options.resume == "latest" and options.run_dir is not None and RunDirectory(options.run_dir).read_record() is None:
        raise BadRequest(f"nothing to resume: there is no run in {options.run_dir}; omit --resume to start one")
    if options.resume == "auto" and options.run_dir is None:
        return (newest_version if has_versions(options.log_dir) else next_version)(options.log_dir), None
    if isinstance(options.resume, str) and options.resume not in ("latest", "auto"):
        path = Path(options.resume)
        if not path.exists():
            raise BadRequest(f"--resume {path}: there is no such run or training state")
        run, state = (path, None) if path.is_dir() else (path.parent.parent, path)
        if state is not None and state.parent.name != "checkpoints":
            raise BadRequest(f"--resume must be a run directory, or a training state in its checkpoints/, got {path}")
        if options.run_dir is not None and Path(options.run_dir).resolve() != run.resolve():
            raise BadRequest(f"--resume {path} is not in --run-dir {options.run_dir}; omit one of the two")
        return run, state
    if options.run_dir is not None:
        return Path(options.run_dir), None
    return (newest_version if options.resume else next_version)(options.log_dir), None


def open_run(options: TrainingOptions, run: RunDirectory, identity: dict, *, deadline: float | None = None) -> str | None:
    """Lock the run directory and the file to publish.

    Returns
    -------
    str or None
        Why the run in the directory is another one and must be superseded; None if it is this run, or there is none.

    Raises
    ------
    BadRequest
        If another process holds a lock, or the run in the directory can neither be continued nor superseded.
    Failed
        With status 75, if another process holds a lock until *deadline*.
    """
    until = time.monotonic() + 60 * options.wait_for_lock
    _wait_for_lock(run.lock_path, until=until, deadline=deadline)
    run.lock()
    if options.out is not None:
        _wait_for_lock(target_lock(options.out), until=until, deadline=deadline)
        run.lock_target(options.out)
    record = run.read_record()
    if record is not None and (options.restart or record["identity"] != identity):
        before = record["identity"]
        reason = "--restart" if options.restart else describe_differences(before, identity)
        if options.resume and not _differs_in_length(before, identity, options):
            raise BadRequest(f"{run.path} was started with {reason}; omit --resume to start afresh")
        is_on_others = before | {"devices": identity["devices"]} == identity
        if not options.restart and is_on_others and run.last.exists() and run.finished_checkpoint() is None:
            raise BadRequest(
                f"{run.path} was started on {before['devices']} and cannot continue on {identity['devices']}, which would give "
                f"other weights. Use {before['devices']} again, or start afresh with --restart (under Snakemake, with "
                f"`rm -r {run.path}`)"
            )
        return reason
    if record is None and options.resume:
        logger.warning(f"nothing to resume in {run.path}: starting from step 0")
    return None


def _differs_in_length(before: dict, identity: dict, options: TrainingOptions) -> bool:
    """Whether the run in the directory is the requested one but for its length, so that it may be prolonged."""
    from cxt.trainer.prolonging import differs_in_length_only

    return not options.restart and differs_in_length_only(before, identity)


def describe_differences(old: dict, new: dict) -> str:
    """Describe the differences between a run's identity and the requested one, each with both values."""
    words = []
    for key, after in new.items():
        if key == "settings":
            before = old.get(key, {})
            names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            words += [f"{name} {before.get(name)} instead of {after.get(name)}" for name in names]
        elif old.get(key) != after:
            words.append(f"{key} {str(old.get(key))[:12]} instead of {str(after)[:12]}")
    return ", ".join(words)


def _wait_for_lock(path: Path, *, until: float, deadline: float | None) -> None:
    """Wait while another process holds the lock file *path*, at most until the time *until* (of `time.monotonic`).

    A job that was cancelled, or has reached its time limit, may still be saving when its next attempt begins; and after
    Snakemake was killed, its jobs go on. Failed with status 75 if the deadline comes first: the next try waits on.
    """
    if deadline is not None:
        until = min(until, deadline)
    if time.monotonic() < until and is_locked(path):
        logger.info(f"another trainer holds {path}: waiting for it, at most {until - time.monotonic():.0f} s")
        while time.monotonic() < until and is_locked(path):
            time.sleep(min(1.0, max(0.0, until - time.monotonic())))
    if until == deadline and is_locked(path):
        raise Failed(f"another trainer still holds {path}; run the same command again to wait on", status=75)


@contextlib.contextmanager
def _released_at_the_end(run: RunDirectory) -> Iterator[None]:
    """Release *run* at the end of a `with` block, even if a signal ends it."""
    try:
        with call_before_exit(lambda text, status: run.abandon()):
            yield
    finally:
        run.release()
