"""Runs that are interrupted, and end as if they had not been.

`make test-resume` runs the whole matrix with twenty kills each; by default there are a few.
"""

import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_python

from cxt.rundir import RunDirectory
from cxt.runlog import TIMING, read_log
from cxt.saves import saves_of

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
        else:
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "cxt.train", *arguments]
            with open(out, "w") as file:
                self.process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)
            self.ended, self.wait = (lambda: self.process.poll() is not None), self.process.wait

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


def kill_at_a_random_moment(trainer: Trainer, run: Path, rng) -> str:
    """Kill a trainer: in one case of five while it starts, else as it trains."""
    log = RunDirectory(run).log
    before = log.stat().st_mtime_ns if log.exists() else 0
    while not trainer.ended() and "parameters train" not in trainer.said():
        time.sleep(0.005)
    if rng.random() > 0.2:
        while not trainer.ended() and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.005)
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


KINDS = ("plain", "adapter", "resume_adapter")


@pytest.fixture(scope="module")
def parents(dataset, dataset_n10, tmp_path_factory):
    """{kind: arguments that name its data and parent}."""
    directory = tmp_path_factory.mktemp("parents")
    plain, adapter = directory / "plain.ckpt", directory / "adapter.ckpt"
    few = ["--devices", 0, "--epochs", 1]
    finish(command("--dataset-path", dataset, *few, "--run-dir", directory / "plain", "--out", plain))
    on_plain = ["--dataset-path", dataset_n10, "--adapter", "--adapter-bottleneck", 4, "--adapter-dropout", 0.1, "--last-n", 1]
    finish(command(*on_plain, "--checkpoint", plain, *few, "--run-dir", directory / "adapter", "--out", adapter))
    return {
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


@pytest.mark.parametrize(("kind", "workers", "accumulation", "ranks"), MATRIX if KILLS else FEW)
def test_killed_at_random_moments(parents, tmp_path, kind, workers, accumulation, ranks):
    steps = 100 * min(KILLS or 2, 5)
    epochs = math.ceil(steps / ((100 if kind == "plain" else 50) // ranks // 4 // accumulation))
    devices = ["--devices", 0] if ranks == 1 else ["--accelerator", "cpu", "--devices", 2]
    arguments = command(
        *parents[kind], *devices, "--workers", workers, "--grad-accum", accumulation, "--epochs", epochs, "--max-steps", steps,
    )  # fmt: skip
    whole, directory, out = tmp_path / "whole", tmp_path / "cut", tmp_path / "cut.ckpt"
    finish([*arguments, "--run-dir", str(whole), "--out", str(tmp_path / "whole.ckpt")])
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
        assert_equal_runs(whole, directory)
        assert (tmp_path / "whole.ckpt").read_bytes() == out.read_bytes()
        shutil.rmtree(directory)
        out.unlink()
    print(
        f"{kind}, {workers} workers, accumulation {accumulation}, {ranks} ranks: {kills} kills of {runs} runs, {steps} steps "
        f"each, {continued} tries continued a save"
    )
    assert continued
