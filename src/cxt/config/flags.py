"""Flags of commands: their values from a file, and checks of their numbers."""

import argparse
import json
import os
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cxt.config.problems import explain_value, refuse
from cxt.config.yaml import read_yaml
from cxt.console import counted, get_logger
from cxt.errors import BadRequest, suggest_nearest

logger = get_logger(__name__)


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, which `insert_config` replaces by the flags in its file."""
    parser.add_argument("--config", help="YAML file whose keys are the names of these flags; the command line takes precedence")


def take_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split *argv* into the files of `--config FILE` or `--config=FILE`, in order, and all other words."""
    files, others, words = [], [], iter(argv)
    for word in words:
        flag, _, value = word.partition("=")
        if flag != "--config":
            others.append(word)
        elif not (file := value or next(words, "")):
            raise BadRequest("--config needs a YAML file")
        else:
            files.append(file)
    return files, others


def read_config_file(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings in a file for `--config`; BadRequest for a key that is no flag of *parser*, with the nearest name."""
    known = {action.dest for action in parser._actions} - {"help", "config"}
    settings = read_yaml(path)
    for key in settings:
        if key not in known:
            raise BadRequest(f"{path}: unknown key '{key}'{suggest_nearest(key, known)}")
    return settings


def insert_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Replace `--config FILE` in *argv* by the settings in FILE, as leading arguments; a mapping or list becomes JSON.

    Raises
    ------
    BadRequest
        If a file cannot be read, or has a key that is no flag of *parser*.
    """
    files, others = take_config_files(argv)
    words = []
    for path in files:
        for key, value in read_config_file(path, parser).items():
            if value is not None:
                text = json.dumps(value) if isinstance(value, dict | list) else str(value)
                words.append(f"--{key.replace('_', '-')}={text}")
    return words + others


def find_problems(values: dict, accepted: dict[str, Any]) -> list[str]:
    """Messages about *values* that their *accepted* types refuse, by name; values that are None or missing are skipped."""
    lines = []
    for name, annotation in accepted.items():
        if (value := values.get(name)) is not None:
            try:
                TypeAdapter(annotation).validate_python(value)
            except ValidationError:
                lines.append(explain_value(name, annotation, value))
    return lines


def check_flags(args, **accepted) -> None:
    """BadRequest naming every argument of a command that its accepted type refuses."""
    flags = {f"--{name.replace('_', '-')}": name for name in accepted}
    refuse(find_problems({flag: getattr(args, name, None) for flag, name in flags.items()},
                         {flag: accepted[name] for flag, name in flags.items()}))  # fmt: skip


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cap_workers(workers: int) -> int:
    """At most as many *workers* as there are cores for this process: more of them are slower, and change no batch."""
    return min(workers, count_cores())


def note_more_than_cores(*, threads: int, workers: int = 0, processes: int = 1) -> None:
    """Note on stderr if *processes* with this many threads and workers each exceed the available cores.

    Workers are capped, see `cap_workers`; threads are not, because results depend on their number.
    """
    available = count_cores()
    cores = counted(available, "core")
    if workers > available:
        logger.warning(
            f"note: {counted(workers, 'worker')}, but this process may use only {cores}: using {counted(available, 'worker')}"
        )
    used = max(threads, cap_workers(workers))
    if processes * used > available:
        what = counted(threads, "thread")
        if workers:
            what += f" and {counted(cap_workers(workers), 'worker')}"
        each = f" in each of {processes} processes" if processes > 1 else ""
        logger.warning(f"note: {what}{each}, but this process may use only {cores}; more threads than cores are slower")
