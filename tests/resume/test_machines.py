"""Several machines of one run, which are processes of this machine here."""

import contextlib
import multiprocessing
import os
import shlex
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from helpers.interruptions import _forked, assert_equal_runs, command
from helpers.repository import REPOSITORY, run_python

from cxt.checkpoints.run_directory import RunDirectory
from cxt.config.file import load
from cxt.errors import BadRequest, Failed
from cxt.trainer import connection, rendezvous
from cxt.trainer.machines import Machines
from cxt.trainer.options import build_parser, parse_flags
from cxt.trainer.rendezvous import read_machine_rank
from cxt.workflow.costs import Costs
from cxt.workflow.estimates import estimate_costs


def free_port() -> int:
    """A port that is free, and the one after it, below those that the system gives to others."""
    for port in range(15_000, 20_000, 2):
        try:
            for each in (port, port + 1):
                socket.create_server(("", each)).close()
        except OSError:
            continue
        return port
    raise AssertionError("no free port")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Two machines at a free port of this machine, of which this is the first."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in ("NODE_RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    values = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # where the first leaves the secret
    return values


# What the documentation says


def test_table_of_devices(tmp_path):
    """Its rows keep the published items of a step, and have the steps that are planned."""
    overlay = tmp_path / "gpus.yaml"
    text = (REPOSITORY / "docs" / "exact-resume.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    names = next(row for row in rows if row[0] == "GPUs")[3:]
    rows = [row for row in rows if row[1].startswith("{devices:")]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "8"]
    for row in rows:
        overlay.write_text(f"training: {row[1]}")
        models = estimate_costs(load([REPOSITORY / "config" / "paper.yaml", overlay]), Costs())["models"]
        assert {str(model["devices"]) for model in models.values()} == {row[0]}
        assert {model["effective_batch"] for model in models.values()} == {int(row[2])} == {2304}
        assert {name: models[name]["steps"] for name in models} == dict(zip(names, map(int, row[3:]), strict=True))


def test_command_in_the_documentation_parses():
    text = (REPOSITORY / "docs" / "exact-resume.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("srun")]
    words = shlex.split(line.split("cxt.train", 1)[1])
    parser = build_parser()
    args = parse_flags(words, parser)
    assert args.devices * args.nodes * args.batch_size * args.grad_accum == 2304


# Which machine this is


def test_one_machine_needs_nothing(environment, monkeypatch):
    for name in environment:
        monkeypatch.delenv(name)
    with Machines(1) as machines:
        assert (machines.rank, machines.gather("x"), machines.share("y")) == (0, [], "y")
    assert "MASTER_ADDR" not in os.environ


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (2, {"NODE_RANK": None}, r"--nodes 2, but NODE_RANK is not set.*NODE_RANK \(0 to 1\).*srun --nodes 2"),
        (2, {"NODE_RANK": None, "MASTER_ADDR": None}, "NODE_RANK and MASTER_ADDR are not set"),
        (2, {"NODE_RANK": "2"}, "NODE_RANK must be a whole number from 0 to 1, got '2'"),
        (2, {"MASTER_PORT": "65535"}, "MASTER_PORT must be a whole number from 1 to 65534, got '65535'"),
        (2, {"SLURM_NODEID": "0", "SLURM_LOCALID": "1"}, "several processes on this machine"),
        (1, {"NODE_RANK": "1"}, "NODE_RANK is 1, but --nodes is 1"),
        (0, {}, "--nodes must be positive, got 0"),
    ],
)
def test_what_is_not_set(environment, monkeypatch, count, changes, message):
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(BadRequest, match=message):
        read_machine_rank(count)


@pytest.mark.parametrize(
    ("names", "first"), [("gpu[03-04,07]", "gpu03"), ("a1,b2", "a1"), ("n12", "n12"), ("rack2-gpu[9,11]", "rack2-gpu9")]
)
def test_slurm_says_it(environment, monkeypatch, names, first):
    for name in environment:
        monkeypatch.delenv(name)
    slurm = {"SLURM_NODEID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": names, "SLURM_JOB_ID": "7000001"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    try:
        assert read_machine_rank(2) == 1
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "28002")
    finally:
        for name in environment:
            os.environ.pop(name, None)


# Coming together


def test_others_do_not_come(environment, monkeypatch):
    with pytest.raises(BadRequest, match=r"machine 1, 2 did not connect within 0 s .--nodes 3.; start the same command"):
        Machines(3, seconds=0.2)
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(BadRequest, match=r"machine 0 did not answer within 0 s at 127.0.0.1, port \d+ .*MASTER_ADDR must be"):
        Machines(2, seconds=0.2)
    assert not list(Path().iterdir())  # the secret is gone with who left it


def joins(environment, *ranks: int, count: int = 3) -> list[threading.Thread]:
    """Threads that stand for other machines: each joins, says nothing more, and keeps its connection for a while."""

    def join(rank: int) -> None:
        port = int(environment["MASTER_PORT"]) + 1
        peer = rendezvous.connect_to_first("127.0.0.1", port, rank, count, 10, rendezvous.secret_path("."))
        time.sleep(1)
        peer.close()

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize(
    ("ranks", "count", "message"),
    [
        ((1, 1), 3, "two processes claim to be machine 1"),
        ((1,), 2, "machine 0 was started with --nodes 3, machine 1 with --nodes 2"),
    ],
)
def test_machines_that_do_not_belong_together(environment, ranks, count, message):
    threads = joins(environment, *ranks, count=count)
    with pytest.raises(BadRequest, match=message):
        Machines(3, seconds=20)
    for thread in threads:
        thread.join()


def test_port_in_use(environment):
    port = int(environment["MASTER_PORT"]) + 1
    with socket.create_server(("", port)), pytest.raises(BadRequest, match=f"port {port}, MASTER_PORT \\+ 1, cannot be used"):
        Machines(2)


def test_what_is_no_machine_is_ignored_and_an_end_is_noticed(environment):
    port = int(environment["MASTER_PORT"]) + 1

    threads = []

    def knock() -> None:
        """Before the others join: with the last of them the port is closed."""
        for _ in range(500):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\n")
                threads.extend(joins(environment, 1, 2))
                return
            except OSError:
                time.sleep(0.02)

    stranger = threading.Thread(target=knock)
    stranger.start()
    silent = [threading.Thread(target=sit, args=(port,)) for _ in range(3)]
    for thread in silent:
        thread.start()
    with pytest.raises(Failed, match="lost the connection to machine [12]"), Machines(3, seconds=20) as machines:
        machines.gather("here")
    stranger.join()
    assert len(threads) == 2
    for thread in threads + silent:
        thread.join()


def sit(port: int) -> None:
    """Connect and say nothing, as one who wants the others to wait; a machine that listens ends it in its time."""
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.recv(1000)
            stranger.recv(1000)
            return
        time.sleep(0.02)


class Stranger:
    """A connection to the first machine, which has not said who it is."""

    def __init__(self, port: int):
        for _ in range(500):
            with contextlib.suppress(OSError):
                self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
                break
            time.sleep(0.02)
        self.peer = connection.Connection(self.socket)

    def is_sent_away(self) -> bool:
        """Whether nothing comes but the end of the connection."""
        try:
            return self.socket.recv(1000) == b""
        except ConnectionError:
            return True


def first_of_two(seconds: float = 20) -> tuple[threading.Thread, list]:
    """A thread in which the first of two machines waits for the other, and what has come of it."""
    result = []

    def wait() -> None:
        try:
            with Machines(2, seconds=seconds) as machines:
                result.append(machines.gather("here"))
        except (BadRequest, Failed) as error:
            result.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, result


def hello(number: str, secret: str, **changes) -> dict:
    """What a machine says that knows *secret*, with *changes* that it has signed."""
    message = {"number": "1", "machine": 1, "machines": 2} | changes
    numbers = (number, message["number"], str(message["machine"]), str(message["machines"]))
    return {"proof": connection.make_proof(secret, "machine", *numbers)} | message


def test_who_does_not_know_the_secret_is_sent_away(environment):
    """Guesses, answers to another connection, ranks that cannot be, and lines of any length; the machine itself is let in."""
    port = int(environment["MASTER_PORT"]) + 1
    thread, result = first_of_two()
    strangers = [Stranger(port) for _ in range(7)]
    numbers = [stranger.peer.receive()["number"] for stranger in strangers]
    file = rendezvous.secret_path(".")
    secret = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(set(numbers)) == 7
    say = [
        hello(numbers[0], "guess"),
        {"machine": 1, "machines": 2},
        hello(numbers[1], secret),  # of another connection
        hello(numbers[3], secret, machine=0),
        hello(numbers[4], secret, machine=2),
        hello(numbers[5], secret, machine=True),
    ]
    for stranger, message in zip(strangers, say, strict=False):
        stranger.peer.send(message)
    with contextlib.suppress(ConnectionError):
        strangers[6].socket.sendall(b"x" * 100_000)
    assert all(stranger.is_sent_away() for stranger in strangers)
    assert not result
    peer = rendezvous.connect_to_first("127.0.0.1", port, 1, 2, 10, file)
    peer.send({"value": "there"})
    thread.join()
    assert result == [["there"]]
    assert not file.exists()
    peer.close()


def test_only_the_first_machine_is_believed(environment):
    """Whoever answers at its address without the secret gets nothing of it, and nothing from it is taken."""
    port = int(environment["MASTER_PORT"]) + 1
    rendezvous.leave_secret(rendezvous.secret_path("."))
    heard = []

    def pretend() -> None:
        accepted = server.accept()[0]
        peer = connection.Connection(accepted)
        peer.send({"number": "1"})
        heard.append(peer.receive())
        peer.send({"proof": heard[0]["proof"]})
        peer.send({"value": "/tmp/evil"})
        peer.close()

    with socket.create_server(("127.0.0.1", port)) as server:
        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(BadRequest, match="wrong secret|timed out"):
            rendezvous.connect_to_first("127.0.0.1", port, 1, 2, 0.1, rendezvous.secret_path("."))
        thread.join()
    assert rendezvous.secret_path(".").read_text() not in str(heard)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"x" * (2**20 + 2), "machine 1 sent an invalid message (message longer than 1048576 bytes"),
        (b"[1]\n", "machine 1 sent an invalid message (message is not a mapping"),
        (b'{"failed": 1, "status": 0}\n', "machine 1 sent an invalid message (unknown message"),
        (b'{"value": 1, "more": 2}\n', "machine 1 sent an invalid message (unknown message"),
        (b"[" * 100_000 + b"\n", "machine 1 sent an invalid message (message nested too deeply"),
    ],
)
def test_messages_are_looked_at(environment, message, problem):
    port = int(environment["MASTER_PORT"]) + 1
    thread, result = first_of_two()
    peer = rendezvous.connect_to_first("127.0.0.1", port, 1, 2, 10, rendezvous.secret_path("."))
    with contextlib.suppress(ConnectionError):
        peer._socket.sendall(message)
    thread.join()
    assert problem in str(result[0])
    assert isinstance(result[0], Failed)
    peer.close()


def test_listens_where_it_is_told(environment, capsys):
    port = int(environment["MASTER_PORT"])
    for address, at in (("127.0.0.1", "127.0.0.1"), ("localhost", None), ("192.0.2.1", "0.0.0.0")):
        with rendezvous.open_listener(address, port) as server:
            where = server.getsockname()[0]
            assert where == at if at else where in ("127.0.0.1", "::1")
        assert ("is not a reachable address of this machine" in capsys.readouterr().out) == (at == "0.0.0.0")
    with pytest.raises(BadRequest, match="MASTER_ADDR 'no.such.invalid' cannot be resolved on this machine"):
        rendezvous.open_listener("no.such.invalid", port)


def test_a_process_that_waits_for_a_machine_that_is_gone_is_ended(environment):
    threads = joins(environment, 1, count=2)
    code = """if True:
        import subprocess, time
        from cxt.trainer import machines
        machines.SHUTDOWN_TIMEOUT = 0.2
        with machines.Machines(2):
            subprocess.Popen(["sleep", "60"])  # in the place of another device's process
            time.sleep(60)  # and of a collective
    """
    began = time.monotonic()
    done = run_python("-c", code, check=False)  # which waits until both have closed what they write to
    assert time.monotonic() - began < 50
    assert done.returncode == 1
    assert "cxt: lost the connection to machine 1" in done.stderr
    for thread in threads:
        thread.join()


# Training


def _as_machine(variables: dict, arguments: list[str], out: str) -> None:
    os.environ.update(variables)
    _forked(arguments, out)


class Machine:
    """`python -m cxt.train` as machine *rank* of *count*, in a process that has imported everything already."""

    def __init__(self, arguments, rank: int, count: int, port: int, out: Path):
        self.out = out
        out.unlink(missing_ok=True)
        variables = {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["cxt.train", "cxt.trainer.fit", "matplotlib.pyplot"])
        self.process = context.Process(
            target=_as_machine, args=(variables, [*map(str, arguments), "--nodes", str(count)], str(out))
        )
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Its status (negative for a signal), and what it has said."""
        self.process.join(timeout=60)
        status = self.process.exitcode
        self.process.kill()
        return status, self.out.read_text()


def start(arguments, directory: Path, *, count: int = 2, last=None) -> list[Machine]:
    """All machines, the last with other arguments if *last* gives them."""
    port = free_port()
    words = [arguments] * (count - 1) + [last or arguments]
    return [Machine(words[rank], rank, count, port, directory / f"machine{rank}") for rank in range(count)]


def ends(machines: list[Machine]) -> tuple[list[int], list[str]]:
    statuses, outputs = zip(*(machine.end() for machine in machines), strict=True)
    return list(statuses), list(outputs)


def newest_step(run: RunDirectory) -> int:
    return int(run.last.resolve().stem.removeprefix("step="))


def wait_for_a_save_after(run: RunDirectory, step: int, both: list[Machine]) -> None:
    while newest_step(run) <= step:
        assert all(machine.process.exitcode is None for machine in both), [machine.out.read_text() for machine in both]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def arguments(dataset) -> list[str]:
    return command("--dataset-path", dataset, "--accelerator", "cpu", "--epochs", 60, "--grad-accum", 3, "--keep-saves", 2)


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The run on one machine with two processes."""
    directory = tmp_path_factory.mktemp("whole")
    out = ["--run-dir", directory / "run", "--out", directory / "x.ckpt", "--devices", 2]
    run_python("-m", "cxt.train", *arguments, *out, env={"OMP_NUM_THREADS": "1"})
    return directory


@pytest.mark.long
def test_two_machines_end_as_one_with_two_devices(arguments, whole, tmp_path):
    """Whatever stops either of them, and with the status that says why on both."""
    out = tmp_path / "x.ckpt"
    words = [*arguments, "--run-dir", tmp_path / "run", "--out", out, "--devices", 1]
    run = RunDirectory(tmp_path / "run")

    statuses, outputs = ends(start([*words, "--max-minutes", "0.001"], tmp_path))
    assert statuses == [75, 75]
    assert all("Slurm allocation) at step 1; the same command continues from step 1" in text for text in outputs)

    for number, of, expected in (
        (signal.SIGTERM, 1, [143, 143]),
        (signal.SIGKILL, 1, [1, -signal.SIGKILL]),
        (signal.SIGKILL, 0, [-signal.SIGKILL, 1]),
    ):
        step = newest_step(run)
        both = start(words, tmp_path)
        wait_for_a_save_after(run, step, both)
        os.kill(both[of].process.pid, number)
        statuses, outputs = ends(both)
        assert statuses == expected, outputs
        if number == signal.SIGTERM:
            assert all("stopped by SIGTERM at step" in text for text in outputs)
        else:
            assert f"cxt: lost the connection to machine {of}; the same command" in outputs[1 - of]
        assert not out.exists()

    statuses, outputs = ends(start(words, tmp_path))
    assert statuses == [0, 0]
    assert "continuing from" in outputs[0]
    assert "on 2 cpu on 2 machines" in outputs[0]
    assert out.read_bytes() == (whole / "x.ckpt").read_bytes()
    assert_equal_runs(whole / "run", run.path)

    out.unlink()
    statuses, outputs = ends(start(words, tmp_path))
    assert statuses == [0, 0]
    assert "is finished: publishing its checkpoint again" in outputs[0]
    assert out.read_bytes() == (whole / "x.ckpt").read_bytes()


@pytest.mark.long
def test_three_machines_continue_exactly(dataset, tmp_path):
    """Of two numbers the sum is the same in any order; of three it is not."""
    arguments = command("--dataset-path", dataset, "--accelerator", "cpu", "--epochs", 6, "--decode-items", 0)
    for name in ("whole", "cut"):
        words = [*arguments, "--run-dir", tmp_path / name, "--out", tmp_path / f"{name}.ckpt", "--devices", 1]
        if name == "cut":
            assert ends(start([*words, "--max-minutes", "0.001"], tmp_path, count=3))[0] == [75, 75, 75]
        statuses, outputs = ends(start(words, tmp_path, count=3))
        assert statuses == [0, 0, 0], outputs
    assert "continuing from" in outputs[0]
    assert (tmp_path / "whole.ckpt").read_bytes() == (tmp_path / "cut.ckpt").read_bytes()


def test_machines_that_were_started_differently(arguments, tmp_path):
    words = [*arguments, "--run-dir", tmp_path / "run", "--devices", 1]
    statuses, outputs = ends(start(words, tmp_path, last=[*words, "--lr", "2e-3"]))
    assert statuses == [2, 2]
    assert all("machine 1 differs from machine 0: lr 0.002 instead of 0.001" in text for text in outputs)
    assert not (tmp_path / "run").exists()


def test_what_one_machine_cannot_do_ends_all(arguments, tmp_path):
    words = [*arguments, "--run-dir", tmp_path / "run", "--devices", 1]
    statuses, outputs = ends(start(words, tmp_path, last=[*words, "--dataset-path", tmp_path / "nowhere"]))
    assert statuses == [2, 2]
    assert "cxt: machine 1: " in outputs[0]
    assert "nowhere" in outputs[0]
    held = RunDirectory(tmp_path / "held")
    held.lock()
    words = [*arguments, "--run-dir", tmp_path / "held", "--devices", 1]
    statuses, outputs = ends(start(words, tmp_path))
    assert statuses == [2, 2]
    assert f"cxt: machine 0: {held.path} is in use by process {os.getpid()}" in outputs[1]
    held.release()


def test_torchrun_is_refused(arguments, tmp_path):
    done = run_python("-m", "cxt.train", *arguments, "--run-dir", tmp_path / "run", env={"LOCAL_RANK": "0"}, check=False)
    assert done.returncode == 2
    assert "LOCAL_RANK is set, as by torchrun; start one process on each machine" in done.stderr
