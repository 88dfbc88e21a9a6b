"""Runs that are interrupted, and end as if they had not been.

`make test-resume` runs the whole matrix with twenty kills each; by default there are a few. With `-k "once_each"` it is one
combination of each kind of training: twenty `kill -9`, and twenty signals to all processes.
"""

import contextlib
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import REPOSITORY, constant_scenario, run_python

from cxt.rundir import RunDirectory
from cxt.runlog import TIMING, read_log
from cxt.saves import saves_of
from cxt.signals import SIGNALS, STATUS

KILLS = int(os.environ.get("CXT_RESUME_KILLS", "0"))
"""Kills of every combination of the matrix; 0 runs three combinations with two kills."""

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
    from cxt.errors import exit_on_bad_request
    from cxt.signals import end_at_once, ignore
    from cxt.train import main

    end_at_once()
    exit_on_bad_request(main)
    ignore()


class Trainer:
    """A trainer in a session of its own: forked from a process that only imports, which saves seconds, or a command."""

    def __init__(self, arguments: list[str], out: Path, *, forks: bool):
        self.out = out
        out.unlink(missing_ok=True)  # what the one before has said
        if forks:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["cxt.train", "cxt.fit", "matplotlib.pyplot"])
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
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


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
    assert len(saves_of(first)) == 2
    for name in names:
        one, other = (torch.load(run.checkpoints / name, weights_only=True) for run in (first, second))
        assert same(everything_but_time(one), everything_but_time(other)), name
    logs = [[{key: row[key] for key in row if key not in TIMING} for row in read_log(run.log)] for run in (first, second)]
    assert len(logs[0]) > 20
    assert logs[0] == logs[1]
    steps = [row["step"] for row in logs[0]]
    assert steps == sorted(set(steps))
    assert any(row["val_loss"] for row in logs[0])


KINDS = ("plain", "adapter", "resume_adapter", "simulate")


@pytest.fixture(scope="module")
def parents(dataset, dataset_n10, tmp_path_factory):
    """{kind: arguments that name its data and parent}."""
    directory = tmp_path_factory.mktemp("parents")
    plain, adapter = directory / "plain.ckpt", directory / "adapter.ckpt"
    few = ["--devices", 0, "--epochs", 1]
    finish(command("--dataset-path", dataset, *few, "--run-dir", directory / "plain", "--out", plain))
    on_plain = ["--dataset-path", dataset_n10, "--adapter", "--adapter-bottleneck", 4, "--adapter-dropout", 0.1, "--last-n", 1]
    finish(command(*on_plain, "--checkpoint", plain, *few, "--run-dir", directory / "adapter", "--out", adapter))
    live = directory / "live.yaml"
    live.write_text(yaml.safe_dump({"scenarios": {"little": constant_scenario(sequence_length=10_000)}}))
    return {
        "simulate": ["--simulate", "little", "--configfile", live, "--window-size", 1000, "--eval-samples", 8],
        "plain": ["--dataset-path", dataset],
        "adapter": [*on_plain, "--checkpoint", plain],
        "resume_adapter": [*on_plain, "--resume-adapter", adapter],
    }


MATRIX = [
    (kind, workers, accumulation, ranks)
    for kind in KINDS
    for workers in (0, 2)
    for accumulation in (1, 3)
    for ranks in (1, 2)
]  # fmt: skip
FEW = [("plain", 0, 3, 1), ("resume_adapter", 2, 1, 1), ("adapter", 0, 1, 2)]
ONCE_EACH = [("plain", 0, 3, 1), ("adapter", 0, 1, 1), ("resume_adapter", 2, 1, 1), ("simulate", 2, 1, 1)]


def named(combinations) -> list:
    """Parameters of a test, of which those of ONCE_EACH can be chosen by `-k once_each`."""
    return [
        pytest.param(*each, id="-".join(map(str, each)) + ("-once_each" if each in ONCE_EACH else "")) for each in combinations
    ]


def arguments_of(parents, kind: str, workers: int, accumulation: int, ranks: int, *, steps: int) -> list[str]:
    devices = ["--devices", 0] if ranks == 1 else ["--accelerator", "cpu", "--devices", 2]
    epochs = math.ceil(steps / ((100 if kind == "plain" else 50) // ranks // 4 // accumulation))
    return command(
        *parents[kind], *devices, "--workers", workers, "--grad-accum", accumulation, "--max-steps", steps,
        *([] if kind == "simulate" else ["--epochs", epochs]),
    )  # fmt: skip


def compare_and_forget(directory: Path) -> None:
    """The run `cut` and its checkpoint are equal to those of `whole`; they are removed, to be made once more."""
    assert_equal_runs(directory / "whole", directory / "cut")
    assert (directory / "whole.ckpt").read_bytes() == (directory / "cut.ckpt").read_bytes()
    shutil.rmtree(directory / "cut")
    (directory / "cut.ckpt").unlink()


@pytest.mark.parametrize(("kind", "workers", "accumulation", "ranks"), named(MATRIX if KILLS else FEW))
def test_killed_at_random_moments(parents, tmp_path, kind, workers, accumulation, ranks):
    steps = 100 * min(KILLS or 2, 5)
    arguments = arguments_of(parents, kind, workers, accumulation, ranks, steps=steps)
    directory, out = tmp_path / "cut", tmp_path / "cut.ckpt"
    finish([*arguments, "--run-dir", str(tmp_path / "whole"), "--out", str(tmp_path / "whole.ckpt")])
    cut = [*arguments, "--run-dir", str(directory), "--out", str(out)]
    rng = np.random.default_rng([KINDS.index(kind), workers, accumulation, ranks])
    kills = continued = runs = 0
    while kills < (KILLS or 2) or not runs:
        trainer = Trainer(cut, tmp_path / "said", forks=ranks == 1)
        said = kill_at_a_random_moment(trainer, directory, rng)
        continued += "continuing from" in said
        if not out.exists():
            kills += 1
            if kills < (KILLS or 2):
                continue
            said = finish(cut)
            continued += "continuing from" in said
        runs += 1
        compare_and_forget(tmp_path)
    print(
        f"{kind}, {workers} workers, accumulation {accumulation}, {ranks} ranks: {kills} kills of {runs} runs, {steps} steps "
        f"each, {continued} tries continued a save"
    )
    assert continued


HEARD = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
"""Under `nohup` that one is not."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc whether a trainer listens yet")
@pytest.mark.parametrize(
    ("kind", "workers", "accumulation", "ranks"),
    named(MATRIX if KILLS else [("simulate", 2, 1, 2)]),
)
def test_signals_to_all_processes(parents, tmp_path, kind, workers, accumulation, ranks):
    """As `timeout`, a scheduler or a terminal sends them: the status that is documented, a line, and nobody left behind.

    The trainer alone is killed now and then, too: what it has started ends with it.
    """
    count = KILLS or 5
    arguments = arguments_of(parents, kind, workers, accumulation, ranks, steps=100 * min(KILLS or 2, 5))
    directory, out = tmp_path / "cut", tmp_path / "cut.ckpt"
    finish([*arguments, "--run-dir", str(tmp_path / "whole"), "--out", str(tmp_path / "whole.ckpt")])
    cut = [*arguments, "--run-dir", str(directory), "--out", str(out)]
    rng = np.random.default_rng([9, KINDS.index(kind), workers, accumulation, ranks])
    sent = continued = saved = runs = 0
    while sent < count or not runs:
        number = (signal.SIGKILL, *HEARD)[sent % (1 + len(HEARD))]
        if sent < count:
            trainer = Trainer(cut, tmp_path / "said", forks=ranks == 1)
            said = signal_at_a_random_moment(trainer, directory, rng, number)
            assert "Traceback" not in said, said
            if trainer.status():
                sent += 1
                assert trainer.status() == STATUS.get(number, -number), said
                assert number == signal.SIGKILL or f"stopped by {signal.Signals(number).name}" in said, said
        else:
            said = finish(cut)
        continued += "continuing from" in said
        saved += "; the same command continues from step" in said
        if out.exists():
            runs += 1
            compare_and_forget(tmp_path)
    print(
        f"{kind}, {workers} workers, accumulation {accumulation}, {ranks} ranks: {sent} signals in {runs} runs, {saved} tries "
        f"saved, {continued} continued a save"
    )
