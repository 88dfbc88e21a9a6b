"""The end of a Slurm allocation, as `squeue` tells it; tests/cluster asks a real one."""

import os
import time

import pytest

from cxt.errors import BadRequest, Failed
from cxt.io import acquire_lock
from cxt.trainer.allocation import find_allocation_end, parse_time_left
from cxt.trainer.launch import _wait_for_lock


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:07\n", 7),
        ("12:34", 754),
        ("1:00:00", 3600),
        ("2-03:04:05", 183_845),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_time_left(text, seconds):
    assert parse_time_left(text) == seconds


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A `squeue` that prints what a test says, and the job id."""

    def answer(text: str, status: int = 0) -> None:
        program = tmp_path / "squeue"
        program.write_text(f'#!/bin/sh\n[ "$3" = 17 ] || exit 9\necho "{text}"\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "17")

    return answer


@pytest.mark.parametrize(
    ("left", "margin"),
    [("2:00", 40), ("10:00", 120), ("20:00", 120), ("1-00:00:00", 4320)],
)
def test_training_ends_before_the_allocation(squeue, left, margin):
    squeue(left)
    assert find_allocation_end() == pytest.approx(time.monotonic() + parse_time_left(left) - margin, abs=2)


def test_no_limit_and_no_allocation(squeue, monkeypatch, capsys):
    squeue("UNLIMITED")
    assert find_allocation_end() is None
    squeue("1:00", status=1)
    assert find_allocation_end() is None
    assert "squeue does not say when job 17 ends" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert find_allocation_end() is None


def test_lock_names_the_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1090")
    lock = acquire_lock(tmp_path / "x.lock", "the run")
    assert (tmp_path / "x.lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}, Slurm job 1090"
    with pytest.raises(BadRequest, match=r"is in use by process .*\(to stop it: scancel 1090; it saves first\)"):
        acquire_lock(tmp_path / "x.lock", "the run")
    lock.close()


def test_waiting_for_a_lock_ends_with_the_allocation(tmp_path):
    path = tmp_path / "x.lock"
    lock = acquire_lock(path, "the run")
    now = time.monotonic()
    _wait_for_lock(path, until=now + 1, deadline=None)  # the caller is refused by the lock itself
    with pytest.raises(Failed, match="another trainer still holds") as error:
        _wait_for_lock(path, until=now + 1000, deadline=now + 2)
    assert error.value.status == 75
    lock.close()
    _wait_for_lock(path, until=now + 1000, deadline=now + 1000)
    assert time.monotonic() < now + 60
