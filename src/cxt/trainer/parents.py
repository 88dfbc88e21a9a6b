"""The network of a run and the checkpoint it starts from, checked against flags, dataset and parent."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxt.config.network import (
    PRESETS,
    SIZES,
    Adapter,
    AdapterConfig,
    Lora,
    LoraConfig,
    ModelConfig,
    TrainedModel,
    check_adapter_samples,
    check_inheritance,
    check_lora,
    check_missingness,
)
from cxt.config.training import TrainingFields
from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.trainer.options import TrainingOptions

if TYPE_CHECKING:  # importing torch takes seconds
    from cxt.checkpoints.file import Checkpoint

logger = get_logger(__name__)

NETWORK_FLAGS = (
    "layers",
    "heads",
    "width",
    "dropout",
    "mask_singletons",
    "start_token_in_prefix",
    "reads_rates",
    "separate_embeddings",
)
"""Flags whose default comes from the preset or, for sizes, from the parent if there is one."""

ADAPTER_FLAGS = {
    "adapter_samples": None,
    **{
        f"adapter_{name}" if name in ("bottleneck", "dropout") else name: field.default
        for name, field in Adapter.model_fields.items()
    },
    "backbone_lr_factor": TrainingFields.model_fields["backbone_lr_factor"].default,
}
"""Flags that apply to an adapter, with their defaults if no adapter is resumed."""


LORA_FLAGS = {f"lora_{name}": field.default for name, field in Lora.model_fields.items()}
"""Flags that apply to LoRA, with their defaults."""


def check_adapter_flags(options: TrainingOptions) -> None:
    """BadRequest for adapter flags without an adapter; default values, which a file may contain, are accepted.

    Also for flags of LoRA without a base.
    """
    values = options.flatten()
    given = [name for name, default in ADAPTER_FLAGS.items() if values[name] not in (None, default)]
    if given and not options.has_adapter:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise BadRequest(f"{flags} cannot be used without --adapter or --resume-adapter")
    given = [f"--{name.replace('_', '-')}" for name in LORA_FLAGS if values[name] is not None]
    if given and options.lora_of is None:
        raise BadRequest(f"{', '.join(given)} cannot be used without --lora-of, the checkpoint to train a LoRA of")


def _describe_parent(parent: "Checkpoint", *, name: str) -> TrainedModel:
    """The properties of a checkpoint that its children are checked against; of its dataset, scales and samples are known."""
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
        Completed by `inherit`.
    manifest : dict
        Manifest of the dataset.
    parent : Checkpoint or None
        The checkpoint to start from.

    Raises
    ------
    BadRequest
        If network, dataset and parent do not fit together.
    """
    explicit = {key: getattr(options, key) for key in NETWORK_FLAGS if getattr(options, key) is not None}
    shape = {key: manifest[key] for key in ("windows", "window_size", "samples")} | {"scales": len(manifest["scales"])}
    if options.windows is not None:
        shape["windows"] = options.windows
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
        for key in ("layers", "heads", "width"):  # from a flag, otherwise from the parent
            given, inherited = getattr(network, key), getattr(parent.model, key)
            if given != inherited:
                raise BadRequest(f"--{key} {given}, but checkpoint {name} has {inherited}; omit the flag to inherit it")
        check_inheritance(model, _describe_parent(parent, name=name))
        if network.window_size != parent.model.window_size:
            logger.info(f"note: the window size changes from {parent.model.window_size} to {network.window_size} bp")
        if network.windows != parent.model.windows:
            logger.info(f"note: the number of windows changes from {parent.model.windows} to {network.windows}")
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
        raise BadRequest(f"--last-n {adapter.last_n} cannot be used with --unfreeze-strategy {adapter.unfreeze_strategy}")
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
        If it cannot be read, is quantised, or has an adapter where none is expected, or the other way round.
    """
    from cxt.checkpoints.file import read_checkpoint
    from cxt.checkpoints.load import find_checkpoint, read_usable_checkpoint

    starts = ("checkpoint", "resume_adapter", "lora_of")
    given = [f"--{start.replace('_', '-')}" for start in starts if getattr(options, start) is not None]
    if len(given) > 1:
        raise BadRequest(f"{' and '.join(given)} cannot be used together")
    if options.resume and options.restart:
        raise BadRequest("--resume and --restart cannot be used together")
    if options.adapter and options.parent is None:
        raise BadRequest("--adapter needs a trained backbone; name one with --checkpoint, or an adapter with --resume-adapter")
    if options.adapter and options.lora_of is not None:
        raise BadRequest("--adapter and --lora-of cannot be used together")
    name = options.parent
    if name is None:
        return None, None
    path = find_checkpoint(name)
    parent = read_checkpoint(path) if options.lora_of is not None else read_usable_checkpoint(path)
    if (quantization := parent.record.get("quantization")) is not None:
        raise BadRequest(
            f"{path} is quantised: its weights were rounded to {quantization['bits']} bits, to be used and not to be trained "
            f"from; start from its source, the checkpoint of sha256 {quantization['source']}"
        )
    if options.lora_of is not None:
        _check_base(path, parent)
        return path, parent
    if options.checkpoint is not None and parent.adapter is not None:
        raise BadRequest(f"{path} is an adapter model; use --resume-adapter {name}")
    if options.resume_adapter is not None and parent.adapter is None:
        raise BadRequest(f"{path} has no adapter weights; use --checkpoint {name} --adapter")
    return path, parent


def _check_base(path: Path, base: "Checkpoint") -> None:
    """BadRequest unless a LoRA of the checkpoint *base* can be trained, and can find it again by its name and file."""
    if base.adapter is not None:
        raise BadRequest(f"{path} is an adapter model, which cannot be the base of LoRA")
    if base.lora is not None:
        raise BadRequest(
            f"{path} is itself a LoRA of '{base.record['parent']['name']}'; merge it (cxt checkpoint merge) and use the merged "
            "checkpoint, or use that base"
        )
    if path.suffix != ".ckpt" or not base.record["name"]:
        raise BadRequest(
            f"the base of LoRA must be a .ckpt file with the name of its model, by which the LoRA finds it again, got {path}"
        )


def resolve_lora(options: TrainingOptions, network: ModelConfig, parent: "Checkpoint | None") -> LoraConfig | None:
    """The LoRA of this run, checked against its base, *parent*; None for a run without."""
    if options.lora_of is None or parent is None:
        return None
    lora = LoraConfig(rank=options.lora_rank, alpha=options.lora_alpha, targets=options.lora_targets)
    check_lora(lora, network, parent.model, name=f"--lora-of {options.lora_of}", base_name=options.lora_of)
    return lora


def inherit(options: TrainingOptions, parent: "Checkpoint | None") -> TrainingOptions:
    """Inherit options that are not given from the parent, as the workflow does, and log those that differ from the defaults.

    These are sizes of the network, settings of a resumed adapter, and behaviour that only published weights have.

    Returns
    -------
    TrainingOptions
        A copy in which all settings of an adapter or LoRA are set, if one is trained.
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
        logger.warning(f"note: inherited from {options.parent}: {words}")
    if options.start_token_in_prefix is None and parent is not None and parent.model.start_token_in_prefix:
        inherited["start_token_in_prefix"] = True
        logger.warning(
            f"note: as in {options.parent}, sources attend to the start token; --start-token-in-prefix false turns this off"
        )
    if options.lora_of is not None:
        inherited |= {name: default for name, default in LORA_FLAGS.items() if getattr(options, name) is None}
    if options.has_adapter:
        if options.overwrite_bin0 is None and options.resume_adapter is not None and parent.adapter.overwrite_bin0:
            inherited["overwrite_bin0"] = True
            logger.warning(f"note: as in {options.parent}, the adapter overwrites bin 0; --overwrite-bin0 false turns this off")
        values = options.flatten() | inherited
        inherited |= {name: default for name, default in ADAPTER_FLAGS.items() if values[name] is None}
    return dataclasses.replace(options, **inherited)
