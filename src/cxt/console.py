"""Console output that survives ASCII terminals, full disks and closed pipes."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable

from cxt.errors import BadRequest, Failed, advise_extra, suggest_nearest

ON_STDERR = {"on_stderr": True}
"""`extra` of a log record that goes to standard error at any level, for commands that print their result to standard output."""


class _ConsoleHandler(logging.Handler):
    """Prints log records: progress to standard output; warnings, errors and records with `ON_STDERR` to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        is_for_stderr = record.levelno >= logging.WARNING or getattr(record, "on_stderr", False)
        print(self.format(record), file=sys.stderr if is_for_stderr else sys.stdout, flush=True)


def counted(number: int, noun: str) -> str:
    """A number of things for a message: "0 runs", "1 run" or "1,200 runs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


LOG_LEVELS = ("info", "warning", "error")
"""Levels of messages: progress, notes to the user, and errors."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of cxt, which prints to the console by default.

    Progress is logged as INFO, notes to the user as WARNING. A program that handles the records itself removes the handler of
    the logger `cxt` with ``logging.getLogger("cxt").handlers.clear()`` and sets its `propagate`.
    """
    package = logging.getLogger("cxt")
    if not getattr(package, "is_set_up", False):
        package.is_set_up = True
        package.addHandler(_ConsoleHandler())
        package.propagate = False
        if package.level == logging.NOTSET:
            package.setLevel(logging.INFO)
    return package if name == "__main__" else logging.getLogger(name)  # `python -m` calls a module so


def add_verbosity_flags(parser: argparse.ArgumentParser) -> None:
    """Add -v and -q to the flags of a command that reports progress."""
    parser.add_argument("-v", "--verbose", action="store_true", help="begin lines of progress with the time and the module")
    parser.add_argument("-q", "--quiet", action="store_true", help="print warnings and errors only")
    parser.add_argument(
        "--log-level", default="info", metavar=f"{{{','.join(LOG_LEVELS)}}}",
        help="least important messages to print; warning is the same as --quiet, error hides notes, too (default info)",
    )  # fmt: skip


def set_log_level(level: str) -> None:
    """Print only messages of this *level* or a more important one; BadRequest unless it is one of `LOG_LEVELS`."""
    if level not in LOG_LEVELS:
        raise BadRequest(f"unknown log level '{level}'{suggest_nearest(level, LOG_LEVELS)}")
    get_logger("cxt").setLevel(level.upper())


def set_verbosity(args: argparse.Namespace) -> None:
    """Apply the flags of `add_verbosity_flags`."""
    package = get_logger("cxt")
    set_log_level("warning" if args.quiet and args.log_level == "info" else args.log_level)
    for handler in package.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if args.verbose else None))


class LossTolerantStream:
    """A stream whose failure stops no work: it remembers the first failure, and drops everything written after it."""

    def __init__(self, stream):
        self._stream, self.lost, self.is_progress = stream, None, False

    def __getattr__(self, attribute):
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        """Write *text*, or drop it if the stream fails; return its length in either case."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream; `check` raises a failure later, unless the stream carries progress."""
        self._try(self._stream.flush)

    def _try(self, work) -> None:
        try:
            work()
        except OSError as error:
            _drop(self._stream)
            if self.is_progress:
                line = f"cxt: standard output cannot be written ({error.strerror}); continuing without it"
                print(line, file=sys.stderr, flush=True)
            elif self.lost is None:
                self.lost = error

    def check(self) -> None:
        """Flush; raise Failed if output was lost, without a message if the reader closed the pipe."""
        self.flush()
        if isinstance(self.lost, BrokenPipeError):
            raise Failed("", status=141)  # a shell's status for a command that SIGPIPE has killed
        if self.lost is not None:
            raise Failed(f"standard output cannot be written: {self.lost.strerror}")


def _drop(stream) -> None:
    """Discard a stream's buffer and everything that is written to it from now on."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


@contextlib.contextmanager
def console():
    """Prepare the process for a command, and check at the end that its output was written.

    Characters that the encoding of a stream lacks (in an ASCII locale) are written as escapes. Failures of standard error are
    ignored. `MPLBACKEND` is set because a notebook's may name a module that is not installed here, so that every import of
    matplotlib would fail.

    Raises
    ------
    Failed
        If standard output could not be written; without a message if its reader closed the pipe, as in `cxt runs | head`.
    """
    os.environ["MPLBACKEND"] = "agg"
    streams = out, err = sys.stdout, sys.stderr  # None if closed
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = tolerant_streams = [stream and LossTolerantStream(stream) for stream in streams]
    try:
        try:
            yield
        except SystemExit:
            if out is not None:
                tolerant_streams[0].check()
            raise
        if out is not None:
            tolerant_streams[0].check()
    finally:
        for stream in tolerant_streams:
            if stream is not None:
                stream.flush()  # otherwise Python would complain at exit
        sys.stdout, sys.stderr = out, err


@contextlib.contextmanager
def progress_only():
    """Treat standard output within a `with` block as progress: losing it is reported once, and is no error."""
    out = sys.stdout
    if not isinstance(out, LossTolerantStream):
        yield
        return
    out.is_progress = True
    try:
        yield
    finally:
        out.flush()
        out.is_progress = False


def print_error(message: str) -> None:
    """Print a line to standard error, if that is possible."""
    if sys.stderr is not None:
        print(f"cxt: {message}", file=LossTolerantStream(sys.stderr), flush=True)


def exit_on_bad_request(main: Callable[[], None]) -> None:
    """Run a command's *main* and turn expected errors into one line on standard error and an exit status.

    The status is 2 for a bad request and for a missing package of one of cxt's extras, a failed run's own status, and 130 for
    Ctrl-C. Any other exception propagates: Python prints its traceback and exits with status 1.
    """
    try:
        with console():
            main()
    except BadRequest as error:
        print_error(str(error))
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        advice = advise_extra(error)
        if advice is None:
            raise
        print_error(advice)
        raise SystemExit(2) from None
    except Failed as error:
        if str(error):
            print_error(str(error))
        raise SystemExit(error.status) from None
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns a KeyboardInterrupt into SystemExit.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt Python's exit
        print_error("interrupted")
        raise SystemExit(130) from None
