"""What the simulate stage costs beside the coalescent itself, in CPU seconds.

    python benchmarks/simulate_overhead.py [CONFIGFILE …]

Runs every simulation job of a configuration (default: the laptop's) under Snakemake, in a temporary directory, and
compares the CPU time of Snakemake and all its jobs with a bare loop, in one process, over the very calls of
msprime.sim_ancestry and msprime.sim_mutations that those jobs make; that process's import of msprime is counted once.
One job at a time, since two that share a processor's caches cost each other time that has nothing to do with the stage.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import_began = time.process_time()
import msprime  # noqa: E402

IMPORT_SECONDS = time.process_time() - import_began

from cxt.configfile import load  # noqa: E402
from cxt.jobs import evaluation_batches, leaf_of, leaves_of  # noqa: E402
from cxt.kinds import simulate_one  # noqa: E402
from cxt.scenarios import batches  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


def jobs_of(config: dict) -> list[tuple[dict, int, int]]:
    """(spec, start, count) of every simulation job that the checkpoints and their evaluation need."""
    used = {name for dataset in config["datasets"].values() for name in dataset["scenarios"]}
    planned = {
        (leaf.name, start): (leaf.spec, start, count)
        for leaf in leaves_of(config, sorted(used))
        for start, count in batches(simulations=leaf.simulations, batch=leaf.batch)
    }
    for model in config["models"]:
        for batch in evaluation_batches(config, model):
            leaf = leaf_of(config, batch["scenario"])
            planned[leaf.name, batch["start"]] = (leaf.spec, batch["start"], batch["count"])
    return list(planned.values())


def bare_seconds(spec: dict, start: int, count: int, seed: int) -> float:
    """CPU seconds of the msprime calls of one job, recorded first and then repeated one after another."""
    calls = []
    originals = {name: getattr(msprime, name) for name in ("sim_ancestry", "sim_mutations")}

    def recorder(name):
        def record(*args, **kwargs):
            calls.append((name, args, kwargs))
            return originals[name](*args, **kwargs)

        return record

    spent = 0.0
    for index in range(start, start + count):
        calls.clear()
        for name in originals:
            setattr(msprime, name, recorder(name))
        try:
            simulate_one(spec, index=index, seed=seed)
        finally:
            for name, original in originals.items():
                setattr(msprime, name, original)
        began = time.process_time()
        for name, args, kwargs in calls:
            originals[name](*args, **kwargs)
        spent += time.process_time() - began
    return spent


def main() -> None:
    config = load(sys.argv[1:])
    jobs = jobs_of(config)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", directory]
        command += ["--cores", "1", "--quiet", "all", "--until", "simulate"]
        if sys.argv[1:]:
            command += ["--configfile", *(str(Path(path).resolve()) for path in sys.argv[1:])]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        made = len(list(Path(directory).glob("results/simulations/*/*.trees.batch")))
    if made != len(jobs):
        raise SystemExit(f"Snakemake made {made} batches, expected {len(jobs)}")
    staged = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    bare = IMPORT_SECONDS + sum(bare_seconds(spec, start, count, config["seed"]) for spec, start, count in jobs)
    simulations = sum(count for _, _, count in jobs)
    print(f"{simulations} simulations in {len(jobs)} jobs")
    print(f"bare loop {bare:.1f} s CPU, simulate stage under Snakemake {staged:.1f} s CPU: {staged / bare - 1:+.1%}")


if __name__ == "__main__":
    main()
