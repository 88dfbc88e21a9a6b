"""The run directories of the workflow: listing them, and removing those that the configuration no longer uses.

cxt runs [--configfile my.yaml]             list them
cxt runs --prune                            remove those of other lineages, after confirmation
"""

import contextlib
import sys
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
        + (f"current: {run.model}" if run.model else "not used by this configuration")
        for run in runs
    )


def prune(runs: list[Run], *, yes: bool) -> None:
    """Remove the runs that no model uses and no trainer holds, after asking on the terminal unless *yes*."""
    old = [run for run in runs if run.model is None and not run.in_use]
    if not old:
        print("nothing to remove")
        return
    size = sum(run.bytes for run in old) / 1e6
    print(
        f"Runs to remove ({size:.1f} MB). If another overlay still uses one, cancel and pass that overlay with --configfile:\n"
        f"{format_runs(old)}"
    )
    if not yes:
        if not sys.stdin.isatty():
            raise BadRequest("--prune asks for confirmation, but there is no terminal; add --yes to remove without asking")
        if input("Remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return
    removed = 0
    for path in [run.path for run in old]:
        run = RunDirectory(path)
        try:
            run.lock()
        except BadRequest as error:  # a trainer started while waiting for the answer
            print(f"not removed: {error}")
            continue
        try:
            run.remove()
            removed += 1
        except OSError as error:
            print(f"not removed: {error}")
        finally:
            run.release()
    print(f"{removed} removed")
