"""Training states: when they are saved, how they are written, and which one an interrupted run continues from.

A training state holds weights, optimizer, counters and random numbers. It is saved between two optimizer steps only, because
one inside an accumulation window would not be exact; clocks and signals only set a flag. A state saved before a validation
records that the validation is pending, so that a resumed run performs it.
"""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback

from cxt.checkpoints.archive import UNREADABLE, open_verified, pack
from cxt.checkpoints.run_directory import RunDirectory
from cxt.console import get_logger
from cxt.errors import BadRequest, Failed, first_line
from cxt.io import atomic_link, atomic_write
from cxt.signals import OUT_OF_TIME, STATUS, exit_on_signal, has_exit_handler, ignore, is_started_by_trainer, listen

logger = get_logger(__name__)

NOTHING, SAVE, STOP = 0, 1, 2
"""The action that is due; STOP + n means stopped by signal n."""


class AtomicIO(TorchCheckpointIO):
    """Writes training states atomically, and refuses to read one that was changed or damaged.

    Serialised in memory first, because torch's error for a full disk does not say so.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write *checkpoint* to *path* atomically, with a digest at the end; *storage_options* is ignored."""
        atomic_write(path, pack(checkpoint))

    def load_checkpoint(self, path, map_location=None, weights_only=True) -> dict:
        """Return the training state in *path*, on the CPU unless *map_location* says otherwise; BadRequest if it is damaged.

        Nothing in the file is executed, whatever *weights_only* says.
        """
        try:
            with open_verified(path, sealed=True) as file:
                return torch.load(file, map_location=map_location or "cpu", weights_only=True)
        except UNREADABLE as error:
            raise BadRequest(f"the training state {path} cannot be read ({first_line(error)}); run the command again") from None


def validate_now(trainer: pl.Trainer) -> None:
    """Run Lightning's validation between two steps; by its own schedule it may fall into an accumulation window."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    first_loop_iter = trainer._logger_connector._first_loop_iter
    trainer.lightning_module.on_validation_model_zero_grad()
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_loop_iter


class StateSaver(Callback):
    """Saves training states: at regular steps or minutes, when a signal or the deadline ends the run, and before validations.

    It also runs the validations, so that they take place between two optimizer steps.

    Parameters
    ----------
    run : RunDirectory
        States are saved as `checkpoints/step=S.ckpt`; `last.ckpt` links to the newest.
    name : str
        Name of the checkpoint, for messages.
    every_steps : int
        Optimizer steps between states.
    every_minutes : float
        Minutes between states, if these pass first; 0 = by steps only.
    keep : int
        Number of states to keep.
    total_steps : int
        Optimizer steps of the whole run.
    validates : callable
        Whether there is a validation after a step.
    refuse : callable
        Called with the trainer before a state is saved; raises if it must not be saved.
    deadline : float, optional
        Time of `time.monotonic` after which the run saves and ends with status 75.
    validated_weights : callable, optional
        Returns a context manager within which the model has the weights to validate.
    """

    def __init__(
        self,
        run: RunDirectory,
        name: str,
        *,
        every_steps: int,
        every_minutes: float,
        keep: int,
        total_steps: int,
        validates: Callable[[int], bool],
        refuse: Callable[[pl.Trainer], None],
        deadline: float | None = None,
        validated_weights: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.run, self.name, self.validates, self.refuse = run, name, validates, refuse
        self.validated_weights = validated_weights
        self.every_steps, self.every_seconds, self.keep = every_steps, 60 * every_minutes, keep
        self.total_steps, self.deadline = total_steps, deadline
        self._signal = None
        self._stepped = False  # this process has something to save
        self._validation_left = False
        self._step = 0
        self._saved_at = time.monotonic()
        self._saved_step: int | None = None

    def state_dict(self) -> dict:
        """Return whether a validation is pending."""
        return {"validation_left": self._validation_left}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._validation_left = state["validation_left"]

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        """Correct the epoch counters in *checkpoint*, which Lightning gets wrong in a resumed run."""
        # Resumed at the end of an epoch, Lightning 2.6 does not count the next one as begun. A state saved after that would be
        # continued with the wrong examples.
        for progress in map(checkpoint["loops"]["fit_loop"]["epoch_progress"].get, ("total", "current")):
            progress["ready"] = progress["started"] = progress["processed"] + 1

    def _take_note(self, number: int, frame) -> None:
        if has_exit_handler() and not self._stepped:  # nothing to save yet, and compiling may take minutes
            exit_on_signal(number)
        self._signal = number

    @contextlib.contextmanager
    def listening(self):
        """Note signals within a `with` block instead of ending; a process for another device leaves them to its parent.

        A command that ends with an exception must not be interrupted before it has reported it.
        """
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
            yield
            return
        before = listen(signal.SIG_IGN if is_started_by_trainer() else self._take_note)
        try:
            yield
        except BaseException:
            if has_exit_handler():
                ignore()
                before.clear()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer, module) -> None:
        """Note the step that the run starts from, and run a validation that was pending when it was saved."""
        self._step = trainer.global_step
        self._saved_step = trainer.global_step if trainer.ckpt_path else None
        self._saved_at = time.monotonic()
        if self._validation_left:
            with self.validated_weights():
                validate_now(trainer)
            self._validation_left = False

    def _due(self, trainer, step: int) -> int:
        """The action that is due at this optimizer step, the same on all ranks."""
        now = time.monotonic()
        due = NOTHING
        if step % self.every_steps == 0 or (self.every_seconds and now - self._saved_at >= self.every_seconds):
            due = SAVE
        if self.deadline is not None and now >= self.deadline:
            due = STOP
        if self._signal is not None:
            due = STOP + self._signal
        if trainer.world_size > 1:
            everywhere = torch.tensor(due, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MAX)
            due = int(everywhere)
        return due

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """After an optimizer step, save a training state, stop and validate, in this order, if due.

        After the last step, validation comes before saving.
        """
        step = trainer.global_step
        if step == self._step:  # gradients are still being accumulated
            return
        self._step, self._stepped = step, True
        due = self._due(trainer, step)
        self._validation_left = self.validates(step)
        last = step >= self.total_steps
        if not last and (due or self._validation_left):
            self._save(trainer, step)
        if not last and due >= STOP:
            self._stop(trainer, due - STOP)
        if self._validation_left:
            with self.validated_weights():
                validate_now(trainer)
            self._validation_left = False
        if last:  # Lightning does nothing more when resumed from this state, so validation comes first
            self._save(trainer, step)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_index, dataloader_index=0) -> None:
        """If a signal has arrived, stop a run on one device without waiting for the end of the validation."""
        # Except for the last validation, the run was saved before it; a single process need not wait for others.
        if self._signal is not None and trainer.world_size == 1 and trainer.global_step < self.total_steps:
            self._stop(trainer, self._signal)

    def _save(self, trainer, step: int) -> None:
        self.refuse(trainer)
        path = self.run.checkpoints / f"step={step}.ckpt"
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            raise Failed(f"{self.name}: {self._describe_failure(step, error)}") from error
        self._saved_at, self._saved_step = time.monotonic(), step
        if trainer.is_global_zero:
            atomic_link(self.run.last, path.name)
            for old in list_training_states(self.run)[self.keep :]:
                old.unlink(missing_ok=True)

    def _describe_failure(self, step: int, error: Exception) -> str:
        kept = list_training_states(self.run)
        intact = f"the training state of {kept[0].stem} is intact" if kept else "no earlier training state exists"
        return (
            f"step {step} could not be saved in {self.run.checkpoints}: {first_line(error)}; {intact}. "
            "Free disk space and run the same command again"
        )

    def _stop(self, trainer, number: int) -> None:
        """End the run. Only rank 0 reports the status, because a rank that fails before it would get it killed."""
        if not trainer.is_global_zero:
            raise Failed("", status=0, agreed=True)
        start = "the start: nothing was saved yet" if self._saved_step is None else f"step {self._saved_step}"
        out_of_time = "out of time (--max-minutes, or the end of the Slurm allocation)"
        reason = f"stopped by {signal.Signals(number).name}" if number else out_of_time
        raise Failed(
            f"{self.name}: {reason} at step {trainer.global_step}; the same command continues from {start}",
            status=STATUS[number] if number else OUT_OF_TIME,
            agreed=True,
        )


def list_training_states(run: RunDirectory) -> list[Path]:
    """The training states of a run, newest first."""
    matches = {path: re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in run.checkpoints.glob("step=*.ckpt")}
    steps = {path: int(match[1]) for path, match in matches.items() if match}
    return sorted(steps, key=lambda path: -steps[path])


def get_step(path: Path) -> int:
    """The optimizer step of a training state, by the name of its file."""
    return int(path.stem.removeprefix("step="))


def find_damage(path: Path) -> str | None:
    """Describe why a training state cannot be read; None if it can."""
    try:
        with open_verified(path, sealed=True) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        return first_line(error)
    return None if isinstance(content, dict) and "loops" in content else "it is not a training state"


def find_state_to_continue(run: RunDirectory, name: str, *, wanted: Path | None = None) -> Path | None:
    """Find the training state to continue a run from.

    Removes temporary files of killed processes, and states newer than *wanted*, whose steps will be repeated.

    Parameters
    ----------
    run : RunDirectory
        Locked by this process.
    name : str
        Name of the checkpoint, for messages.
    wanted : Path, optional
        The state to use; by default, the newest that can be read.

    Returns
    -------
    Path or None
        None if nothing was saved.

    Raises
    ------
    BadRequest
        If there are states but none can be read, or *wanted* cannot be read or is not among them.
    """
    for temporary in run.checkpoints.glob("*.tmp"):
        temporary.unlink()
    if wanted is not None:
        wanted = wanted.resolve()
        states = list_training_states(run)
        if wanted not in [path.resolve() for path in states]:
            names = ", ".join(path.name for path in states)
            choice = f"choose from {names}" if names else "it has none"
            raise BadRequest(f"{wanted} is not one of the training states of {run.path}; {choice}")
        if (damage := find_damage(wanted)) is not None:
            raise BadRequest(f"{wanted} cannot be continued from: {damage}")
    problems = []
    for path in list_training_states(run):
        if wanted is not None and path.resolve() != wanted:
            if not problems:
                logger.info(f"{name}: discarding the newer training state {path.name}; its steps will be repeated")
            path.unlink()
            continue
        if (damage := find_damage(path)) is None:
            for newer in problems:
                logger.info(f"{name}: {newer}; continuing from the one before")
            atomic_link(run.last, path.name)
            return path
        problems.append(f"the training state {path} cannot be read ({damage})")
    if problems:
        raise BadRequest(
            f"{name}: "
            + "; ".join(problems)
            + f"; no earlier training state is left. To start afresh, delete {run.path} or use --restart"
        )
    return None
