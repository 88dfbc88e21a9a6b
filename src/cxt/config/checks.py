"""Checks of the whole configuration: names that must be known, and sections that must fit together."""

from cxt.config.collected import ProblemCollector
from cxt.config.dataset_checks import check_dataset
from cxt.config.demes import read_demes
from cxt.config.ensembles import check_ensembles
from cxt.config.model_checks import check_models, check_parents, list_checked
from cxt.config.models import (
    check_order,
)
from cxt.config.on_the_fly import check_source, fill_simulated
from cxt.config.scenarios import complete_parameters
from cxt.config.tree_files import check_shared_files, fill_tree_files
from cxt.config.variants import NOT_PARAMETERS, check_variants
from cxt.errors import BadRequest, suggest_nearest


def fill_scenarios(config: dict, removed: set[str]) -> None:
    """Replace Demes files and scenario sets by their content; describe files of tree sequences, and examples on the fly.

    Parameters
    ----------
    config : the configuration, modified in place
    removed : scenarios that an overlay has removed, which are dropped from all sets
    """
    problems = ProblemCollector()
    for name, scenario in config["scenarios"].items():
        with problems.collect():
            _check_scenario(name, scenario)
    with problems.collect():
        _check_names(config)
    for name in list_checked(config):
        with problems.collect():
            check_source(name, config["models"][name])
    problems.refuse()
    check_shared_files(config["scenarios"])
    _fill_sets(config, removed)
    fill_simulated(config)
    evaluation = config["evaluation"]
    evaluation["simulations_of"] = {k: v for k, v in evaluation["simulations_of"].items() if k not in removed}


def check_consistency(config: dict) -> None:
    """BadRequest naming everything in a complete configuration that does not fit together.

    Models are checked only if all datasets are valid.
    """
    problems = ProblemCollector()
    for name, dataset in config["datasets"].items():
        with problems.collect():
            check_dataset(config, name, dataset)
    for name in config["evaluation"]["simulations_of"]:
        with problems.collect():
            if name not in config["scenarios"]:
                raise BadRequest(
                    f"evaluation.simulations_of: unknown scenario '{name}'{suggest_nearest(name, config['scenarios'])}"
                )
    problems.refuse()
    for name in list_checked(config):
        with problems.collect():
            check_parents(config, name)
    problems.refuse()
    check_order(config)
    check_models(config)
    check_ensembles(config)


def _check_scenario(name: str, scenario: dict) -> None:
    """Check a scenario's sweep, replace the path of a Demes file by its content, and describe files of tree sequences."""
    at = f"scenarios.{name}"
    base = {key: value for key, value in scenario.items() if key not in NOT_PARAMETERS}
    for row in scenario.get("combinations", []):
        complete_parameters(scenario["kind"], base | row, at=f"{at}.combinations")
    if scenario["kind"] == "demes":
        scenario["demography"] = read_demes(scenario["demography"], at=at)
    if scenario["kind"] == "trees":
        fill_tree_files(scenario, at=at)
    check_variants(name, scenario)


def _check_names(config: dict) -> None:
    """BadRequest if two names differ in case only (some file systems ignore case), or a scenario and a set share a name."""
    for section in ("scenarios", "datasets", "models"):
        first: dict[str, str] = {}
        for name in config[section]:
            other = first.setdefault(name.casefold(), name)
            if other != name:
                raise BadRequest(f"{section} '{other}' and '{name}' differ in case only; rename one of them")
    for name in config["scenarios"]:
        if name in config["scenario_sets"]:
            raise BadRequest(f"'{name}' names both a scenario and a scenario set; rename one of them")


def _fill_sets(config: dict, removed: set[str]) -> None:
    """Replace the names of sets by their scenarios, each once and in order, wherever scenarios are listed."""
    scenarios, sets = config["scenarios"], config["scenario_sets"]
    for name, members in sets.items():
        for member in members:
            if member not in scenarios and member not in removed:
                raise BadRequest(f"scenario_sets.{name}: unknown scenario '{member}'{suggest_nearest(member, scenarios)}")

    def filled(names, at: str) -> list[str]:
        result: dict[str, None] = {}
        for name in [names] if isinstance(names, str) else names:
            if name not in scenarios and name not in sets:
                raise BadRequest(f"{at}: unknown scenario '{name}'{suggest_nearest(name, [*scenarios, *sets])}")
            result |= dict.fromkeys(member for member in sets.get(name, [name]) if member in scenarios)
        return list(result)

    for name, dataset in config["datasets"].items():
        dataset["scenarios"] = filled(dataset["scenarios"], f"datasets.{name}.scenarios")
        if not dataset["scenarios"]:
            raise BadRequest(f"datasets.{name}.scenarios: no scenario is left in the sets it names; name at least one scenario")
    for name, model in config["models"].items():
        for key in ("evaluation", "simulate"):
            if key in model:
                model[key] = filled(model[key], f"models.{name}.{key}")
        if model.get("simulate") == []:
            raise BadRequest(f"models.{name}.simulate: no scenario is left in the sets it names; name at least one scenario")
