"""Several machines of one run: sharing the first one's decisions, and ending all when one fails.

The same command is started once on each machine. The first process of the first machine, which alone writes files, sends its
decisions to the first processes of the others, over connections that last as long as the run. A process that fails reports it
before it ends; a broken connection also counts as a failure. Processes that a machine starts for its other devices take no
part.
"""

import os
import sys
import threading

import psutil  # noqa: F401 (`kill_children` takes it only where it is loaded)

from cxt.errors import BadRequest, Failed, first_line
from cxt.signals import call_before_exit, kill_children
from cxt.trainer.connection import Connection
from cxt.trainer.rendezvous import accept_machines, connect_to_first, read_machine_rank, secret_path

JOIN_TIMEOUT = 600.0
"""Seconds within which all machines must have started."""

SHUTDOWN_TIMEOUT = 10.0
"""Seconds that a process has to end by itself after another machine has failed; then it is killed, as it may wait forever."""


class Machines:
    """The machines of a run, as seen by the first process of each; use it as a context manager.

    An exception in the `with` block of one machine ends the blocks of all with the same status; a process that does not end by
    itself within `SHUTDOWN_TIMEOUT` is killed.

    Parameters
    ----------
    count : int
        Number of machines; with one, there are no connections.
    directory : path-like
        A directory that all machines share, where the first one leaves a secret until the others have connected.
    seconds : float
        Time within which all machines must connect.

    Attributes
    ----------
    rank : int
        Number of this machine; 0 is the first, which makes the decisions.

    Raises
    ------
    BadRequest
        If the environment does not say which machine this is, its port is in use, or the others do not connect in time.
    """

    def __init__(self, count: int, *, directory=".", seconds: float = JOIN_TIMEOUT):
        self.rank, self.count = read_machine_rank(count), count
        self._connections: list[Connection] = []
        self._failure: tuple[str, int] | None = None
        self._failed, self._closed, self._lock = threading.Event(), threading.Event(), threading.Lock()
        if count > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
            path = secret_path(directory)
            self._connections = (
                accept_machines(address, port, count, seconds, path)
                if self.rank == 0
                else [connect_to_first(address, port, self.rank, count, seconds, path)]
            )
        for connection in self._connections:
            threading.Thread(target=self._listen, args=(connection,), daemon=True, name=f"machine {connection.machine}").start()

    @property
    def is_first(self) -> bool:
        """Whether this is the machine that makes the decisions and writes files."""
        return self.rank == 0

    def gather(self, value) -> list:
        """Wait on the first machine for the *value* of each of the others, and return them; on the others, return []."""
        if self.is_first:
            return [self._take(connection) for connection in self._connections]
        self._send_all({"value": value})
        return []

    def share(self, value=None):
        """Return the *value* of the first machine on all machines."""
        if not self.is_first:
            return self._take(self._connections[0])
        self._send_all({"value": value})
        return value

    def __enter__(self):
        self._exit_callback = call_before_exit(
            lambda text, status: self._send_all({"failed": f"machine {self.rank}: {text}", "status": status})
        )
        self._exit_callback.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is not None and self._connections:
                self._end_all(error)
        finally:
            self._exit_callback.__exit__(None, None, None)
            self._closed.set()
            self._send_all({"end": "no more to say"})
            for connection in self._connections:
                connection.close()

    def _end_all(self, error: BaseException) -> None:
        """Report *error* to the others, or raise the failure that one of them has reported, if it caused *error*."""
        agreed = getattr(error, "agreed", False)
        if not agreed or not self.is_first:
            # Torch's error about a lost process may arrive before that process's own report.
            self._failed.wait(SHUTDOWN_TIMEOUT if agreed else 0 if isinstance(error, BadRequest | Failed) else 2)
        failure = self._failure
        if failure is None:
            status = 2 if isinstance(error, BadRequest) else getattr(error, "status", 1)
            text = str(error) if isinstance(error, BadRequest | Failed) else first_line(error)
            self._send_all({"failed": f"machine {self.rank}: {text}", "status": status})
        elif str(error) != failure[0]:
            raise Failed(failure[0], status=failure[1]) from error

    def _send_all(self, message: dict) -> None:
        for connection in self._connections:
            connection.send(message)

    def _take(self, connection: Connection):
        """Wait for the next value of another machine; raises Failed if that machine has failed."""
        message = connection.inbox.get()
        if message is None:
            text, status = self._failure
            raise Failed(text, status=status)
        return message["value"]

    def _listen(self, connection: Connection) -> None:
        """Pass on the messages of a machine to the waiting thread; when it has failed, make sure that this process ends."""
        while True:
            try:
                message = connection.receive_from_machine()
            except (OSError, ValueError) as error:
                machine = f"machine {connection.machine}"
                lost = isinstance(error, OSError)
                what = f"lost the connection to {machine}" if lost else f"{machine} sent an invalid message ({error})"
                message = {
                    "failed": f"{what}; the same command on every machine continues from the last training state",
                    "status": 1,
                }
            if "end" in message:
                return
            if "failed" in message:
                break
            connection.inbox.put(message)
        if self._closed.is_set():
            return
        with self._lock:
            is_first_failure = self._failure is None
            if is_first_failure:
                self._failure = (message["failed"], message["status"])
                if self.is_first:
                    self._send_all(message)
            self._failed.set()
        for other in self._connections:
            other.inbox.put(None)
        if is_first_failure and not self._closed.wait(SHUTDOWN_TIMEOUT):
            print(f"cxt: {message['failed']}", file=sys.stderr, flush=True)
            kill_children()
            os._exit(message["status"])
