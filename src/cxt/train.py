"""Stage 3: train one checkpoint.

    python -m cxt.train --model broad --dataset-path results/datasets/processed --epochs 2

Three verbs: `--checkpoint X` starts a new run from X's weights, `--resume-adapter X` from X's backbone and adapter
weights, `--resume` continues this very run. Without one, training starts from random weights.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

import jsonargparse

from cxt.config import (
    PRESETS,
    AdapterConfig,
    ModelConfig,
    TrainingConfig,
    change_no_result,
    check_adapter_samples,
    check_inheritance,
    check_missingness,
    steps_per_epoch,
)
from cxt.configfile import read_yaml
from cxt.errors import BadRequest, Failed, exit_on_bad_request, nearest
from cxt.files import check_writable
from cxt.lineage import STAGE_VERSION, file_sha256, stage_lineage
from cxt.nodes import Nodes
from cxt.rundir import RunDirectory, newest_version, next_version
from cxt.source import check_source, live_source, source_of
from cxt.store import MANIFEST, read_manifest

BEGAN = time.monotonic()
"""When this process began, near enough."""

RUN_DIRECTORY_OF_RANK_0 = "CXT_RUN_DIRECTORY"
NOT_IN_IDENTITY = ("dataset_path", "configfile", "checkpoint", "resume_adapter", "gpus", "devices", "nodes", "accelerator")
"""Settings that a run's identity holds in another form: files by digest, devices by number."""


OF_THE_NETWORK = ("layers", "heads", "width", "dropout", "mask_singletons", "start_token_in_prefix")
"""Flags whose default is the preset's."""


def build_parser(**options) -> jsonargparse.ArgumentParser:
    """All flags; a key of `--config FILE.yaml` is the name of a flag, with underscores."""
    training = TrainingConfig()
    parser = jsonargparse.ArgumentParser(prog="python -m cxt.train", description="Train one checkpoint.", **options)
    add = parser.add_argument
    add("--config", action="config", help="YAML file whose keys are the names of these flags; the command line wins")
    add("--model", default="broad", help=f"preset: {', '.join(PRESETS)}")
    add("--name", type=str | None, help="name of the checkpoint in logs and file names (default: the preset)")
    add("--dataset-path", type=str | None, help="dataset directory, with train/ and test/")
    add("--simulate", type=str, nargs="+", help="train on these scenarios, simulated on the fly, instead of a dataset")
    add("--configfile", type=str, nargs="+", default=[], help="overlays over the default configuration, for --simulate")
    add("--window-size", type=int | None, help="base pairs of a window, for --simulate (default: the preset's)")
    add("--samples", type=int | None, help="haplotypes, for --simulate (default: all that are simulated)")
    add("--eval-samples", type=int | None, help="items held out for validation, for --simulate: the first ones")
    add("--eval-max-batches", type=int | None, help="the same in batches of --batch-size")
    add("--max-steps", type=int | None, help="optimizer steps to train for; with a dataset, at most its epochs")
    add("--gpus", type=int, nargs="+", help="indices of the GPUs to train on; several use DDP")
    add("--devices", type=int | None, help="number of devices instead: GPUs, or 0 for the CPU")
    add("--nodes", type=int, default=1, help="nodes with so many devices each; start the same command once on each")
    add("--accelerator", default="auto", choices=["auto", "cpu", "gpu"], help="cpu with --devices N: N DDP processes on CPU")
    add("--checkpoint", type=str | None, help="start from the weights of this checkpoint")
    add("--resume-adapter", type=str | None, help="start from the backbone and adapter weights of this adapter checkpoint")
    add(
        "--resume",
        type=bool | str,
        default=False,
        nargs="?",
        const=True,
        help="continue the newest run below --log-dir, or --run-dir, or a run or one of its saves, given as a path",
    )
    add(
        "--restart",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="start the run directory afresh; what it held is kept as …-superseded-N",
    )
    add(
        "--adapter",
        type=bool,
        default=False,
        nargs="?",
        const=True,
        help="train a sample-size adapter on the backbone of --checkpoint",
    )
    add("--adapter-samples", type=int | None, help="haplotypes of the adapter's input (default: the dataset's)")
    adapter = AdapterConfig()
    add("--adapter-bottleneck", type=int, default=adapter.bottleneck, help="width of the adapter's gated branch")
    add("--adapter-dropout", type=float, default=adapter.dropout, help="dropout in the adapter's gated branch")
    add("--unfreeze-strategy", default=adapter.unfreeze_strategy, choices=["none", "ln", "lastN", "ln_lastN"],
        help="backbone parameters that train beside the adapter")  # fmt: skip
    add("--last-n", type=int, default=adapter.last_n, help="last blocks that lastN and ln_lastN unfreeze")
    add("--overwrite-bin0", type=bool | None, help="adapter overwrites bin 0 always (published; default: as its parent)")
    add("--log-dir", type=str, default=".", help="runs go to <log-dir>/lightning_logs/version_N")
    add("--run-dir", type=str | None, help="run directory to use instead; an unfinished run in it is continued")
    add("--max-minutes", type=float | None, help="after so many minutes save and exit with status 75; run again to go on")
    add("--out", type=str | None, help="publish the finished checkpoint here")
    add("--print-config", type=bool, default=False, nargs="?", const=True, help="print all settings as YAML and end")
    add("--lineage", type=str | None, help="digest of everything the checkpoint depends on, stored in it")
    for name, text in {
        "layers": "transformer blocks", "heads": "attention heads", "width": "width of the residual stream",
    }.items():  # fmt: skip
        add(f"--{name}", type=int | None, help=f"{text} (default: the preset's)")
    add("--dropout", type=float | None, help="dropout of the network (default: the preset's)")
    add("--mask-singletons", type=bool | None, help="zero frequency bin 0 in the model (default: the preset's)")
    add("--start-token-in-prefix", type=bool | None, help="sources see the start token (published; default: as its parent)")
    for field in dataclasses.fields(TrainingConfig):
        add(
            f"--{field.name.replace('_', '-')}",
            type=str | bool | int if field.name == "precision" else field.type,  # YAML reads `no` and `16` as these
            default=getattr(training, field.name),
            help="see config/README.md",
            **({"nargs": "?", "const": True} if field.type is bool else {}),
        )
    return parser


def check_config_keys(argv: list[str], parser: jsonargparse.ArgumentParser) -> None:
    """BadRequest with the nearest name for an unknown key in a --config file, or an unknown flag."""
    known = {action.dest for action in parser._actions} - {"help", "config"}
    flags = {option for action in parser._actions for option in action.option_strings}
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag not in flags:
            raise BadRequest(f"unknown flag {flag}{nearest(flag, flags)}")
        if flag == "--config":
            for key in read_yaml(value or argv[min(i + 1, len(argv) - 1)]):
                if key not in known:
                    raise BadRequest(f"{value or argv[i + 1]}: unknown key '{key}'{nearest(key, known)}")


def choose_devices(args) -> tuple[str, int | list[int]]:
    """(accelerator, devices) for Lightning; BadRequest for GPUs that are not there."""
    import torch

    present = torch.cuda.device_count()
    if args.gpus is not None and args.devices is not None:
        raise BadRequest("--gpus and --devices exclude each other")
    if args.devices is not None and args.devices < 0:
        raise BadRequest(f"--devices {args.devices}: expected at least 0")
    if args.accelerator == "cpu" or args.devices == 0:
        if args.gpus is not None:
            raise BadRequest("--gpus and --accelerator cpu exclude each other")
        if args.accelerator == "gpu":
            raise BadRequest("--accelerator gpu and --devices 0 exclude each other")
        return "cpu", args.devices or 1
    wanted = args.gpus if args.gpus is not None else args.devices
    if wanted is None:
        if present:
            return "gpu", 1
        if args.accelerator == "gpu":
            raise BadRequest("--accelerator gpu, but torch sees no GPU")
        print("no GPU: training on the CPU", file=sys.stderr)
        return "cpu", 1
    highest = max(wanted) if isinstance(wanted, list) else wanted - 1
    if highest >= present or (isinstance(wanted, list) and min(wanted) < 0):
        flag = "--gpus " + " ".join(map(str, wanted)) if isinstance(wanted, list) else f"--devices {wanted}"
        has = f"torch sees {present} GPU{'' if present == 1 else 's'}"
        raise BadRequest(f"{flag}, but {has}; leave the flag out, or use --devices 0 to train on the CPU")
    return "gpu", wanted


def resolve_network(args, manifest: dict, parent) -> tuple[ModelConfig, AdapterConfig | None]:
    """Network and adapter of this run, checked against dataset and parent."""
    is_adapter = args.adapter or args.resume_adapter is not None
    explicit = {key: getattr(args, key) for key in OF_THE_NETWORK if getattr(args, key) is not None}
    shape = {key: manifest[key] for key in ("windows", "window_size", "samples")} | {"scales": len(manifest["scales"])}
    if is_adapter and parent is not None:
        shape["samples"] = parent.model.samples
    network = dataclasses.replace(PRESETS[args.model], **(explicit | shape))
    dataset = source_of(args)
    check_missingness(f"--model {args.model}", network, dataset, manifest["missing"])
    if parent is not None:
        source = args.checkpoint or args.resume_adapter
        theirs = {key: getattr(parent.model, key) for key in ("layers", "heads", "width")}
        mine = {key: getattr(network, key) for key in theirs}
        if mine != theirs:
            flags = " ".join(f"--{key} {value}" for key, value in theirs.items())
            raise BadRequest(
                f"--model {args.model} has {mine}, but checkpoint {source} (preset {parent.record['preset']}) has {theirs}; "
                f"choose its preset, or pass {flags}"
            )
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
    return network, adapter


def read_parent(args):
    """File and content of the checkpoint that the verb names, or (None, None); BadRequest when it is of the other sort."""
    from cxt.checkpoint import find_checkpoint, read_checkpoint

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
    """Let weights of the published behaviour go on with it where no flag says otherwise, and say so."""
    source = args.checkpoint or args.resume_adapter
    if args.start_token_in_prefix is None and parent is not None and parent.model.start_token_in_prefix:
        args.start_token_in_prefix = True
        print(f"note: sources see the start token, as in {source}; --start-token-in-prefix false ends that", file=sys.stderr)
    if args.overwrite_bin0 is None:
        args.overwrite_bin0 = args.resume_adapter is not None and parent.adapter.overwrite_bin0
        if args.overwrite_bin0:
            print(f"note: the adapter overwrites bin 0, as in {source}; --overwrite-bin0 false ends that", file=sys.stderr)


def settings_of(args) -> dict:
    """The settings that decide the result, as they can be read back with --config."""
    leave_out = {"config", "resume", "restart", "run_dir", "log_dir", "out", "lineage", "max_minutes", "print_config"}
    return {
        key: value
        for key, value in vars(args).items()
        if key not in leave_out and value is not None and not key.startswith("__")
    }


def differences(old: dict, new: dict) -> str:
    """What differs between a run's identity and the one asked for, in words; single settings with both values."""
    words = []
    for key, after in new.items():
        if key == "settings":
            before = old.get(key, {})
            names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            words += [f"{name} {before.get(name)} instead of {after.get(name)}" for name in names]
        elif old.get(key) != after:
            found, wanted = (str(value)[:12] for value in (old.get(key), after))
            words.append(f"another {key} ({found} instead of {wanted})")
    return ", ".join(words)


def run_to_open(args) -> tuple[Path, Path | None]:
    """The run directory that is asked for, and a save in it to continue from (None: the newest)."""
    if isinstance(args.resume, str):
        path = Path(args.resume)
        if not path.exists():
            raise BadRequest(f"--resume {path}: there is no such run or save")
        found, save = (path, None) if path.is_dir() else (path.parent.parent, path)
        if save is not None and save.parent.name != "checkpoints":
            raise BadRequest(f"--resume {path}: expected a run directory, or a save in the checkpoints/ of one")
        if args.run_dir is not None and Path(args.run_dir).resolve() != found.resolve():
            raise BadRequest(f"--resume {path} is not in --run-dir {args.run_dir}; leave one of the two out")
        return found, save
    if args.run_dir is not None:
        return Path(args.run_dir), None
    return (newest_version if args.resume else next_version)(args.log_dir), None


def open_run(args, run: RunDirectory, identity: dict) -> str | None:
    """Lock the run directory; why what it holds is not this run's, or None if it is, or is empty."""
    run.lock()
    if args.out is not None:
        run.lock_target(args.out)
    state = run.state()
    if state is not None and (args.restart or state["identity"] != identity):
        before = state["identity"]
        reason = "--restart" if args.restart else differences(before, identity)
        if args.resume:
            raise BadRequest(f"{run.path} was started with {reason}; leave --resume out to start afresh")
        if not args.restart and before | {"devices": identity["devices"]} == identity:
            if run.finished_checkpoint() is not None:
                return None  # whatever it was trained on, it is what was asked for
            if run.last.exists():
                raise BadRequest(
                    f"{run.path} was begun on {before['devices']} and cannot go on with {identity['devices']}: it would not be "
                    f"the same run. Give it {before['devices']} again (`--resources gpu=N` may have clipped them), or start "
                    f"afresh with --restart, or, under Snakemake, by `rm -r {run.path}`"
                )
        return reason
    if state is None and args.resume:
        print(f"nothing to resume in {run.path}: starting from step 0", file=sys.stderr, flush=True)
    return None


def plan_of(args):
    """(plan, identity) of what the arguments ask for, checked against dataset and parent."""
    from cxt.fit import Plan

    if args.model not in PRESETS:
        raise BadRequest(f"unknown model '{args.model}'{nearest(args.model, PRESETS)}")
    training = TrainingConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainingConfig)})
    args.precision = training.precision
    check_source(args)
    accelerator, devices = choose_devices(args)
    if training.attention == "flex" and accelerator == "cpu":
        raise BadRequest("attention flex trains on GPUs only: FlexAttention has no gradients on a CPU; leave it at split")
    world = args.nodes * (len(devices) if isinstance(devices, list) else devices)
    if args.simulate is None:
        simulated, manifest = None, read_manifest(args.dataset_path)
        data_digest = file_sha256(Path(args.dataset_path) / MANIFEST)
    else:
        training = dataclasses.replace(training, epochs=1, validate_every=training.validate_every or -(-args.max_steps // 10))
        simulated, manifest = live_source(args, training, world=world)
        data_digest = stage_lineage("preprocess", STAGE_VERSION["simulate"], simulated, manifest)
    parent_file, parent = read_parent(args)
    inherit(args, parent)
    network, adapter = resolve_network(args, manifest, parent)
    items = manifest["splits"]["train"]["items"]
    steps_per_epoch(items=items, batch_size=training.batch_size, grad_accum=training.grad_accum, world=world)
    if not manifest["splits"]["test"]["items"] and (training.patience or training.export == "best"):
        asks = "patience" if training.patience else "export: best"
        raise BadRequest(f"{asks} needs validation, but the dataset has no test items")
    settings = settings_of(args)
    leave_out = {*NOT_IN_IDENTITY, *change_no_result(settings)}
    identity = {
        "settings": {key: value for key, value in settings.items() if key not in leave_out},
        # On several nodes a GPU's sums may be made in another order.
        "devices": f"{world} {accelerator}" + (f" on {args.nodes} nodes" if args.nodes > 1 else ""),
        "lineage": args.lineage,
        "dataset": data_digest,
        "parent": None if parent_file is None else file_sha256(parent_file),
    }
    plan = Plan(
        name=args.name or args.model,
        preset=args.model,
        dataset_path=args.dataset_path,
        manifest=manifest,
        dataset_sha256=data_digest,
        simulated=simulated,
        network=network,
        adapter=adapter,
        training=training,
        parent=parent,
        parent_file=None if parent_file is None else str(parent_file),
        parent_sha256=identity["parent"],
        resumes_adapter=args.resume_adapter is not None,
        accelerator=accelerator,
        devices=devices,
        nodes=args.nodes,
        lineage=args.lineage,
        max_steps=args.max_steps,
    )
    return plan, identity


def train_model(config=None, **settings) -> Path:
    """Train as `python -m cxt.train` does, and return the run directory.

    Parameters
    ----------
    config : YAML file of settings, such as the config.yaml of a run directory
    settings : flags with underscores, over those of the file: ``dataset_path="data", epochs=2, gpus=[0, 1], adapter=True``

    Raises
    ------
    BadRequest
        If what is asked for cannot be done.
    Failed
        If the run was begun and could not be finished.
    """
    parser = build_parser(exit_on_error=False)
    words = [] if config is None else ["--config", str(config)]
    for key, value in settings.items():
        if value is not None:
            words.append("--" + key.replace("_", "-"))
            words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    check_config_keys(words, parser)
    try:
        args = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        raise BadRequest(str(error)) from None
    return train(args, began=time.monotonic())


def train(args, *, began: float) -> Path:
    """One run, from parsed arguments to a published checkpoint; its directory. --max-minutes count from *began*."""
    if "LOCAL_RANK" in os.environ and RUN_DIRECTORY_OF_RANK_0 not in os.environ:
        raise BadRequest(
            "LOCAL_RANK is set, as by torchrun; start one process on each node without it: that one starts those of the other "
            "devices (--devices N or --gpus)"
        )
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return train_beside(args, began=began)
    with Nodes(args.nodes) as nodes:
        return train_on_node(args, nodes, began=began)


def deadline_of(args, began: float) -> float | None:
    """When --max-minutes are over, in `time.monotonic`."""
    return None if args.max_minutes is None else began + 60 * args.max_minutes


def train_beside(args, *, began: float) -> Path:
    """The same in a process that another one of this node has started for one of its devices."""
    from cxt.fit import data_of, fit

    plan, _ = plan_of(args)
    plan = dataclasses.replace(plan, deadline=deadline_of(args, began))
    run = RunDirectory(os.environ[RUN_DIRECTORY_OF_RANK_0])
    fit(plan, run, data_of(plan))
    return run.path


def train_on_node(args, nodes: Nodes, *, began: float) -> Path:
    """The same in the first process of a node; that of the first node decides and writes."""
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise BadRequest(f"--max-minutes {args.max_minutes:g}: expected above 0")
    if args.out is not None:
        check_writable(args.out)
    plan, identity = plan_of(args)
    for node, theirs in enumerate(nodes.gather(identity), start=1):
        if theirs != identity:
            raise BadRequest(f"node {node} was started with {differences(theirs, identity)}, as on node 0; they must be alike")
    if nodes.rank == 0:
        path, save = run_to_open(args)
        nodes.share(str(path.absolute()))
    else:
        path, save = Path(nodes.share()), None
    run = RunDirectory(path)
    os.environ[RUN_DIRECTORY_OF_RANK_0] = str(path)
    try:
        stale = open_run(args, run, identity) if nodes.rank == 0 else None
        is_finished = nodes.share(stale is None and run.finished_checkpoint() is not None)
        if not is_finished:
            plan = dataclasses.replace(plan, deadline=deadline_of(args, began), wanted_save=save)
            run_plan(plan, run, nodes, identity=identity, settings=settings_of(args), stale=stale)
        elif save is not None:
            raise BadRequest(f"--resume {save}: {run.path} is finished; leave the save out, or start afresh with --restart")
        elif nodes.rank == 0:
            print(f"{run.path} is finished: publishing its checkpoint again", flush=True)
        if nodes.rank == 0:
            print(f"finished: {run.finished_checkpoint()}", flush=True)
            if args.out is not None:
                run.publish(args.out)
                print(f"published: {args.out}", flush=True)
        nodes.share()  # the others end when it is published
    finally:
        run.release()
    return run.path


def run_plan(plan, run: RunDirectory, nodes: Nodes, *, identity: dict, settings: dict, stale: str | None) -> None:
    """Read the data, set what is *stale* aside when all nodes have read theirs, and train."""
    from cxt.fit import data_of, fit

    try:
        data = data_of(plan)
        nodes.gather("read")
    except (BadRequest, Failed):
        if nodes.rank == 0:
            run.discard_if_empty()
        raise
    if stale is not None:
        print(f"starting afresh ({stale}); the old run is kept as {run.supersede()}", flush=True)
    fit(plan, run, data, nodes=nodes, identity=identity, settings=settings)


def print_settings(args) -> None:
    """All settings, as a file for --config; sizes that no flag gives are the preset's."""
    import yaml

    if args.model not in PRESETS:
        raise BadRequest(f"unknown model '{args.model}'{nearest(args.model, PRESETS)}")
    inherit(args, read_parent(args)[1])
    settings = settings_of(args)
    for key in OF_THE_NETWORK:
        settings.setdefault(key, getattr(PRESETS[args.model], key))
    settings["precision"] = TrainingConfig(precision=args.precision).precision
    print(yaml.safe_dump(settings, sort_keys=True), end="")


def main() -> None:
    parser = build_parser()
    check_config_keys(sys.argv[1:], parser)
    args = parser.parse_args()
    if args.print_config:
        print_settings(args)
    else:
        train(args, began=BEGAN)


if __name__ == "__main__":
    exit_on_bad_request(main)
