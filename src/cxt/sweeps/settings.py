"""The settings of a trial: the fixed ones of the command, with the trial's values put in."""

import contextlib
import copy
import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cxt.config.training import RESULT_NEUTRAL_SETTINGS, drop_later_defaults
from cxt.errors import BadRequest, suggest_nearest
from cxt.io import atomic_write
from cxt.sweeps.metric import check_metric
from cxt.sweeps.space import Sweep
from cxt.trainer.options import OPTIONS, STRUCTURED, TRAINING_SETTINGS, build_options, build_parser, merge_options, parse_flags
from cxt.trainer.options import with_config_files as expand_config_files
from cxt.trainer.request import (
    OPTIONS_IDENTIFIED_OTHERWISE,
    RUN_CONTROL_OPTIONS,
    RunRequest,
    build_request,
    list_settings,
)

ALLOWED_CONTROL = ("max_minutes",)
"""Flags that control a run and may be given to a sweep."""

SAME_FOR_ALL = (
    "name", "dataset_path", "soft_targets", "simulate", "configfile", "windows", "window_size", "samples", "eval_samples",
    "eval_max_batches", "gpus", "devices", "nodes", "accelerator", "validation_items", "batch_size_eval",
    *RESULT_NEUTRAL_SETTINGS,
)  # fmt: skip
"""Settings that are the same in all trials, because values on other data cannot be compared, or nothing depends on them."""

NEUTRAL = (
    "workers", "save_every", "save_minutes", "keep_saves", "storage", "scratch", "mlflow", "wandb", "histograms", "profiler",
    "profile_batches",
)  # fmt: skip
"""Settings that may change while a study goes on."""


@dataclasses.dataclass(frozen=True)
class Fixed:
    """What all trials of a sweep have in common.

    Parameters
    ----------
    settings : the fixed settings, in the format of `--config`
    max_minutes : minutes after which the command saves and ends; None = no limit
    """

    settings: Mapping[str, Any]
    max_minutes: float | None


def list_given_flags(argv: list[str]) -> set[str]:
    """Names of the trainer's settings that *argv* and its `--config` files give, with underscores."""
    words = expand_config_files(argv, build_parser())
    return {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}


def read_fixed(argv: list[str], sweep: Sweep) -> Fixed:
    """Read the fixed settings of a sweep from the trainer's flags and the constants of the sweep file.

    Parameters
    ----------
    argv : list of str
        Flags of the trainer, `--config` files among them.
    sweep : Sweep

    Returns
    -------
    Fixed

    Raises
    ------
    BadRequest
        For flags that a sweep sets itself, for parameters that are no settings or cannot be searched, for settings that are
        given twice, and for a metric that a trial will not have, or that says different things in different trials.
    """
    given = list_given_flags(argv)
    refused = sorted(given & ({*RUN_CONTROL_OPTIONS, "print_config"} - {*ALLOWED_CONTROL}))
    if refused:
        raise BadRequest(
            f"{', '.join('--' + name.replace('_', '-') for name in refused)} cannot be used with a sweep, whose trials train "
            "in the directory trials/ of --out"
        )
    _check_names(sweep, given)
    values = vars(parse_flags(argv, build_parser()))
    options = build_options(values)
    if options.nodes > 1:
        raise BadRequest(f"--nodes must be 1 in a sweep, got {options.nodes}: start the same command on each machine instead")
    settings = list_settings(options)
    for name, value in sweep.constants.items():
        put(settings, name, value)
    check_metric(sweep, settings, put)
    if settings.get("eval_max_batches") is not None and "batch_size" in {parameter.name for parameter in sweep.parameters}:
        raise BadRequest(
            "--eval-max-batches is a number of batches, so that trials with another batch_size would be validated on other "
            "examples; give their number with --eval-samples instead"
        )
    return Fixed(settings, options.max_minutes)


def _check_names(sweep: Sweep, given: set[str]) -> None:
    """BadRequest unless each parameter is a setting that can be searched, and none is given twice."""
    known = {*OPTIONS, *TRAINING_SETTINGS} - {*RUN_CONTROL_OPTIONS}
    names = [parameter.name for parameter in sweep.parameters]
    for name in (*names, *sweep.constants):
        top, _, inside = name.partition(".")
        if top in RUN_CONTROL_OPTIONS:
            raise BadRequest(f"parameters.{name} cannot be in a sweep, whose trials train in the directory trials/ of --out")
        if top not in known:
            raise BadRequest(f"parameters.{name} is no setting of the trainer{suggest_nearest(top, known - {*SAME_FOR_ALL})}")
        if inside and top not in STRUCTURED:
            raise BadRequest(f"parameters.{name}: {top} has no settings inside it; those that have are {', '.join(STRUCTURED)}")
        if name in names and top in SAME_FOR_ALL:
            raise BadRequest(
                f"parameters.{name} must be the same in all trials, or their values could not be compared; give it as a flag"
            )
        for other in (*names, *sweep.constants):
            if other.startswith(f"{name}."):
                raise BadRequest(f"parameters.{name} and parameters.{other}: one contains the other; remove one of them")
        if name in given:
            raise BadRequest(f"{name} is in the sweep file and among the flags; remove one of them")


def put(settings: dict, name: str, value: Any) -> None:
    """Put *value* into *settings* under a name that may have dots; a part that is a number is a place in a list."""
    *path, last = name.split(".")
    target: Any = settings
    for depth, part in enumerate([*path, last]):
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise BadRequest(
                    f"parameters.{name}: {'.'.join(name.split('.')[:depth])} is a list of {len(target)}, so that a place in it "
                    f"must be a number from 0 to {len(target) - 1}, got {part}"
                )
            key: Any = int(part)
        elif isinstance(target, dict):
            key = part
        else:
            raise BadRequest(f"parameters.{name}: {'.'.join(name.split('.')[:depth])} is {target!r}, which has no settings")
        if depth == len(path):
            target[key] = value
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
        else:
            target = target[key]


def settings_of_trial(fixed: Fixed, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trial, in the format of `--config`.

    Parameters
    ----------
    fixed : Fixed
    values : mapping
        The trial's values by the names of the parameters.
    """
    settings = copy.deepcopy(dict(fixed.settings))
    for name, value in values.items():
        put(settings, name, value)
    return settings


def write_settings(path: Path, settings: Mapping[str, Any], *, comment: str = "") -> None:
    """Write *settings* to a file for `--config`, after lines of *comment*."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    atomic_write(path, (lines + yaml.safe_dump(dict(settings), sort_keys=True, allow_unicode=True)).encode())


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Suppress notes on settings without effect, which the trainer prints again."""
    package = logging.getLogger("cxt")
    before = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(before)


def check_trial(settings: Mapping[str, Any]) -> RunRequest:
    """Resolve the settings of a trial as its trainer will; BadRequest for a combination that the trainer refuses."""
    with tempfile.TemporaryDirectory(prefix="cxt-sweep-") as directory, _without_notes():
        path = Path(directory) / "trial.yaml"
        write_settings(path, settings)
        try:
            return build_request(merge_options(path, {}))
        except BadRequest as error:
            raise BadRequest(str(error).replace(f"{path}: ", "").replace(os.fspath(path), "the trial")) from None


def identify(sweep: Sweep, fixed: Fixed, request: RunRequest) -> dict[str, Any]:
    """What must be equal for two commands to take part in the same study, by the words for messages.

    Parameters
    ----------
    sweep, fixed : Sweep, Fixed
    request : RunRequest
        Of any combination; its dataset, parent and devices are those of all.
    """
    searched = {parameter.name.partition(".")[0] for parameter in sweep.parameters}
    leave_out = {*OPTIONS_IDENTIFIED_OTHERWISE, *NEUTRAL, "name"}
    settings = {key: value for key, value in fixed.settings.items() if key not in leave_out}
    files = {"dataset": request.dataset_sha256, "devices": request.identity["devices"]}
    if not searched & {"checkpoint", "resume_adapter", "lora_of"}:
        files["parent"] = request.parent_sha256
    if request.soft_targets is not None:
        files["soft targets"] = request.soft_targets["digest"]
    return dict(sweep.about) | drop_later_defaults(settings) | files


def describe_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Describe how two identities differ, each with both values; empty if they are equal."""
    words = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old != new:
            words.append(f"{key} {_shorten(old)} instead of {_shorten(new)}")
    return ", ".join(words)


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
