"""The run directory: what a training run leaves, who may write to it, and when it may be continued.

run.json       what the run was started with (settings, lineage, digests of dataset and parent), and how it ended
config.yaml    the resolved settings
lock           held by the trainer that writes here
checkpoints/   last.ckpt to continue from, and the finished <name>_epoch=E-step=S.ckpt
events.…       TensorBoard
"""

import fcntl
import json
import os
import shutil
import socket
from pathlib import Path

import yaml

from cxt.errors import BadRequest
from cxt.files import atomic_write, check_writable
from cxt.lineage import file_sha256


class RunDirectory:
    """One run's directory, locked by this process from `lock` until it ends."""

    def __init__(self, path):
        self.path = Path(path)
        self._lock = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The save that an interrupted run continues from."""
        return self.checkpoints / "last.ckpt"

    def lock(self) -> None:
        """Take the directory for this process; BadRequest says who has it.

        `lockf` dies with its process and is not inherited by forked loader workers.
        """
        check_writable(self.path / "run.json")
        self._lock = open(self._lock_path(), "a+")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "an unknown process"
            raise BadRequest(f"{self.path} is in use by {holder}; wait for it or stop it, then try again") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def _lock_path(self) -> Path:
        # Beside the directory, so that superseding (renaming) it does not move the lock away.
        return self.path.with_name(self.path.name + ".lock")

    def state(self) -> dict | None:
        """What run.json says, or None for a directory in which nothing was started."""
        path = self.path / "run.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise BadRequest(f"{path} is damaged: {error}; delete {self.path} to start afresh") from None

    def supersede(self) -> Path:
        """Rename the directory to `…-superseded-N`, make an empty one, and return the new name of the old."""
        n = 1
        while (old := self.path.with_name(f"{self.path.name}-superseded-{n}")).exists():
            n += 1
        self.path.rename(old)
        self.path.mkdir()
        return old

    def discard_if_empty(self) -> None:
        """Remove the directory again if nothing was started in it."""
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def start(self, identity: dict, settings: dict) -> None:
        """Record what the run is started with."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=True).encode())
        self._write_state({"identity": identity, "finished": None})

    def finish(self, checkpoint: Path) -> None:
        """Record that training is complete and which file is its result."""
        state = self.state()
        state["finished"] = {"checkpoint": checkpoint.name, "sha256": file_sha256(checkpoint)}
        self._write_state(state)

    def _write_state(self, state: dict) -> None:
        atomic_write(self.path / "run.json", (json.dumps(state, indent=1, sort_keys=True) + "\n").encode())

    def finished_checkpoint(self) -> Path | None:
        """The finished checkpoint, if the run is complete and the file is whole."""
        state = self.state()
        if not state or not state["finished"]:
            return None
        path = self.checkpoints / state["finished"]["checkpoint"]
        if path.exists() and file_sha256(path) == state["finished"]["sha256"]:
            return path
        return None

    def publish(self, out) -> None:
        """Copy the finished checkpoint to *out*, byte for byte, under a temporary name first."""
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".tmp")
        shutil.copyfile(self.finished_checkpoint(), temporary)
        temporary.replace(out)


def next_version(log_dir) -> Path:
    """`<log_dir>/lightning_logs/version_N`, N one more than the largest there is."""
    return _versions(log_dir) / f"version_{max(_numbers(log_dir), default=-1) + 1}"


def newest_version(log_dir) -> Path:
    """The newest `version_N` below *log_dir*; BadRequest if there is none to resume."""
    numbers = _numbers(log_dir)
    if not numbers:
        raise BadRequest(f"nothing to resume: there is no run below {_versions(log_dir)}; leave --resume out to start one")
    return _versions(log_dir) / f"version_{max(numbers)}"


def _versions(log_dir) -> Path:
    return Path(log_dir) / "lightning_logs"


def _numbers(log_dir) -> list[int]:
    names = [path.name.removeprefix("version_") for path in _versions(log_dir).glob("version_*") if path.is_dir()]
    return [int(name) for name in names if name.isdigit()]
