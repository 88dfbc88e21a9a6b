"""The run directory: the files of a training run, and their locks.

run.json             identity of the run (settings, lineage, digests of dataset and parent), and its finished checkpoint
config.yaml          the resolved settings; `python -m cxt.train --config` runs it again
grid.json            the grid of ln generations
model_summary.json   parameters, memory, effective batch, planned steps, FLOPs
training_log.csv     loss, validation, learning rate, gradient norm, throughput
checkpoints/         training states, last.ckpt (a link to the newest), best.ckpt, and the finished <name>_epoch=E-step=S.ckpt
losses.png, tracks.png   curves, and decoded test examples; the latter drawn at validations, too
events.…, hparams.yaml   TensorBoard; the second has the settings that it shows

Beside it, <name>.lock is held by the trainer that writes to the directory.
"""

import json
import shutil
from pathlib import Path

import yaml

from cxt.errors import BadRequest
from cxt.io import Lock, acquire_lock, atomic_file, atomic_write, check_writable, file_sha256, json_text


def target_lock(out) -> Path:
    """The lock file of a file that a run will publish."""
    return Path(out).with_name(f".{Path(out).name}.lock")


class RunDirectory:
    """One run's directory, locked by this process from `lock` until it ends."""

    def __init__(self, path):
        self.path = Path(path)
        self._locks: list[Lock] = []

    @property
    def checkpoints(self) -> Path:
        """The directory of the training states, the best weights and the finished checkpoint."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The training state that an interrupted run continues from."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """The weights of the lowest validation loss."""
        return self.checkpoints / "best.ckpt"

    @property
    def log(self) -> Path:
        """The training log, training_log.csv."""
        return self.path / "training_log.csv"

    def lock(self) -> None:
        """Lock the directory until `release`; BadRequest names a process that already holds the lock."""
        self._locks.append(acquire_lock(self.lock_path, self.path))
        check_writable(self.path / "run.json")

    def lock_target(self, out) -> None:
        """Lock the file that the run will publish: a trainer of another run may be about to publish to the same file."""
        self._locks.append(acquire_lock(target_lock(out), Path(out)))

    def release(self) -> None:
        """Release all locks, and mark in the lock files that this process ended cleanly."""
        for lock in self._locks:
            lock.close()
        self._locks.clear()

    def abandon(self) -> None:
        """Release the directory if it was locked, and remove it if it is empty."""
        if self._locks and self.path.is_dir():
            self.discard_if_empty()
        self.release()

    def remove(self) -> None:
        """Remove the directory, which must be locked, and then its lock file."""
        shutil.rmtree(self.path)
        for lock in self._locks:
            lock.close(remove=lock.path == self.lock_path)
        self._locks.clear()

    @property
    def lock_path(self) -> Path:
        """The lock file, `<name>.lock` beside the directory."""
        # Beside the directory, so that superseding (renaming) it does not move the lock.
        return self.path.with_name(self.path.name + ".lock")

    def read_record(self) -> dict | None:
        """The content of run.json, or None for a directory without a run."""
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{path} is damaged: {error}; delete {self.path} to start afresh") from None

    def supersede(self) -> Path:
        """Rename the directory to `…-superseded-N`, create an empty one, and return the new name of the old one."""
        n = 1
        while (old := self.path.with_name(f"{self.path.name}-superseded-{n}")).exists():
            n += 1
        self.path.rename(old)
        self.path.mkdir()
        return old

    def restore(self, old: Path) -> None:
        """Put the run that was superseded as *old* back, and drop what is in its place, of which no run has come."""
        shutil.rmtree(self.path)
        old.rename(self.path)

    def discard_if_empty(self) -> None:
        """Remove the directory if it is empty."""
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def start(self, identity: dict, settings: dict, *, grid: dict, summary: dict) -> None:
        """Record the start of the run: its identity, settings, grid and summary."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=True).encode())
        for name, content in (("grid.json", grid), ("model_summary.json", summary)):
            atomic_write(self.path / name, json_text(content).encode())
        self._write_record({"identity": identity, "finished": None})

    def finish(self, checkpoint: Path) -> None:
        """Record that training is complete and which file in `checkpoints/` is its result."""
        record = self.read_record()
        record["finished"] = {"checkpoint": checkpoint.name, "sha256": file_sha256(checkpoint)}
        self._write_record(record)

    def _write_record(self, record: dict) -> None:
        atomic_write(self.path / "run.json", json_text(record, sort_keys=True).encode())

    def finished_checkpoint(self) -> Path | None:
        """The finished checkpoint, if the run is complete and the file is intact."""
        record = self.read_record()
        if not record or not record["finished"]:
            return None
        path = self.checkpoints / record["finished"]["checkpoint"]
        if path.exists() and file_sha256(path) == record["finished"]["sha256"]:
            return path
        return None

    def publish(self, out) -> None:
        """Copy the finished checkpoint to *out*, byte for byte and atomically."""
        with open(self.finished_checkpoint(), "rb") as finished, atomic_file(out) as file:
            shutil.copyfileobj(finished, file)

    def publish_log(self, out) -> None:
        """Copy the training log to *out*."""
        atomic_write(out, self.log.read_bytes())


def next_version(log_dir) -> Path:
    """`<log_dir>/lightning_logs/version_N`, with N one more than the largest existing one."""
    return _versions(log_dir) / f"version_{max(_numbers(log_dir), default=-1) + 1}"


def has_versions(log_dir) -> bool:
    """Whether there is a run below *log_dir*."""
    return bool(_numbers(log_dir))


def newest_version(log_dir) -> Path:
    """The newest `version_N` below *log_dir*; BadRequest if there is none to resume."""
    numbers = _numbers(log_dir)
    if not numbers:
        raise BadRequest(f"nothing to resume: there is no run below {_versions(log_dir)}; omit --resume to start one")
    return _versions(log_dir) / f"version_{max(numbers)}"


def _versions(log_dir) -> Path:
    return Path(log_dir) / "lightning_logs"


def _numbers(log_dir) -> list[int]:
    names = [path.name.removeprefix("version_") for path in _versions(log_dir).glob("version_*") if path.is_dir()]
    return [int(name) for name in names if name.isdigit()]
