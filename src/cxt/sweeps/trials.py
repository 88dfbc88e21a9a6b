"""One trial: its trainer as a process of its own, followed by its training log until it ends or is ended."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import read_log
from cxt.console import get_logger
from cxt.errors import BadRequest, Failed
from cxt.signals import OUT_OF_TIME, STATUS
from cxt.sweeps.settings import check_trial, write_settings
from cxt.sweeps.study import Claim, Study

logger = get_logger(__name__)

MAX_ATTEMPTS = 3
"""Times that the trainer of a trial may be killed before the trial has failed."""

LINE_SECONDS = 30.0
"""Shortest time between two progress lines of a trial."""

LOCK_MINUTES = 1
"""Time to wait for the trainer of a killed sweep to disappear."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial has ended.

    Parameters
    ----------
    state : COMPLETE, PRUNED or FAIL
    value : the metric of a complete trial
    reason : why it is not complete
    steps, seconds : optimizer steps and time that it trained
    is_refused : whether its values are no valid request
    never_began : whether its trainer ended before it had built the network, although its values are a valid request
    """

    state: str
    value: float | None = None
    reason: str = ""
    steps: int = 0
    seconds: float = 0.0
    is_refused: bool = False
    never_began: bool = False


class Interruption:
    """Reacts to signals: remembers the first one, and passes it on to the trainer that is running, if there is one."""

    def __init__(self):
        self.number: int | None = None
        self.process: subprocess.Popen | None = None

    def __call__(self, number: int, frame=None) -> None:
        """Handle a signal."""
        self.number = self.number or number
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raise Failed, with the status of the signal, if there was one."""
        if self.number is not None:
            name = signal.Signals(self.number).name
            raise Failed(
                f"stopped by {name}; run the same command again to continue", status=STATUS[signal.Signals(self.number)]
            )


def metric_at_end(rows: list[dict], metric: str, *, export: str) -> float | None:
    """The metric of the weights that a finished run publishes.

    Parameters
    ----------
    rows : list of dict
        Rows of its training log.
    metric : str
        A column.
    export : str
        `last`, or `best` for the weights of the lowest validation loss.

    Returns
    -------
    float or None
        None if the log has no value there.
    """
    if export == "best":
        validated = [row for row in rows if row["val_loss"] is not None]
        return min(validated, key=lambda row: row["val_loss"]).get(metric) if validated else None
    return rows[-1].get(metric) if rows else None


def last_error(path: Path) -> str:
    """The last error in what a trainer has printed, or its last line."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("cxt: ") for line in lines if line.startswith("cxt: ")]
    return (errors or lines or ["it printed nothing"])[-1]


class TrialRun:
    """Trains one trial.

    Parameters
    ----------
    study, claim : Study, Claim
    settings : mapping
        The trial's settings, in the format of `--config`.
    interruption : Interruption
        The handler of this process's signals.
    deadline : float or None
        Time of `time.monotonic` at which to save and end.
    """

    def __init__(
        self, study: Study, claim: Claim, settings: Mapping[str, Any], interruption: Interruption, *, deadline: float | None
    ):
        self.study, self.claim, self.settings, self.interruption, self.deadline = study, claim, settings, interruption, deadline
        self.run = RunDirectory(study.run_directory(claim.number))
        self.config = self.run.path.with_name(f"{claim.number}.yaml")
        self.output = self.run.path.with_name(f"{claim.number}.log")
        self._reported = 0
        self._line_at = time.monotonic()

    def train(self) -> Outcome:
        """Train to the end, or until the trial is pruned.

        Returns
        -------
        Outcome

        Raises
        ------
        Failed
            If this process or the trainer was interrupted; the trial can then be continued.
        """
        try:
            check_trial(self.settings)
        except BadRequest as error:
            return Outcome("PRUNED", reason=f"refused: {error}", is_refused=True)
        write_settings(self.config, self.settings)
        status = 0
        for _ in range(MAX_ATTEMPTS):
            self.interruption.check()
            status, pruned_at = self._run_process()
            if pruned_at is not None:
                metric, place = self.study.sweep.metric, pruned_at
                row = self._rows()[place - 1]  # the trainer may have gone a few steps further
                reason = f"{metric} {row[metric]:.4g} at validation {place}: the best so far is worse than the median"
                return Outcome("PRUNED", reason=reason, steps=row["step"], seconds=row["seconds"] or 0.0)
            self._wait_for_own_signal(status)
            self.interruption.check()
            if status == 0:
                return self._finished()
            if status == 2:
                return self._outcome("PRUNED", reason=f"refused: {last_error(self.output)}", is_refused=True)
            if status in (OUT_OF_TIME, *STATUS.values()):
                raise Failed(
                    f"the trainer of trial {self.claim.number} was interrupted (status {status}); run the same command again "
                    "to continue",
                    status=status,
                )
            if status > 0:
                return self._outcome("FAIL", reason=last_error(self.output))
            logger.warning(f"trial {self.claim.number}: its trainer was killed by {_name(-status)}; continuing it")
        return self._outcome(
            "FAIL", reason=f"its trainer was killed {MAX_ATTEMPTS} times, at last by {_name(-status)}; is there enough memory?"
        )

    def _wait_for_own_signal(self, status: int) -> None:
        """Schedulers signal all processes of a job, but not at once: wait a moment for the signal that ended the trainer."""
        until = time.monotonic() + 1
        while status in STATUS.values() and self.interruption.number is None and time.monotonic() < until:
            time.sleep(0.05)

    def _run_process(self) -> tuple[int, int | None]:
        """Run the trainer; its exit status, and the validation at which it was pruned, if it was."""
        flags = ["--config", str(self.config), "--run-dir", str(self.run.path), "--wait-for-lock", str(LOCK_MINUTES)]
        if self.deadline is not None:
            flags += ["--max-minutes", f"{max(0.01, (self.deadline - time.monotonic()) / 60):.3f}"]
        words = [sys.executable, "-m", "cxt.sweeps.trainer_process", str(os.getpid()), *flags]
        pruned_at = None
        with open(self.output, "ab") as output:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            self.interruption.process = process
            try:
                if self.interruption.number is not None:  # which came before the handler knew of the process
                    process.terminate()
                while True:
                    ended = _has_ended(process)
                    pruned_at = self._follow() if self.interruption.number is None else None
                    if pruned_at is not None and process.poll() is None:
                        process.terminate()
                        process.wait()
                    if ended or pruned_at is not None:
                        break
                return process.wait(), pruned_at
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                self.interruption.process = None

    def _rows(self) -> list[dict]:
        """Rows of the training log that have the metric."""
        return [row for row in read_log(self.run.log) if row.get(self.study.sweep.metric) is not None]

    def _follow(self) -> int | None:
        """Report new rows of the training log; the validation at which the trial is to be pruned, if it is."""
        rows = self._rows()
        planned = self._planned_steps()
        for place, row in enumerate(rows[self._reported :], start=self._reported + 1):
            is_last = self.study.report(self.claim, place, row[self.study.sweep.metric])
            self._reported = place
            self._say(row)
            # A trial that has reached its last step is complete.
            if is_last and row["step"] != planned and self.study.should_prune(self.claim):
                return place
        return None

    def _planned_steps(self) -> int | None:
        path = self.run.path / "model_summary.json"
        return json.loads(path.read_text(encoding="utf-8"))["planned_steps"] if path.exists() else None

    def _say(self, row: dict) -> None:
        now = time.monotonic()
        if now - self._line_at >= LINE_SECONDS:
            self._line_at = now
            metric = self.study.sweep.metric
            logger.info(f"trial {self.claim.number}: step {row['step']}/{self._planned_steps()}, {metric} {row[metric]:.4f}")

    def _outcome(self, state: str, **about) -> Outcome:
        last = (read_log(self.run.log) or [{"step": 0, "seconds": 0.0}])[-1]
        never_began = self.run.read_record() is None
        return Outcome(state, steps=last["step"], seconds=last["seconds"] or 0.0, never_began=never_began, **about)

    def _finished(self) -> Outcome:
        metric = self.study.sweep.metric
        value = metric_at_end(read_log(self.run.log), metric, export=self.settings.get("export", "last"))
        if value is None:
            return self._outcome("FAIL", reason=f"its training_log.csv has no {metric} at the end")
        return self._outcome("COMPLETE", value=value)


def _has_ended(process: subprocess.Popen, seconds: float = 0.3) -> bool:
    """Wait for *seconds* for a process, and say whether it has ended."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _name(number: int) -> str:
    return signal.Signals(number).name


def describe_values(values: Mapping[str, Any]) -> str:
    """The values of a trial for messages: `lr 0.00123, optimizer.name adamw`."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items())


def format_value(value: Any) -> str:
    """A value for messages and tables."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, list | dict | bool) or value is None else str(value)
