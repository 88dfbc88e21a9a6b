"""The connection between two machines of a run: messages as lines of JSON, and mutual authentication.

The shared secret is never sent: each side proves that it knows it by a digest of the secret and random numbers that both have
drawn for this connection. Until then, only one short line, within a few seconds, is accepted from a peer.
"""

import contextlib
import hmac
import json
import queue
import secrets
import socket
import time

HANDSHAKE_SECONDS = 5.0
"""Seconds within which a peer must prove that it is a machine of the run."""

LONGEST_HELLO, LONGEST_MESSAGE = 4096, 2**20
"""Largest size of a message in bytes, during the handshake and after it."""


class Connection:
    """The connection to another machine's first process.

    Parameters
    ----------
    connection : socket.socket
        A connected socket.

    Attributes
    ----------
    machine : int
        Number of the machine at the other end; 0 is the first.
    inbox : queue.Queue
        Received messages that have not been read yet.
    """

    def __init__(self, connection: socket.socket):
        self.machine = 0
        self.inbox: queue.Queue = queue.Queue()
        self._socket, self._buffer = connection, b""
        # A machine that loses power does not close its connections.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict) -> None:
        """Send a message; errors are ignored, because the thread that reads from the connection notices them."""
        with contextlib.suppress(OSError):
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self, *, until: float | None = None, longest: int = LONGEST_MESSAGE) -> dict:
        """Wait for the next message.

        Parameters
        ----------
        until : float, optional
            Time of `time.monotonic` until which to wait; by default without limit.
        longest : int
            Largest accepted size of a message in bytes.

        Raises
        ------
        OSError
            If the connection ends, or no message arrives in time.
        ValueError
            If the message is not valid.
        """
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > longest:
                raise ValueError(f"message longer than {longest} bytes")
            self._socket.settimeout(None if until is None else max(0.001, until - time.monotonic()))
            try:
                part = self._socket.recv(min(longest, 65536))
            finally:
                self._socket.settimeout(None)
            if not part:
                raise ConnectionError("connection closed")
            self._buffer += part
        line, self._buffer = self._buffer[:end], self._buffer[end + 1 :]
        if len(line) > longest:
            raise ValueError(f"message longer than {longest} bytes")
        try:
            message = json.loads(line)
        except RecursionError:
            raise ValueError("message nested too deeply") from None
        if not isinstance(message, dict):
            raise ValueError("message is not a mapping")
        return message

    def receive_from_machine(self) -> dict:
        """Wait for the next message of a machine of the run: {value}, {end}, or {failed, status}; errors as in `receive`."""
        message = self.receive()
        status = message.get("status")
        if message.keys() in ({"value"}, {"end"}):
            return message
        if message.keys() == {"failed", "status"} and isinstance(message["failed"], str) and type(status) is int:
            return message | {"status": min(max(status, 0), 255)}
        raise ValueError("unknown message")

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):  # the other side may have closed it first
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()


def make_proof(secret: str, role: str, *numbers: str) -> str:
    """A digest of *numbers* that cannot be computed without *secret*."""
    return hmac.new(secret.encode(), "|".join([role, *numbers]).encode(), "sha256").hexdigest()


def _check_proof(message: dict, expected: str) -> None:
    proof = message.get("proof")
    if not (isinstance(proof, str) and hmac.compare_digest(proof.encode(), expected.encode())):
        raise ValueError("wrong secret")


def verify_machine(connection: Connection, secret: str) -> int:
    """Authenticate a peer as a machine of the run, and set `connection.machine`; called on the first machine.

    Returns
    -------
    int
        The number of machines that the peer was started with.

    Raises
    ------
    OSError, ValueError
        If the peer is not a machine of the run.
    """
    until, own_number = time.monotonic() + HANDSHAKE_SECONDS, secrets.token_hex(16)
    connection.send({"number": own_number})
    hello = connection.receive(until=until, longest=LONGEST_HELLO)
    peer_number, machine, machines = (hello.get(key) for key in ("number", "machine", "machines"))
    if not (isinstance(peer_number, str) and type(machine) is int and type(machines) is int):
        raise ValueError("malformed handshake")
    _check_proof(hello, make_proof(secret, "machine", own_number, peer_number, str(machine), str(machines)))
    if not 1 <= machine < machines:
        raise ValueError(f"machine {machine} of {machines}")
    connection.machine = machine
    connection.send({"proof": make_proof(secret, "first", peer_number, own_number)})
    return machines


def prove_membership(connection: Connection, secret: str, *, machine: int, machines: int) -> None:
    """Authenticate to the first machine as number *machine* of *machines*, and verify it in turn.

    Raises
    ------
    OSError, ValueError
        If the peer is not the first machine of the run.
    """
    until, own_number = time.monotonic() + HANDSHAKE_SECONDS, secrets.token_hex(16)
    peer_number = str(connection.receive(until=until, longest=LONGEST_HELLO).get("number"))
    proof = make_proof(secret, "machine", peer_number, own_number, str(machine), str(machines))
    connection.send({"number": own_number, "machine": machine, "machines": machines, "proof": proof})
    _check_proof(connection.receive(until=until, longest=LONGEST_HELLO), make_proof(secret, "first", own_number, peer_number))
