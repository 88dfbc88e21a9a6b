"""Stage 3: train one checkpoint.

    python -m cxt.train --model broad --dataset-path results/datasets/processed --epochs 2

Three verbs: `--checkpoint X` starts a new run from X's weights, `--resume-adapter X` from X's backbone and adapter
weights, `--resume` continues this very run. Without one, training starts from random weights.
"""

from cxt.signals import end_at_once, ends_at_once, follow, ignore, last_words

if __name__ == "__main__":  # before the other imports, which take a second
    end_at_once()

import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path

import jsonargparse

from cxt.checkpoints.run_directory import RunDirectory, has_versions, newest_version, next_version, target_lock
from cxt.config.bounds import note_more_than_cores
from cxt.config.settings import (
    PRESETS,
    TrainingConfig,
    change_no_result,
    steps_per_epoch,
)
from cxt.console import exit_on_bad_request, progress_only
from cxt.data.manifest import read_manifest
from cxt.data.shards import MANIFEST
from cxt.errors import BadRequest, Failed, suggest_nearest
from cxt.io import check_writable, file_sha256, is_locked
from cxt.lineage import STAGE_VERSION, describe_difference, how_to_replan, stage_lineage
from cxt.trainer.flags import build_parser, parse_flags
from cxt.trainer.machines import Machines
from cxt.trainer.parents import (
    OF_THE_ADAPTER,
    OF_THE_NETWORK,
    check_adapter_flags,
    has_adapter,
    inherit,
    read_parent,
    resolve_network,
)
from cxt.trainer.source import check_source, live_source

BEGAN = time.monotonic()
"""When this process began, near enough."""

RUN_DIRECTORY_OF_RANK_0 = "CXT_RUN_DIRECTORY"
OF_THE_WORKFLOW = ("lineage", "settings_lineage", "dataset_lineage", "parent_lineage", "wait_for_lock")
"""Flags by which the workflow says what it planned, and how to start: they are no settings of a run."""

NOT_IN_IDENTITY = ("dataset_path", "configfile", "checkpoint", "resume_adapter", "gpus", "devices", "nodes", "accelerator")
"""Settings that a run's identity holds in another form: files by digest, devices by number."""


def choose_devices(args) -> tuple[str, int | list[int]]:
    """(accelerator, devices) for Lightning; BadRequest for GPUs that are not there."""
    import torch

    present = torch.cuda.device_count()
    if args.gpus is not None and args.devices is not None:
        raise BadRequest("--gpus and --devices exclude each other")
    if args.gpus is not None and len(set(args.gpus)) < len(args.gpus):
        raise BadRequest(f"--gpus {' '.join(map(str, args.gpus))}: one is named twice")
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
        raise BadRequest(f"{flag}, but {has}; {fewer_devices(args, present)}")
    return "gpu", wanted


def fewer_devices(args, present: int) -> str:
    """What to ask for where only *present* GPUs are: the same effective batch, where it can be divided so."""
    wanted = len(args.gpus) if args.gpus is not None else args.devices
    if wanted <= present:
        return f"their indices are 0 to {present - 1}"
    accumulation = args.grad_accum * wanted / max(1, present)
    keep = f" with --grad-accum {accumulation:g}, which keeps the effective batch" if accumulation.is_integer() else ""
    return (
        f"use --devices {present}{keep}{'' if present else ', to train on the CPU'}; in the workflow these are `devices` and "
        "`grad_accum` of `training:`"
    )


def check_lineages(args, manifest: dict, parent) -> None:
    """BadRequest if settings, dataset or parent are not those that the workflow has planned the run with."""
    if args.simulate is not None and (args.dataset_lineage is not None or args.settings_lineage is not None):
        raise BadRequest(
            "--dataset-lineage and --settings-lineage have no meaning with --simulate, which the workflow never plans"
        )
    looked_at = [(f"the settings of {args.name or args.model}", args.settings_lineage, args.settings_lineage and args.lineage)]
    looked_at.append((f"dataset {args.dataset_path}", manifest.get("lineage"), args.dataset_lineage))
    source = args.checkpoint or args.resume_adapter
    if args.parent_lineage is not None:
        if parent is None:
            raise BadRequest("--parent-lineage needs --checkpoint or --resume-adapter")
        looked_at.append((f"parent {source}", parent.record.get("lineage"), args.parent_lineage))
    wrong = [(what, found, planned) for what, found, planned in looked_at if planned is not None and found != planned]
    if wrong:
        said = "; ".join(f"{what}: {describe_difference(found, planned)}" for what, found, planned in wrong)
        target = args.out or args.dataset_path or source
        raise BadRequest(f"not what was planned to train on: {said}; {how_to_replan(target)}")


def settings_of(args) -> dict:
    """The settings that decide the result, as they can be read back with --config."""
    leave_out = {"config", "resume", "restart", "run_dir", "log_dir", "out", "max_minutes", "print_config", *OF_THE_WORKFLOW}
    if not has_adapter(args):
        leave_out |= OF_THE_ADAPTER.keys()
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
    """The run directory that is asked for, and a training state in it to continue from (None: the newest)."""
    if args.resume == "latest" and args.run_dir is not None and RunDirectory(args.run_dir).state() is None:
        raise BadRequest(f"nothing to resume: there is no run in {args.run_dir}; leave --resume out to start one")
    if args.resume == "auto" and args.run_dir is None:
        return (newest_version if has_versions(args.log_dir) else next_version)(args.log_dir), None
    if isinstance(args.resume, str) and args.resume not in ("latest", "auto"):
        path = Path(args.resume)
        if not path.exists():
            raise BadRequest(f"--resume {path}: there is no such run or training state")
        found, save = (path, None) if path.is_dir() else (path.parent.parent, path)
        if save is not None and save.parent.name != "checkpoints":
            raise BadRequest(f"--resume {path}: expected a run directory, or a training state in the checkpoints/ of one")
        if args.run_dir is not None and Path(args.run_dir).resolve() != found.resolve():
            raise BadRequest(f"--resume {path} is not in --run-dir {args.run_dir}; leave one of the two out")
        return found, save
    if args.run_dir is not None:
        return Path(args.run_dir), None
    return (newest_version if args.resume else next_version)(args.log_dir), None


def wait_for_lock(path: Path, *, until: float) -> None:
    """Wait while another process has the lock file *path*, at most *until* then (of `time.monotonic`).

    A job that was cancelled, or whose time was up, may still be saving when its next try begins.
    """
    if time.monotonic() < until and is_locked(path):
        print(f"another trainer has {path}: waiting for it, {until - time.monotonic():.0f} s at most", flush=True)
        while time.monotonic() < until and is_locked(path):
            time.sleep(min(1.0, max(0.0, until - time.monotonic())))


def open_run(args, run: RunDirectory, identity: dict) -> str | None:
    """Lock the run directory; why what it holds is not this run's, or None if it is, or is empty."""
    until = time.monotonic() + 60 * args.wait_for_lock
    wait_for_lock(run.lock_path, until=until)
    run.lock()
    if args.out is not None:
        wait_for_lock(target_lock(args.out), until=until)
        run.lock_target(args.out)
    state = run.state()
    if state is not None and (args.restart or state["identity"] != identity):
        before = state["identity"]
        reason = "--restart" if args.restart else differences(before, identity)
        if args.resume:
            raise BadRequest(f"{run.path} was started with {reason}; leave --resume out to start afresh")
        is_on_others = before | {"devices": identity["devices"]} == identity
        if not args.restart and is_on_others and run.last.exists() and run.finished_checkpoint() is None:
            raise BadRequest(
                f"{run.path} was begun on {before['devices']} and cannot go on with {identity['devices']}: it would not be "
                f"the same run. Give it {before['devices']} again, or start afresh with --restart, or, under Snakemake, by "
                f"`rm -r {run.path}`"
            )
        return reason
    if state is None and args.resume:
        print(f"nothing to resume in {run.path}: starting from step 0", file=sys.stderr, flush=True)
    return None


def plan_of(args):
    """(plan, identity) of what the arguments ask for, checked against dataset and parent."""
    from cxt.trainer.fit import Plan

    if args.model not in PRESETS:
        raise BadRequest(f"unknown model '{args.model}'{suggest_nearest(args.model, PRESETS)}")
    training = TrainingConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainingConfig)})
    args.precision = training.precision
    check_source(args)
    check_adapter_flags(args)
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
    check_lineages(args, manifest, parent)
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
        # On several machines a GPU's sums may be made in another order. "nodes" is what earlier runs have recorded.
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
        machines=args.nodes,
        lineage=args.lineage,
        max_steps=args.max_steps,
    )
    note_what_does_nothing(plan)
    return plan, identity


def note_what_does_nothing(plan) -> None:
    """Say on stderr, once for all processes of a machine, which settings ask for what this run cannot or will not do."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    training, words = plan.training, []
    if plan.simulated is None and plan.max_steps is not None and plan.max_steps > plan.all_steps:
        epochs = f"{training.epochs} epoch{'' if training.epochs == 1 else 's'}"
        words.append(
            f"--max-steps {plan.max_steps} only shortens a run, and {epochs} are {plan.all_steps} steps; raise --epochs"
        )
    items = plan.manifest["splits"]["test"]["items"]
    asked = {"validation_items": training.validation_items, "decode_items": training.decode_items}
    for name, number in asked.items():
        if number > items and number != getattr(TrainingConfig, name):
            words.append(f"{name} {number}, but there are {items} test items: all are taken")
    if training.min_delta and not training.patience:
        words.append(f"min_delta {training.min_delta:g} has no meaning without patience")
    for text in words:
        print(f"note: {text}", file=sys.stderr, flush=True)
    cpus = plan.devices if plan.accelerator == "cpu" and isinstance(plan.devices, int) else 1
    note_more_than_cores(threads=training.threads, workers=training.workers, processes=cpus)


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
    try:
        args = parse_flags(words, parser)
    except jsonargparse.ArgumentError as error:
        raise BadRequest(str(error)) from None
    return train(args, began=time.monotonic())


def train(args, *, began: float) -> Path:
    """One run, from parsed arguments to a published checkpoint; its directory. --max-minutes count from *began*."""
    if "LOCAL_RANK" in os.environ and RUN_DIRECTORY_OF_RANK_0 not in os.environ:
        raise BadRequest(
            "LOCAL_RANK is set, as by torchrun; start one process on each machine without it: that one starts those of the "
            "other devices (--devices N or --gpus)"
        )
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return train_beside(args, began=began)
    with Machines(args.nodes, directory=meeting_place(args)) as machines:
        return train_on_machine(args, machines, began=began)


def meeting_place(args) -> Path:
    """A directory that all machines see before the first one has said which run it is."""
    run = args.run_dir or (args.resume if isinstance(args.resume, str) else None)
    return Path(args.log_dir) if run is None else Path(run).absolute().parent


def deadline_of(args, began: float) -> float | None:
    """When --max-minutes are over, in `time.monotonic`."""
    return None if args.max_minutes is None else began + 60 * args.max_minutes


def train_beside(args, *, began: float) -> Path:
    """The same in a process that another one of this machine has started for one of its devices."""
    follow()
    from cxt.trainer.fit import build_data, fit

    plan, _ = plan_of(args)
    plan = dataclasses.replace(plan, deadline=deadline_of(args, began))
    run = RunDirectory(os.environ[RUN_DIRECTORY_OF_RANK_0])
    fit(plan, run, build_data(plan))
    return run.path


def train_on_machine(args, machines: Machines, *, began: float) -> Path:
    """The same in the first process of a machine; that of the first machine decides and writes."""
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise BadRequest(f"--max-minutes {args.max_minutes:g}: expected above 0")
    if not args.wait_for_lock >= 0:
        raise BadRequest(f"--wait-for-lock {args.wait_for_lock:g}: expected at least 0")
    if args.out is not None:
        check_writable(args.out)
    plan, identity = plan_of(args)
    for number, theirs in enumerate(machines.gather(identity), start=1):
        if theirs != identity:
            raise BadRequest(
                f"machine {number} was started with {differences(theirs, identity)}, as on machine 0; they must be alike"
            )
    if machines.rank == 0:
        path, save = run_to_open(args)
        machines.share(str(path.absolute()))
    else:
        path, save = Path(machines.share()), None
    run = RunDirectory(path)
    os.environ[RUN_DIRECTORY_OF_RANK_0] = str(path)
    with let_go_at_the_end(run):
        stale = open_run(args, run, identity) if machines.rank == 0 else None
        is_finished = machines.share(stale is None and run.finished_checkpoint() is not None)
        if not is_finished:
            plan = dataclasses.replace(plan, deadline=deadline_of(args, began), wanted_save=save)
            run_plan(plan, run, machines, identity=identity, settings=settings_of(args), stale=stale)
        elif save is not None:
            raise BadRequest(
                f"--resume {save}: {run.path} is finished; leave the training state out, or start afresh with --restart"
            )
        elif machines.rank == 0:
            print(f"{run.path} is finished: publishing its checkpoint again", flush=True)
        if machines.rank == 0:
            print(f"finished: {run.finished_checkpoint()}", flush=True)
            if args.out is not None:
                run.publish(args.out)
                print(f"published: {args.out}", flush=True)
        machines.share()  # the others end when it is published
    return run.path


@contextlib.contextmanager
def let_go_at_the_end(run: RunDirectory):
    """Release *run* at the end of a `with` block, also if a signal is the end of it."""
    try:
        with last_words(lambda text, status: run.abandon()):
            yield
    finally:
        run.release()


def run_plan(plan, run: RunDirectory, machines: Machines, *, identity: dict, settings: dict, stale: str | None) -> None:
    """Read the data, set what is *stale* aside when all machines have read theirs, and train."""
    from cxt.trainer.fit import build_data, fit

    try:
        data = build_data(plan)
        machines.gather("read")
    except (BadRequest, Failed):
        if machines.rank == 0:
            run.discard_if_empty()
        raise
    if stale is not None:
        print(f"starting afresh ({stale}); the old run is kept as {run.supersede()}", flush=True)
    fit(plan, run, data, machines=machines, identity=identity, settings=settings)


def print_settings(args) -> None:
    """All settings, as a file for --config; sizes that no flag gives are the preset's."""
    import yaml

    if args.model not in PRESETS:
        raise BadRequest(f"unknown model '{args.model}'{suggest_nearest(args.model, PRESETS)}")
    check_adapter_flags(args)
    inherit(args, read_parent(args)[1])
    settings = settings_of(args)
    for key in OF_THE_NETWORK:
        settings.setdefault(key, getattr(PRESETS[args.model], key))
    settings["precision"] = TrainingConfig(precision=args.precision).precision
    print(yaml.safe_dump(settings, sort_keys=True), end="")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parse_flags(sys.argv[1:] if argv is None else argv, parser)
    if args.print_config:
        print_settings(args)
    else:
        with progress_only():
            train(args, began=BEGAN)
    if ends_at_once():
        ignore()  # it is done, whatever comes now


if __name__ == "__main__":
    exit_on_bad_request(main)
