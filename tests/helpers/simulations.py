"""Small simulations and datasets, made by what the stages call."""

import shutil
from pathlib import Path

import msprime

from cxt.config.file import load
from cxt.config.variants import list_variants
from cxt.data.manifest import write_manifest
from cxt.data.preprocessing import preprocess_batch
from cxt.data.targets import pair_log_tmrca
from cxt.scenarios.batches import write_batch
from cxt.scenarios.genetic_maps import get_genetic_map
from cxt.workflow.jobs import collect_variants
from helpers.repository import REPOSITORY


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
    variant = list_variants(scenario, entry)[0]
    batch = Path(directory) / "batch"
    write_batch(batch, variant.spec, start=0, count=entry["simulations"], seed=seed)
    shards = {split: [f"{split}/{scenario}-0.zarr.zip"] for split in ("train", "test")}
    outs = {split: Path(directory) / names[0] for split, names in shards.items()}
    preprocess_batch(outs, batch, spec, start=0, count=entry["simulations"], mask=mask)
    write_manifest(directory, shards)
    return Path(directory)


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


def maps_taken_as_present(cache: Path) -> Path:
    """A stdpopsim cache that says of every genetic map of config/paper.yaml that it is there."""
    config = load([REPOSITORY / "config" / "paper.yaml"])
    for variant in collect_variants(config, list(config["scenarios"])):
        if "genetic_map" in variant.spec:
            genetic_map = get_genetic_map(variant.spec)
            file = (
                cache
                / "genetic_maps"
                / variant.spec["species"]
                / genetic_map.id
                / f"{genetic_map.url.rsplit('/', 1)[1]}.sha256"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(genetic_map.sha256 + "\n")
    return cache
