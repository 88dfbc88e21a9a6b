"""Several nodes of one run: which this is, what the first of them decides, and the end of all when one ends.

The same command is started once on each node. The first process of the first node, which alone writes, tells those of the
others what it has decided, over a connection that lasts as long as the run; whoever fails says so before it ends, and a
connection that breaks says the same. Processes that a node starts for its other devices take no part.

Who comes must know a secret that the first node has put into the file system that all share, in a file which only its user can
read; before that, nothing is heard of a connection but a short line, for a few seconds. The secret itself is never sent: both
sides show that they know it, by a digest of it with numbers that each of them has drawn for this one connection.
"""

import contextlib
import errno
import hmac
import ipaddress
import json
import os
import queue
import re
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

import psutil  # noqa: F401 (`kill_children` takes it only where it is loaded)

from cxt.errors import BadRequest, Failed, first_line
from cxt.signals import kill_children, last_words

PORT = 29500
"""Torch's, where MASTER_PORT is not set; the nodes themselves talk at the next one."""

TIME_TO_COME = 600.0
"""Seconds in which all nodes must have started."""

TIME_TO_SAY_WHO = 5.0
"""Seconds in which a connection must have shown that it is a node's."""

STRANGERS = 64
"""Connections that may be doing so at the same time."""

LONGEST_HELLO, LONGEST = 4096, 2**20
"""Bytes of a message, before and after that."""

TIME_TO_END = 10.0
"""Seconds that a process has to end by itself after another node has failed; it may be waiting for that one for ever."""


def node_rank(nodes: int) -> int:
    """Number of this node, from 0; NODE_RANK, MASTER_ADDR and MASTER_PORT are set for torch, from Slurm's where they are not.

    Raises
    ------
    BadRequest
        If the environment does not say which of *nodes* this is, or says something else.
    """
    if nodes < 1:
        raise BadRequest(f"--nodes {nodes}: expected at least 1")
    if nodes == 1:
        if os.environ.get("NODE_RANK", "0") != "0":
            raise BadRequest(f"NODE_RANK is {os.environ['NODE_RANK']}, but --nodes is 1; say how many there are, or unset it")
        return 0
    _take_from_slurm()
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise BadRequest(
            f"--nodes {nodes}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. Start the same "
            f"command once on each node, with NODE_RANK (0 to {nodes - 1}) and MASTER_ADDR (the node of rank 0) set; under "
            f"Slurm `srun --nodes {nodes} --ntasks-per-node 1 python -m cxt.train …` sets what is needed"
        )
    os.environ.setdefault("MASTER_PORT", str(PORT))
    for name, low, high in (("NODE_RANK", 0, nodes - 1), ("MASTER_PORT", 1, 65534)):
        text = os.environ[name]
        if not (text.isdigit() and low <= int(text) <= high):
            raise BadRequest(f"{name} is '{text}': expected {low} to {high}")
    return int(os.environ["NODE_RANK"])


def _take_from_slurm() -> None:
    if "SLURM_NODEID" not in os.environ:
        return
    if os.environ.get("SLURM_LOCALID", "0") != "0":
        raise BadRequest("Slurm has started several processes on this node; start one (srun --ntasks-per-node 1)")
    os.environ.setdefault("NODE_RANK", os.environ["SLURM_NODEID"])
    names = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if names:
        from lightning_fabric.plugins.environments import SLURMEnvironment  # takes torch's seconds, which others need not wait

        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(names))
    if os.environ.get("SLURM_JOB_ID", "").isdigit():  # two jobs may share their first node
        os.environ.setdefault("MASTER_PORT", str(20_000 + 2 * (int(os.environ["SLURM_JOB_ID"]) % 6_000)))


class Peer:
    """The connection to another node's first process; what that says waits in *inbox*."""

    def __init__(self, connection: socket.socket):
        self.node = 0
        self.inbox: queue.Queue = queue.Queue()
        self._connection, self._read = connection, b""
        # A machine that has lost its power closes nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def say(self, message: dict) -> None:
        """Send it; where the other is gone, its reader says so."""
        with contextlib.suppress(OSError):
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def read(self, *, until: float | None = None, longest: int = LONGEST) -> dict:
        """The next message, of at most *longest* bytes; OSError at the end, or after *until*; ValueError for what is none."""
        while (end := self._read.find(b"\n")) < 0:
            if len(self._read) > longest:
                raise ValueError(f"a message of more than {longest} bytes")
            self._connection.settimeout(None if until is None else max(0.001, until - time.monotonic()))
            try:
                part = self._connection.recv(min(longest, 65536))
            finally:
                self._connection.settimeout(None)
            if not part:
                raise ConnectionError("it is closed")
            self._read += part
        line, self._read = self._read[:end], self._read[end + 1 :]
        if len(line) > longest:
            raise ValueError(f"a message of more than {longest} bytes")
        try:
            message = json.loads(line)
        except RecursionError:
            raise ValueError("a message of lists in lists") from None
        if not isinstance(message, dict):
            raise ValueError("a message that is no mapping")
        return message

    def heard(self) -> dict:
        """The next message of a node that has shown to be one: a value, the end, or a failure with its status."""
        message = self.read()
        status = message.get("status")
        if message.keys() in ({"value"}, {"end"}):
            return message
        if message.keys() == {"failed", "status"} and isinstance(message["failed"], str) and type(status) is int:
            return message | {"status": min(max(status, 0), 255)}
        raise ValueError("a message that no node sends")

    def close(self) -> None:
        """Nothing more will be said."""
        with contextlib.suppress(OSError):  # the other was faster
            self._connection.shutdown(socket.SHUT_WR)
        self._connection.close()


def _proof(secret: str, who: str, *numbers: str) -> str:
    """What only who knows *secret* can say of *numbers*."""
    return hmac.new(secret.encode(), "|".join([who, *numbers]).encode(), "sha256").hexdigest()


def _check_proof(message: dict, expected: str) -> None:
    proof = message.get("proof")
    if not (isinstance(proof, str) and hmac.compare_digest(proof.encode(), expected.encode())):
        raise ValueError("it does not know the secret")


def _ask_who(peer: Peer, secret: str) -> int:
    """The number of nodes that *peer* was started with, and its own in `peer.node`; OSError or ValueError for a stranger."""
    until, mine = time.monotonic() + TIME_TO_SAY_WHO, secrets.token_hex(16)
    peer.say({"number": mine})
    hello = peer.read(until=until, longest=LONGEST_HELLO)
    theirs, node, nodes = (hello.get(key) for key in ("number", "node", "nodes"))
    if not (isinstance(theirs, str) and type(node) is int and type(nodes) is int):
        raise ValueError("it says no numbers")
    _check_proof(hello, _proof(secret, "node", mine, theirs, str(node), str(nodes)))
    if not 1 <= node < nodes:
        raise ValueError(f"node {node} of {nodes}")
    peer.node = node
    peer.say({"proof": _proof(secret, "first", theirs, mine)})
    return nodes


def _say_who(peer: Peer, secret: str, *, node: int, nodes: int) -> None:
    """The other side of `_ask_who`; OSError or ValueError if it is not the first node that is spoken to."""
    until, mine = time.monotonic() + TIME_TO_SAY_WHO, secrets.token_hex(16)
    theirs = str(peer.read(until=until, longest=LONGEST_HELLO).get("number"))
    proof = _proof(secret, "node", theirs, mine, str(node), str(nodes))
    peer.say({"number": mine, "node": node, "nodes": nodes, "proof": proof})
    _check_proof(peer.read(until=until, longest=LONGEST_HELLO), _proof(secret, "first", mine, theirs))


def secret_file(directory) -> Path:
    """Where the first node leaves the secret for the others: a file of *directory* that is named after their meeting place."""
    place = f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}"
    return Path(directory) / f".cxt-nodes-{re.sub('[^A-Za-z0-9.-]', '_', place)}"


def _leave_secret(path: Path) -> str:
    """A new secret, in a file that only this user can read."""
    secret = secrets.token_hex(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a run that was killed, or whatever it is: its permissions are not to be kept
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8") as file:
            file.write(secret)
    except OSError as error:
        raise BadRequest(f"the secret of the nodes cannot be written to {path}: {error.strerror}") from None
    return secret


class Nodes:
    """The nodes of a run, as the first process of each sees them; use it as a context.

    The block that ends with an exception ends on all nodes, with the same status; a process that does not end by itself
    within `TIME_TO_END` is ended.

    Parameters
    ----------
    count : of nodes; with one, nothing of this happens
    directory : that all nodes see, where the first leaves a secret for the others until they have come
    seconds : in which all must have come

    Attributes
    ----------
    rank : number of this node; the first one decides

    Raises
    ------
    BadRequest
        If the environment does not say which node this is, its port is taken, or the others do not come in time.
    """

    def __init__(self, count: int, *, directory=".", seconds: float = TIME_TO_COME):
        self.rank, self.count = node_rank(count), count
        self._peers: list[Peer] = []
        self._failure: tuple[str, int] | None = None
        self._failed, self._closed, self._lock = threading.Event(), threading.Event(), threading.Lock()
        if count > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
            path = secret_file(directory)
            self._peers = (
                _others(address, port, count, seconds, path)
                if self.rank == 0
                else [_first(address, port, self.rank, count, seconds, path)]
            )
        for peer in self._peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"node {peer.node}").start()

    def gather(self, value) -> list:
        """On the first node what each of the others gives here, once all of them have; on the others nothing."""
        if self.rank == 0:
            return [self._next(peer) for peer in self._peers]
        self._tell({"value": value})
        return []

    def share(self, value=None):
        """What the first node gives here, on all of them."""
        if self.rank != 0:
            return self._next(self._peers[0])
        self._tell({"value": value})
        return value

    def __enter__(self):
        self._words = last_words(lambda text, status: self._tell({"failed": f"node {self.rank}: {text}", "status": status}))
        self._words.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is not None and self._peers:
                self._end_all(error)
        finally:
            self._words.__exit__(None, None, None)
            self._closed.set()
            self._tell({"end": "no more to say"})
            for peer in self._peers:
                peer.close()

    def _end_all(self, error: BaseException) -> None:
        """Tell the others of *error*, or raise what one of them has told of, which is why this one cannot go on."""
        agreed = getattr(error, "agreed", False)
        if not agreed or self.rank != 0:
            # What torch says when another process is gone comes before, or with, that process's own word.
            self._failed.wait(TIME_TO_END if agreed else 0 if isinstance(error, BadRequest | Failed) else 2)
        failure = self._failure
        if failure is None:
            status = 2 if isinstance(error, BadRequest) else getattr(error, "status", 1)
            text = str(error) if isinstance(error, BadRequest | Failed) else first_line(error)
            self._tell({"failed": f"node {self.rank}: {text}", "status": status})
        elif str(error) != failure[0]:
            raise Failed(failure[0], status=failure[1]) from error

    def _tell(self, message: dict) -> None:
        for peer in self._peers:
            peer.say(message)

    def _next(self, peer: Peer):
        message = peer.inbox.get()
        if message is None:
            text, status = self._failure
            raise Failed(text, status=status)
        return message["value"]

    def _listen(self, peer: Peer) -> None:
        """Put what *peer* says where it is waited for; when it has failed, see to it that this process ends."""
        while True:
            try:
                message = peer.heard()
            except (OSError, ValueError) as error:
                what = "is gone, without a word" if isinstance(error, OSError) else f"sent {error}"
                message = {
                    "failed": f"node {peer.node} {what}; the same command on every node continues from the last save",
                    "status": 1,
                }
            if "end" in message:
                return
            if "failed" in message:
                break
            peer.inbox.put(message)
        if self._closed.is_set():
            return
        with self._lock:
            is_first = self._failure is None
            if is_first:
                self._failure = (message["failed"], message["status"])
                if self.rank == 0:
                    self._tell(message)
            self._failed.set()
        for other in self._peers:
            other.inbox.put(None)
        if is_first and not self._closed.wait(TIME_TO_END):
            print(f"cxt: {message['failed']}", file=sys.stderr, flush=True)
            kill_children()
            os._exit(message["status"])


def _listener(address: str, port: int) -> socket.socket:
    """A socket that listens where *address* names this machine, and nowhere else."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BadRequest(f"MASTER_ADDR '{address}' is no address that this node knows: {error.strerror}") from None
    try:
        for family, _, _, _, where in found:
            # Many systems give their own name an address that others cannot reach (127.0.1.1).
            if ipaddress.ip_address(where[0].split("%")[0]).is_loopback and not _means_loopback(address):
                continue
            try:
                return socket.create_server(where, family=family)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        print(
            f"note: MASTER_ADDR '{address}' names no address of this node that others could reach, so that it listens on all "
            "of its addresses; set the address of the network between the nodes to listen there alone",
            flush=True,
        )
        return socket.create_server(("", port))
    except OSError as error:
        raise BadRequest(
            f"port {port}, MASTER_PORT + 1, cannot be used here ({error.strerror}); another run may have it: set another "
            "MASTER_PORT on all nodes, and start one process on each"
        ) from None


def _means_loopback(address: str) -> bool:
    """Whether *address* asks for it, as all nodes of this kind are on one machine."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _others(address: str, port: int, count: int, seconds: float, path: Path) -> list[Peer]:
    """The connections of the first node, by node."""
    until = time.monotonic() + seconds
    peers: dict[int, Peer] = {}
    came: queue.Queue[tuple[Peer, int]] = queue.Queue()
    places = threading.Semaphore(STRANGERS)

    def receive(connection: socket.socket) -> None:
        """Whoever it is, the others do not wait for it."""
        try:
            peer = Peer(connection)
            came.put((peer, _ask_who(peer, secret)))
        except (OSError, ValueError):  # whatever that was, it is no node
            connection.close()
        finally:
            places.release()

    def welcome() -> None:
        with contextlib.suppress(OSError):  # it is closed when all have come
            while True:
                connection = server.accept()[0]
                if places.acquire(blocking=False):
                    threading.Thread(target=receive, args=(connection,), daemon=True, name="who is there").start()
                else:
                    connection.close()  # a node tries again

    with _listener(address, port) as server:
        secret = _leave_secret(path)
        try:
            print(f"node 0 of {count} waits for the others at {socket.gethostname()}, port {port}", flush=True)
            threading.Thread(target=welcome, daemon=True, name="nodes").start()
            while len(peers) < count - 1:
                try:
                    peer, nodes = came.get(timeout=max(0.01, until - time.monotonic()))
                except queue.Empty:
                    missing = ", ".join(str(node) for node in range(1, count) if node not in peers)
                    raise BadRequest(
                        f"--nodes {count}, but after {seconds:.0f} s nothing was heard of node {missing}; start the same "
                        f"command on every node, and let them reach port {port} of {socket.gethostname()} and read {path}"
                    ) from None
                wrong = None
                if nodes != count:
                    wrong = f"node 0 was started with --nodes {count}, node {peer.node} with --nodes {nodes}"
                elif peer.node in peers:
                    wrong = f"two processes say that they are node {peer.node}; start one on each, with a NODE_RANK of its own"
                if wrong is not None:
                    for other in (*peers.values(), peer):
                        other.say({"failed": wrong, "status": 2})
                    raise BadRequest(wrong)
                peers[peer.node] = peer
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who waits in `accept`
    return [peers[node] for node in sorted(peers)]


def _first(address: str, port: int, rank: int, count: int, seconds: float, path: Path) -> Peer:
    """The connection to the first node."""
    until = time.monotonic() + seconds
    while True:
        connection = None
        try:
            connection = socket.create_connection((address, port), timeout=TIME_TO_SAY_WHO)
            peer = Peer(connection)
            _say_who(peer, _secret_in(path), node=rank, nodes=count)
            return peer
        except (OSError, ValueError) as error:
            if connection is not None:
                connection.close()
            if time.monotonic() > until:
                raise BadRequest(
                    f"--nodes {count}, but for {seconds:.0f} s the first node has not answered at {address}, port {port} "
                    f"({error}); start the same command on every node, in the file system that they share; MASTER_ADDR must "
                    "name the one with NODE_RANK 0"
                ) from None
            time.sleep(0.2)


def _secret_in(path: Path) -> str:
    """What the first node has left at *path*, which may be of an earlier run still; OSError if there is nothing."""
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(number, 1000).decode(errors="replace")
    finally:
        os.close(number)
