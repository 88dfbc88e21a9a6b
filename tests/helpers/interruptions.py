"""Trainers that are killed or signalled at random moments, and comparing their runs."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import TIMING, read_log
from cxt.signals import SIGNALS
from cxt.trainer.training_state import list_training_states
from helpers.repository import REPOSITORY, run_python

NETWORK = ["--model", "broad", "--layers", 2, "--heads", 2, "--width", 16, "--dropout", 0.1, "--threads", 1]

TRAINING = [
    "--batch-size", 4, "--lr", 1e-3, "--min-lr", 1e-4, "--decay-steps", 0, "--warmup-steps", 3, "--save-every", 7,
    "--save-minutes", 0, "--validate-every", 11, "--validation-items", 8, "--decode-items", 2, "--log-every", 5,
    "--patience", 1000,
]  # fmt: skip


def command(*arguments) -> list[str]:
    return [*map(str, [*NETWORK, *TRAINING, *arguments])]


def finish(arguments) -> str:
    return run_python("-m", "cxt.train", *arguments, env={"OMP_NUM_THREADS": "1"}).stdout


def _forked(arguments: list[str], out: str) -> None:
    """`python -m cxt.train` in a process that has imported everything already."""
    os.setsid()
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["train", *arguments]
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)  # for its loaders, as where it is started as a command
    from cxt.console import exit_on_bad_request
    from cxt.signals import ignore, install_exit_handler
    from cxt.train import main

    install_exit_handler()
    exit_on_bad_request(main)
    ignore()


class Trainer:
    """A trainer in a session of its own: forked from a process that only imports, which saves seconds, or a command."""

    def __init__(self, arguments: list[str], out: Path, *, forks: bool):
        self.out = out
        out.unlink(missing_ok=True)  # what the one before has said
        if forks:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["cxt.train", "cxt.trainer.fit", "matplotlib.pyplot"])
            self.process = context.Process(target=_forked, args=(arguments, str(out)))
            self.process.start()
            self.ended, self.wait = (lambda: self.process.exitcode is not None), self.process.join
            self.status = lambda: self.process.exitcode
        else:
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "cxt.train", *arguments]
            with open(out, "w") as file:
                self.process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)
            self.ended, self.wait = (lambda: self.process.poll() is not None), self.process.wait
            self.status = lambda: self.process.returncode

    def said(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def kill(self) -> str:
        """`kill -9` of all its processes, and what it has said."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, or has no session yet
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.wait()
        return self.said()


def listens(pid: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    try:
        (caught,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    except OSError:
        return False
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def in_group_of(pid: int) -> list[psutil.Process]:
    """The processes of a group that have not ended."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def signal_at_a_random_moment(trainer: Trainer, run: Path, rng, number: int) -> str:
    """Send a signal to all processes of a trainer, SIGKILL to the first alone, and see that all of them end."""
    pid = trainer.process.pid
    while not trainer.ended() and not listens(pid):
        time.sleep(0.005)
    if rng.random() > 0.4:
        wait_until_it_trains(trainer, run, rng)
    time.sleep(rng.uniform(0, 0.8))
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        (os.kill if number == signal.SIGKILL else os.killpg)(pid, number)
    trainer.wait(60)
    assert trainer.ended(), trainer.said()
    until = time.monotonic() + 20
    while (left := in_group_of(pid)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not left, trainer.said()
    return trainer.said()


def wait_until_it_trains(trainer: Trainer, run: Path, rng) -> None:
    """Until a trainer has said what it will do, and in four cases of five until it has written a row of its log."""
    log = RunDirectory(run).log
    before = log.stat().st_mtime_ns if log.exists() else 0
    while not trainer.ended() and "parameters train" not in trainer.said():
        time.sleep(0.005)
    if rng.random() > 0.2:
        while not trainer.ended() and (not log.exists() or log.stat().st_mtime_ns == before or not has_new_row(trainer, log)):
            time.sleep(0.005)


def has_new_row(trainer: Trainer, log: Path) -> bool:
    """Whether the log, which a continued run first cuts back to the step that it continues from, has a row after that step."""
    continued_from = re.search(r"continuing from \S+step=(\d+)", trainer.said())
    rows = read_log(log)
    return bool(rows) and rows[-1]["step"] > (int(continued_from[1]) if continued_from else 0)


def kill_at_a_random_moment(trainer: Trainer, run: Path, rng) -> str:
    """Kill a trainer: in one case of five while it starts, else as it trains."""
    wait_until_it_trains(trainer, run, rng)
    time.sleep(rng.uniform(0, 0.8))
    return trainer.kill()


def everything_but_time(value):
    """What a save holds, without what no two runs have in common."""
    if isinstance(value, dict):
        return {key: everything_but_time(part) for key, part in value.items() if key not in TIMING}
    if isinstance(value, list):
        return [everything_but_time(part) for part in value]
    return value


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights, everything in the last saves (optimizer, loops, callbacks), and all columns of the log but the timing ones."""
    first, second = RunDirectory(a), RunDirectory(b)
    names = sorted(path.name for path in first.checkpoints.glob("*.ckpt"))
    assert names == sorted(path.name for path in second.checkpoints.glob("*.ckpt"))
    assert len(list_training_states(first)) == 2
    for name in names:
        one, other = (torch.load(run.checkpoints / name, weights_only=True) for run in (first, second))
        assert same(everything_but_time(one), everything_but_time(other)), name
    logs = [[{key: row[key] for key in row if key not in TIMING} for row in read_log(run.log)] for run in (first, second)]
    assert len(logs[0]) > 20
    assert logs[0] == logs[1]
    steps = [row["step"] for row in logs[0]]
    assert steps == sorted(set(steps))
    assert any(row["val_loss"] for row in logs[0])


HEARD = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
"""Under `nohup` that one is not."""
