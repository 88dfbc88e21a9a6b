"""Stage 2: turn tree sequences into the shards of a dataset.

python -m cxt.preprocess shard --batch constant-0.trees.batch --start 0 --count 100 --train A.zarr.zip --test B.zarr.zip
python -m cxt.preprocess manifest --dataset DIRECTORY [--shards JSON]
python -m cxt.preprocess mask --spec JSON --seed 1 --out mask.npz
python -m cxt.preprocess dataset --trees a.trees b.trees --mutations overlay --mutation-rate 1.29e-8 --out DIRECTORY
"""

import argparse
import json
import re
import sys
from pathlib import Path

from cxt.config.bounds import Index, PositiveInteger
from cxt.config.datasets import Layout
from cxt.config.flags import add_config_flag, check_flags, insert_config
from cxt.config.scenarios import Trees
from cxt.config.type_descriptions import list_choices
from cxt.console import add_verbosity_flags, counted, exit_on_bad_request, get_logger, progress_only, set_verbosity
from cxt.data.masks import (
    add_mask_flags,
    draw_synthetic_mask,
    identify_mask_from_flags,
    read_mask_from_flags,
    write_mask,
)
from cxt.errors import BadRequest
from cxt.lineage import check_planned, derive_synthetic_mask_lineage
from cxt.random_seeds import check_seed
from cxt.scenarios.indices import SPLITS

logger = get_logger(__name__)


def _json(text: str, option: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRequest(f"{option} is not valid JSON: {error}") from None


def _shard(args) -> None:
    spec = Layout.read(_json(args.spec, "--spec"), at="--spec").resolved()
    if spec["sequence_length"] % spec["window_size"]:
        raise BadRequest(f"sequence_length {spec['sequence_length']} is not a multiple of window_size {spec['window_size']}")
    mask = read_mask_from_flags(args)

    from cxt.data.preprocessing import preprocess_batch  # imported late so that --help is quick

    outs = {split: path for split in SPLITS if (path := getattr(args, split)) is not None}
    if not outs:
        raise BadRequest("a shard to write must be given: --train FILE.zarr.zip, --test FILE.zarr.zip, or both")
    simulations = preprocess_batch(
        outs,
        args.batch,
        spec,
        start=args.start,
        count=args.count,
        mask=mask,
        mask_lineage=identify_mask_from_flags(args),
        scenario=args.scenario,
        seed=args.seed,
        batch_lineage=args.batch_lineage,
        lineage=args.lineage,
    )
    for split, path in outs.items():
        count = simulations[split]
        logger.info(f"{path}: {counted(count, 'simulation')}, {path.stat().st_size / count / 1000:.1f} kB each")


def _manifest(args) -> None:
    from cxt.data.manifest import plan_shards, write_manifest

    lineages = None
    if args.shards is not None:
        variants = _json(args.shards, "--shards")
        shards = plan_shards(variants)
        lineages = {variant: row[2] for variant, row in variants.items() if len(row) > 2}
    else:
        shards = {
            split: sorted(str(path.relative_to(args.dataset)) for path in (args.dataset / split).glob("*.zarr.zip"))
            for split in SPLITS
        }
    manifest = write_manifest(args.dataset, shards, lineages=lineages, lineage=args.lineage)
    for split in SPLITS:
        part = manifest["splits"][split]
        logger.info(
            f"{args.dataset} {split}: {counted(part['simulations'], 'simulation')}, {counted(part['items'], 'example')}, "
            f"{counted(len(part['shards']), 'shard')}"
        )


def _mask(args) -> None:
    spec, seed = _json(args.spec, "--spec"), check_seed(args.seed, name="--seed")
    if args.lineage is not None:
        check_planned(derive_synthetic_mask_lineage(spec, seed=seed), args.lineage, target=args.out)
    mask = draw_synthetic_mask(spec, seed=seed)
    write_mask(args.out, mask, lineage=args.lineage)
    logger.info(f"{args.out}: {len(mask)} bp, {mask.mean():.1%} inaccessible")


SCENARIO_FLAGS = (
    "mutations", "mutation_rate", "recombination_rate", "generation_time", "individuals", "populations", "simulations",
)  # fmt: skip
OWN_HELP = {
    "individuals": "diploid individuals to take, drawn at random for each piece (default: as many as --samples needs)",
    "simulations": "pieces to use, from the first one on (default: all)",
    "sequence_length": "base pairs of a piece, a multiple of --window-size (default 1000000)",
    "samples": "haplotypes to keep (default 50)",
    "pairs": "random pairs of haplotypes from each piece (default 200)",
}
"""Help texts that differ from the descriptions in the configuration."""

LAYOUT_FLAGS = ("sequence_length", "window_size", "samples", "pairs")


def _dataset(args) -> None:
    from cxt.data.tree_dataset import build_tree_dataset

    def given(names: tuple[str, ...]) -> dict:
        return {name: value for name in names if (value := getattr(args, name)) is not None}

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+]{0,99}", args.name):
        raise BadRequest(f"--name: '{args.name}' must start with a letter or digit and contain only these, '_', '.' and '+'")
    manifest = build_tree_dataset(
        args.out,
        {"files": args.trees} | given(SCENARIO_FLAGS),
        given(LAYOUT_FLAGS),
        name=args.name,
        seed=check_seed(args.seed, name="--seed"),
        mask=read_mask_from_flags(args),
    )
    parts = (f"{counted(manifest['splits'][split]['simulations'], 'piece')} for {split}" for split in SPLITS)
    logger.info(
        f"{args.out}: {', '.join(parts)}, each of {counted(manifest['windows'], 'window')} and "
        f"{counted(manifest['pairs'], 'pair')}"
    )


def _add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trees", nargs="+", required=True, help="tree sequences, .trees or .tsz, in the order in which pieces are numbered")
    add("--out", type=Path, required=True, help="dataset directory to create")
    for name in (*SCENARIO_FLAGS, *LAYOUT_FLAGS):
        section = Trees if name in SCENARIO_FLAGS else Layout
        field = section.model_fields[name]
        choices = list_choices(field) or None
        kind = {"individuals": int, "simulations": int, "populations": str, "mutations": str}.get(name)
        kind = kind or (int if section is Layout else float)
        text = " ".join((field.description or "").split()).replace("%", "%%")
        text += "" if section is Trees else f" (default {field.default})"
        text = OWN_HELP.get(name, text)
        flag = f"--{name.replace('_', '-')}"
        if name == "populations":
            add(flag, nargs="+", help=text)
        else:
            add(flag, type=kind, choices=choices, required=field.is_required(), help=text)
    add("--name", default="trees", help="name of the scenario (default trees); random numbers depend on it and on --seed")
    add("--seed", type=int, default=1, help="seed of mutations, individuals, pairs and mask offsets (default 1)")
    add_mask_flags(parser)


def main(argv: list[str] | None = None) -> None:
    """Run `cxt preprocess`: make a shard, the manifest or a synthetic mask of a dataset, or a dataset of tree sequences.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m cxt.preprocess", description="Make the shards and manifest of a dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    shard = commands.add_parser("shard", help="preprocess a simulation batch into one shard for each split")
    shard.add_argument("--batch", type=Path, required=True, help="simulation batch, a file made by cxt.simulate")
    shard.add_argument("--scenario", help="expected variant")
    shard.add_argument("--seed", type=int, help="expected seed of the simulations")
    shard.add_argument("--start", type=int, required=True, help="first index in the simulation batch")
    shard.add_argument("--count", type=int, required=True, help="number of tree sequences in the simulation batch")
    for split in SPLITS:
        shard.add_argument(f"--{split}", type=Path, help=f"shard of {split} simulations to write, FILE.zarr.zip")
    shard.add_argument("--spec", default="{}", help="the dataset's keys as JSON, which override the published defaults")
    add_mask_flags(shard)
    shard.add_argument("--batch-lineage", help="expected lineage of the simulation batch")
    shard.add_argument("--lineage", help="planned lineage of the shards, stored in them")
    shard.set_defaults(run=_shard)
    manifest = commands.add_parser("manifest", help="check the shards of a dataset and list them in its dataset.json")
    manifest.add_argument("--dataset", type=Path, required=True, help="directory with train/ and test/")
    manifest.add_argument(
        "--shards",
        help="JSON {variant: [simulations, batch size, shard lineage (optional)]} of the expected shards "
        "(default: all shards found)",
    )
    manifest.add_argument("--lineage", help="planned lineage of the dataset")
    manifest.set_defaults(run=_manifest)
    mask = commands.add_parser("mask", help="make a synthetic accessibility mask")
    mask.add_argument("--spec", required=True, help="length, accessible_run and inaccessible_run as JSON")
    mask.add_argument("--seed", type=int, required=True)
    mask.add_argument("--lineage", help="planned lineage of the mask, stored in it")
    mask.add_argument("--out", type=Path, required=True, help=".npz to write")
    mask.set_defaults(run=_mask)
    dataset = commands.add_parser("dataset", help="make a dataset of tree sequences, without the workflow")
    _add_dataset_flags(dataset)
    dataset.set_defaults(run=_dataset)
    for command in commands.choices.values():
        add_config_flag(command)
        add_verbosity_flags(command)
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in commands.choices:
        words = [words[0], *insert_config(words[1:], commands.choices[words[0]])]
    args = parser.parse_args(words)
    set_verbosity(args)
    check_flags(args, start=Index, count=PositiveInteger)
    with progress_only():
        args.run(args)


if __name__ == "__main__":
    exit_on_bad_request(main)
