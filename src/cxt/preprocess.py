"""Stage 2: tree sequences to the shards of a dataset.

python -m cxt.preprocess shard --batch constant-0.trees.batch --start 0 --count 100 --split train --spec JSON --out X.zarr.zip
python -m cxt.preprocess manifest --dataset DIRECTORY [--shards JSON]
python -m cxt.preprocess mask --spec JSON --seed 1 --out mask.npz
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tskit

from cxt.config.bounds import COUNT, INDEX, check_flags
from cxt.config.schema import complete_part
from cxt.console import progress_only
from cxt.data.features import pack_haplotypes, usable_sites
from cxt.data.masks import add_mask_flags, cut_mask, mask_from_flags, synthetic_mask, write_mask
from cxt.data.shards import SPLITS, Entry, write_manifest, write_shard
from cxt.data.targets import pair_log_tmrca
from cxt.errors import BadRequest, exit_on_bad_request
from cxt.scenarios.indices import batches, split_of, split_size
from cxt.scenarios.seeds import random_generator
from cxt.seeds import check_seed
from cxt.simulate import read_batch


def choose_pairs(rng: np.random.Generator, *, samples: int, pairs: int) -> np.ndarray:
    """*pairs* different pairs (a < b) of *samples* haplotypes, in random order: (pairs, 2) int64."""
    first, second = np.triu_indices(samples, k=1)
    if pairs > len(first):
        raise BadRequest(f"{pairs} pairs asked, but {samples} samples have {len(first)} pairs")
    chosen = rng.choice(len(first), size=pairs, replace=False)
    return np.stack([first[chosen], second[chosen]], axis=1)


def region_start(region: int, *, regions: int, length: float) -> int:
    """Where region 0, 1, … of *regions* begins, spread evenly over a simulation of *length* base pairs; 0 for the first."""
    return region * int(length // regions)


def sites_before(ts: tskit.TreeSequence, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Allele codes (sites, samples) int16 and positions of the sites in [0, length), and of no others."""
    positions = ts.sites_position
    positions = positions[: np.searchsorted(positions, length)]
    genotypes = np.empty((len(positions), ts.num_samples), dtype=np.int16)
    variant = tskit.Variant(ts)
    for site in range(len(positions)):
        variant.decode(site)
        genotypes[site] = variant.genotypes
    return genotypes, positions


def preprocess_one(ts: tskit.TreeSequence, spec: dict, *, mask=None, region: int = 0) -> Entry:
    """One region of a simulation as it is stored: usable sites, random pairs, and their ln TMRCA.

    Parameters
    ----------
    ts : tree sequence made by `cxt.scenarios.registry.simulate_one`
    spec : the dataset's window_size, sequence_length, samples, pairs and regions_per_simulation (default 1)
    mask : accessibility mask of a chromosome, True = inaccessible, or None
    region : which of the simulation's regions; 0 begins at its start

    Raises
    ------
    BadRequest
        If the genealogy cannot be used (several roots, ancient samples), or is too short or small.
    """
    identity = ts.metadata["cxt"]

    def rng(purpose: str) -> np.random.Generator:
        purpose = f"{purpose}-{region}" if region else purpose
        return random_generator(seed=identity["seed"], spec=identity["spec"], index=identity["index"], purpose=purpose)

    length = spec["sequence_length"]
    start = region_start(region, regions=spec.get("regions_per_simulation", 1), length=ts.sequence_length)
    if start + length > ts.sequence_length:
        raise BadRequest(
            f"region {region} of {length} bp begins at {start}; the tree sequence has only {ts.sequence_length:g} bp"
        )
    if ts.num_samples < spec["samples"]:
        raise BadRequest(f"{spec['samples']} samples asked, the tree sequence has {ts.num_samples}")
    if ts.num_samples > spec["samples"]:
        if length < ts.sequence_length:  # less to simplify
            ts = ts.keep_intervals([[start, start + length]], simplify=False)
        ts = ts.simplify(ts.samples()[: spec["samples"]])
    if start:
        ts = ts.keep_intervals([[start, start + length]]).trim()
    pairs = choose_pairs(rng("pairs"), samples=spec["samples"], pairs=spec["pairs"])
    log_tmrca = pair_log_tmrca(ts, pairs, window_size=spec["window_size"], sequence_length=length)
    crop, offset = None, 0
    if mask is not None:
        crop, offset = cut_mask(mask, length=length, rng=rng("mask"))
    found, at = sites_before(ts, length)
    genotypes, positions = usable_sites(found, at, sequence_length=length, mask=crop)
    return Entry(
        scenario=identity["scenario"],
        index=identity["index"],
        start=start,
        mutation_rate=identity["mutation_rate"],
        recombination_rate=identity["recombination_rate"],
        genotypes=pack_haplotypes(genotypes),
        positions=positions,
        pairs=pairs,
        log_tmrca=log_tmrca,
        mask=crop,
        mask_offset=offset,
    )


def write_split(
    out,
    batch,
    spec: dict,
    *,
    start: int,
    count: int,
    split: str,
    mask=None,
    scenario=None,
    seed=None,
    batch_lineage=None,
    lineage=None,
) -> int:
    """Preprocess one split of a batch file into the shard *out*; the number of simulations in it.

    The whole batch is read, so that a batch that was cut is noticed whatever the split. *scenario*, *seed* and
    *batch_lineage*, where given, must be those that it was simulated with. *lineage* is the shard's own, stored in it.
    """
    entries = []
    for ts in read_batch(batch, start=start, count=count, scenario=scenario, seed=seed, lineage=batch_lineage):
        identity = ts.metadata["cxt"]
        if split_of(identity["index"]) != split:
            continue
        try:
            for region in range(spec.get("regions_per_simulation", 1)):
                entry = preprocess_one(ts, spec, mask=mask, region=region)
                entry.log_tmrca = entry.log_tmrca.astype(np.float32)  # as it is stored: half the memory until then
                entries.append(entry)
        except BadRequest as error:
            raise BadRequest(f"{batch}, simulation {identity['index']} of '{identity['scenario']}': {error}") from None
    if not entries:
        raise BadRequest(f"{batch}: none of the indices {start}..{start + count - 1} belongs to {split}")
    attributes = {key: spec[key] for key in ("window_size", "sequence_length", "samples", "pairs", "scales")}
    attributes["regions_per_simulation"] = spec.get("regions_per_simulation", 1)
    attributes |= {"missing": mask is not None, "scenario": entries[0].scenario, "split": split, "seed": identity["seed"]}
    if lineage is not None:
        attributes["lineage"] = lineage
    write_shard(out, entries, attributes)
    return len({entry.index for entry in entries})


def planned_shards(leaves: dict[str, tuple]) -> dict[str, list[str]]:
    """{split: shard names} of a dataset of *leaves* {name: (simulations, batch, …)}; empty splits have no shard."""
    return {
        split: [
            f"{split}/{leaf}-{start}.zarr.zip"
            for leaf, (simulations, batch, *_) in leaves.items()
            for start, count in batches(simulations=simulations, batch=batch)
            if split_size(start, count, split)
        ]
        for split in SPLITS
    }


def _json(text: str, option: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRequest(f"{option} is not valid JSON: {error}") from None


def _shard(args) -> None:
    spec = complete_part(_json(args.spec, "--spec"), "dataset", leave_out=("scenarios", "mask"), at="--spec")
    if spec["sequence_length"] % spec["window_size"]:
        raise BadRequest(f"sequence_length {spec['sequence_length']} is not a multiple of window_size {spec['window_size']}")
    mask = mask_from_flags(args)
    done = write_split(
        args.out,
        args.batch,
        spec,
        start=args.start,
        count=args.count,
        split=args.split,
        mask=mask,
        scenario=args.scenario,
        seed=args.seed,
        batch_lineage=args.batch_lineage,
        lineage=args.lineage,
    )
    print(f"{args.out}: {done} simulations, {args.out.stat().st_size / done / 1000:.1f} kB each")


def _manifest(args) -> None:
    lineages = None
    if args.shards is not None:
        leaves = _json(args.shards, "--shards")
        shards = planned_shards(leaves)
        lineages = {leaf: row[2] for leaf, row in leaves.items() if len(row) > 2}
    else:
        shards = {
            split: sorted(str(path.relative_to(args.dataset)) for path in (args.dataset / split).glob("*.zarr.zip"))
            for split in SPLITS
        }
    manifest = write_manifest(args.dataset, shards, lineages=lineages)
    for split in SPLITS:
        part = manifest["splits"][split]
        print(f"{args.dataset} {split}: {part['simulations']} simulations, {part['items']} items, {len(part['shards'])} shards")


def _mask(args) -> None:
    mask = synthetic_mask(_json(args.spec, "--spec"), seed=check_seed(args.seed, at="--seed"))
    write_mask(args.out, mask, lineage=args.lineage)
    print(f"{args.out}: {len(mask)} bp, {mask.mean():.1%} inaccessible")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cxt.preprocess", description="Make the shards and manifest of a dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    shard = commands.add_parser("shard", help="one split of one batch of tree sequences to one shard")
    shard.add_argument("--batch", type=Path, required=True, help="file made by cxt.simulate")
    shard.add_argument("--scenario", help="leaf scenario that it must hold")
    shard.add_argument("--seed", type=int, help="seed that it must have been simulated with")
    shard.add_argument("--start", type=int, required=True, help="first index in the batch")
    shard.add_argument("--count", type=int, required=True, help="number of tree sequences in the batch")
    shard.add_argument("--split", choices=SPLITS, required=True)
    shard.add_argument("--spec", default="{}", help="the dataset's keys as JSON, over the published defaults")
    add_mask_flags(shard)
    shard.add_argument("--batch-lineage", help="lineage that the batch must have")
    shard.add_argument("--lineage", help="digest of all that decides the shard, stored in it")
    shard.add_argument("--out", type=Path, required=True, help="shard to write, FILE.zarr.zip")
    shard.set_defaults(run=_shard)
    manifest = commands.add_parser("manifest", help="list and check the shards of a dataset in its dataset.json")
    manifest.add_argument("--dataset", type=Path, required=True, help="directory with train/ and test/")
    manifest.add_argument("--shards", help="{leaf: [simulations, batch]} as JSON, or with the lineage that its shards must "
                          "have as a third entry (default: the shards that are there, whatever they are)")  # fmt: skip
    manifest.set_defaults(run=_manifest)
    mask = commands.add_parser("mask", help="a synthetic accessibility mask")
    mask.add_argument("--spec", required=True, help="length, accessible_run and inaccessible_run as JSON")
    mask.add_argument("--seed", type=int, required=True)
    mask.add_argument("--lineage", help="digest of all that decides the mask, stored in it")
    mask.add_argument("--out", type=Path, required=True, help=".npz to write")
    mask.set_defaults(run=_mask)
    args = parser.parse_args(argv)
    check_flags(args, start=INDEX, count=COUNT)
    with progress_only():
        args.run(args)


if __name__ == "__main__":
    exit_on_bad_request(main)
