"""What a command says, whatever its standard output and error are: an ASCII terminal, a full disk, a reader that has gone."""

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable

from cxt.errors import BadRequest, Failed, advise_extra

ON_STDERR = {"on_stderr": True}
"""`extra` of a log record that goes to standard error whatever its level: the command has its result on standard output."""


class _ConsoleHandler(logging.Handler):
    """Prints what cxt has to say: on standard output, from warnings on (and with `ON_STDERR`) on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        is_for_stderr = record.levelno >= logging.WARNING or getattr(record, "on_stderr", False)
        print(self.format(record), file=sys.stderr if is_for_stderr else sys.stdout, flush=True)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of cxt, whose lines are shown unless someone decides otherwise.

    Progress is INFO and what a user should know WARNING. To handle the lines in a program of one's own, take the handler of the
    logger `cxt` away: ``logging.getLogger("cxt").handlers.clear()``, and set its `propagate`.
    """
    package = logging.getLogger("cxt")
    if not getattr(package, "is_set_up", False):
        package.is_set_up = True
        package.addHandler(_ConsoleHandler())
        package.propagate = False
        if package.level == logging.NOTSET:
            package.setLevel(logging.INFO)
    return logging.getLogger(name)


def add_verbosity_flags(parser: argparse.ArgumentParser) -> None:
    """Add -v and -q to the flags of a command that has progress to tell."""
    parser.add_argument("-v", "--verbose", action="store_true", help="begin lines of progress with the time and the module")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress: warnings and errors only")


def set_verbosity(args: argparse.Namespace) -> None:
    """Do what the flags of `add_verbosity_flags` ask for."""
    package = get_logger("cxt")
    package.setLevel(logging.WARNING if args.quiet else logging.INFO)
    for handler in package.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s" if args.verbose else None))


class LossTolerantStream:
    """A stream whose loss ends no work: after the first failure, which it remembers, what is written to it is dropped."""

    def __init__(self, stream):
        self._stream, self.lost, self.is_progress = stream, None, False

    def __getattr__(self, attribute):
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        """Write *text*, or drop it if the stream fails; return its length in either case."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream; `check` raises its failure later, unless the stream carries progress."""
        self._try(self._stream.flush)

    def _try(self, work) -> None:
        try:
            work()
        except OSError as error:
            _drop(self._stream)
            if self.is_progress:
                line = f"cxt: standard output cannot be written ({error.strerror}); going on without it"
                print(line, file=sys.stderr, flush=True)
            elif self.lost is None:
                self.lost = error

    def check(self) -> None:
        """Flush; Failed if something was lost, a silent one if it was because the reader has gone."""
        self.flush()
        if isinstance(self.lost, BrokenPipeError):
            raise Failed("", status=141)  # what a shell says of a command that SIGPIPE has ended
        if self.lost is not None:
            raise Failed(f"standard output cannot be written: {self.lost.strerror}")


def _drop(stream) -> None:
    """Send what a stream still holds, and all that is written to it from now on, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


@contextlib.contextmanager
def console():
    """Prepare the process for a command, and see to it that what it printed has arrived.

    Text that the encoding of a stream lacks (an ASCII locale) is written as escapes. Notes on standard error are expendable.
    A notebook's `MPLBACKEND` may name a module that is not installed here, and would fail every import of matplotlib.

    Raises
    ------
    Failed
        If standard output could not be written; silent if its reader has gone, as in `cxt runs | head`.
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
                stream.flush()  # or Python would complain at its end
        sys.stdout, sys.stderr = out, err


@contextlib.contextmanager
def progress_only():
    """What a command prints meanwhile is progress, and the result a file: its loss is said once, and ends nothing."""
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
    """A line on standard error, if that is possible."""
    if sys.stderr is not None:
        print(f"cxt: {message}", file=LossTolerantStream(sys.stderr), flush=True)


def exit_on_bad_request(main: Callable[[], None]) -> None:
    """Run a command's *main*: a bad request is one line on stderr and exit status 2, a failed run one and its status.

    A package that is not installed because it belongs to one of cxt's extras is such a bad request. Ctrl-C is one line and
    status 130. Anything else propagates: Python prints its traceback and exits 1.
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
        # Lightning makes another exit of it.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would find Python at its end
        print_error("interrupted")
        raise SystemExit(130) from None
