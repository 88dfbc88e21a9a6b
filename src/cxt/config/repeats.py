"""Repeats: a model that is trained several times with different seeds, to show how much results depend on chance.

`repeats: 3` of a model `broad` makes three models of it, `broad.r0`, `broad.r1` and `broad.r2`, equal but for the seed of their
training. From here on, the configuration has these three and no `broad`.
"""

import re
from typing import Annotated

from pydantic import Field

from cxt.config.bounds import integer_validator
from cxt.config.collected import ProblemCollector
from cxt.errors import BadRequest
from cxt.random_seeds import LARGEST_SEED

Repeats = Annotated[int, Field(strict=True, ge=1, le=1000), integer_validator]

SECTION = "repeated"
"""Section of a resolved configuration: {model: names of its repeats}; there is none if no model is repeated."""

REPEAT = re.compile(r"(?P<model>.+)\.r(?P<repeat>\d+)")
"""Names of the repeats of a model."""

ENSEMBLE_SUFFIX = ".ensemble"
"""End of the name under which `ensemble: true` evaluates the mean of the repeats of a model."""

LONGEST_NAME = 100

REFERENCES = ("checkpoint", "resume_adapter", "lora_of", "teacher")
"""Keys of a model that name another one, of which there must be only one."""


def name_repeat(model: str, number: int) -> str:
    """Name of a repeat, which are counted from 0."""
    return f"{model}.r{number}"


def list_repeats(config: dict, name: str) -> list[str]:
    """Names of the repeats of a model; none if it is not repeated."""
    return config.get(SECTION, {}).get(name, [])


def is_later_repeat(config: dict, name: str) -> bool:
    """Whether a model is a repeat of another one, and not the first, which has the same settings but for its seed."""
    return any(name in names[1:] for names in config.get(SECTION, {}).values())


def refuse_repeated(config: dict, name: str, *, at: str) -> None:
    """BadRequest if a model is repeated, where *at* names one that is trained only once."""
    if names := list_repeats(config, name):
        raise BadRequest(f"{at}: '{name}' is repeated; name one of its repeats, such as '{names[0]}' ({_describe(names)})")


def _describe(names: list[str]) -> str:
    """The names of repeats as text."""
    if len(names) == 1:
        return f"there is only {names[0]}"
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"


def expand_repeats(config: dict) -> None:
    """Replace each model with `repeats` by its repeats, and `ensemble: true` by an entry of `ensembles`.

    Parameters
    ----------
    config : the configuration, modified in place

    Raises
    ------
    BadRequest
        Naming every repeat or ensemble whose name is taken or too long, every seed that is too large, and every model that
        names a repeated one as its parent or teacher.
    """
    problems = ProblemCollector()
    models: dict[str, dict] = {}
    repeated: dict[str, list[str]] = {}
    averaged: dict[str, list[str]] = {}
    for name, model in config["models"].items():
        repeats, ensemble = model.get("repeats"), model.get("ensemble", False)
        once = {key: value for key, value in model.items() if key not in ("repeats", "ensemble")}
        if ensemble and (repeats is None or repeats < 2):
            problems.add(f"models.{name}.ensemble: an ensemble is the mean of repeats; add `repeats`, of 2 or more")
            continue
        if repeats is None:
            models[name] = once
            continue
        names = [name_repeat(name, number) for number in range(repeats)]
        made = [*names, f"{name}{ENSEMBLE_SUFFIX}"] if ensemble else names
        taken = next((one for one in made if one in config["models"] or one in config.get("ensembles", {})), None)
        first = once.get("training", {}).get("seed", config["training"]["seed"])
        if taken is not None:
            problems.add(f"models.{name}: its repeats need the name '{taken}', which another entry has; rename one of them")
        elif (longest := max(made, key=len)) and len(longest) > LONGEST_NAME:
            problems.add(f"models.{name}.repeats: the name '{longest}' is longer than {LONGEST_NAME} characters; shorten it")
        elif first + repeats - 1 > LARGEST_SEED:
            problems.add(
                f"models.{name}.repeats: the seeds of {repeats} repeats, from {first}, exceed {LARGEST_SEED}; lower "
                "`seed` of its training"
            )
        else:
            for number, one in enumerate(names):
                models[one] = once | {"training": once.get("training", {}) | {"seed": first + number}}
            repeated[name] = names
            if ensemble:
                averaged[f"{name}{ENSEMBLE_SUFFIX}"] = names
    if repeated:
        config[SECTION] = repeated
    for at, named in _list_references(config):
        with problems.collect():
            refuse_repeated(config, named, at=at)
    config["models"] = models
    problems.refuse()
    if "ensembles" in config:  # a repeated model stands for all its repeats
        given = config["ensembles"].items()
        filled = {name: [one for member in members for one in repeated.get(member, [member])] for name, members in given}
        config["ensembles"] = averaged | filled
    elif averaged:
        config["ensembles"] = averaged


def _list_references(config: dict) -> list[tuple[str, str]]:
    """Where models and translations name a model of which one checkpoint is needed: (key, name)."""
    named = [(f"models.{name}.{key}", model.get(key)) for name, model in config["models"].items() for key in REFERENCES]
    named += [(f"translate.{name}.model", entry.get("model")) for name, entry in config["translate"].items()]
    return [(at, other) for at, other in named if other is not None]
