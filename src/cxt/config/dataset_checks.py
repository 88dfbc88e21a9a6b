"""Checks of datasets, and of scenarios beside what reads them."""

from pathlib import Path

from cxt.config.network import (
    count_pairs,
)
from cxt.config.on_the_fly import is_on_the_fly
from cxt.config.variants import list_variants
from cxt.errors import BadRequest


def check_dataset(config: dict, name: str, dataset: dict) -> None:
    """BadRequest unless a dataset's shape is possible, and its scenarios can be preprocessed to it."""
    at = f"models.{name.partition(':')[0]}" if is_on_the_fly(dataset) else f"datasets.{name}"
    length, window = dataset["sequence_length"], dataset["window_size"]
    for scenario_name in dataset["scenarios"]:
        scenario = config["scenarios"][scenario_name]
        if not scenario["simulations"] and not is_on_the_fly(dataset):
            raise BadRequest(
                f"{at}.scenarios: '{scenario_name}' has `simulations: 0`, which is for evaluation only; set it to 2 or more"
            )
        check_scenario_fits(scenario_name, scenario, at, dataset)
        regions = dataset["regions_per_simulation"]
        for variant in list_variants(scenario_name, scenario):
            if regions * length > variant.spec["sequence_length"]:
                raise BadRequest(
                    f"{at}.regions_per_simulation: {regions} regions of {length} bp do not fit into the "
                    f"{variant.spec['sequence_length']} bp of scenario '{variant.name}'"
                )
    if length % window:
        raise BadRequest(f"{at}: sequence_length {length} is not a multiple of window_size {window}")
    exist = count_pairs(dataset["samples"])
    if dataset["pairs"] > exist:
        raise BadRequest(f"{at}.pairs: {dataset['pairs']} pairs requested, but {dataset['samples']} samples have only {exist}")
    mask = dataset.get("mask", {})
    if "path" in mask and not Path(mask["path"]).is_file():
        raise BadRequest(f"{at}.mask.path: there is no file {mask['path']}")
    if "path" not in mask and mask.get("length", length) < length:
        raise BadRequest(f"{at}.mask.length: {mask['length']} bp is shorter than sequence_length {length}")


def count_individuals(scenario: dict) -> int:
    """Diploid individuals that a scenario samples."""
    return sum(scenario["samples"].values()) if "samples" in scenario else scenario["individuals"]


def check_scenario_fits(name: str, scenario: dict, at: str, dataset: dict) -> None:
    """BadRequest if simulations of *scenario* are too short or have too few samples for *dataset*."""
    for variant in list_variants(name, scenario):
        if variant.spec["sequence_length"] < dataset["sequence_length"]:
            raise BadRequest(
                f"{at}.sequence_length: {dataset['sequence_length']} bp requested, but scenario '{variant.name}' simulates "
                f"only {variant.spec['sequence_length']} bp"
            )
        individuals = count_individuals(variant.spec)
        if 2 * individuals < dataset["samples"]:
            raise BadRequest(
                f"{at}.samples: {dataset['samples']} haplotypes requested, but scenario '{variant.name}' samples only "
                f"{individuals} individuals ({2 * individuals} haplotypes)"
            )
