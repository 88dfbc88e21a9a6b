"""A dataset from files of tree sequences, without the workflow."""

import os
import tempfile
from pathlib import Path

from cxt.config.datasets import Layout
from cxt.config.network import count_pairs
from cxt.config.scenarios import Trees
from cxt.config.tree_files import fill_tree_files
from cxt.config.variants import list_variants
from cxt.console import get_logger
from cxt.data.manifest import plan_shards, write_manifest
from cxt.data.preprocessing import preprocess_batch
from cxt.errors import BadRequest
from cxt.io import check_writable
from cxt.scenarios.batches import write_batch
from cxt.scenarios.indices import SPLITS, count_in_split, simulation_batches
from cxt.scenarios.registry import check_variant
from cxt.scenarios.tree_pieces import inspect_files

logger = get_logger(__name__)


def build_tree_dataset(out, scenario: dict, layout: dict, *, name: str = "trees", seed: int = 1, mask=None) -> dict:
    """Cut files of tree sequences into pieces, and make a dataset directory of them: train/, test/ and dataset.json.

    The shards are those that the workflow makes of a scenario of kind `trees` called *name*, but without lineages.

    Parameters
    ----------
    out : path-like
        Directory to create. It appears only when it is complete.
    scenario : dict
        Keys of a scenario of kind `trees`, as in a configuration; `individuals` may be missing.
    layout : dict
        Keys of a dataset, as in a configuration: window_size and sequence_length (base pairs), samples, pairs, scales.
    name : str
        Name of the scenario, of which the random numbers depend, as well as on *seed*.
    seed : int
        Seed of mutations, individuals, pairs and mask offsets.
    mask : bool array, optional
        Accessibility mask, True = inaccessible.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    BadRequest
        If *out* exists, the files cannot be used, or there are not two pieces, one for each split.
    """
    out = Path(out)
    if out.exists():
        raise BadRequest(f"{out} exists; remove it, or choose another directory")
    spec = Layout.read(layout, at="dataset").resolved()
    if spec["sequence_length"] % spec["window_size"]:
        raise BadRequest(f"sequence_length {spec['sequence_length']} is not a multiple of window_size {spec['window_size']}")
    if spec["pairs"] > (exist := count_pairs(spec["samples"])):
        raise BadRequest(
            f"{spec['pairs']} pairs requested, but {spec['samples']} samples have only {exist}; lower pairs to {exist}"
        )
    given = {"kind": "trees", "sequence_length": spec["sequence_length"]} | scenario
    if not {"samples", "individuals"} & scenario.keys():
        given["individuals"] = -(-spec["samples"] // 2)
    section = Trees.read(given, at="trees").resolved()
    individuals = sum(section["samples"].values()) if "samples" in section else section["individuals"]
    if 2 * individuals < spec["samples"]:
        raise BadRequest(
            f"{spec['samples']} samples requested, but {individuals} individuals have only {2 * individuals} haplotypes; lower "
            "samples, or take more individuals"
        )
    fill_tree_files(section, at="trees")
    (variant,) = list_variants(name, section)
    if variant.simulations < 2:
        raise BadRequest(
            f"{variant.simulations} piece of {spec['sequence_length']:,} bp is to be used, but a dataset needs at least 2: the "
            "first one is held out. Add files, or lower sequence_length"
        )
    check_variant(variant.spec)
    inspect_files(variant.spec)
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        directory = Path(temporary, "dataset")
        batch = Path(temporary, "pieces.trees.batch")
        for start, count in simulation_batches(simulations=variant.simulations, batch=variant.batch):
            write_batch(batch, variant.spec, start=start, count=count, seed=seed)
            shards = {
                split: directory / split / f"{name}-{start}.zarr.zip" for split in SPLITS if count_in_split(start, count, split)
            }
            preprocess_batch(shards, batch, spec, start=start, count=count, mask=mask)
            logger.info(f"{out}: {start + count} of {variant.simulations} pieces")
        manifest = write_manifest(directory, plan_shards({name: (variant.simulations, variant.batch)}))
        os.rename(directory, out)
    return manifest
