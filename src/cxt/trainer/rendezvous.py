"""How the machines of a run find each other: which of them this is, the secret that they share, and the first connections.

Torch's word for a machine is node. It stays in the environment variables NODE_RANK, MASTER_ADDR and MASTER_PORT, which are
torch's, in the flag --nodes, and in the file names of earlier versions.
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
"""Torch's, where MASTER_PORT is not set; the machines themselves talk at the next one."""

MAX_PENDING_HANDSHAKES = 64
"""Connections that may be in their handshake at the same time."""


def read_machine_rank(machines: int) -> int:
    """Number of this machine, from 0, as the environment says.

    NODE_RANK, MASTER_ADDR and MASTER_PORT are set for torch, from Slurm's variables where they are not.

    Raises
    ------
    BadRequest
        If the environment does not say which of *machines* this is, or says something else.
    """
    if machines < 1:
        raise BadRequest(f"--nodes {machines}: expected at least 1")
    if machines == 1:
        if os.environ.get("NODE_RANK", "0") != "0":
            raise BadRequest(f"NODE_RANK is {os.environ['NODE_RANK']}, but --nodes is 1; say how many there are, or unset it")
        return 0
    _take_from_slurm()
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise BadRequest(
            f"--nodes {machines}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. Start the same "
            f"command once on each machine, with NODE_RANK (0 to {machines - 1}) and MASTER_ADDR (the machine of rank 0) set; "
            f"under Slurm `srun --nodes {machines} --ntasks-per-node 1 python -m cxt.train …` sets what is needed"
        )
    os.environ.setdefault("MASTER_PORT", str(PORT))
    for name, low, high in (("NODE_RANK", 0, machines - 1), ("MASTER_PORT", 1, 65534)):
        text = os.environ[name]
        if not (text.isdigit() and low <= int(text) <= high):
            raise BadRequest(f"{name} is '{text}': expected {low} to {high}")
    return int(os.environ["NODE_RANK"])


def _take_from_slurm() -> None:
    if "SLURM_NODEID" not in os.environ:
        return
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        raise BadRequest("Slurm has started several processes on this machine; start one (srun --ntasks-per-node 1)")
    os.environ.setdefault("NODE_RANK", os.environ["SLURM_NODEID"])
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if names:
        from lightning_fabric.plugins.environments import SLURMEnvironment  # takes torch's seconds, which others need not wait

        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(names))
    if os.environ.get("SLURM_JOB_ID", "").isdigit():  # two jobs may share their first machine
        os.environ.setdefault("MASTER_PORT", str(20_000 + 2 * (int(os.environ["SLURM_JOB_ID"]) % 6_000)))


def secret_path(directory) -> Path:
    """File of *directory*, named after the meeting place, in which the first machine leaves the secret for the others."""
    place = f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
    return Path(directory) / f".cxt-nodes-{re.sub('[^A-Za-z0-9.-]', '_', place)}"


def leave_secret(path: Path) -> str:
    """A new secret, in a file that only this user can read."""
    secret = secrets.token_hex(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a run that was killed, or whatever it is: its permissions are not to be kept
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as file:
            file.write(secret)
    except OSError as error:
        raise BadRequest(f"the secret of the machines cannot be written to {path}: {error.strerror}") from None
    return secret


def _read_secret(path: Path) -> str:
    """What the first machine has left at *path*, which may be of an earlier run still; OSError if there is nothing."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(number, 1000).decode(errors="replace")
    finally:
        os.close(number)


def open_listener(address: str, port: int) -> socket.socket:
    """A socket that listens where *address* names this machine, and nowhere else."""
    try:
        candidates = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BadRequest(f"MASTER_ADDR '{address}' is no address that this machine knows: {error.strerror}") from None
    try:
        for family, _, _, _, where in candidates:
            # Many systems give their own name an address that others cannot reach (127.0.1.1).
            if ipaddress.ip_address(where[0].split("%")[0]).is_loopback and not _means_loopback(address):
                continue
            try:
                return socket.create_server(where, family=family)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        logger.info(
            f"note: MASTER_ADDR '{address}' names no address of this machine that others could reach, so that it listens on "
            "all of its addresses; set the address of the network between the machines to listen there alone"
        )
        return socket.create_server(("", port))
    except OSError as error:
        raise BadRequest(
            f"port {port}, MASTER_PORT + 1, cannot be used here ({error.strerror}); another run may have it: set another "
            "MASTER_PORT on all machines, and start one process on each"
        ) from None


def _means_loopback(address: str) -> bool:
    """Whether *address* asks for it, as all "machines" are processes of this one."""
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
        Time in which all must have come.
    path : Path
        The file in which the secret is left meanwhile.

    Returns
    -------
    list of Connection
        In the order of the machines.

    Raises
    ------
    BadRequest
        If one does not come in time, or was started with another number of machines, or two are the same.
    """
    until = time.monotonic() + seconds
    connections: dict[int, Connection] = {}
    arrivals: queue.Queue[tuple[Connection, int]] = queue.Queue()
    places = threading.Semaphore(MAX_PENDING_HANDSHAKES)

    def shake_hands(accepted: socket.socket) -> None:
        """In a thread of its own, so that the machines of the run do not wait for a stranger."""
        try:
            connection = Connection(accepted)
            arrivals.put((connection, verify_machine(connection, secret)))
        except (OSError, ValueError):  # whatever that was, it is no machine of the run
            accepted.close()
        finally:
            places.release()

    def accept() -> None:
        with contextlib.suppress(OSError):  # it is closed when all have come
            while True:
                accepted = server.accept()[0]
                if places.acquire(blocking=False):
                    threading.Thread(target=shake_hands, args=(accepted,), daemon=True, name="handshake").start()
                else:
                    accepted.close()  # a machine of the run tries again

    with open_listener(address, port) as server:
        secret = leave_secret(path)
        try:
            logger.info(f"machine 0 of {machines} waits for the others at {socket.gethostname()}, port {port}")
            threading.Thread(target=accept, daemon=True, name="accept machines").start()
            while len(connections) < machines - 1:
                try:
                    connection, announced_machines = arrivals.get(timeout=max(0.01, until - time.monotonic()))
                except queue.Empty:
                    missing = ", ".join(str(machine) for machine in range(1, machines) if machine not in connections)
                    raise BadRequest(
                        f"--nodes {machines}, but after {seconds:.0f} s nothing was heard of machine {missing}; start the same "
                        f"command on every machine, and let them reach port {port} of {socket.gethostname()} and read {path}"
                    ) from None
                problem = None
                if announced_machines != machines:
                    problem = (
                        f"machine 0 was started with --nodes {machines}, machine {connection.machine} with "
                        f"--nodes {announced_machines}"
                    )
                elif connection.machine in connections:
                    problem = (
                        f"two processes say that they are machine {connection.machine}; start one on each, with a NODE_RANK of "
                        "its own"
                    )
                if problem is not None:
                    for other in (*connections.values(), connection):
                        other.send({"failed": problem, "status": 2})
                    raise BadRequest(problem)
                connections[connection.machine] = connection
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who waits in `accept`
    return [connections[machine] for machine in sorted(connections)]


def connect_to_first(address: str, port: int, machine: int, machines: int, seconds: float, path: Path) -> Connection:
    """The connection to the first machine, which may still have to start; parameters as of `accept_machines`.

    Raises
    ------
    BadRequest
        If the first machine has not answered after *seconds*.
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
                    f"--nodes {machines}, but for {seconds:.0f} s the first machine has not answered at {address}, port {port} "
                    f"({error}); start the same command on every machine, in the file system that they share; MASTER_ADDR must "
                    "name the one with NODE_RANK 0"
                ) from None
            time.sleep(0.2)
