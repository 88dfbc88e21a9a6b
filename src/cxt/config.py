"""Presets, the published defaults, and the configuration: merging, checking, and what it says of each model.

`python -m cxt.config --spec JSON --out FILE.yaml` writes one model's resolved training settings, which
`python -m cxt.train --config FILE.yaml` reads.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import yaml

from cxt.errors import BadRequest, exit_on_bad_request, nearest
from cxt.schema import REPOSITORY, complete

DEFAULT_CONFIG = REPOSITORY / "config" / "config.yaml"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network; the defaults are the published `broad`.

    Attributes
    ----------
    layers, heads, width : transformer blocks, attention heads, width of the residual stream
    dropout : on embeddings and residual branches
    windows, samples, scales : windows of a region, haplotypes, number of window widths
    window_size : base pairs; informational, weights may move to another one
    mask_singletons : zero frequency bin 0 of the input. Despite the published name, true singletons (bin 1) stay.
    start_token_in_prefix : sources attend to the start token when all tokens are given, as in published training;
        decoding never does, so leave it False for anything but published weights
    grid_low, grid_high, bins : the grid of ln generations
    """

    layers: int = 10
    heads: int = 4
    width: int = 400
    dropout: float = 0.1
    windows: int = 500
    samples: int = 50
    scales: int = 4
    window_size: int = 2000
    mask_singletons: bool = True
    start_token_in_prefix: bool = False
    grid_low: float = 3.0
    grid_high: float = 17.0
    bins: int = 324

    def __post_init__(self):
        for name in ("layers", "heads", "width", "windows", "samples", "scales", "bins"):
            if getattr(self, name) < 1:
                raise BadRequest(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise BadRequest(f"dropout is {self.dropout}, expected at least 0 and below 1")
        if self.width % self.scales:
            raise BadRequest(f"width {self.width} is not a multiple of the number of scales, {self.scales}")
        if self.width % (2 * self.heads):
            raise BadRequest(
                f"width {self.width} is not a multiple of {2 * self.heads}: each of {self.heads} heads needs an even width"
            )

    @property
    def vocabulary(self) -> int:
        return self.bins + 2


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The sample-size adapter: *samples* haplotypes in, the backbone's number out.

    Attributes
    ----------
    samples : haplotypes of its input
    bottleneck, dropout : width and dropout of the gated branch
    unfreeze_strategy : backbone parameters that train too: `none`, `ln` (layer norms), `lastN` (last *last_n* blocks),
        or `ln_lastN` (both)
    overwrite_bin0 : overwrite bin 0 always, as published, not only where the backbone masks it
    """

    samples: int = 10
    bottleneck: int = 32
    dropout: float = 0.0
    unfreeze_strategy: str = "ln_lastN"
    last_n: int = 2
    overwrite_bin0: bool = False


PRECISIONS = ("bf16-mixed", "16-mixed", "32-true")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training settings; the defaults are the published ones, and config/README.md describes each."""

    epochs: int = 10
    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup_steps: int = 10
    decay_steps: int = 150_000
    batch_size: int = 128
    grad_accum: int = 6
    grad_clip: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    backbone_lr_factor: float = 0.05
    precision: str = "bf16-mixed"
    threads: int = 2
    workers: int = 0
    seed: int = 1
    validation_items: int = 0
    save_every: int = 200

    def __post_init__(self):
        if not self.lr > 0:
            raise BadRequest(f"lr is {self.lr}, expected above 0")
        if self.precision not in PRECISIONS:
            raise BadRequest(f"unknown precision '{self.precision}'{nearest(self.precision, PRECISIONS)}")
        if self.min_lr > self.lr:
            raise BadRequest(f"lr {self.lr:g} is below min_lr {self.min_lr:g}, so the learning rate would rise: lower min_lr")
        for name in ("epochs", "batch_size", "grad_accum", "threads", "save_every"):
            if getattr(self, name) < 1:
                raise BadRequest(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("min_lr", "warmup_steps", "decay_steps", "grad_clip", "weight_decay", "workers", "validation_items"):
            if getattr(self, name) < 0:
                raise BadRequest(f"{name} is {getattr(self, name)}, expected at least 0")


PRESETS = {
    "narrow": ModelConfig(layers=6),
    "broad": ModelConfig(),
    "broad_w200": ModelConfig(window_size=200),
    "w200_wmissing": ModelConfig(window_size=200, mask_singletons=False),
}
"""The published architectures, by name."""

CHANGE_NO_RESULT = ("workers", "save_every", "validation_items")
"""Training settings that do not change the trained weights."""

SIZES = ("layers", "heads", "width", "dropout")


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


def read_yaml(path) -> dict:
    """The mapping in a YAML file; BadRequest if there is none."""
    try:
        value = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise BadRequest(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"{path} holds no mapping")
    return value


def load(configfiles=(), *, default=DEFAULT_CONFIG) -> dict:
    """The checked configuration: *configfiles* in order over the default one, defaults filled in.

    Raises BadRequest for anything that `resolve` refuses.
    """
    config = read_yaml(default)
    for path in configfiles:
        config = merge(config, read_yaml(path))
    return resolve(config)


def resolve(config: dict) -> dict:
    """*config* without nulls, checked against the schema and in itself, with defaults filled in."""
    config = complete(without_nulls(config))
    for name, dataset in config["datasets"].items():
        _check_dataset(config, name, dataset)
    for name in config["models"]:
        _check_model(config, name)
    for name in config["evaluation"]["simulations_of"]:
        if name not in config["scenarios"]:
            raise BadRequest(f"evaluation.simulations_of: unknown scenario '{name}'{nearest(name, config['scenarios'])}")
    return config


def _check_dataset(config: dict, name: str, dataset: dict) -> None:
    at = f"datasets.{name}"
    for scenario in dataset["scenarios"]:
        if scenario not in config["scenarios"]:
            raise BadRequest(f"{at}.scenarios: unknown scenario '{scenario}'{nearest(scenario, config['scenarios'])}")
        check_scenario_fits(scenario, config["scenarios"][scenario], at, dataset)
    length, window = dataset["sequence_length"], dataset["window_size"]
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


def pairs_of(samples: int) -> int:
    """Number of different pairs of *samples* haplotypes."""
    return samples * (samples - 1) // 2


def check_scenario_fits(scenario: str, entry: dict, at: str, dataset: dict) -> None:
    """BadRequest if simulations of *entry* are too short or have too few samples for *dataset*."""
    if entry["sequence_length"] < dataset["sequence_length"]:
        raise BadRequest(
            f"{at}.sequence_length: {dataset['sequence_length']} bp asked, but scenario '{scenario}' simulates "
            f"{entry['sequence_length']} bp"
        )
    if 2 * entry["individuals"] < dataset["samples"]:
        raise BadRequest(
            f"{at}.samples: {dataset['samples']} asked, but scenario '{scenario}' samples {entry['individuals']} individuals "
            f"({2 * entry['individuals']} haplotypes)"
        )


def parent_of(model: dict) -> str | None:
    """Name of the parent model, or None."""
    return model.get("checkpoint", model.get("resume_adapter"))


def lineage_of_parents(config: dict, name: str) -> list[str]:
    """*name*, its parent, and so on to a model trained from scratch; BadRequest on unknown parents and cycles."""
    chain = [name]
    while (parent := parent_of(config["models"][chain[-1]])) is not None:
        if parent not in config["models"]:
            raise BadRequest(f"models.{chain[-1]}: unknown parent '{parent}'{nearest(parent, config['models'])}")
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
        raise BadRequest(f"{at}.dataset: unknown dataset '{model['dataset']}'{nearest(model['dataset'], config['datasets'])}")
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
        if scenario not in config["scenarios"]:
            raise BadRequest(f"{at}.evaluation: unknown scenario '{scenario}'{nearest(scenario, config['scenarios'])}")
        check_scenario_fits(scenario, config["scenarios"][scenario], f"{at}.evaluation", dataset)
    network = model_config(config, name)
    training_config(config, name)
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


def check_adapter_samples(at: str, dataset: str, samples: int, backbone: int) -> None:
    """BadRequest if an adapter would not expand anything."""
    if samples >= backbone:
        raise BadRequest(
            f"{at}: an adapter needs fewer samples than its backbone's {backbone}, dataset '{dataset}' has {samples}"
        )


def check_missingness(at: str, network: ModelConfig, dataset: str, missing: bool) -> None:
    """BadRequest if the network and the dataset disagree on what frequency bin 0 means."""
    if missing and network.mask_singletons:
        raise BadRequest(
            f"{at}: dataset '{dataset}' carries missingness in bin 0, which this model masks; "
            "use preset w200_wmissing, or mask_singletons: false"
        )
    if not missing and not network.mask_singletons:
        raise BadRequest(
            f"{at}: this model reads missingness from bin 0, but dataset '{dataset}' has none; "
            "give the dataset a mask, or choose a preset with mask_singletons"
        )


def check_inheritance(
    *,
    child,
    network,
    parent,
    parent_network,
    dataset,
    scales,
    parent_scales,
    samples_in,
    parent_samples_in,
    fresh_adapter,
    missing,
) -> None:
    """BadRequest if a child cannot start from its parent's weights with its dataset; window size may differ."""
    if not fresh_adapter and samples_in != parent_samples_in:
        raise BadRequest(
            f"{child}: dataset '{dataset}' has {samples_in} samples, but its parent '{parent}' takes {parent_samples_in}; "
            "an adapter can bridge that"
        )
    if list(scales) != list(parent_scales):
        raise BadRequest(f"{child}: dataset '{dataset}' has scales {scales}, but its parent '{parent}' {parent_scales}")
    for key in ("layers", "heads", "width", "samples", "bins"):
        mine, theirs = getattr(network, key), getattr(parent_network, key)
        if mine != theirs:
            raise BadRequest(f"{child}: {key} is {mine}, but its parent '{parent}' has {theirs}; they must be equal")
    if network.windows != parent_network.windows:
        raise BadRequest(
            f"{child}: dataset '{dataset}' has {network.windows} windows, but its parent '{parent}' was trained with "
            f"{parent_network.windows}; change sequence_length or window_size"
        )
    if not missing and not parent_network.mask_singletons:
        raise BadRequest(f"{child}: its parent '{parent}' was trained with missingness, dataset '{dataset}' has none")


def steps_per_epoch(*, items: int, batch_size: int, grad_accum: int, world: int) -> int:
    """Optimizer steps of one epoch: full batches of each rank, and a last short accumulation that steps too.

    Raises
    ------
    BadRequest
        If a rank has less than one batch.
    """
    batches = items // world // batch_size
    if batches < 1:
        devices = "device" if world == 1 else "devices"
        raise BadRequest(
            f"the dataset has {items} training items, fewer than one batch of {batch_size} on {world} {devices}; "
            "lower the batch size or simulate more"
        )
    return -(-batches // grad_accum)


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
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cxt.config", description="Write one model's training settings as YAML.")
    parser.add_argument("--spec", required=True, help="the settings as JSON")
    parser.add_argument("--out", required=True, type=Path, help="YAML file to write")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_text(yaml.safe_dump(json.loads(args.spec), sort_keys=True))
    temporary.replace(args.out)


if __name__ == "__main__":
    exit_on_bad_request(main)
