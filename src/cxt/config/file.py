"""The configuration: merging overlays, checking, and what it says of each model.

`cxt configfile --spec JSON --out FILE.yaml` writes one model's resolved training settings, which
`python -m cxt.train --config FILE.yaml` reads.
"""

import contextlib
import dataclasses
from pathlib import Path

from cxt.config.demes import read_demes
from cxt.config.schema import complete, complete_part
from cxt.config.settings import (
    PRESETS,
    SIZES,
    AdapterConfig,
    ModelConfig,
    TrainingConfig,
    check_adapter_samples,
    check_inheritance,
    check_missingness,
    pairs_of,
)
from cxt.config.shipped import default_configfile, find_configfile
from cxt.config.variants import NOT_PARAMETERS, check_variants, variants
from cxt.config.yaml import read_yaml
from cxt.errors import BadRequest, suggest_nearest

DEFAULT_CONFIG = default_configfile()


def merge(base: dict, overlay: dict) -> dict:
    """*overlay* over *base* as Snakemake merges config files: mappings key by key, everything else replaced."""
    result = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def without_nulls(value):
    """*value* without the mapping entries that are null: an overlay removes a key or an entry by `null`."""
    if isinstance(value, dict):
        return {key: without_nulls(child) for key, child in value.items() if child is not None}
    return value


def load(configfiles=(), *, default=DEFAULT_CONFIG) -> dict:
    """The checked configuration: *configfiles* in order over the default one, defaults filled in.

    Raises BadRequest for anything that `resolve` refuses.
    """
    config = read_yaml(default)
    for path in configfiles:
        config = merge(config, read_yaml(find_configfile(path)))
    return resolve(config)


def resolve(config: dict) -> dict:
    """*config* without nulls, checked against the schema and in itself, with defaults filled in.

    Demes files are replaced by their content, and scenario sets by the scenarios in them.
    """
    scenarios = config.get("scenarios")
    removed = {name for name, entry in scenarios.items() if entry is None} if isinstance(scenarios, dict) else set()
    config = complete(without_nulls(config))
    for name, entry in config["scenarios"].items():
        _check_scenario(name, entry)
    _check_names(config)
    _fill_sets(config, removed)
    for name, dataset in config["datasets"].items():
        _check_dataset(config, name, dataset)
    for name in config["models"]:
        _check_model(config, name)
    evaluation = config["evaluation"]
    evaluation["simulations_of"] = {k: v for k, v in evaluation["simulations_of"].items() if k not in removed}
    for name in evaluation["simulations_of"]:
        if name not in config["scenarios"]:
            raise BadRequest(
                f"evaluation.simulations_of: unknown scenario '{name}'{suggest_nearest(name, config['scenarios'])}"
            )
    return config


def _check_scenario(name: str, entry: dict) -> None:
    """Check a scenario's sweep, and put the content of a Demes file in the place of its path."""
    at = f"scenarios.{name}"
    base = {key: value for key, value in entry.items() if key not in NOT_PARAMETERS}
    for row in entry.get("combinations", []):
        complete_part(base | row, entry["kind"], leave_out=NOT_PARAMETERS, at=f"{at}.combinations")
    if entry["kind"] == "demes":
        entry["demography"] = read_demes(entry["demography"], at=at)
    check_variants(name, entry)


def _check_names(config: dict) -> None:
    """BadRequest if names of one kind differ in case only (some file systems do not), or a scenario's is also a set's."""
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
    """Replace names of sets by the scenarios in them, each once and in order, wherever scenarios are listed."""
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
            raise BadRequest(f"datasets.{name}.scenarios: the sets named hold no scenario any more; name at least one")
    for name, model in config["models"].items():
        if "evaluation" in model:
            model["evaluation"] = filled(model["evaluation"], f"models.{name}.evaluation")


def _check_dataset(config: dict, name: str, dataset: dict) -> None:
    at = f"datasets.{name}"
    length, window = dataset["sequence_length"], dataset["window_size"]
    for scenario in dataset["scenarios"]:
        entry = config["scenarios"][scenario]
        if not entry["simulations"]:
            raise BadRequest(f"{at}.scenarios: '{scenario}' has `simulations: 0`, which is for evaluation only; give it some")
        check_scenario_fits(scenario, entry, at, dataset)
        regions = dataset["regions_per_simulation"]
        for variant in variants(scenario, entry):
            if regions * length > variant.spec["sequence_length"]:
                raise BadRequest(
                    f"{at}.regions_per_simulation: {regions} regions of {length} bp do not fit into the "
                    f"{variant.spec['sequence_length']} bp of scenario '{variant.name}'"
                )
    if length % window:
        raise BadRequest(f"{at}: sequence_length {length} is not a multiple of window_size {window}")
    exist = pairs_of(dataset["samples"])
    if dataset["pairs"] > exist:
        raise BadRequest(f"{at}.pairs: {dataset['pairs']} asked, but {dataset['samples']} samples have {exist} pairs")
    mask = dataset.get("mask", {})
    if "path" in mask and not Path(mask["path"]).is_file():
        raise BadRequest(f"{at}.mask.path: there is no file {mask['path']}")
    if "path" not in mask and mask.get("length", length) < length:
        raise BadRequest(f"{at}.mask.length: {mask['length']} bp is shorter than sequence_length {length}")


def individuals_of(entry: dict) -> int:
    """Diploid individuals that a scenario samples."""
    return sum(entry["samples"].values()) if entry["kind"] == "demes" else entry["individuals"]


def check_scenario_fits(scenario: str, entry: dict, at: str, dataset: dict) -> None:
    """BadRequest if simulations of *entry* are too short or have too few samples for *dataset*."""
    for variant in variants(scenario, entry):
        if variant.spec["sequence_length"] < dataset["sequence_length"]:
            raise BadRequest(
                f"{at}.sequence_length: {dataset['sequence_length']} bp asked, but scenario '{variant.name}' simulates "
                f"{variant.spec['sequence_length']} bp"
            )
        individuals = individuals_of(variant.spec)
        if 2 * individuals < dataset["samples"]:
            raise BadRequest(
                f"{at}.samples: {dataset['samples']} asked, but scenario '{variant.name}' samples {individuals} individuals "
                f"({2 * individuals} haplotypes)"
            )


def parent_of(model: dict) -> str | None:
    """Name of the parent model, or None."""
    return model.get("checkpoint", model.get("resume_adapter"))


def lineage_of_parents(config: dict, name: str) -> list[str]:
    """*name*, its parent, and so on to a model trained from scratch; BadRequest on unknown parents and cycles."""
    chain = [name]
    while (parent := parent_of(config["models"][chain[-1]])) is not None:
        if parent not in config["models"]:
            raise BadRequest(f"models.{chain[-1]}: unknown parent '{parent}'{suggest_nearest(parent, config['models'])}")
        if parent in chain:
            raise BadRequest(f"models: a cycle of parents: {' <- '.join([*chain, parent])}")
        chain.append(parent)
    return chain


def is_adapter(config: dict, name: str) -> bool:
    """Whether the model has a sample-size adapter."""
    model = config["models"][name]
    return "adapter" in model or "resume_adapter" in model


def _check_model(config: dict, name: str) -> None:
    model = config["models"][name]
    at = f"models.{name}"
    if model["dataset"] not in config["datasets"]:
        raise BadRequest(
            f"{at}.dataset: unknown dataset '{model['dataset']}'{suggest_nearest(model['dataset'], config['datasets'])}"
        )
    if "checkpoint" in model and "resume_adapter" in model:
        raise BadRequest(f"{at}: `checkpoint` and `resume_adapter` exclude each other")
    chain = lineage_of_parents(config, name)
    if "checkpoint" in model and is_adapter(config, chain[1]):
        raise BadRequest(f"{at}.checkpoint: '{chain[1]}' is an adapter model; use `resume_adapter: {chain[1]}`")
    if "resume_adapter" in model and not is_adapter(config, chain[1]):
        raise BadRequest(f"{at}.resume_adapter: '{chain[1]}' has no adapter; use `checkpoint: {chain[1]}`")
    if "adapter" in model and len(chain) == 1:
        raise BadRequest(f"{at}.adapter: an adapter needs a trained backbone: name one with `checkpoint`")
    dataset = config["datasets"][model["dataset"]]
    asked, exist = config["evaluation"]["pairs"], pairs_of(dataset["samples"])
    if asked > exist:
        raise BadRequest(f"evaluation.pairs: {asked} asked, but the {dataset['samples']} samples of {at} have {exist} pairs")
    for scenario in model.get("evaluation", []):
        check_scenario_fits(scenario, config["scenarios"][scenario], f"{at}.evaluation", dataset)
    with _named(f"{at}.architecture"):
        network = model_config(config, name)
    own = model.get("training", {})
    with _named(f"{at}.training" if own else f"training, of {at}"):
        training_config(config, name)
    if "backbone_lr_factor" in own and not is_adapter(config, name):
        raise BadRequest(f"{at}.training: backbone_lr_factor has no meaning without an adapter; leave it out")
    if is_adapter(config, name):
        with _named(f"{at}.adapter"):
            adapter_config(config, name)
    if len(chain) > 1:
        parent = config["datasets"][config["models"][chain[1]]["dataset"]]
        check_inheritance(
            child=at,
            network=network,
            parent=chain[1],
            parent_network=model_config(config, chain[1]),
            dataset=model["dataset"],
            scales=dataset["scales"],
            parent_scales=parent["scales"],
            samples_in=dataset["samples"],
            parent_samples_in=parent["samples"],
            fresh_adapter="adapter" in model and "checkpoint" in model,
            missing="mask" in dataset,
        )
    check_missingness(at, network, model["dataset"], "mask" in dataset)
    if is_adapter(config, name):
        check_adapter_samples(at, model["dataset"], dataset["samples"], network.samples)


@contextlib.contextmanager
def _named(at: str):
    """Let a BadRequest say of which section of the configuration it speaks."""
    try:
        yield
    except BadRequest as error:
        raise BadRequest(f"{at}: {error}") from None


def model_config(config: dict, name: str) -> ModelConfig:
    """The network of model *name*: preset, sizes inherited from the parents, own sizes, shape of the dataset."""
    chain = lineage_of_parents(config, name)
    model = config["models"][name]
    sizes: dict = {}
    for ancestor in reversed(chain):
        architecture = config["models"][ancestor].get("architecture", {})
        if ancestor == chain[-1]:
            sizes = {key: getattr(PRESETS[config["models"][ancestor]["preset"]], key) for key in SIZES}
        sizes |= {key: value for key, value in architecture.items() if key in SIZES}
    own = {key: value for key, value in model.get("architecture", {}).items() if key not in SIZES}
    dataset = config["datasets"][model["dataset"]]
    # The backbone of an adapter model keeps the samples of the model that it was first trained as.
    backbone = next(ancestor for ancestor in chain if not is_adapter(config, ancestor))
    shape = {
        "windows": dataset["sequence_length"] // dataset["window_size"],
        "window_size": dataset["window_size"],
        "scales": len(dataset["scales"]),
        "samples": config["datasets"][config["models"][backbone]["dataset"]]["samples"],
    }
    return dataclasses.replace(PRESETS[model["preset"]], **(sizes | own | shape))


def adapter_config(config: dict, name: str) -> AdapterConfig | None:
    """The adapter of model *name*, settings inherited from the adapter it resumes; None for a plain model."""
    if not is_adapter(config, name):
        return None
    settings: dict = {}
    for ancestor in reversed(lineage_of_parents(config, name)):
        settings |= config["models"][ancestor].get("adapter", {})
    if "lastN" not in settings.get("unfreeze_strategy", AdapterConfig.unfreeze_strategy):
        settings.pop("last_n", None)  # nothing looks at it
    return AdapterConfig(**settings, samples=config["datasets"][config["models"][name]["dataset"]]["samples"])


def training_config(config: dict, name: str) -> TrainingConfig:
    """The training settings of model *name*; `devices` is the rule's resource, not a setting of the trainer."""
    settings = config["training"] | config["models"][name].get("training", {})
    settings = {key: value for key, value in settings.items() if key != "devices"}
    return TrainingConfig(**settings)


def training_settings(config: dict, name: str) -> dict:
    """Model *name*'s settings as `python -m cxt.train --config` reads them: flat, one key per flag."""
    network = model_config(config, name)
    settings = {"model": config["models"][name]["preset"], "name": name}
    for key in (*SIZES, "mask_singletons", "start_token_in_prefix"):
        settings[key] = getattr(network, key)
    settings |= dataclasses.asdict(training_config(config, name))
    adapter = adapter_config(config, name)
    if adapter is not None:
        settings |= {
            "adapter": True,
            "adapter_samples": adapter.samples,
            "adapter_bottleneck": adapter.bottleneck,
            "adapter_dropout": adapter.dropout,
            "unfreeze_strategy": adapter.unfreeze_strategy,
            "last_n": adapter.last_n,
            "overwrite_bin0": adapter.overwrite_bin0,
        }
    else:
        del settings["backbone_lr_factor"]  # so that it is not a plain model's
    return settings
