"""Stage 1: run one simulation batch, which writes tree sequences one after another into one file.

    python -m cxt.simulate --config constant.yaml --start 0 --count 100 --out constant-0.trees.batch
    python -m cxt.simulate --scenario constant --count 10 --out constant-0.trees.batch

`tskit.load(path)` would return only the first; `read_batch` reads them all and checks that none is missing, and
`cxt trees` extracts one.
"""

import argparse
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from cxt.config.demes import read_demes
from cxt.config.flags import add_config_flag, insert_config
from cxt.config.scenarios import complete_parameters
from cxt.config.tree_files import PLANNED, fill_tree_files
from cxt.config.variants import list_variants
from cxt.console import ON_STDERR, add_verbosity_flags, exit_on_bad_request, get_logger, set_verbosity
from cxt.errors import BadRequest, Failed, suggest_nearest
from cxt.io import check_writable, remove_abandoned_files
from cxt.lineage import check_planned, derive_batch_lineage
from cxt.random_seeds import check_seed
from cxt.scenarios.batches import how_to_reproduce, write_batch
from cxt.scenarios.genetic_maps import catalogue_versions
from cxt.scenarios.registry import SIMULATORS, check_variant, identify_simulations
from cxt.scenarios.stdpopsim_catalogue import describe_other_recombination
from cxt.signals import STATUS, block_signals, end_with_parent, ignore, listen

logger = get_logger(__name__)


def _read_variant(args) -> dict:
    if args.spec is not None:
        try:
            spec = json.loads(args.spec)
        except json.JSONDecodeError as error:
            raise BadRequest(f"--spec is not valid JSON: {error}") from None
        texts = [spec.get(key) for key in ("name", "kind")] if isinstance(spec, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or spec["kind"] not in SIMULATORS:
            raise BadRequest(f"--spec must be a variant with a name and a kind, one of {', '.join(SIMULATORS)}")
        parameters = {key: value for key, value in spec.items() if key != "name"}
        # Digests and lengths of files that the workflow has planned with; the digests are checked when the files are read.
        planned = {key: parameters.pop(key) for key in PLANNED if spec["kind"] == "trees" and key in parameters}
        completed = complete_parameters(spec["kind"], parameters, at="--spec")
        if completed["kind"] == "demes":
            completed["demography"] = read_demes(completed["demography"], at="--spec")
        if completed["kind"] == "trees" and not planned:
            fill_tree_files(completed, at="--spec")
        completed |= planned
        (variant, *others) = list_variants(spec["name"], completed | {"simulations": 1, "batch": 10})
        if others or variant.name != spec["name"]:
            raise BadRequest("--spec must be one variant, not a sweep: it has a list of values")
        return variant.spec
    from cxt.checkpoints.parents import read_parent_file
    from cxt.config.file import load  # not needed by the workflow's jobs, which pass --spec

    config = load(args.configfile, read_parent=read_parent_file)
    unswept = {
        variant.name: variant for name, scenario in config["scenarios"].items() for variant in list_variants(name, scenario)
    }
    if args.scenario in config["scenarios"] and args.scenario not in unswept:
        swept = [variant.name for variant in list_variants(args.scenario, config["scenarios"][args.scenario])]
        raise BadRequest(f"scenario '{args.scenario}' is a sweep; choose one of its variants: {', '.join(swept)}")
    if args.scenario not in unswept:
        raise BadRequest(f"unknown scenario '{args.scenario}'{suggest_nearest(args.scenario, unswept)}")
    if args.seed is None:
        args.seed = config["seed"]
    return unswept[args.scenario].spec


def main(argv: list[str] | None = None) -> None:
    """Run `cxt simulate`: run one simulation batch.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m cxt.simulate", description="Run one simulation batch.")
    add_config_flag(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--spec", help="variant as JSON")
    what.add_argument("--scenario", help="variant by name, looked up in the configuration")
    parser.add_argument("--configfile", nargs="+", default=[], help="overlays on the default configuration, for --scenario")
    parser.add_argument("--start", type=int, default=0, help="first index (default 0)")
    parser.add_argument("--count", type=int, required=True, help="number of simulations")
    parser.add_argument("--seed", type=int, help="seed of the workflow (default: the configuration's; 1 with --spec)")
    parser.add_argument("--lineage", help="planned lineage of the simulation batch, stored in it")
    parser.add_argument("--out", type=Path, required=True, help="file to write, FILE.trees.batch")
    add_verbosity_flags(parser)
    args = parser.parse_args(insert_config(sys.argv[1:] if argv is None else argv, parser))
    set_verbosity(args)
    if args.start < 0:
        raise BadRequest(f"--start must not be negative, got {args.start}")
    if args.count < 1:
        raise BadRequest(f"--count must be positive, got {args.count}")
    spec = _read_variant(args)
    seed = 1 if args.seed is None else args.seed
    if args.start + args.count > 2_000_000_000:
        raise BadRequest(f"--start {args.start} --count {args.count}: indices must be below 2000000000")
    check_seed(seed, name="--seed")
    check_variant(spec)
    if spec["kind"] == "stdpopsim" and (difference := describe_other_recombination(spec)):
        logger.warning(f"cxt: {difference}")
    check_writable(args.out)
    if args.lineage is not None:
        catalogue = catalogue_versions(spec)
        identity = identify_simulations(spec, start=args.start, count=args.count)
        computed = derive_batch_lineage(identity, seed=seed, start=args.start, count=args.count, catalogue=catalogue)
        check_planned(computed, args.lineage, target=args.out)
    _simulate_in_child(args.out, spec, start=args.start, count=args.count, seed=seed, lineage=args.lineage)


def _simulate_in_child(out: Path, spec: dict, *, start: int, count: int, seed: int, lineage: str | None) -> None:
    """Run `write_batch` in a child process, so that even a sudden death (out of memory, a crash) can be reported."""
    context = multiprocessing.get_context("fork")  # no threads are running yet
    receiver, sender = context.Pipe(duplex=False)

    parent = os.getpid()

    def work() -> None:
        receiver.close()
        ignore()  # only the parent reports a signal that is sent to both
        end_with_parent(parent)
        # Without a reader, the next send ends this process: no batch is written after the parent has died.
        batch = {"start": start, "count": count, "seed": seed, "lineage": lineage}
        exit_on_bad_request(lambda: write_batch(out, spec, **batch, progress=sender.send))

    child = context.Process(target=work)

    def stop(number, frame) -> None:
        ignore()
        if child.pid is not None:
            child.kill()
            child.join()
        remove_abandoned_files(out)
        raise Failed(f"{spec['name']}: stopped by {signal.Signals(number).name}; nothing was written", status=STATUS[number])

    listen(stop)
    gc.freeze()  # otherwise the child's first garbage collection would copy every page of shared memory
    with block_signals():  # the child ignores signals from its start
        child.start()
    sender.close()
    started = last_report = time.monotonic()
    index = start
    while True:
        try:
            index = receiver.recv()
        except EOFError:
            break
        if time.monotonic() - last_report > 10:
            last_report = time.monotonic()
            logger.info(f"{spec['name']}: {index - start}/{count} simulations, {last_report - started:.0f} s", extra=ON_STDERR)
    child.join()
    if child.exitcode < 0:
        name = signal.Signals(-child.exitcode).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        logger.error(
            f"cxt: the simulation process was killed by {name}{hint}.\n{how_to_reproduce(spec, index=index, seed=seed)}"
        )
        sys.exit(1)
    if child.exitcode:
        sys.exit(child.exitcode)
    logger.info(f"{spec['name']}: {count}/{count} simulations, {time.monotonic() - started:.0f} s", extra=ON_STDERR)


if __name__ == "__main__":
    exit_on_bad_request(main)
