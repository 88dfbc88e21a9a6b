"""The connection between two machines of a run: lines of JSON, and how each side proves that it belongs to the run.

The secret that both must know is never sent: each proves that it knows it by a digest of it with numbers that both have drawn
for this one connection. Until a peer has done so, nothing is taken from it but one short line within a few seconds.
"""

import contextlib
import hmac
import json
import queue
import secrets
import socket
import time

HANDSHAKE_SECONDS = 5.0
"""Seconds in which a peer must have proved that it is a machine of the run."""

LONGEST_HELLO, LONGEST_MESSAGE = 4096, 2**20
"""Bytes of a message, during the handshake and after it."""


class Connection:
    """The connection to another machine's first process.

    Parameters
    ----------
    connection : socket.socket
        Connected.

    Attributes
    ----------
    machine : int
        Number of the machine at the other end; 0 is the first.
    inbox : queue.Queue
        Messages that the other machine has sent and nobody has taken yet.
    """

    def __init__(self, connection: socket.socket):
        self.machine = 0
        self.inbox: queue.Queue = queue.Queue()
        self._socket, self._buffer = connection, b""
        # A machine that has lost its power closes nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict) -> None:
        """Send a message; if the other machine is gone, whoever reads from it finds out."""
        with contextlib.suppress(OSError):
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self, *, until: float | None = None, longest: int = LONGEST_MESSAGE) -> dict:
        """Wait for the next message.

        Parameters
        ----------
        until : float, optional
            Time of `time.monotonic` until which to wait; without it, for ever.
        longest : int
            Bytes of the longest message that is accepted.

        Raises
        ------
        OSError
            If the connection ends, or nothing came in time.
        ValueError
            If what came is no message.
        """
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > longest:
                raise ValueError(f"a message of more than {longest} bytes")
            self._socket.settimeout(None if until is None else max(0.001, until - time.monotonic()))
            try:
                part = self._socket.recv(min(longest, 65536))
            finally:
                self._socket.settimeout(None)
            if not part:
                raise ConnectionError("it is closed")
            self._buffer += part
        line, self._buffer = self._buffer[:end], self._buffer[end + 1 :]
        if len(line) > longest:
            raise ValueError(f"a message of more than {longest} bytes")
        try:
            message = json.loads(line)
        except RecursionError:
            raise ValueError("a message of lists in lists") from None
        if not isinstance(message, dict):
            raise ValueError("a message that is no mapping")
        return message

    def receive_from_machine(self) -> dict:
        """Wait for the next message of a proven machine: {value}, {end}, or {failed, status}; errors as of `receive`."""
        message = self.receive()
        status = message.get("status")
        if message.keys() in ({"value"}, {"end"}):
            return message
        if message.keys() == {"failed", "status"} and isinstance(message["failed"], str) and type(status) is int:
            return message | {"status": min(max(status, 0), 255)}
        raise ValueError("a message that no machine sends")

    def close(self) -> None:
        """End the connection; nothing more is sent."""
        with contextlib.suppress(OSError):  # the other was faster
            self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()


def make_proof(secret: str, role: str, *numbers: str) -> str:
    """Digest that only who knows *secret* can make of *numbers*."""
    return hmac.new(secret.encode(), "|".join([role, *numbers]).encode(), "sha256").hexdigest()


def _check_proof(message: dict, expected: str) -> None:
    proof = message.get("proof")
    if not (isinstance(proof, str) and hmac.compare_digest(proof.encode(), expected.encode())):
        raise ValueError("it does not know the secret")


def verify_machine(connection: Connection, secret: str) -> int:
    """Let a peer prove that it is a machine of the run, and set `connection.machine`: the first machine's side.

    Returns
    -------
    int
        The number of machines that the peer was started with.

    Raises
    ------
    OSError, ValueError
        If the peer is a stranger.
    """
    until, own_number = time.monotonic() + HANDSHAKE_SECONDS, secrets.token_hex(16)
    connection.send({"number": own_number})
    hello = connection.receive(until=until, longest=LONGEST_HELLO)
    peer_number, machine, machines = (hello.get(key) for key in ("number", "machine", "machines"))
    if not (isinstance(peer_number, str) and type(machine) is int and type(machines) is int):
        raise ValueError("it says no numbers")
    _check_proof(hello, make_proof(secret, "machine", own_number, peer_number, str(machine), str(machines)))
    if not 1 <= machine < machines:
        raise ValueError(f"machine {machine} of {machines}")
    connection.machine = machine
    connection.send({"proof": make_proof(secret, "first", peer_number, own_number)})
    return machines


def prove_membership(connection: Connection, secret: str, *, machine: int, machines: int) -> None:
    """Prove to the first machine that this is number *machine* of *machines*, and have it prove itself.

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
