"""Ensembles: several models of which each predicts, and whose distributions are averaged."""

from cxt.config.collected import ProblemCollector
from cxt.config.learning import is_readable
from cxt.config.models import build_network_config, build_training_config
from cxt.errors import BadRequest, suggest_nearest

SECTION = "ensembles"
"""Section of a configuration; a resolved one has none if there are no ensembles."""

COMPARED = ("windows", "window_size", "bins", "grid_low", "grid_high", "reads_rates")
"""Properties of the networks that must be equal, besides the haplotypes, scales and missing data of their input."""


def list_ensembles(config: dict) -> list[str]:
    """Names of the ensembles of a configuration."""
    return list(config.get(SECTION, {}))


def list_members(config: dict, name: str) -> list[str]:
    """The models that are evaluated as *name*: the members of an ensemble, or the one model of that name."""
    return config.get(SECTION, {}).get(name, [name])


def check_ensembles(config: dict) -> None:
    """BadRequest, naming all problems, unless the members of every ensemble exist and can be read together.

    The models of the configuration must be valid.
    """
    problems = ProblemCollector()
    for name in list_ensembles(config):
        with problems.collect():
            _check_ensemble(config, name)
    problems.refuse()


def _check_ensemble(config: dict, name: str) -> None:
    at, members = f"ensembles.{name}", list_members(config, name)
    if other := next((model for model in config["models"] if model.casefold() == name.casefold()), None):
        raise BadRequest(f"{at}: the model '{other}' has this name; rename one of them")
    for member in members:
        if member not in config["models"]:
            nested = ", which is an ensemble; list its members" if member in list_ensembles(config) else None
            raise BadRequest(f"{at}: unknown model '{member}'{nested or suggest_nearest(member, config['models'])}")
        if not is_readable(objective := build_training_config(config, member).objective):
            raise BadRequest(f"{at}: '{member}' cannot be a member, because its objective {objective} predicts no times")
    if len(members) < 2:
        raise BadRequest(f"{at}: an ensemble has two or more members, got {members}")
    if doubled := sorted({member for member in members if members.count(member) > 1}):
        raise BadRequest(f"{at}: {', '.join(doubled)} is listed more than once")
    first = describe_input(config, members[0])
    for member in members[1:]:
        other = describe_input(config, member)
        if differences := [f"{key} {other[key]} instead of {first[key]}" for key in first if other[key] != first[key]]:
            raise BadRequest(
                f"{at}: '{member}' reads another input than '{members[0]}', so that their distributions cannot be averaged: "
                f"{', '.join(differences)}"
            )


def describe_input(config: dict, name: str) -> dict:
    """What must be equal for the members of an ensemble: input and output of a model's network."""
    dataset, network = config["datasets"][config["models"][name]["dataset"]], build_network_config(config, name)
    return {key: getattr(network, key) for key in COMPARED} | {
        "samples": dataset["samples"],
        "scales": dataset["scales"],
        "missingness": "mask" in dataset,
    }
