"""Profiling: where the time of a run's first steps goes."""

import cProfile
import io
import pstats
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler

from cxt.console import get_logger
from cxt.io import atomic_write

logger = get_logger(__name__)

MOST_ROWS = 40
"""Functions or operators in a report."""

PARTS = {
    "moving to the device": (".batch_to_device",),
    "forward": (".training_step",),
    "backward": (".backward",),
}
"""Parts of a step, and the ends of the names of Lightning's actions of which they consist."""


class Profiling(Callback):
    """Profiles some batches at the start of a run, after the first one, and says where their time went.

    The report is written to the run directory: `profile.txt`, and for *kind* `pytorch` also `profile-trace.json`, to be opened
    in Perfetto or chrome://tracing. On a GPU, kernels run while Python goes on, so that only `pytorch` tells what they take.

    Parameters
    ----------
    directory : path-like
        The run directory.
    name : str
        Name of the run, for messages.
    kind : str
        `simple`: Lightning's actions; `advanced`: every Python function (cProfile); `pytorch`: every torch operator.
    batches : int
        Micro-batches to profile.
    """

    def __init__(self, directory, name: str, *, kind: str, batches: int):
        self.directory, self.name, self.kind, self.batches = Path(directory), name, kind, batches
        self._seen, self._actions = 0, None
        self._functions = cProfile.Profile() if kind == "advanced" else None
        self._operators = torch.profiler.profile() if kind == "pytorch" else None

    @property
    def _active(self) -> bool:
        return self._actions is not None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Begin after the first batch of this process, which compiles and allocates, and end when enough were seen."""
        self._seen += 1
        if self._seen == 1:
            self._begin(trainer)
        elif self._active and self._seen > self.batches:
            self._end(trainer)

    def on_train_end(self, trainer, module) -> None:
        """Write the report of a run that has fewer batches."""
        if self._active:
            self._end(trainer)

    def _begin(self, trainer) -> None:
        self._began, self._waited, self._first = time.perf_counter(), trainer.train_dataloader.waited, self._seen
        self._actions = trainer.profiler = SimpleProfiler()
        if self._operators is not None:
            self._operators.start()
        if self._functions is not None:
            self._functions.enable()

    def _end(self, trainer) -> None:
        if self._functions is not None:
            self._functions.disable()
        if self._operators is not None:
            self._operators.stop()
        actions, self._actions, trainer.profiler = self._actions, None, PassThroughProfiler()
        seconds = time.perf_counter() - self._began
        batches = self._seen - self._first
        if not batches:
            logger.warning(f"{self.name}: nothing was profiled, because the run has only one batch")
            return
        waited = trainer.train_dataloader.waited - self._waited
        parts = divide_time(actions.recorded_durations, seconds=seconds, waited=waited)
        summary = format_parts(parts, batches=batches)
        logger.info(
            f"{self.name}: {batches} batch{'' if batches == 1 else 'es'} took {1000 * seconds / batches:.1f} ms each: {summary}"
        )
        report = self._report(actions)
        atomic_write(self.directory / "profile.txt", f"{batches} batches: {summary}\n\n{report}\n".encode())
        if self._operators is not None:
            self._operators.export_chrome_trace(str(self.directory / "profile-trace.json"))
        logger.info(f"{self.name}: profile in {self.directory}/profile.txt")

    def _report(self, actions: SimpleProfiler) -> str:
        if self._functions is not None:
            out = io.StringIO()
            pstats.Stats(self._functions, stream=out).sort_stats("cumulative").print_stats(MOST_ROWS)
            return out.getvalue()
        if self._operators is not None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return self._operators.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=MOST_ROWS)
        return actions.summary()


def divide_time(durations: Mapping[str, list[float]], *, seconds: float, waited: float) -> dict[str, float]:
    """Divide the time of some batches among the parts of a step.

    Parameters
    ----------
    durations : mapping
        Seconds of each call of each of Lightning's actions.
    seconds : float
        Time of all batches.
    waited : float
        Seconds of waiting for data.

    Returns
    -------
    dict of str to float
        Seconds by part. The optimizer's are those of a batch without forward and backward, which Lightning calls within the
        optimizer's step; what is in no part (logs, validation, saving) is `other`.
    """
    sums = {name: sum(calls) for name, calls in durations.items()}
    parts = {"waiting for data": waited}
    for part, ends in PARTS.items():
        parts[part] = sum(value for name, value in sums.items() if name.startswith("[Strategy]") and name.endswith(ends))
    parts["optimizer"] = max(0.0, sums.get("run_training_batch", 0.0) - parts["forward"] - parts["backward"])
    parts["other"] = max(0.0, seconds - sum(parts.values()))
    return parts


def format_parts(parts: Mapping[str, float], *, batches: int) -> str:
    """The parts of a step in milliseconds per batch, and their shares."""
    total = sum(parts.values())
    return ", ".join(f"{name} {1000 * value / batches:.1f} ms ({value / total:.0%})" for name, value in parts.items())
