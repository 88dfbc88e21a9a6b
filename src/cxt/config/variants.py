"""Variants of a scenario: one for each combination of swept values."""

import dataclasses
import itertools

from cxt.errors import BadRequest

NOT_PARAMETERS = ("simulations", "batch", "combinations")
"""Keys of a scenario that determine how many simulations and variants there are, and are not parameters of the model."""


LONGEST_NAME = 200
"""Largest number of characters of a variant's name, which is part of file names (at most 255)."""


NEVER_SWEPT = ("models", "history", "populations", "files", "sha256", "lengths")
"""Parameters whose value is a list and not a sweep."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One combination of a scenario's sweep: its name, parameters, number of simulations, and simulations per batch."""

    name: str
    spec: dict
    simulations: int
    batch: int


def list_variants(name: str, scenario: dict) -> list[Variant]:
    """The variants of *scenario* (a checked scenario of the config).

    There is one for each combination of listed parameters and each row of `combinations`, named
    `<scenario>-<parameter>=<value>…` with parameters sorted by name. A scenario without either is its own variant.
    """
    parameters = {key: _plain(value) for key, value in scenario.items() if key not in NOT_PARAMETERS}
    if parameters.get("ancestry_model") == "hudson":
        del parameters["ancestry_model"]  # the default, written out
    swept = sorted(key for key, value in parameters.items() if isinstance(value, list) and key not in NEVER_SWEPT)
    rows = _plain(scenario.get("combinations", [{}]))
    result = []
    for *values, row in itertools.product(*(parameters[key] for key in swept), rows):
        chosen = dict(zip(swept, values, strict=True)) | row
        variant = "-".join([name, *(f"{key}={chosen[key]}" for key in sorted(chosen))])
        spec = {"name": variant, **parameters, **chosen}
        result.append(Variant(variant, spec, scenario["simulations"], scenario["batch"]))
    return result


def get_scenario_name(variant: str) -> str:
    """Name of the scenario that the variant called *variant* belongs to; scenario names contain no hyphen."""
    return variant.split("-", maxsplit=1)[0]


def _plain(value):
    """Convert whole floats to integers, so that 20000, 20000.0 and 2.0e+4 specify the same simulations."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_variants(name: str, scenario: dict) -> None:
    """BadRequest if a parameter is both listed and in `combinations`, rows disagree, or two variants share a name."""
    at = f"scenarios.{name}"
    rows = scenario.get("combinations", [])
    for row in rows:
        if set(row) != set(rows[0]):
            raise BadRequest(
                f"{at}.combinations: one row sets {', '.join(sorted(rows[0]))}, another {', '.join(sorted(row))}; "
                "every row must set the same parameters"
            )
        for key in row:
            if isinstance(scenario.get(key), list):
                raise BadRequest(f"{at}: `{key}` is a list and also set by `combinations`; keep one of them")
    seen_names = set()
    for variant in list_variants(name, scenario):
        if variant.name in seen_names:
            raise BadRequest(f"{at}: two variants have the same name, '{variant.name}'; remove one of them")
        seen_names.add(variant.name)
        if len(variant.name) > LONGEST_NAME:
            raise BadRequest(
                f"{at}: the variant '{variant.name[:100]}…' has a name of {len(variant.name)} characters, more than the "
                f"{LONGEST_NAME} that fit into file names; sweep fewer parameters, or give the scenario a shorter name"
            )
