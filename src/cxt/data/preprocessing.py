"""Preprocessing a simulation for a shard: usable sites, random pairs, and their ln TMRCA in windows."""

import math
from pathlib import Path

import numpy as np
import tskit

from cxt.data.features import pack_haplotypes, select_usable_sites
from cxt.data.masks import cut_mask
from cxt.data.shards import PreprocessedSimulation, write_shard
from cxt.data.targets import pair_log_tmrca
from cxt.errors import BadRequest
from cxt.lineage import check_planned, derive_shard_lineage
from cxt.scenarios.batches import read_batch
from cxt.scenarios.indices import assign_split
from cxt.scenarios.seeds import build_random_generator


def choose_pairs(rng: np.random.Generator, *, samples: int, pairs: int) -> np.ndarray:
    """Choose *pairs* different pairs (a < b) of *samples* haplotypes, in random order: (pairs, 2) int64."""
    first, second = np.triu_indices(samples, k=1)
    if pairs > len(first):
        raise BadRequest(f"{pairs} pairs requested, but {samples} samples have only {len(first)}")
    chosen = rng.choice(len(first), size=pairs, replace=False)
    return np.stack([first[chosen], second[chosen]], axis=1)


def compute_region_start(region: int, *, regions: int, length: float) -> int:
    """Start of region 0, 1, … of *regions*, evenly spaced in a simulation of *length* base pairs; 0 for the first."""
    return region * int(length // regions)


def decode_sites(ts: tskit.TreeSequence, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Allele codes (sites, samples) int16 and positions of the sites in [0, length)."""
    positions = ts.sites_position
    positions = positions[: np.searchsorted(positions, length)]
    genotypes = np.empty((len(positions), ts.num_samples), dtype=np.int16)
    variant = tskit.Variant(ts)
    for site in range(len(positions)):
        variant.decode(site)
        genotypes[site] = variant.genotypes
    return genotypes, positions


def cut_region(ts: tskit.TreeSequence, *, samples: int, start: int, length: int) -> tskit.TreeSequence:
    """The first *samples* haplotypes of a tree sequence in the region [start, start + length), which begins at 0 in the result.

    A region at the start of the sequence may be followed by more sites and trees.

    Raises
    ------
    BadRequest
        If it has too few base pairs or samples.
    """
    if start + length > ts.sequence_length:
        raise BadRequest(f"{length} bp requested from {start} on; the tree sequence has only {ts.sequence_length:g} bp")
    if ts.num_samples < samples:
        raise BadRequest(f"{samples} samples requested, but the tree sequence has only {ts.num_samples}")
    if ts.num_samples > samples:
        if length < ts.sequence_length:  # makes simplification faster
            ts = ts.keep_intervals([[start, start + length]], simplify=False)
        ts = ts.simplify(ts.samples()[:samples])
    return ts.keep_intervals([[start, start + length]]).trim() if start else ts


def preprocess_simulation(ts: tskit.TreeSequence, spec: dict, *, mask=None, region: int = 0) -> PreprocessedSimulation:
    """Preprocess one region of a simulation: usable sites, random pairs, and their ln TMRCA.

    Parameters
    ----------
    ts : tskit.TreeSequence
        Made by `cxt.scenarios.registry.simulate_tree_sequence`.
    spec : dict
        The dataset's window_size and sequence_length (base pairs), samples, pairs and regions_per_simulation (default 1).
    mask : bool array, optional
        Accessibility mask of a chromosome, True = inaccessible.
    region : int
        Number of the region; 0 begins at the start of the simulation.

    Returns
    -------
    PreprocessedSimulation

    Raises
    ------
    BadRequest
        If the tree sequence cannot be used (several roots, ancient samples), or has too few base pairs or samples.
    """
    identity = ts.metadata["cxt"]

    def rng(purpose: str) -> np.random.Generator:
        purpose = f"{purpose}-{region}" if region else purpose
        return build_random_generator(seed=identity["seed"], spec=identity["spec"], index=identity["index"], purpose=purpose)

    length = spec["sequence_length"]
    start = compute_region_start(region, regions=spec.get("regions_per_simulation", 1), length=ts.sequence_length)
    ts = cut_region(ts, samples=spec["samples"], start=start, length=length)
    pairs = choose_pairs(rng("pairs"), samples=spec["samples"], pairs=spec["pairs"])
    log_tmrca = pair_log_tmrca(ts, pairs, window_size=spec["window_size"], sequence_length=length)
    crop, offset = None, 0
    if mask is not None:
        crop, offset = cut_mask(mask, length=length, rng=rng("mask"))
    all_genotypes, all_positions = decode_sites(ts, length)
    genotypes, positions = select_usable_sites(all_genotypes, all_positions, sequence_length=length, mask=crop)
    return PreprocessedSimulation(
        scenario=identity["scenario"],
        index=identity["index"],
        start=start,
        mutation_rate=identity["mutation_rate"],
        recombination_rate=math.nan if identity["recombination_rate"] is None else identity["recombination_rate"],
        genotypes=pack_haplotypes(genotypes),
        positions=positions,
        pairs=pairs,
        log_tmrca=log_tmrca,
        mask=crop,
        mask_offset=offset,
    )


def preprocess_batch(
    outs: dict[str, Path],
    batch,
    spec: dict,
    *,
    start: int,
    count: int,
    mask=None,
    mask_lineage=None,
    scenario=None,
    seed=None,
    batch_lineage=None,
    lineage=None,
) -> dict[str, int]:
    """Preprocess a simulation batch into one shard for each split.

    The whole batch is read, so that a truncated batch is detected for any split.

    Parameters
    ----------
    outs : dict of str to path-like
        {split: shard to write}.
    batch : path-like
        The simulation batch.
    spec : dict
        The dataset's settings, as for `preprocess_simulation`, and its scales.
    start, count : int
        First index and number of simulations of the batch.
    mask : bool array, optional
        Accessibility mask, True = inaccessible.
    mask_lineage : str, optional
        Its lineage.
    scenario, seed, batch_lineage : optional
        Expected variant, workflow seed and lineage of the simulation batch, if given.
    lineage : str, optional
        The planned lineage of the shards, stored in them.

    Returns
    -------
    dict of str to int
        Number of simulations in each shard.

    Raises
    ------
    BadRequest
        If the batch is damaged or not the expected one, a simulation does not fit *spec*, a split would be empty, or settings,
        batch and mask give another lineage than *lineage*.
    """
    simulations: dict[str, list[PreprocessedSimulation]] = {split: [] for split in outs}
    for ts in read_batch(batch, start=start, count=count, scenario=scenario, seed=seed, lineage=batch_lineage):
        identity = ts.metadata["cxt"]
        if lineage is not None:
            computed = derive_shard_lineage(spec, batch=identity.get("lineage"), mask=mask_lineage)
            check_planned(computed, lineage, target=next(iter(outs.values())))
        if (split := assign_split(identity["index"])) not in outs:
            continue
        try:
            for region in range(spec.get("regions_per_simulation", 1)):
                preprocessed = preprocess_simulation(ts, spec, mask=mask, region=region)
                # Stored as float32 anyway, and takes half the memory until then.
                preprocessed.log_tmrca = preprocessed.log_tmrca.astype(np.float32)
                simulations[split].append(preprocessed)
        except BadRequest as error:
            raise BadRequest(f"{batch}, simulation {identity['index']} of '{identity['scenario']}': {error}") from None
    for split, rows in simulations.items():
        if not rows:
            raise BadRequest(f"{batch}: none of the indices {start}..{start + count - 1} belongs to {split}")
    attributes = {key: spec[key] for key in ("window_size", "sequence_length", "samples", "pairs", "scales")}
    attributes["regions_per_simulation"] = spec.get("regions_per_simulation", 1)
    attributes |= {"missing": mask is not None, "scenario": identity["scenario"]}
    for split, rows in simulations.items():
        own = {"split": split, "seed": identity["seed"]} | ({} if lineage is None else {"lineage": lineage})
        write_shard(outs[split], rows, attributes | own)
    return {split: len({preprocessed.index for preprocessed in rows}) for split, rows in simulations.items()}
