"""A sweep in two processes that are killed and continued, and its best trial trained again."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.interruptions import in_group_of
from helpers.repository import REPOSITORY, run_python
from helpers.training import equal, weights

from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import read_log

FLAGS = [
    "--model", "broad", "--layers", 1, "--width", 16, "--batch-size", 4, "--grad-accum", 1, "--epochs", 4, "--threads", 1,
    "--devices", 0, "--min-lr", 0, "--decay-steps", 0, "--warmup-steps", 2, "--validate-every", 12, "--validation-items", 8,
    "--decode-items", 0, "--save-every", 5, "--save-minutes", 0,
]  # fmt: skip

SWEEP = {
    "method": "bayes",
    "metric": {"name": "val_loss", "goal": "minimize"},
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1},
        "heads": {"values": [1, 2, 3]},  # a width of 16 cannot be divided among three heads
        "optimizer.name": {"values": ["adamw", "sgd"]},
    },
    "early_terminate": {"type": "median", "min_iter": 2, "min_trials": 3},
}


class Worker:
    """A process of a sweep, with its trainers in a session of its own."""

    def __init__(self, directory: Path, dataset: Path, *, count: int, sweep=SWEEP, flags=()):
        (directory / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        words = ["-m", "cxt", "sweep", *FLAGS, *flags, "--dataset-path", dataset, "--sweep", directory / "sweep.yaml"]
        words += ["--count", count, "--out", directory / "out"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
        self.out, self.began = directory / "out", time.time()
        self.said = directory / f"said-{time.monotonic_ns()}"
        with open(self.said, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)], env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait_until_it_trains(self) -> None:
        """Until a trial of this process has written a row of its log, or the process has ended."""
        while self.process.poll() is None:
            begun = re.findall(r"trial (\d+) (?:begins|continues)", self.said.read_text())
            log = self.out / "trials" / (begun or ["none"])[-1] / "training_log.csv"
            if log.exists() and log.stat().st_mtime > self.began:
                return
            time.sleep(0.02)

    def stop(self, number: int) -> int:
        """Send a signal to the sweep's process alone, and see that nothing is left of its group."""
        self.process.send_signal(number)
        status = self.process.wait(120)
        until = time.monotonic() + 20
        while (left := in_group_of(self.process.pid)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left, self.said.read_text()
        return status


def read_rows(directory: Path) -> list[dict]:
    with open(directory / "out" / "sweep.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def continued_states(directory: Path) -> int:
    """How often a trainer has continued from a training state."""
    return sum(path.read_text().count("continuing from") for path in (directory / "out" / "trials").glob("*.log"))


def assert_best_trains_again(directory: Path, rows: list[dict]) -> None:
    """best.yaml has the settings of the best trial, whose weights it trains to the bit."""
    best = min((row for row in rows if row["state"] == "complete"), key=lambda row: float(row["val_loss"]))
    run_python("-m", "cxt.train", "--config", directory / "out" / "best.yaml", "--run-dir", directory / "again")
    again, before = RunDirectory(directory / "again"), RunDirectory(directory / "out" / "trials" / best["number"])
    assert equal(weights(again.finished_checkpoint()), weights(before.finished_checkpoint()))
    assert read_log(again.log)[-1]["val_loss"] == float(best["val_loss"])


@pytest.mark.long
def test_two_processes_that_are_killed(dataset, tmp_path):
    rng = random.Random(1)
    count, kills = 12, 6
    workers = [Worker(tmp_path, dataset, count=count) for _ in range(2)]
    for kill in range(kills):
        place = kill % 2
        worker = workers[place]
        if kill > 1:  # soon after a row of the log, so that there is a training state and the trial is not finished
            worker.wait_until_it_trains()
        time.sleep(rng.uniform(0, 3 if kill < 2 else 0.1))
        if worker.process.poll() is not None:
            assert worker.process.returncode == 0, worker.said.read_text()
            continue
        number = signal.SIGTERM if kill == 3 else signal.SIGKILL
        status = worker.stop(number)
        assert status in ((143, 0) if number == signal.SIGTERM else (-9, 0)), worker.said.read_text()
        workers[place] = Worker(tmp_path, dataset, count=count)
    for worker in workers:
        assert worker.process.wait(900) == 0, worker.said.read_text()
    last = Worker(tmp_path, dataset, count=count)  # a killed trial may have been left to nobody
    assert last.process.wait(900) == 0
    said = "".join(path.read_text() for path in tmp_path.glob("said-*"))
    rows = read_rows(tmp_path)
    assert [int(row["number"]) for row in rows] == list(range(count))
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    assert " continues: " in said
    assert continued_states(tmp_path)
    refused = [row for row in rows if "refused: width 16 is not a multiple of 6" in row["reason"]]
    assert refused
    assert all(row["heads"] == "3" and row["state"] == "pruned" for row in refused)
    assert any("the best so far is worse than the median" in row["reason"] for row in rows)
    for row in rows:  # interrupted or not, each row of a log is there once
        steps = [entry["step"] for entry in read_log(tmp_path / "out" / "trials" / row["number"] / "training_log.csv")]
        assert steps == sorted(set(steps))
    for name in ("history.png", "importance.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert "12 trials: " in last.said.read_text()
    assert_best_trains_again(tmp_path, rows)


@pytest.mark.long
def test_one_process_goes_on_as_if_nothing_had_happened(dataset, tmp_path):
    """Values, prunings and results of a killed sweep are those of an undisturbed one; more trials are added to both."""
    directories = [tmp_path / "killed", tmp_path / "undisturbed"]
    for directory in directories:
        directory.mkdir()
    for kill in range(4):
        worker = Worker(directories[0], dataset, count=5)
        worker.wait_until_it_trains()
        time.sleep(kill)
        if worker.process.poll() is None:
            worker.stop(signal.SIGKILL)
    for directory in directories:
        assert Worker(directory, dataset, count=5).process.wait(900) == 0
    assert continued_states(directories[0])
    killed, undisturbed = ([{key: row[key] for key in row if key != "seconds"} for row in read_rows(d)] for d in directories)
    assert killed == undisturbed


@pytest.mark.long
def test_trials_that_fail(dataset, tmp_path):
    """A trial whose loss is not finite has failed, and the sweep goes on; a grid ends by itself."""
    sweep = {"method": "grid", "metric": {"name": "val_loss"}, "parameters": {"lr": {"values": [1e-3, 1e30]}}}
    worker = Worker(tmp_path, dataset, count=5, sweep=sweep, flags=["--heads", 2])
    assert worker.process.wait(600) == 0, worker.said.read_text()
    rows = {float(row["lr"]): row for row in read_rows(tmp_path)}
    assert {lr: row["state"] for lr, row in rows.items()} == {1e-3: "complete", 1e30: "failed"}
    assert "is not finite at step" in rows[1e30]["reason"]
    other = Worker(tmp_path, dataset, count=5, sweep=sweep, flags=["--heads", 1])
    assert other.process.wait(120) == 2
    assert "holds another sweep, of heads 2 instead of 1" in other.said.read_text()
