"""What the simulate stage costs beside the coalescent itself, in CPU seconds.

    python benchmarks/simulate_overhead.py [--repeats 3] [CONFIGFILE …]

Runs every simulation job of a configuration (default: the laptop's) under Snakemake, in a temporary directory, and beside
it, at the same time on another core, a bare loop in one process over the very calls of msprime.sim_ancestry and
msprime.sim_mutations that those jobs make. Compares the CPU time of Snakemake and all its jobs with that of the loop, to
which its import of msprime is added. At the same time, because minutes later the machine may be another, and jobs one at
a time, so that both sides have a core and the same neighbour.
"""

import argparse
import gc
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import_began = time.process_time()
import msprime  # noqa: E402

IMPORT_SECONDS = time.process_time() - import_began

from cxt.config.file import load  # noqa: E402
from cxt.scenarios.indices import simulation_batches  # noqa: E402
from cxt.scenarios.registry import simulate_tree_sequence  # noqa: E402
from cxt.workflow.jobs import collect_variants, find_variant  # noqa: E402
from cxt.workflow.lineages import evaluation_batches  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = ("sim_ancestry", "sim_mutations")


def jobs_of(config: dict) -> list[tuple[dict, int, int]]:
    """(spec, start, count) of every simulation job that the checkpoints and their evaluation need."""
    used = {name for dataset in config["datasets"].values() for name in dataset["scenarios"]}
    planned = {
        (variant.name, start): (variant.spec, start, count)
        for variant in collect_variants(config, sorted(used))
        for start, count in simulation_batches(simulations=variant.simulations, batch=variant.batch)
    }
    for model in config["models"]:
        for batch in evaluation_batches(config, model):
            variant = find_variant(config, batch["scenario"])
            planned[variant.name, batch["start"]] = (variant.spec, batch["start"], batch["count"])
    return list(planned.values())


def recorded(jobs: list, *, seed: int) -> list[list]:
    """Of every simulation of *jobs* the calls: (name, arguments, keywords), but for the trees that one gives the next."""
    simulations, originals = [], {name: getattr(msprime, name) for name in STEPS}
    last = None

    def recorder(name):
        def record(*args, **kwargs):
            nonlocal last
            if name == "sim_mutations":
                if args[0] is not last:
                    raise SystemExit("sim_mutations was not given what sim_ancestry made: this benchmark cannot repeat it")
                simulations[-1].append((name, args[1:], kwargs))
            else:
                simulations[-1].append((name, args, kwargs))
            last = originals[name](*args, **kwargs)
            return last

        return record

    for name in STEPS:
        setattr(msprime, name, recorder(name))
    try:
        for spec, start, count in jobs:
            for index in range(start, start + count):
                simulations.append([])
                simulate_tree_sequence(spec, index=index, seed=seed)
    finally:
        for name, original in originals.items():
            setattr(msprime, name, original)
    return simulations


def bare(simulations: list[list], sender) -> None:
    """Repeat what was recorded, and send the CPU seconds it took."""
    began = time.process_time()
    for calls in simulations:
        ts = ()
        for name, args, kwargs in calls:
            ts = (getattr(msprime, name)(*ts, *args, **kwargs),)
    sender.send(time.process_time() - began)


def staged(configfiles: list[str], *, jobs: int) -> float:
    """CPU seconds of the simulate stage under Snakemake, Snakemake's own included."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", directory]
        command += ["--cores", "1", "--quiet", "all", "--until", "simulate"]
        if configfiles:
            command += ["--configfile", *(str(Path(path).resolve()) for path in configfiles)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        made = len(list(Path(directory).glob("results/simulations/*/*.trees.batch")))
    if made != jobs:
        raise SystemExit(f"Snakemake made {made} batches, expected {jobs}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("configfiles", nargs="*", help="overlays over the default configuration")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    args = parser.parse_args()
    config = load(args.configfiles)
    jobs = jobs_of(config)
    print(f"{sum(count for _, _, count in jobs)} simulations in {len(jobs)} jobs; recording their calls", flush=True)
    simulations = recorded(jobs, seed=config["seed"])
    context = multiprocessing.get_context("fork")
    ratios = []
    for _ in range(args.repeats):
        receiver, sender = context.Pipe(duplex=False)
        gc.freeze()
        loop = context.Process(target=bare, args=(simulations, sender))
        loop.start()
        sender.close()
        stage = staged(args.configfiles, jobs=len(jobs))
        alone = IMPORT_SECONDS + receiver.recv()
        loop.join()
        ratios.append(stage / alone - 1)
        print(f"bare loop {alone:.1f} s CPU, simulate stage under Snakemake {stage:.1f} s CPU: {ratios[-1]:+.1%}", flush=True)
    print(f"median overhead {statistics.median(ratios):+.1%}")


if __name__ == "__main__":
    main()
