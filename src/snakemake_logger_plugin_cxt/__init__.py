"""A Snakemake logger, `snakemake --logger cxt`: a line of progress per stage and checkpoint, and everything that went wrong.

Snakemake finds it by the name of this package. Snakemake's own messages, job by job, are in `.snakemake/log/` as always. What
trainers and evaluations print is not touched.
"""

import sys
import time
from collections import Counter
from logging import WARNING, LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

SECONDS = 30
"""Least time between two lines of a stage, but for its last one."""

STAGES = {
    "genetic_map": ("simulate", "genetic maps"),
    "simulate": ("simulate", "simulation batches"),
    "synthetic_mask": ("preprocess", "masks"),
    "preprocess": ("preprocess", "preprocessed batches"),
    "manifest": ("preprocess", "datasets"),
    "teach": ("teach", "taught batches"),
    "train": ("train", "checkpoints"),
    "evaluate": ("evaluate", "checkpoints"),
    "translate_blocks": ("translate", "parts"),
    "translate": ("translate", "translations"),
}
"""{rule: (stage, what its jobs make)}. Other rules take seconds."""

SHOWN_EVENTS = (LogEvent.JOB_ERROR, LogEvent.GROUP_ERROR, LogEvent.ERROR)


class LogHandler(LogHandlerBase):
    """Prints progress to standard error."""

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._planned: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._jobs: dict[int, tuple[str, str]] = {}  # rule and output of each job
        self._printed: dict[str, float] = {}

    def emit(self, record: LogRecord) -> None:
        """Print what a record says, if it is progress or a problem."""
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self._show_plan(record.__dict__["stats"])
        elif event == LogEvent.JOB_INFO:
            job = record.__dict__
            self._jobs[job["jobid"]] = (job["rule_name"], next(iter(job["output"] or ()), ""))
        elif event == LogEvent.JOB_FINISHED:
            self._show_finished(*self._jobs.get(record.__dict__["job_id"], ("", "")))
        elif event in SHOWN_EVENTS or record.levelno >= WARNING or record.getMessage().startswith("Nothing to be done"):
            text = self.format(record)
            if text and text != "None":
                self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _show_plan(self, stats: dict) -> None:
        """Print how many jobs of each stage there are."""
        for rule, count in stats.items():
            self._planned[rule] += count
        parts = [
            f"{what}: {self._planned[rule]}" for rule, (_, what) in STAGES.items() if rule != "evaluate" and self._planned[rule]
        ]
        if self._planned["evaluate"]:
            parts.append(f"evaluations: {self._planned['evaluate']}")
        if parts:
            self._print(f"to make: {'; '.join(parts)}")

    def _show_finished(self, rule: str, output: str) -> None:
        """Count a finished job, and print its stage's progress if it is time."""
        if rule not in STAGES:
            return
        self._done[rule] += 1
        stage, what = STAGES[rule]
        done, planned, now = self._done[rule], self._planned[rule], time.monotonic()
        if done < planned and rule != "train" and now - self._printed.get(rule, self._began) < SECONDS:
            return
        self._printed[rule] = now
        minutes, seconds = divmod(round(now - self._began), 60)
        name = f" ({Path(output).stem})" if rule == "train" else ""
        self._print(f"[{minutes:3d}:{seconds:02d}] {stage}: {what} {done} of {planned}{name}")

    @property
    def writes_to_stream(self) -> bool:
        """Snakemake's own messages are not printed beside it."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """Nothing is written to a file."""
        return False

    @property
    def has_filter(self) -> bool:
        """All records are wanted, whatever --quiet says."""
        return True

    @property
    def has_formatter(self) -> bool:
        """Problems are formatted as Snakemake does it."""
        return False

    @property
    def needs_rulegraph(self) -> bool:
        """The graph of rules is not needed."""
        return False
