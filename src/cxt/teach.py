"""Stage 3, for models with a teacher: read the examples of a dataset with the teacher's checkpoint.

    python -m cxt.teach --checkpoint results/broad.ckpt --shards TRAIN.zarr.zip TEST.zarr.zip --out TRAIN.npz TEST.npz

What it writes are soft targets, on which the objective `distill` trains a student. A teacher that reads more haplotypes than
the shards hold needs the simulation batch that they were made from, and reads the same pairs there.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from cxt.config.bounds import Index, PositiveInteger, Seed
from cxt.config.flags import add_config_flag, check_flags, find_problems, insert_config
from cxt.console import add_verbosity_flags, counted, exit_on_bad_request, get_logger, progress_only, set_verbosity
from cxt.errors import BadRequest
from cxt.lineage import check_lineage, check_planned, derive_soft_target_lineage, how_to_replan

logger = get_logger(__name__)

SPEC = {"reading": "auto", "replicates": 12, "seed": 1}
"""How a teacher is read, by default: as it was trained; if by sampling, so many sequences for each pair."""

SPEC_RANGES = {"reading": Literal["auto", "marginal", "sampled"], "replicates": PositiveInteger, "seed": Seed}

PAIRS_AT_ONCE = 40


def check_teacher(model, record: dict, attributes: dict, *, checkpoint, batch) -> None:
    """BadRequest unless a teacher can read the examples of a shard with these attributes, from it or from a batch."""
    trained_on = record["dataset"]
    expected = {
        "windows": model.config.windows,
        "window_size": model.config.window_size,
        "scales": trained_on["scales"],
        "missingness": trained_on["missing"],
    }
    found = {
        "windows": attributes["sequence_length"] // attributes["window_size"],
        "window_size": attributes["window_size"],
        "scales": attributes["scales"],
        "missingness": attributes["missing"],
    }
    if wrong := [f"{key} {found[key]} instead of {expected[key]}" for key in found if found[key] != expected[key]]:
        raise BadRequest(f"the teacher {checkpoint} cannot read this dataset: {', '.join(wrong)}")
    if model.samples < attributes["samples"]:
        raise BadRequest(
            f"the teacher {checkpoint} reads {model.samples} haplotypes, fewer than the {attributes['samples']} of this dataset"
        )
    if model.samples > attributes["samples"] and batch is None:
        raise BadRequest(
            f"the teacher {checkpoint} reads {model.samples} haplotypes, but the shards hold {attributes['samples']}; pass the "
            "simulation batch that they were made from with --batch, --start and --count"
        )


def list_stored_sites(arrays: dict) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(row, packed genotypes, positions) of each row of a shard."""
    for row, (first, end) in enumerate(zip(arrays["site_offsets"][:-1], arrays["site_offsets"][1:], strict=True)):
        yield row, arrays["genotypes"][first:end], arrays["positions"][first:end]


def list_simulated_sites(simulations, arrays: dict, attributes: dict, *, samples: int) -> Iterator[tuple]:
    """The same with *samples* haplotypes of the simulations from which the shard was made."""
    from cxt.data.features import pack_haplotypes, select_usable_sites
    from cxt.data.preprocessing import cut_region, decode_sites

    length = attributes["sequence_length"]
    for ts in simulations:
        for row in np.flatnonzero(arrays["index"] == ts.metadata["cxt"]["index"]):
            region = cut_region(ts, samples=samples, start=int(arrays["start"][row]), length=length)
            genotypes, positions = decode_sites(region, length)
            mask = None
            if attributes["missing"]:
                mask = np.unpackbits(arrays["mask"][row], count=length, bitorder="little").astype(bool)
            genotypes, positions = select_usable_sites(genotypes, positions, sequence_length=length, mask=mask)
            yield row, pack_haplotypes(genotypes), positions


def read_examples(model, sites, arrays: dict, attributes: dict, spec: dict, *, device) -> np.ndarray:
    """Quantiles of ln TMRCA that a teacher gives to the examples of a shard.

    Parameters
    ----------
    model : CoalescenceModel
        The teacher, on *device*. It is given the rates of the simulations, if it reads rates.
    sites : iterable of (row, packed genotypes, positions)
        Of all rows of the shard, in any order.
    arrays, attributes : dict
        Of the shard.
    spec : dict
        reading, replicates and seed.

    Returns
    -------
    float64 array (rows, pairs, windows, levels)
    """
    import torch

    from cxt.config.learning import choose_reading
    from cxt.config.network import log_rates
    from cxt.data.examples import compute_model_input
    from cxt.data.features import compute_missing_fraction, compute_pair_counts
    from cxt.data.grid import Grid
    from cxt.data.soft_targets import LEVELS
    from cxt.decoding.decode import use_precision
    from cxt.decoding.posterior import posterior_quantiles
    from cxt.decoding.reading import build_reader
    from cxt.model.rates import find_scale

    config = model.config
    grid = Grid(config.grid_low, config.grid_high, config.bins)
    reading = choose_reading(model.objective, spec["reading"])
    read = build_reader(model, reading, replicates=spec["replicates"], seed=spec["seed"])
    shape, scales, length = arrays["log_tmrca"].shape, attributes["scales"], attributes["sequence_length"]
    result = np.full((*shape, len(LEVELS)), np.nan)
    for row, genotypes, positions in sites:
        counts = compute_pair_counts(
            genotypes, positions, arrays["pairs"][row], window_size=config.window_size, windows=config.windows,
            samples=model.samples, scales=scales,
        )  # fmt: skip
        missing = None
        if attributes["missing"]:
            mask = np.unpackbits(arrays["mask"][row], count=length, bitorder="little")
            fraction = compute_missing_fraction(mask, window_size=config.window_size, sequence_length=length, scales=scales)
            missing = torch.from_numpy(fraction).float().to(device)
        known = {name: float(arrays[name][row]) for name in ("mutation_rate", "recombination_rate")}
        scale = float(find_scale(np.array(log_rates(**known)))) if config.reads_rates else 0.0
        for first in range(0, shape[1], PAIRS_AT_ONCE):
            part = torch.from_numpy(counts[first : first + PAIRS_AT_ONCE]).to(device)
            x = compute_model_input(part, None if missing is None else missing.expand(len(part), -1, -1))
            ids = range(int(row) * shape[1] + first, int(row) * shape[1] + first + len(part))
            with use_precision(model.precision, device):
                distribution, _ = read(x, model.repeat_rates(**known, examples=len(part)), ids, None)
            quantiles = posterior_quantiles(distribution, grid, LEVELS.tolist())
            result[row, first : first + len(part)] = quantiles.cpu().numpy() - scale
    return result


def teach(args, spec: dict) -> None:
    """Read the examples of all shards with the teacher, and write their soft targets."""
    import torch

    from cxt.checkpoints.file import read_checkpoint
    from cxt.checkpoints.load import find_checkpoint, load_model
    from cxt.data.shards import read_shard
    from cxt.data.soft_targets import write_soft_targets
    from cxt.io import file_sha256
    from cxt.scenarios.batches import read_batch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    path = find_checkpoint(args.checkpoint)
    record = read_checkpoint(path).record
    check_lineage(f"checkpoint {path}", actual=record.get("lineage"), planned=args.checkpoint_lineage, target=path)
    sha256, published = file_sha256(path), record.get("published", {}).get("sha256")
    if args.checkpoint_sha256 not in (None, sha256, published):
        raise BadRequest(
            f"checkpoint {path} is not the planned one: its sha256 must be {args.checkpoint_sha256}, got {sha256}; "
            f"{how_to_replan(path)}"
        )
    device = "cuda:0" if args.devices else "cpu"
    model = load_model(path, device=device)
    teacher = {"name": record["name"], "lineage": record.get("lineage"), "sha256": sha256}
    if args.checkpoint_sha256 not in (None, sha256):
        teacher["published"] = published
    grid = [model.config.grid_low, model.config.grid_high, model.config.bins]
    for shard, out in zip(args.shards, args.out, strict=True):
        arrays, attributes = read_shard(shard)
        check_teacher(model, record, attributes, checkpoint=path, batch=args.batch)
        identity = args.checkpoint_sha256 or record.get("lineage")
        lineage = derive_soft_target_lineage(spec, shard=attributes.get("lineage"), checkpoint=identity)
        check_planned(lineage, args.lineage, target=out)
        if model.samples == attributes["samples"]:
            sites = list_stored_sites(arrays)
        else:
            expected = {"start": args.start, "count": args.count, "scenario": attributes["scenario"]}
            simulations = read_batch(args.batch, **expected, lineage=args.batch_lineage)
            sites = list_simulated_sites(simulations, arrays, attributes, samples=model.samples)
        quantiles = read_examples(model, sites, arrays, attributes, spec, device=device)
        if not np.isfinite(quantiles).all():
            raise BadRequest(f"{args.batch} does not hold all simulations of {shard}; pass the batch that it was made from")
        about = {"shard": file_sha256(shard), "teacher": teacher, "grid": grid, "lineage": lineage} | spec
        write_soft_targets(out, quantiles, about)
        logger.info(f"{out}: {counted(quantiles.shape[0] * quantiles.shape[1], 'example')}, {out.stat().st_size / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> None:
    """Run `cxt teach`: write the soft targets of shards.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cxt.teach", description="Read the examples of a dataset with a teacher's checkpoint."
    )
    parser.add_argument("--checkpoint", required=True, help="name or path of the teacher's checkpoint")
    parser.add_argument("--shards", nargs="+", type=Path, required=True, help="shards of the student's dataset")
    parser.add_argument("--out", nargs="+", type=Path, required=True, help="file of soft targets to write for each shard, .npz")
    parser.add_argument("--batch", type=Path, help="simulation batch of the shards, if the teacher reads more haplotypes")
    parser.add_argument("--start", type=int, help="first index in the simulation batch")
    parser.add_argument("--count", type=int, help="number of tree sequences in the simulation batch")
    parser.add_argument("--spec", default="{}", help=f"how to read the teacher, as JSON; by default {json.dumps(SPEC)}")
    parser.add_argument("--devices", type=int, default=0, choices=(0, 1), help="1 = read on the first GPU (default 0, CPU)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--checkpoint-lineage", help="expected lineage of the checkpoint")
    parser.add_argument("--checkpoint-sha256", help="expected sha256 of the checkpoint, or of the file it was imported from")
    parser.add_argument("--batch-lineage", help="expected lineage of the simulation batch")
    parser.add_argument("--lineage", help="planned lineage of the soft targets, stored in them")
    add_config_flag(parser)
    add_verbosity_flags(parser)
    args = parser.parse_args(insert_config(sys.argv[1:] if argv is None else argv, parser))
    set_verbosity(args)
    check_flags(args, start=Index, count=PositiveInteger, threads=PositiveInteger)
    try:
        spec = SPEC | json.loads(args.spec)
    except (json.JSONDecodeError, TypeError) as error:
        raise BadRequest(f"--spec is not valid JSON of a mapping: {error}") from None
    if unknown := sorted(spec.keys() - SPEC.keys()):
        raise BadRequest(f"--spec has unknown keys {', '.join(unknown)}; the keys are {', '.join(SPEC)}")
    if problems := find_problems(spec, SPEC_RANGES):
        raise BadRequest(f"--spec: {'; '.join(problems)}")
    if len(args.shards) != len(args.out):
        raise BadRequest(f"--out must name one file for each of the {len(args.shards)} shards, got {len(args.out)}")
    if args.batch is not None and None in (args.start, args.count):
        raise BadRequest("--batch needs --start and --count")
    if args.devices:
        import torch

        if not torch.cuda.is_available():
            raise BadRequest("--devices 1, but torch sees no GPU; use --devices 0")
    with progress_only():
        teach(args, spec)


if __name__ == "__main__":
    exit_on_bad_request(main)
