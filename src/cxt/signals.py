"""Signals that end a run: how a command reacts to them, and how it ends the processes it has started.

During its optimizer steps, a trainer notes a signal and saves (`cxt.trainer.training_state`). At any other time there is
nothing to save, and it exits immediately, within the handler: an exception raised there would surface in the middle of an
import or a compilation.
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
"""Exit statuses. Schedulers send SIGUSR1 as a warning before SIGTERM."""

OUT_OF_TIME = 75
"""Exit status when the wall-clock budget is spent: try again, and it goes on."""

TRAINER = "CXT_TRAINER"
"""Environment variable: id of the trainer process that has started this one for another device of its machine."""

_exit_callbacks: list[Callable[[str, int], None]] = []


def listen(handler) -> dict:
    """Install *handler* for the signals and return the previous handlers. SIGHUP stays ignored if it already is (`nohup`)."""
    heard = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def ignore() -> None:
    """Ignore these signals from now on, pending ones included."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Block signals, so that a process forked meanwhile can install its handlers first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def install_exit_handler() -> None:
    """From now on, a signal ends this process with one line and its status; one for another device ends with its parent."""
    if is_started_by_trainer():
        end_with_trainer()
        return
    os.environ[TRAINER] = str(os.getpid())
    listen(exit_on_signal)


def has_exit_handler() -> bool:
    """Whether this process is a command prepared by `install_exit_handler`, and not, for example, a notebook's."""
    return os.environ.get(TRAINER) == str(os.getpid())


@contextlib.contextmanager
def call_before_exit(callback: Callable[[str, int], None]) -> Iterator[None]:
    """Call *callback* with message and status if `exit_on_signal` ends this process within the `with` block."""
    _exit_callbacks.append(callback)
    try:
        yield
    finally:
        _exit_callbacks.remove(callback)


def exit_on_signal(number: int, frame=None) -> None:
    """End this process because of a signal; a signal handler."""
    ignore()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the loaders that end here
    text = (
        f"stopped by {signal.Signals(number).name}; run the same command again to continue from the last training state, "
        "if there is one"
    )
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
    """Kill (SIGKILL) all descendants of this process."""
    # Not imported here: a signal may arrive in the middle of any import. Modules that start processes have imported it before.
    psutil = sys.modules.get("psutil")
    if psutil is None:
        return
    with contextlib.suppress(Exception):  # psutil itself may be half imported
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(Exception):
                process.kill()


def is_started_by_trainer() -> bool:
    """Whether another process of this machine has started this one for another device."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def end_with_trainer() -> None:
    """Leave signals to the parent, which has started this process for another device, and end when it ends."""
    ignore()
    end_with_parent(int(os.environ[TRAINER]) if TRAINER in os.environ else os.getppid())


def end_with_parent(parent: int) -> None:
    """End this process when its *parent* ends, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before the call
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end with the trainer").start()
