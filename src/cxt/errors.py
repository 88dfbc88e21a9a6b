"""Exceptions for bad requests and failed runs, and what their messages have in common."""

import difflib
from collections.abc import Callable, Iterable


class BadRequest(ValueError):
    """What was asked cannot be done: found, expected, and what to do, in one message. Commands exit 2."""


class Failed(RuntimeError):
    """A run that was begun could not be finished, for a reason that its message tells in full. Commands exit with *status*.

    *agreed* says that all processes of the run end like this, so that none need be ended by another.
    """

    def __init__(self, message: str, *, status: int = 1, agreed: bool = False):
        super().__init__(message)
        self.status, self.agreed = status, agreed


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def try_drawing(draw: Callable[[], object]) -> str:
    """Draw a figure, and say why that failed; empty if it did not. What was computed must not be lost to a picture."""
    try:
        draw()
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


MAX_LISTED_NAMES = 12
"""So many names are listed in a message; of more, the five most similar ones."""


def _likeness(name: str, choice: str) -> float:
    """From 0 to 1, without the case, leading dashes, and the difference between a dash and an underscore."""
    one, other = (word.casefold().lstrip("-").replace("-", "_") for word in (name, choice))
    return difflib.SequenceMatcher(None, one, other).ratio()


def suggest_nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of *choices* if it is close, and else what there is to choose from."""
    names = sorted(map(str, choices))
    if not names:
        return "; there are none"
    by_likeness = sorted(names, key=lambda choice: -_likeness(str(name)[:200], choice))
    if _likeness(str(name)[:200], by_likeness[0]) >= 0.7:
        return f"; did you mean '{by_likeness[0]}'?"
    if len(names) <= MAX_LISTED_NAMES:
        return f"; there are: {', '.join(names)}"
    return f"; there are {len(names)}, the most similar are {', '.join(by_likeness[:5])}"


EXTRAS = {
    "demes": "simulate", "msprime": "simulate", "stdpopsim": "simulate",
    "jsonargparse": "train", "lightning_fabric": "train", "pytorch_lightning": "train", "tensorboard": "train",
    "snakemake": "workflow",
}  # fmt: skip
"""{package to import: the extra of cxt that installs it}."""


def advise_extra(error: ModuleNotFoundError) -> str | None:
    """Say which extra of cxt to install for a package that could not be imported.

    Parameters
    ----------
    error : ModuleNotFoundError
        As Python raised it.

    Returns
    -------
    str or None
        One line with the command; None for a package that is in no extra.
    """
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"this needs the package {package}, which is not installed: pip install 'cxt[{EXTRAS[package]}]'"
