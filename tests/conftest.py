"""Shared fixtures: real msprime simulations, a tiny dataset, and a finished tiny workflow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msprime
import numpy as np
import pytest
from filelock import FileLock

from cxt.catalogue import genetic_map
from cxt.configfile import load
from cxt.jobs import leaves_of
from cxt.preprocess import write_split
from cxt.scenarios import leaves
from cxt.simulate import write_batch
from cxt.store import write_manifest
from cxt.targets import pair_log_tmrca

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"
TINY = REPOSITORY / "tests" / "tiny.yaml"


def run_python(*arguments, cwd=None, env=None, check=True) -> subprocess.CompletedProcess:
    """`python …` with the package on its path; fails the test on a non-zero status unless *check* is False."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "COLUMNS": "200"} | (env or {})
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return done


def simulate(*, seed, length=100_000, individuals=5, discrete=True, rate=2e-7, **kwargs):
    """A small tree sequence; with *discrete* sites and a high rate there are multi-allelic ones."""
    ts = msprime.sim_ancestry(
        individuals, population_size=1e4, sequence_length=length, recombination_rate=1e-8, random_seed=seed, **kwargs
    )
    return msprime.sim_mutations(ts, rate=rate, random_seed=seed, discrete_genome=discrete)


def check_genealogies(ts) -> None:
    """Fails, by an exception, where a tree has several roots or a sample is ancient."""
    pair_log_tmrca(ts, [(0, 1)], window_size=1000, sequence_length=int(ts.sequence_length))


def constant_scenario(**changes) -> dict:
    """A checked scenario entry of kind `constant`."""
    entry = {
        "kind": "constant", "simulations": 20, "batch": 20, "individuals": 10, "sequence_length": 20_000,
        "mutation_rate": 1.29e-8, "recombination_rate": 1.28e-8, "population_size": 20_000,
    }  # fmt: skip
    return entry | changes


def build_dataset(directory, *, scenario="constant", seed=1, mask=None, entry=None, **spec) -> Path:
    """A dataset of one scenario in *directory*, made by the functions that the stages call."""
    entry = entry or constant_scenario()
    spec = {"window_size": 1000, "sequence_length": 20_000, "samples": 20, "pairs": 6, "scales": [2, 4]} | spec
    leaf = leaves(scenario, entry)[0]
    batch = Path(directory) / "batch"
    write_batch(batch, leaf.spec, start=0, count=entry["simulations"], seed=seed)
    shards = {split: [f"{split}/{scenario}-0.zarr.zip"] for split in ("train", "test")}
    for split, names in shards.items():
        write_split(Path(directory) / names[0], batch, spec, start=0, count=entry["simulations"], split=split, mask=mask)
    write_manifest(directory, shards)
    return Path(directory)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """20 simulations of 20 windows, 20 samples, 6 pairs, 2 scales: 108 training and 12 test items."""
    return build_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def masked_dataset(tmp_path_factory) -> Path:
    """The same with an accessibility mask."""
    mask = np.random.default_rng(1).random(50_000) < 0.3
    return build_dataset(tmp_path_factory.mktemp("masked"), mask=mask)


@pytest.fixture(scope="session")
def dataset_n10(tmp_path_factory) -> Path:
    """The same simulations, their first ten haplotypes."""
    return build_dataset(tmp_path_factory.mktemp("n10"), samples=10)


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    """A dataset to damage."""
    return shutil.copytree(dataset, tmp_path / "copy")


def damage_shard(shard: Path, damage: str, *, other: Path) -> None:
    """Damage a shard: flip a bit, cut it, remove it, or put the one of the dataset *other* in its place."""
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        shard.unlink()
    else:
        shutil.copy(other / shard.parent.name / shard.name, shard)


def snakemake(*arguments, cwd, configfile=TINY, repository=REPOSITORY, check=True) -> subprocess.CompletedProcess:
    """Snakemake on the tiny configuration, with *cwd* as its working directory."""
    return run_python(
        "-m", "snakemake", "--snakefile", repository / "Snakefile", "--directory", cwd, "--cores", "2",
        "--rerun-incomplete", *arguments, "--configfile", configfile, cwd=cwd, check=check,
        env={"PYTHONPATH": str(repository / "src")},
    )  # fmt: skip


@pytest.fixture(scope="session")
def workflow(tmp_path_factory) -> Path:
    """A directory in which the whole tiny workflow has run: once for all processes that test, and a copy for each.

    `CXT_FINISHED_WORKFLOW` may name one that has just run, as `.ci/run` does.
    """
    directory = tmp_path_factory.mktemp("workflow")
    if finished := os.environ.get("CXT_FINISHED_WORKFLOW"):
        return shutil.copytree(finished, directory / "workflow", symlinks=True)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        snakemake("--show-failed-logs", cwd=directory)
        return directory
    shared = tmp_path_factory.getbasetemp().parent / "workflow"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            making = shared.with_name("workflow-in-the-making")
            making.mkdir()
            snakemake("--show-failed-logs", cwd=making)
            making.rename(shared)
    return shutil.copytree(shared, directory / "workflow", symlinks=True)


def maps_taken_as_present(cache: Path) -> Path:
    """A stdpopsim cache that says of every genetic map of config/paper.yaml that it is there."""
    config = load([REPOSITORY / "config" / "paper.yaml"])
    for leaf in leaves_of(config, list(config["scenarios"])):
        if "genetic_map" in leaf.spec:
            found = genetic_map(leaf.spec)
            file = cache / "genetic_maps" / leaf.spec["species"] / found.id / f"{found.url.rsplit('/', 1)[1]}.sha256"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(found.sha256 + "\n")
    return cache
