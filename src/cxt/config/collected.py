"""Problems of a configuration that independent checks find, told together."""

import contextlib
from collections.abc import Iterator

from cxt.errors import BadRequest


class ProblemCollector:
    """Collects the bad requests of independent checks, to raise them together."""

    def __init__(self) -> None:
        self.messages: dict[str, None] = {}

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Collect the BadRequest that a check in this block raises."""
        try:
            yield
        except BadRequest as error:
            self.add(str(error))

    def add(self, message: str) -> None:
        """Add a problem."""
        self.messages[message] = None

    def refuse(self) -> None:
        """Raise one BadRequest with all collected messages, if there are any."""
        if len(self.messages) > 1:
            raise BadRequest("\n  ".join(["the configuration is not valid:", *self.messages]))
        if self.messages:
            raise BadRequest(next(iter(self.messages)))


@contextlib.contextmanager
def prefix_errors(at: str) -> Iterator[None]:
    """Prefix a BadRequest of the `with` block with the section *at* of the configuration."""
    try:
        yield
    except BadRequest as error:
        raise BadRequest(f"{at}: {error}") from None
