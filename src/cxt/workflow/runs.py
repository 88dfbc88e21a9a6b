"""The run directories of the workflow, and which model uses each."""

import contextlib
from pathlib import Path
from typing import NamedTuple

from cxt.checkpoints.run_directory import RunDirectory
from cxt.errors import BadRequest
from cxt.io import is_locked
from cxt.trainer.training_state import list_training_states
from cxt.workflow.lineages import run_directory


class Run(NamedTuple):
    """A run directory: a description of its state, its size, and the model that uses it (None: no model)."""

    path: Path
    progress: str
    bytes: int
    model: str | None
    in_use: bool


def describe_progress(run: RunDirectory, *, in_use: bool) -> str:
    """Describe the progress of a run."""
    try:
        record = run.read_record()
    except BadRequest:
        return "damaged"
    if record["finished"]:
        return "finished" if run.finished_checkpoint() else "finished, its checkpoint is missing"
    states = list_training_states(run)
    saved = f"saved at {states[0].stem.replace('=', ' ')}" if states else "nothing saved"
    return f"{'training' if in_use else 'interrupted'}, {saved}"


def list_runs(directory: Path, config: dict) -> list[Run]:
    """All run directories below *directory*, by name."""
    wanted = {Path(run_directory(config, model)).name: model for model in config["models"]}
    runs = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if (path / "run.json").is_file():  # other directories are not runs, and must not be removed
            run = RunDirectory(path)
            in_use = is_locked(run.lock_path)
            runs.append(Run(path, describe_progress(run, in_use=in_use), _size(path), wanted.get(path.name), in_use))
    return runs


def _size(directory: Path) -> int:
    """Bytes of the files below a directory, in which a trainer may be running."""
    total = 0
    for file in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += 0 if file.is_dir() else file.lstat().st_size
    return total


def format_runs(runs: list[Run]) -> str:
    """The runs as text, one per line."""
    width = max((len(run.path.name) for run in runs), default=0)
    progress_width = max((len(run.progress) for run in runs), default=0)
    return "\n".join(
        f"{run.path.name:{width}}  {run.progress:{progress_width}}  {run.bytes / 1e6:9.1f} MB  "
        + (f"current: {run.model}" if run.model else "not of this configuration")
        for run in runs
    )


def remove_run(run: Run) -> None:
    """Remove a run directory and its lock.

    Raises
    ------
    BadRequest
        A trainer holds it.
    OSError
        It cannot be removed.
    """
    directory = RunDirectory(run.path)
    directory.lock()
    try:
        directory.remove()
    finally:
        directory.release()
