"""Several machines of one run: what the first of them decides, and the end of all when one ends.

The same command is started once on each machine. The first process of the first machine, which alone writes, tells those of
the others what it has decided, over connections that last as long as the run; a process that fails says so before it ends, and
a connection that breaks says the same. Processes that a machine starts for its other devices take no part.
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
"""Seconds in which all machines must have started."""

SHUTDOWN_TIMEOUT = 10.0
"""Seconds that a process has to end by itself after another machine has failed; it may be waiting for that one for ever."""


class Machines:
    """The machines of a run, as the first process of each sees them; use it as a context.

    The block that ends with an exception ends on all machines, with the same status; a process that does not end by itself
    within `SHUTDOWN_TIMEOUT` is ended.

    Parameters
    ----------
    count : int
        Number of machines; with one, nothing of this happens.
    directory : path-like
        A directory that all machines see, where the first leaves a secret for the others until they have come.
    seconds : float
        Time in which all must have come.

    Attributes
    ----------
    rank : int
        Number of this machine; 0 is the first, which decides.

    Raises
    ------
    BadRequest
        If the environment does not say which machine this is, its port is taken, or the others do not come in time.
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
        """Whether this is the machine that decides and writes."""
        return self.rank == 0

    def gather(self, value) -> list:
        """On the first machine what each of the others gives here, once all of them have; on the others nothing."""
        if self.is_first:
            return [self._take(connection) for connection in self._connections]
        self._send_all({"value": value})
        return []

    def share(self, value=None):
        """What the first machine gives here, on all of them."""
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
        """Tell the others of *error*, or raise what one of them has told of, which is why this one cannot go on."""
        agreed = getattr(error, "agreed", False)
        if not agreed or not self.is_first:
            # What torch says when another process is gone comes before, or with, that process's own word.
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
        """Wait for the next value of another machine; Failed if that has failed."""
        message = connection.inbox.get()
        if message is None:
            text, status = self._failure
            raise Failed(text, status=status)
        return message["value"]

    def _listen(self, connection: Connection) -> None:
        """Put what a machine sends where it is waited for; when it has failed, see to it that this process ends."""
        while True:
            try:
                message = connection.receive_from_machine()
            except (OSError, ValueError) as error:
                what = "is gone, without a word" if isinstance(error, OSError) else f"sent {error}"
                message = {
                    "failed": f"machine {connection.machine} {what}; the same command on every machine continues from the last "
                    "training state",
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
