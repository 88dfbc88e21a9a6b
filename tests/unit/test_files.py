"""Files that are whole or not there, and locks that hold as long as their holder."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.repository import REPOSITORY, locking_process, run_python
from helpers.simulations import constant_scenario

from cxt.checkpoints.run_directory import RunDirectory
from cxt.commands.runs import prune
from cxt.config.variants import list_variants
from cxt.errors import BadRequest
from cxt.io import acquire_lock, atomic_file, atomic_link, atomic_write, is_locked
from cxt.scenarios.batches import write_batch
from cxt.workflow.runs import Run

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}


def child(code: str) -> subprocess.Popen:
    """A process that runs *code*, which prints a line when it is ready and then waits for one."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


# Files


def test_two_writers_at_once(tmp_path):
    """Each has a file of its own; the last to end wins, and its content is whole."""
    path = tmp_path / "x"
    with atomic_file(path) as one:
        one.write(b"one" * 1000)
        with atomic_file(path) as other:
            other.write(b"other")
            assert not path.exists()
            assert len(list(tmp_path.iterdir())) == 2
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one" * 1000
    assert list(tmp_path.iterdir()) == [path]


def test_many_writers_at_once(tmp_path):
    """None takes another's file for one that was left behind."""
    path, failed = tmp_path / "x", []

    def write(number: int) -> None:
        try:
            for _ in range(50):
                atomic_write(path, bytes([number]) * 5000)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    content = path.read_bytes()
    assert len(content) == 5000
    assert len(set(content)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_no_link_is_followed(tmp_path, monkeypatch):
    """Neither one under the old fixed name, nor one under a name that was guessed, nor one in the file's own place."""
    path, precious = tmp_path / "x", tmp_path / "precious"
    precious.write_text("precious")
    path.with_name("x.tmp").symlink_to(precious)
    path.symlink_to(precious)
    atomic_write(path, b"new")
    assert not path.is_symlink()
    assert path.read_bytes() == b"new"
    monkeypatch.setattr("cxt.io.secrets.token_hex", lambda n: "0" * 2 * n)
    path.with_name(f"x.{'0' * 16}.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError):
        atomic_write(path, b"newer")
    assert precious.read_text() == "precious"
    assert path.read_bytes() == b"new"


def test_a_directory_may_be_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "scratch")
    atomic_write(tmp_path / "results" / "deeper" / "x", b"1")
    assert (tmp_path / "scratch/deeper/x").read_bytes() == b"1"
    assert (tmp_path / "results").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_permissions_are_kept(tmp_path, mode):
    path = tmp_path / "x"
    before = os.umask(0o027)
    try:
        atomic_write(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(mode)
        atomic_write(path, b"2")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_an_exception_leaves_nothing(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), atomic_file(path):
        raise KeyboardInterrupt
    with pytest.raises(TypeError):
        atomic_write(path, "text")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        atomic_write(tmp_path / "directory", b"1")
    with pytest.raises(OSError, match="directory"):
        atomic_link(tmp_path / "directory", "x")
    assert path.read_bytes() == b"before"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["directory", "x"]


def test_file_and_directory_are_synced(tmp_path, monkeypatch):
    """The file before it gets its name, the directory after."""
    path, seen = tmp_path / "x", []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: seen.append((os.fstat(number), path.exists())) or original(number))
    atomic_write(path, b"1")
    assert [(stat.S_ISDIR(status.st_mode), named) for status, named in seen] == [(False, False), (True, True)]
    assert os.path.samestat(seen[0][0], path.stat())
    assert os.path.samestat(seen[1][0], tmp_path.stat())
    del seen[:]
    atomic_link(path, "elsewhere")
    assert [stat.S_ISDIR(status.st_mode) for status, _ in seen] == [True]


def test_a_file_of_thousands(tmp_path, monkeypatch):
    """It replaces another as a whole, without a search of the directory or a flush."""
    path = tmp_path / "x"
    path.write_bytes(b"before")
    for name in ("fsync", "listdir"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("that takes long"))
    with atomic_file(path, durable=False) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    with pytest.raises(KeyboardInterrupt), atomic_file(path, durable=False) as file:
        raise KeyboardInterrupt
    assert path.read_bytes() == b"after"
    assert list(tmp_path.glob("*")) == [path]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    """What one is still writing, what is another file's, and what was never ours, is not."""
    path = tmp_path / "x"
    others = ["x.y.0123456789abcdef.tmp", "xx.0123456789abcdef.tmp", "x.tmp", "x.0123.tmp"]
    for name in others:
        (tmp_path / name).write_text("other")
    code = f"from cxt.io import atomic_file\nwith atomic_file({str(path)!r}) as file: print(1, flush=True); input()"
    lives, dies = child(code), child(code)
    dies.kill()
    dies.wait()
    assert len(list(tmp_path.iterdir())) == 6
    atomic_write(path, b"1")
    assert len(list(tmp_path.iterdir())) == 6  # one less, and x
    lives.communicate("\n")
    assert lives.returncode == 0
    assert path.read_bytes() == b""
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["x", *others])


def test_long_names(tmp_path):
    for path in (tmp_path / ("x" * 255), tmp_path / ("ä" * 127)):
        atomic_write(path, b"1")
        assert path.read_bytes() == b"1"


def test_a_batch_and_one_of_it(tmp_path):
    """Their writers have temporary names of their own, too."""
    for name in ("b", "one.trees"):
        (tmp_path / f"{name}.tmp").symlink_to(tmp_path / "precious")
    (variant,) = list_variants("constant", constant_scenario(simulations=1))
    write_batch(tmp_path / "b", variant.spec, start=0, count=1, seed=1)
    run_python("-m", "cxt.commands.trees", tmp_path / "b", "--index", 0, "--out", tmp_path / "one.trees")
    assert not (tmp_path / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.tmp", "one.trees", "one.trees.tmp"]


# Locks


def is_refused(path) -> str:
    """What another process is told that wants the lock."""
    done = run_python("-c", f"from cxt.io import acquire_lock; acquire_lock({str(path)!r}, 'it')", check=False)
    return done.stderr if done.returncode else ""


def test_a_lock_outlasts_looking_at_it(tmp_path):
    """In the process that holds it: POSIX's go with the first descriptor of the file that is closed."""
    path = tmp_path / "x.lock"
    lock = acquire_lock(path, "it")
    assert is_locked(path)
    assert path.read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    with pytest.raises(BadRequest, match=f"it is in use by process {os.getpid()}"):
        acquire_lock(path, "it")
    assert f"it is in use by process {os.getpid()}" in is_refused(path)
    lock.close()
    assert path.read_text() == ""
    assert not is_locked(path)
    assert not is_refused(path)


@pytest.mark.parametrize("process", ["fork", "subprocess"])
def test_a_lock_goes_with_its_process_and_not_with_those_it_has_started(tmp_path, process):
    """`kill -9` of a trainer: a loader, or whatever it has started, that lives on does not hold up the next one."""
    start = {
        "fork": "pid = os.fork()\nif not pid: time.sleep(600)",
        "subprocess": "pid = subprocess.Popen(['sleep', '600'], close_fds=False).pid",
    }[process]
    code = (
        "import os, subprocess, time\nfrom cxt.io import acquire_lock\n"
        f"lock = acquire_lock({str(tmp_path / 'x.lock')!r}, 'it')\n"
        f"{start}\nprint(1, flush=True)\nprint(pid, flush=True)\ninput()"
    )
    holder = child(code)
    left = int(holder.stdout.readline())
    try:
        assert is_locked(tmp_path / "x.lock")
        holder.kill()
        holder.wait()
        os.kill(left, 0)
        until = time.monotonic() + 20  # a forked process may not have closed it yet
        while is_locked(tmp_path / "x.lock") and time.monotonic() < until:
            time.sleep(0.05)
        assert not is_locked(tmp_path / "x.lock")
        acquire_lock(tmp_path / "x.lock", "it").close()
    finally:
        os.kill(left, signal.SIGKILL)


def test_a_fork_that_ends_does_not_let_go(tmp_path):
    lock = acquire_lock(tmp_path / "x.lock", "it")
    pid = os.fork()
    if not pid:
        lock.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert is_locked(tmp_path / "x.lock")
    assert (tmp_path / "x.lock").read_text()
    lock.close()


def test_a_lock_that_was_removed_while_it_was_waited_for(tmp_path, monkeypatch):
    """Who opened it before it was removed does not go in beside who has made it anew."""
    path = tmp_path / "x.lock"
    first = acquire_lock(path, "it")
    real, second = os.open, []

    def open_and_be_overtaken(name, *args, **kwargs):
        number = real(name, *args, **kwargs)
        if not second:
            second.append(None)
            first.close(remove=True)  # as `prune` does
            second[0] = acquire_lock(path, "it")  # by yet another
        return number

    monkeypatch.setattr("cxt.io.os.open", open_and_be_overtaken)
    with pytest.raises(BadRequest, match="it is in use by process"):
        acquire_lock(path, "it")
    second[0].close()


def test_a_lock_that_is_a_link(tmp_path):
    """What it points to is not emptied."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "x.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(BadRequest, match=r"it: the lock .*x.lock cannot be opened: .*; remove it"):
        acquire_lock(tmp_path / "x.lock", "it")
    assert not is_locked(tmp_path / "x.lock")
    assert (tmp_path / "precious").read_text() == "precious"


def started(directory: Path, name: str) -> Run:
    """A run directory as `cxt runs` lists it."""
    (directory / name).mkdir()
    (directory / name / "run.json").write_text("{}")
    return Run(directory / name, "interrupted", 0, None, in_use=False)


def test_prune_and_who_has_the_lock(tmp_path, capsys):
    """One is taken while the question is on the screen: it stays, and so does its lock; of the other nothing stays."""
    busy, old = started(tmp_path, "busy"), started(tmp_path, "old")
    holder = locking_process(busy.path)
    prune([busy, old], yes=True)
    output = capsys.readouterr().out
    assert f"not removed: {busy.path} is in use by process {holder.pid}" in output
    assert "1 run removed" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy", "busy.lock"]
    assert is_locked(RunDirectory(busy.path).lock_path)
    holder.communicate("\n")
