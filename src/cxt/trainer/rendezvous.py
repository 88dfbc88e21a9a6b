"""How the machines of a run find each other: their numbers, the shared secret, and the first connections.

Torch calls a machine a node, as in the environment variable NODE_RANK. That word also remains in the flag --nodes and in file
names.
"""

import contextlib
import errno
import ipaddress
import os
import queue
import re
import secrets
import socket
import threading
import time
from pathlib import Path

from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.trainer.connection import HANDSHAKE_SECONDS, Connection, prove_membership, verify_machine

logger = get_logger(__name__)

PORT = 29500
"""Default of MASTER_PORT, the port that torch uses; the machines exchange messages on the next one."""

MAX_PENDING_HANDSHAKES = 64
"""Largest number of connections in their handshake at the same time."""


def read_machine_rank(machines: int) -> int:
    """Read the number of this machine, from 0, from the environment.

    If NODE_RANK, MASTER_ADDR and MASTER_PORT are not set, they are set from Slurm's variables; torch reads them, too.

    Raises
    ------
    BadRequest
        If the environment does not say which of *machines* this is, or a variable is not valid.
    """
    if machines < 1:
        raise BadRequest(f"--nodes must be positive, got {machines}")
    if machines == 1:
        if os.environ.get("NODE_RANK", "0") != "0":
            raise BadRequest(
                f"NODE_RANK is {os.environ['NODE_RANK']}, but --nodes is 1; set --nodes to the number of machines, or unset "
                "NODE_RANK"
            )
        return 0
    _take_from_slurm()
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise BadRequest(
            f"--nodes {machines}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. Start the same "
            f"command once on each machine, with NODE_RANK (0 to {machines - 1}) and MASTER_ADDR (the machine of rank 0) set; "
            f"under Slurm, `srun --nodes {machines} --ntasks-per-node 1 python -m cxt.train …` sets them"
        )
    os.environ.setdefault("MASTER_PORT", str(PORT))
    for name, low, high in (("NODE_RANK", 0, machines - 1), ("MASTER_PORT", 1, 65534)):
        text = os.environ[name]
        if not (text.isdigit() and low <= int(text) <= high):
            raise BadRequest(f"{name} must be a whole number from {low} to {high}, got '{text}'")
    return int(os.environ["NODE_RANK"])


def _take_from_slurm() -> None:
    if "SLURM_NODEID" not in os.environ:
        return
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        raise BadRequest("Slurm has started several processes on this machine; start one (srun --ntasks-per-node 1)")
    os.environ.setdefault("NODE_RANK", os.environ["SLURM_NODEID"])
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if names:
        from lightning_fabric.plugins.environments import SLURMEnvironment  # imports torch, which takes seconds

        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(names))
    if os.environ.get("SLURM_JOB_ID", "").isdigit():  # two jobs may have the same first machine
        os.environ.setdefault("MASTER_PORT", str(20_000 + 2 * (int(os.environ["SLURM_JOB_ID"]) % 6_000)))


def secret_path(directory) -> Path:
    """The file in *directory*, named after address and port, in which the first machine leaves the secret for the others."""
    place = f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
    return Path(directory) / f".cxt-nodes-{re.sub('[^A-Za-z0-9.-]', '_', place)}"


def leave_secret(path: Path) -> str:
    """Write a new secret to a file that only this user can read, and return it."""
    secret = secrets.token_hex(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a file of a killed run, for example, may have other permissions
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as file:
            file.write(secret)
    except OSError as error:
        raise BadRequest(f"the secret of the machines cannot be written to {path}: {error.strerror}") from None
    return secret


def _read_secret(path: Path) -> str:
    """Read the secret of the first machine at *path*, which may still be that of an earlier run; OSError if there is none."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(number, 1000).decode(errors="replace")
    finally:
        os.close(number)


def open_listener(address: str, port: int) -> socket.socket:
    """Open a socket that listens on *address* if others can reach this machine there, otherwise on all addresses."""
    try:
        candidates = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BadRequest(f"MASTER_ADDR '{address}' cannot be resolved on this machine: {error.strerror}") from None
    try:
        for family, _, _, _, where in candidates:
            # Many systems resolve their own name to an address that others cannot reach (127.0.1.1).
            if ipaddress.ip_address(where[0].split("%")[0]).is_loopback and not _means_loopback(address):
                continue
            try:
                return socket.create_server(where, family=family)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        logger.info(
            f"note: MASTER_ADDR '{address}' is not a reachable address of this machine; listening on all addresses. Set it to "
            "the address on the machines' network to listen there only"
        )
        return socket.create_server(("", port))
    except OSError as error:
        raise BadRequest(
            f"port {port}, MASTER_PORT + 1, cannot be used ({error.strerror}); another run may be using it: set another "
            "MASTER_PORT on all machines, and start one process on each"
        ) from None


def _means_loopback(address: str) -> bool:
    """Whether *address* is a loopback address, which works if all "machines" are processes of this one."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def accept_machines(address: str, port: int, machines: int, seconds: float, path: Path) -> list[Connection]:
    """Wait on the first machine for the others.

    Parameters
    ----------
    address, port : str, int
        Where to listen.
    machines : int
        All machines of the run, this one included.
    seconds : float
        Time within which all must connect.
    path : Path
        File for the secret until then.

    Returns
    -------
    list of Connection
        Connections in the order of the machines.

    Raises
    ------
    BadRequest
        If a machine does not connect in time or was started with another number of machines, or two have the same number.
    """
    until = time.monotonic() + seconds
    connections: dict[int, Connection] = {}
    arrivals: queue.Queue[tuple[Connection, int]] = queue.Queue()
    places = threading.Semaphore(MAX_PENDING_HANDSHAKES)

    def shake_hands(accepted: socket.socket) -> None:
        """Authenticate a peer; in a thread of its own, so that the machines of the run do not wait for strangers."""
        try:
            connection = Connection(accepted)
            arrivals.put((connection, verify_machine(connection, secret)))
        except (OSError, ValueError):  # not a machine of the run
            accepted.close()
        finally:
            places.release()

    def accept() -> None:
        with contextlib.suppress(OSError):  # the server is closed when all machines have connected
            while True:
                accepted = server.accept()[0]
                if places.acquire(blocking=False):
                    threading.Thread(target=shake_hands, args=(accepted,), daemon=True, name="handshake").start()
                else:
                    accepted.close()  # a machine of the run will try again

    with open_listener(address, port) as server:
        secret = leave_secret(path)
        try:
            logger.info(f"machine 0 of {machines} is waiting for the others at {socket.gethostname()}, port {port}")
            threading.Thread(target=accept, daemon=True, name="accept machines").start()
            while len(connections) < machines - 1:
                try:
                    connection, announced_machines = arrivals.get(timeout=max(0.01, until - time.monotonic()))
                except queue.Empty:
                    missing = ", ".join(str(machine) for machine in range(1, machines) if machine not in connections)
                    raise BadRequest(
                        f"machine {missing} did not connect within {seconds:.0f} s (--nodes {machines}); start the same "
                        f"command on every machine, and make sure that all can reach port {port} of {socket.gethostname()} "
                        f"and read {path}"
                    ) from None
                problem = None
                if announced_machines != machines:
                    problem = (
                        f"machine 0 was started with --nodes {machines}, machine {connection.machine} with "
                        f"--nodes {announced_machines}"
                    )
                elif connection.machine in connections:
                    problem = (
                        f"two processes claim to be machine {connection.machine}; start one on each machine, with its own "
                        "NODE_RANK"
                    )
                if problem is not None:
                    for other in (*connections.values(), connection):
                        other.send({"failed": problem, "status": 2})
                    raise BadRequest(problem)
                connections[connection.machine] = connection
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread that waits in `accept`
    return [connections[machine] for machine in sorted(connections)]


def connect_to_first(address: str, port: int, machine: int, machines: int, seconds: float, path: Path) -> Connection:
    """Connect to the first machine, which may not have started yet; parameters as in `accept_machines`.

    Raises
    ------
    BadRequest
        If the first machine does not answer within *seconds*.
    """
    until = time.monotonic() + seconds
    while True:
        connected = None
        try:
            connected = socket.create_connection((address, port), timeout=HANDSHAKE_SECONDS)
            connection = Connection(connected)
            prove_membership(connection, _read_secret(path), machine=machine, machines=machines)
            return connection
        except (OSError, ValueError) as error:
            if connected is not None:
                connected.close()
            if time.monotonic() > until:
                raise BadRequest(
                    f"machine 0 did not answer within {seconds:.0f} s at {address}, port {port} ({error}); start the same "
                    "command on every machine, in a file system that they share; MASTER_ADDR must be the address of the "
                    "machine with NODE_RANK 0"
                ) from None
            time.sleep(0.2)
