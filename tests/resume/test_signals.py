"""Signals at any time: a line, the documented status, and no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.interruptions import HEARD, command, in_group_of, listens
from helpers.repository import REPOSITORY

from cxt.checkpoints.run_directory import RunDirectory
from cxt.console import exit_on_bad_request
from cxt.signals import STATUS
from cxt.trainer.training_state import list_training_states

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc whether a process listens yet")


def start(*words, through=()) -> subprocess.Popen:
    """`python …` in a group of its own."""
    return subprocess.Popen(
        [*through, sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def ends(process: subprocess.Popen, status: int) -> str:
    """What it says, once it has ended with *status* and left nobody behind."""
    output = process.communicate(timeout=120)[0]
    assert process.returncode == status, output
    assert "Traceback" not in output, output
    assert "Exception ignored" not in output, output
    assert not in_group_of(process.pid)
    return output


# Training


@pytest.fixture
def arguments(dataset, tmp_path) -> list[str]:
    return command(
        "--dataset-path",
        dataset,
        "--devices",
        0,
        "--epochs",
        1,
        "--grad-accum",
        1,
        "--run-dir",
        tmp_path / "run",
        "--out",
        tmp_path / "x.ckpt",
    )


@pytest.mark.parametrize(("number", "seconds"), list(zip(HEARD, (0.0, 0.3, 1.5, 4.0), strict=False)))
def test_while_it_starts(arguments, tmp_path, number, seconds):
    """While it imports, reads or begins to train, with epochs enough; three in a row, as of someone who is impatient."""
    process = start("-m", "cxt.train", *arguments, "--epochs", 1000)
    wait_for(lambda: listens(process.pid), process)
    time.sleep(seconds)
    for _ in range(3):
        if process.poll() is None:
            os.killpg(process.pid, number)
            time.sleep(0.01)
    output = ends(process, STATUS[number])
    assert output.count(f"stopped by {number.name}") == 1
    assert not (tmp_path / "x.ckpt").exists()


def test_nohup(arguments):
    """A closed session that is not to be heard of is not."""
    process = start("-m", "cxt.train", *arguments, through=["nohup"])
    wait_for(lambda: listens(process.pid), process)
    os.killpg(process.pid, signal.SIGHUP)
    output = ends(process, 0)
    assert "published" in output


CODE = """if True:
    import os, signal, sys
    from cxt.signals import install_exit_handler, ignore
    install_exit_handler()
    import cxt.{module} as module
    from cxt.console import exit_on_bad_request
    from cxt.train import main
    original = module.{name}
    def interrupted(*args, **kwargs):
        for _ in range(3):
            os.kill(os.getpid(), signal.{number})
        return original(*args, **kwargs)
    module.{name} = interrupted
    exit_on_bad_request(main)
    ignore()
"""


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        ("trainer.fit", "write_checkpoint", "SIGHUP"),  # when it is trained
        ("checkpoints.run_directory", "atomic_file", "SIGINT"),  # as it publishes
        ("trainer.launch", "Machines", "SIGTERM"),  # before it waits for other machines
        ("trainer.fit", "build_data", "SIGUSR1"),  # as it reads
    ],
)
def test_where_nothing_is_to_be_saved(arguments, tmp_path, module, name, number):
    """It ends at once, and the same command does the rest."""
    if number not in [each.name for each in HEARD]:
        pytest.skip("under nohup")
    code = CODE.format(module=module, name=name, number=number)
    output = ends(start("-c", code, *arguments), STATUS[signal.Signals[number]])
    assert output.count(f"stopped by {number}") == 1
    assert "run the same command again to continue from the last training state" in output
    assert not (tmp_path / "x.ckpt").exists()
    assert name != "build_data" or not (tmp_path / "run").exists()
    output = ends(start("-m", "cxt.train", *arguments), 0)
    assert "without releasing it" not in output  # it has let go of its locks
    assert (tmp_path / "x.ckpt").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_while_it_saves(arguments, tmp_path):
    """Three Ctrl-C: saved, and ended once."""
    code = CODE.format(module="trainer.training_state", name="atomic_write", number="SIGINT")
    output = ends(start("-c", code, *arguments), 130)
    assert output.count("stopped by SIGINT") == 1
    assert "stopped by SIGINT at step 8; the same command continues from step 8" in output  # that after the one it was saving
    assert [path.name for path in list_training_states(RunDirectory(tmp_path / "run"))] == ["step=8.ckpt", "step=7.ckpt"]


# Other commands


def test_ctrl_c_of_other_commands(tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    def interrupted_in_lightning():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    before = signal.getsignal(signal.SIGINT)
    try:
        for main in (interrupted, interrupted_in_lightning):
            with pytest.raises(SystemExit) as error:
                exit_on_bad_request(main)
            assert error.value.code == 130
            assert capsys.readouterr().err == "cxt: interrupted\n"
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(SystemExit) as error:
        exit_on_bad_request(lambda: sys.exit(3))
    assert error.value.code == 3


@pytest.mark.parametrize("number", HEARD)
def test_simulation_stopped(tmp_path, number):
    """A signal to both processes: one line, and nothing of the batch is left."""
    out = tmp_path / "b"
    process = start("-m", "cxt.simulate", "--scenario", "constant", "--count", 100_000, "--out", out)
    wait_for(lambda: list(tmp_path.glob("*.tmp")), process)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    output = ends(process, STATUS[number])
    assert output.splitlines()[-1] == f"cxt: constant: stopped by {number.name}; nothing was written"
    assert not list(tmp_path.iterdir())
