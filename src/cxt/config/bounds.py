"""What is accepted of the numbers that settings and flags ask for."""

import math
import os
import sys
from collections.abc import Mapping
from typing import NamedTuple

from cxt.errors import BadRequest


class Range(NamedTuple):
    """Numbers from *low* to *high*; the ends belong to it unless they are *open_low* and *open_high*."""

    low: float = 0
    high: float = math.inf
    whole: bool = True
    open_low: bool = False
    open_high: bool = False

    def problem(self, value) -> str | None:
        """What is wrong with *value*, as `"is -1, expected at least 0"`; None if nothing is."""
        if isinstance(value, bool) or not isinstance(value, int | float) or (self.whole and not isinstance(value, int)):
            return f"is {value!r}, expected {'a whole number' if self.whole else 'a number'}"
        if not self.whole and not math.isfinite(value):
            return f"is {value}, expected a finite number"
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return None if above and below else f"is {value}, expected {self.words()}"

    def words(self) -> str:
        """The limits, as `"at least 0 and below 1"`."""
        words = [f"{'above' if self.open_low else 'at least'} {self.low}"] if self.low > -math.inf else []
        words += [f"{'below' if self.open_high else 'at most'} {self.high}"] if self.high < math.inf else []
        return " and ".join(words)


MOST_THREADS, MOST_WORKERS, MOST_DEVICES = 1024, 256, 1024
"""More than any machine has use for: OpenMP ends the process long before 100 000 threads."""

MOST = 10**9
"""Of anything that is counted, where nothing else sets a limit."""

INDEX = Range(0, 2 * 10**9)
COUNT = Range(1, MOST)
ANY_COUNT = Range(0, MOST)
POSITIVE = Range(0, whole=False, open_low=True)
NOT_NEGATIVE = Range(0, whole=False)
SHARE = Range(0, 1, whole=False, open_high=True)
THREADS = Range(1, MOST_THREADS)
WORKERS = Range(0, MOST_WORKERS)
DEVICES = Range(0, MOST_DEVICES)


def problems(values: Mapping, ranges: Mapping[str, Range]) -> list[str]:
    """What is wrong with *values*, each by name; values that are None or not there are not asked for."""
    found = ((name, accepted.problem(values[name])) for name, accepted in ranges.items() if values.get(name) is not None)
    return [f"{name} {problem}" for name, problem in found if problem]


def check_flags(args, **ranges: Range) -> None:
    """BadRequest that names every number of a command's arguments that is not in its range."""
    found = []
    for name, accepted in ranges.items():
        value = getattr(args, name, None)
        if value is not None and (problem := accepted.problem(value)):
            found.append(f"--{name.replace('_', '-')} {problem.removeprefix('is ').replace(', expected', ': expected', 1)}")
    if found:
        raise BadRequest("\n  ".join(["not a valid request:", *found] if len(found) > 1 else found))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def note_more_than_cores(*, threads: int, workers: int = 0, processes: int = 1) -> None:
    """Say on stderr that *processes* with so many threads and workers each have fewer cores than that."""
    asked, there = processes * max(threads, workers), cores()
    if asked > there:
        what = f"{threads} thread{'' if threads == 1 else 's'} and {workers} worker{'' if workers == 1 else 's'}"
        each = f" in each of {processes} processes" if processes > 1 else ""
        print(f"note: {what}{each}, but this process may use {there} core{'' if there == 1 else 's'}; "
              "more threads than cores are slower", file=sys.stderr, flush=True)  # fmt: skip
