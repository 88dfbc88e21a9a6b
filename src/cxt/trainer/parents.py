"""The network of a run, and the checkpoint that it starts from: what the flags ask for against what dataset and parent are."""

import dataclasses
import sys

from cxt.config.settings import (
    PRESETS,
    SIZES,
    AdapterConfig,
    ModelConfig,
    TrainingConfig,
    check_adapter_samples,
    check_inheritance,
    check_missingness,
)
from cxt.errors import BadRequest
from cxt.trainer.source import source_of

OF_THE_NETWORK = ("layers", "heads", "width", "dropout", "mask_singletons", "start_token_in_prefix")
"""Flags whose default is the preset's, and sizes the parent's where there is one."""

OF_THE_ADAPTER = {
    "adapter_samples": None,
    "adapter_bottleneck": AdapterConfig.bottleneck,
    "adapter_dropout": AdapterConfig.dropout,
    "unfreeze_strategy": AdapterConfig.unfreeze_strategy,
    "last_n": AdapterConfig.last_n,
    "overwrite_bin0": AdapterConfig.overwrite_bin0,
    "backbone_lr_factor": TrainingConfig.backbone_lr_factor,
}
"""Flags that act on an adapter, with their defaults where none is resumed."""


def has_adapter(args) -> bool:
    """Whether the flags ask for an adapter."""
    return args.adapter or args.resume_adapter is not None


def check_adapter_flags(args) -> None:
    """BadRequest for flags that act on an adapter where there is none; their defaults, as a file may have them, pass."""
    given = [name for name, default in OF_THE_ADAPTER.items() if getattr(args, name) not in (None, default)]
    if given and not has_adapter(args):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise BadRequest(f"{flags} {'has' if len(given) == 1 else 'have'} no meaning without --adapter or --resume-adapter")


def resolve_network(args, manifest: dict, parent) -> tuple[ModelConfig, AdapterConfig | None]:
    """Network and adapter of this run, checked against dataset and parent."""
    is_adapter = has_adapter(args)
    explicit = {key: getattr(args, key) for key in OF_THE_NETWORK if getattr(args, key) is not None}
    shape = {key: manifest[key] for key in ("windows", "window_size", "samples")} | {"scales": len(manifest["scales"])}
    if is_adapter and parent is not None:
        shape["samples"] = parent.model.samples
    network = dataclasses.replace(PRESETS[args.model], **(explicit | shape))
    dataset = source_of(args)
    check_missingness(f"--model {args.model}", network, dataset, manifest["missing"])
    if parent is not None:
        source = args.checkpoint or args.resume_adapter
        for key in ("layers", "heads", "width"):  # given with a flag, or else the parent's
            mine, theirs = getattr(network, key), getattr(parent.model, key)
            if mine != theirs:
                raise BadRequest(f"--{key} {mine}, but checkpoint {source} has {theirs}; leave the flag out to take that")
        check_inheritance(
            child=f"--model {args.model}",
            network=network,
            parent=source,
            parent_network=parent.model,
            dataset=dataset,
            scales=manifest["scales"],
            parent_scales=parent.record["dataset"]["scales"],
            samples_in=manifest["samples"],
            parent_samples_in=parent.model.samples if parent.adapter is None else parent.adapter.samples,
            fresh_adapter=args.adapter and args.resume_adapter is None,
            missing=manifest["missing"],
        )
        if network.window_size != parent.model.window_size:
            print(f"note: the window size moves from {parent.model.window_size} to {network.window_size} bp", flush=True)
    if not is_adapter:
        return network, None
    if args.adapter_samples is not None and args.adapter_samples != manifest["samples"]:
        raise BadRequest(f"--adapter-samples {args.adapter_samples}, but dataset {dataset} has {manifest['samples']} samples")
    check_adapter_samples(f"--model {args.model}", dataset, manifest["samples"], network.samples)
    adapter = AdapterConfig(
        samples=manifest["samples"],
        bottleneck=args.adapter_bottleneck,
        dropout=args.adapter_dropout,
        unfreeze_strategy=args.unfreeze_strategy,
        last_n=args.last_n,
        overwrite_bin0=args.overwrite_bin0,
    )
    if args.resume_adapter is not None and parent.adapter.bottleneck != adapter.bottleneck:
        raise BadRequest(
            f"--adapter-bottleneck {adapter.bottleneck}, but {args.resume_adapter} has {parent.adapter.bottleneck}"
        )
    if "lastN" not in adapter.unfreeze_strategy and adapter.last_n != AdapterConfig.last_n:
        raise BadRequest(f"--last-n {adapter.last_n} has no meaning with --unfreeze-strategy {adapter.unfreeze_strategy}")
    return network, adapter


def read_parent(args):
    """File and content of the checkpoint that the verb names, or (None, None); BadRequest when it is of the other sort."""
    from cxt.checkpoints.file import read_checkpoint
    from cxt.checkpoints.load import find_checkpoint

    if args.checkpoint is not None and args.resume_adapter is not None:
        raise BadRequest("--checkpoint and --resume-adapter exclude each other")
    if args.resume and args.restart:
        raise BadRequest("--resume and --restart exclude each other")
    if args.adapter and args.checkpoint is None and args.resume_adapter is None:
        raise BadRequest("--adapter needs a trained backbone: name one with --checkpoint, or an adapter with --resume-adapter")
    source = args.checkpoint or args.resume_adapter
    if source is None:
        return None, None
    path = find_checkpoint(source)
    parent = read_checkpoint(path)
    if args.checkpoint is not None and parent.adapter is not None:
        raise BadRequest(f"{path} holds an adapter model: use --resume-adapter {source}")
    if args.resume_adapter is not None and parent.adapter is None:
        raise BadRequest(f"{path} has no adapter weights: use --checkpoint {source} --adapter")
    return path, parent


def inherit(args, parent) -> None:
    """Let a run go on with what its parent is where no flag says otherwise, as in the workflow; say where that is no default.

    Sizes of the network and settings of a resumed adapter are the parent's. What only published weights do is said as well.
    """
    source = args.checkpoint or args.resume_adapter
    taken = []

    def take(flag: str, theirs, default) -> None:
        if getattr(args, flag) is None and theirs != default:
            setattr(args, flag, theirs)
            taken.append(f"{flag} {theirs}")

    if parent is not None:
        for key in SIZES:
            take(key, getattr(parent.model, key), getattr(PRESETS[args.model], key))
    if args.resume_adapter is not None:
        theirs, defaults = parent.adapter, OF_THE_ADAPTER
        take("adapter_bottleneck", theirs.bottleneck, defaults["adapter_bottleneck"])
        take("adapter_dropout", theirs.dropout, defaults["adapter_dropout"])
        take("unfreeze_strategy", theirs.unfreeze_strategy, defaults["unfreeze_strategy"])
        if "lastN" in (args.unfreeze_strategy or defaults["unfreeze_strategy"]):
            take("last_n", theirs.last_n, defaults["last_n"])
    if taken:
        print(f"note: {', '.join(taken)}, as in {source}", file=sys.stderr)
    if args.start_token_in_prefix is None and parent is not None and parent.model.start_token_in_prefix:
        args.start_token_in_prefix = True
        print(f"note: sources see the start token, as in {source}; --start-token-in-prefix false ends that", file=sys.stderr)
    if not has_adapter(args):
        return
    if args.overwrite_bin0 is None and args.resume_adapter is not None and parent.adapter.overwrite_bin0:
        args.overwrite_bin0 = True
        print(f"note: the adapter overwrites bin 0, as in {source}; --overwrite-bin0 false ends that", file=sys.stderr)
    for flag, default in OF_THE_ADAPTER.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
