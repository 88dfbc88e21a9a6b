"""Signals that end a run: what a command does about them between its steps, and how the processes that it has started end.

A trainer that is at its steps takes note of a signal and saves (`cxt.trainer.training_state`). At any other time there is
nothing to save, and it ends at once, from within the handler: an exception there would come out of whatever is being
imported or compiled.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129, signal.SIGINT: 130}
"""Exit statuses. SIGUSR1 is what schedulers warn with before they send SIGTERM."""

OUT_OF_TIME = 75
"""Exit status when the wall-clock budget is spent: try again, and it goes on."""

TRAINER = "CXT_TRAINER"
"""Environment: number of the process that has started this one for another device of its machine."""

_exit_callbacks: list[Callable[[str, int], None]] = []


def listen(handler) -> dict:
    """Call *handler* for the signals; the handlers before. One for a closed session that is ignored (`nohup`) stays so."""
    heard = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def ignore() -> None:
    """From here on the signals do nothing to this process, nor those that came while they were held back."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Signals wait while this lasts, for a process that is forked meanwhile until it has said what it does about them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def install_exit_handler() -> None:
    """From here on a signal ends this process with one line and its status; if another has started it, with that one."""
    if is_started_by_trainer():
        end_with_trainer()
        return
    os.environ[TRAINER] = str(os.getpid())
    listen(exit_on_signal)


def has_exit_handler() -> bool:
    """Whether this is a command that `install_exit_handler` has prepared, and no one else's process, such as a notebook's."""
    return os.environ.get(TRAINER) == str(os.getpid())


@contextlib.contextmanager
def call_before_exit(callback: Callable[[str, int], None]) -> Iterator[None]:
    """Call *callback* with message and status before `exit_on_signal` ends this process, while this lasts."""
    _exit_callbacks.append(callback)
    try:
        yield
    finally:
        _exit_callbacks.remove(callback)


def exit_on_signal(number: int, frame=None) -> None:
    """End this process because of a signal: a handler for it."""
    ignore()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would tell of the loaders that end here
    text = f"stopped by {signal.Signals(number).name}; nothing is lost: the same command goes on from what is saved"
    kill_children()
    for callback in reversed(_exit_callbacks):
        with contextlib.suppress(Exception):
            callback(text, STATUS[number])
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"cxt: {text}\n".encode())
    os._exit(STATUS[number])


def kill_children() -> None:
    """`kill -9` of all processes that this one has started, and of theirs."""
    # Not imported here: a signal may have come in the middle of any import. Whoever starts processes has imported it before.
    psutil = sys.modules.get("psutil")
    if psutil is None:
        return
    with contextlib.suppress(Exception):  # half imported itself
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(Exception):
                process.kill()


def is_started_by_trainer() -> bool:
    """Whether another process of this machine has started this one, for another device."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def end_with_trainer() -> None:
    """Leave signals to the process that has started this one for a device of its own, and end when it ends."""
    ignore()
    end_with_parent(int(os.environ[TRAINER]) if TRAINER in os.environ else os.getppid())


def end_with_parent(parent: int) -> None:
    """End this process when its *parent* ends, whatever way that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before that
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with the trainer").start()
