"""The network of a run, and the checkpoint that it starts from: what the flags ask for against what dataset and parent are."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxt.config.network import (
    PRESETS,
    SIZES,
    Adapter,
    AdapterConfig,
    ModelConfig,
    TrainedModel,
    check_adapter_samples,
    check_inheritance,
    check_missingness,
)
from cxt.config.training import TrainingFields
from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.trainer.options import TrainingOptions

if TYPE_CHECKING:  # it takes torch's seconds
    from cxt.checkpoints.file import Checkpoint

logger = get_logger(__name__)

NETWORK_FLAGS = ("layers", "heads", "width", "dropout", "mask_singletons", "start_token_in_prefix")
"""Flags whose default is the preset's, and sizes the parent's where there is one."""

ADAPTER_FLAGS = {
    "adapter_samples": None,
    **{
        f"adapter_{name}" if name in ("bottleneck", "dropout") else name: field.default
        for name, field in Adapter.model_fields.items()
    },
    "backbone_lr_factor": TrainingFields.model_fields["backbone_lr_factor"].default,
}
"""Flags that act on an adapter, with their defaults where none is resumed."""


def check_adapter_flags(options: TrainingOptions) -> None:
    """BadRequest for flags that act on an adapter where there is none; their defaults, as a file may have them, pass."""
    values = options.flatten()
    given = [name for name, default in ADAPTER_FLAGS.items() if values[name] not in (None, default)]
    if given and not options.has_adapter:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise BadRequest(f"{flags} {'has' if len(given) == 1 else 'have'} no meaning without --adapter or --resume-adapter")


def _describe_parent(parent: "Checkpoint", *, name: str) -> TrainedModel:
    """A checkpoint as its children are checked against it; its dataset is known by its scales and samples only."""
    return TrainedModel(
        name=name,
        network=parent.model,
        dataset=name,
        scales=parent.record["dataset"]["scales"],
        samples=parent.model.samples if parent.adapter is None else parent.adapter.samples,
        has_missingness=not parent.model.mask_singletons,
        has_adapter=parent.adapter is not None,
    )


def resolve_network(
    options: TrainingOptions, manifest: dict, parent: "Checkpoint | None"
) -> tuple[ModelConfig, AdapterConfig | None]:
    """Network and adapter of this run, checked against dataset and parent.

    Parameters
    ----------
    options : TrainingOptions
        With what `inherit` has taken from the parent.
    manifest : dict
        The dataset's.
    parent : Checkpoint or None
        The checkpoint to start from.

    Raises
    ------
    BadRequest
        If network, dataset and parent do not fit together.
    """
    explicit = {key: getattr(options, key) for key in NETWORK_FLAGS if getattr(options, key) is not None}
    shape = {key: manifest[key] for key in ("windows", "window_size", "samples")} | {"scales": len(manifest["scales"])}
    if options.has_adapter and parent is not None:
        shape["samples"] = parent.model.samples
    network = PRESETS[options.model].replace(**(explicit | shape))
    dataset = options.data
    model = TrainedModel(
        name=f"--model {options.model}",
        network=network,
        dataset=dataset,
        scales=manifest["scales"],
        samples=manifest["samples"],
        has_missingness=manifest["missing"],
        has_adapter=options.has_adapter,
    )
    check_missingness(model)
    if parent is not None:
        name = options.parent
        for key in ("layers", "heads", "width"):  # given with a flag, or else the parent's
            given, inherited = getattr(network, key), getattr(parent.model, key)
            if given != inherited:
                raise BadRequest(f"--{key} {given}, but checkpoint {name} has {inherited}; leave the flag out to take that")
        check_inheritance(model, _describe_parent(parent, name=name))
        if network.window_size != parent.model.window_size:
            logger.info(f"note: the window size moves from {parent.model.window_size} to {network.window_size} bp")
    if not options.has_adapter:
        return network, None
    if options.adapter_samples is not None and options.adapter_samples != manifest["samples"]:
        raise BadRequest(
            f"--adapter-samples {options.adapter_samples}, but dataset {dataset} has {manifest['samples']} samples"
        )
    check_adapter_samples(model)
    adapter = AdapterConfig(
        samples=manifest["samples"],
        bottleneck=options.adapter_bottleneck,
        dropout=options.adapter_dropout,
        unfreeze_strategy=options.unfreeze_strategy,
        last_n=options.last_n,
        overwrite_bin0=options.overwrite_bin0,
    )
    if options.resume_adapter is not None and parent.adapter.bottleneck != adapter.bottleneck:
        raise BadRequest(
            f"--adapter-bottleneck {adapter.bottleneck}, but {options.resume_adapter} has {parent.adapter.bottleneck}"
        )
    if "lastN" not in adapter.unfreeze_strategy and adapter.last_n != ADAPTER_FLAGS["last_n"]:
        raise BadRequest(f"--last-n {adapter.last_n} has no meaning with --unfreeze-strategy {adapter.unfreeze_strategy}")
    return network, adapter


def read_parent(options: TrainingOptions) -> "tuple[Path, Checkpoint] | tuple[None, None]":
    """The checkpoint to start from.

    Returns
    -------
    tuple
        Its file and its content, or (None, None) if training starts from random weights.

    Raises
    ------
    BadRequest
        If it cannot be read, or is with an adapter where one without is asked for, or the other way round.
    """
    from cxt.checkpoints.file import read_checkpoint
    from cxt.checkpoints.load import find_checkpoint

    if options.checkpoint is not None and options.resume_adapter is not None:
        raise BadRequest("--checkpoint and --resume-adapter exclude each other")
    if options.resume and options.restart:
        raise BadRequest("--resume and --restart exclude each other")
    if options.adapter and options.checkpoint is None and options.resume_adapter is None:
        raise BadRequest("--adapter needs a trained backbone: name one with --checkpoint, or an adapter with --resume-adapter")
    name = options.checkpoint or options.resume_adapter
    if name is None:
        return None, None
    path = find_checkpoint(name)
    parent = read_checkpoint(path)
    if options.checkpoint is not None and parent.adapter is not None:
        raise BadRequest(f"{path} holds an adapter model: use --resume-adapter {name}")
    if options.resume_adapter is not None and parent.adapter is None:
        raise BadRequest(f"{path} has no adapter weights: use --checkpoint {name} --adapter")
    return path, parent


def inherit(options: TrainingOptions, parent: "Checkpoint | None") -> TrainingOptions:
    """Take from the parent what no flag says otherwise, as the workflow does, and say so where it is no default.

    Sizes of the network and settings of a resumed adapter are the parent's. What only published weights do is said as well.

    Returns
    -------
    TrainingOptions
        A copy in which no setting of an adapter is None, if an adapter is trained.
    """
    inherited: dict[str, Any] = {}

    def take(name: str, value, default) -> None:
        if getattr(options, name) is None and value != default:
            inherited[name] = value

    if parent is not None:
        for name in SIZES:
            take(name, getattr(parent.model, name), getattr(PRESETS[options.model], name))
    if options.resume_adapter is not None:
        adapter = parent.adapter
        take("adapter_bottleneck", adapter.bottleneck, ADAPTER_FLAGS["adapter_bottleneck"])
        take("adapter_dropout", adapter.dropout, ADAPTER_FLAGS["adapter_dropout"])
        take("unfreeze_strategy", adapter.unfreeze_strategy, ADAPTER_FLAGS["unfreeze_strategy"])
        strategy = inherited.get("unfreeze_strategy", options.unfreeze_strategy) or ADAPTER_FLAGS["unfreeze_strategy"]
        if "lastN" in strategy:
            take("last_n", adapter.last_n, ADAPTER_FLAGS["last_n"])
    if inherited:
        words = ", ".join(f"{name} {value}" for name, value in inherited.items())
        logger.warning(f"note: {words}, as in {options.parent}")
    if options.start_token_in_prefix is None and parent is not None and parent.model.start_token_in_prefix:
        inherited["start_token_in_prefix"] = True
        logger.warning(f"note: sources see the start token, as in {options.parent}; --start-token-in-prefix false ends that")
    if options.has_adapter:
        if options.overwrite_bin0 is None and options.resume_adapter is not None and parent.adapter.overwrite_bin0:
            inherited["overwrite_bin0"] = True
            logger.warning(f"note: the adapter overwrites bin 0, as in {options.parent}; --overwrite-bin0 false ends that")
        values = options.flatten() | inherited
        inherited |= {name: default for name, default in ADAPTER_FLAGS.items() if values[name] is None}
    return dataclasses.replace(options, **inherited)
