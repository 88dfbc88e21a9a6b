"""Several nodes of one run: which this is, what the first of them decides, and the end of all when one ends.

The same command is started once on each node. The first process of the first node, which alone writes, tells those of the
others what it has decided, over a connection that lasts as long as the run; whoever fails says so before it ends, and a
connection that breaks says the same. Processes that a node starts for its other devices take no part.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time

import psutil

from cxt.errors import BadRequest, Failed, first_line

PORT = 29500
"""Torch's, where MASTER_PORT is not set; the nodes themselves talk at the next one."""

TIME_TO_COME = 600.0
"""Seconds in which all nodes must have started."""

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
        self._connection = connection
        # A machine that has lost its power closes nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._lines = connection.makefile("r", encoding="utf-8")

    def say(self, message: dict) -> None:
        """Send it; where the other is gone, its reader says so."""
        with contextlib.suppress(OSError):
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def read(self, *, seconds: float | None = None) -> dict:
        """The next message; OSError or ValueError at the end, or if there is none in time."""
        self._connection.settimeout(seconds)
        return json.loads(self._lines.readline())

    def close(self) -> None:
        """Nothing more will be said."""
        with contextlib.suppress(OSError):  # the other was faster
            self._connection.shutdown(socket.SHUT_WR)
        self._connection.close()


class Nodes:
    """The nodes of a run, as the first process of each sees them; use it as a context.

    The block that ends with an exception ends on all nodes, with the same status; a process that does not end by itself
    within `TIME_TO_END` is ended.

    Parameters
    ----------
    count : of nodes; with one, nothing of this happens
    seconds : in which all must have come

    Attributes
    ----------
    rank : number of this node; the first one decides

    Raises
    ------
    BadRequest
        If the environment does not say which node this is, its port is taken, or the others do not come in time.
    """

    def __init__(self, count: int, *, seconds: float = TIME_TO_COME):
        self.rank, self.count = node_rank(count), count
        self._peers: list[Peer] = []
        self._failure: tuple[str, int] | None = None
        self._failed, self._closed, self._lock = threading.Event(), threading.Event(), threading.Lock()
        if count > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
            self._peers = (
                _others(port, count, seconds) if self.rank == 0 else [_first(address, port, self.rank, count, seconds)]
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
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is not None and self._peers:
                self._end_all(error)
        finally:
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
                message = peer.read()
            except (OSError, ValueError):  # the connection is closed: an empty line is no JSON
                message = {
                    "failed": f"node {peer.node} is gone, without a word; the same command on every node continues from the "
                    "last save",
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
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            os._exit(message["status"])


def _others(port: int, count: int, seconds: float) -> list[Peer]:
    """The connections of the first node, by node."""
    until = time.monotonic() + seconds
    peers: dict[int, Peer] = {}
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise BadRequest(
            f"port {port}, MASTER_PORT + 1, cannot be used here ({error.strerror}); another run may have it: set another "
            "MASTER_PORT on all nodes, and start one process on each"
        ) from None
    print(f"node 0 of {count} waits for the others at {socket.gethostname()}, port {port}", flush=True)
    with server:
        while len(peers) < count - 1:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                peer = Peer(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(node) for node in range(1, count) if node not in peers)
                raise BadRequest(
                    f"--nodes {count}, but after {seconds:.0f} s nothing was heard of node {missing}; start the same command "
                    f"on every node, and let them reach port {port} of {socket.gethostname()}"
                ) from None
            try:
                hello = peer.read(seconds=5)
                peer.node, nodes = int(hello["node"]), int(hello["nodes"])
            except (OSError, ValueError, TypeError, KeyError):  # whatever that was, it is no node
                peer.close()
                continue
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
    return [peers[node] for node in sorted(peers)]


def _first(address: str, port: int, rank: int, count: int, seconds: float) -> Peer:
    """The connection to the first node."""
    until = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise BadRequest(
                    f"--nodes {count}, but for {seconds:.0f} s the first node has not answered at {address}, port {port} "
                    f"({error}); start the same command on every node; MASTER_ADDR must name the one with NODE_RANK 0"
                ) from None
            time.sleep(0.2)
    peer = Peer(connection)
    peer.say({"node": rank, "nodes": count})
    return peer
