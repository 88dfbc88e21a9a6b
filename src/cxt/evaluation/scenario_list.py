"""Evaluating any checkpoint on scenarios by their names: the simulations are made for it, and nothing has to be prepared.

    cxt evaluate small --scenarios constant island --simulations 4 --pairs 10 --out accuracy

The shape of the input comes from the checkpoint, the scenarios from the configuration. As in the workflow, the indices of the
simulations are in the range that no dataset can reach, so that no checkpoint was trained on them.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cxt.checkpoints.file import Checkpoint
from cxt.config.dataset_checks import count_individuals
from cxt.config.datasets import Mask
from cxt.config.network import count_pairs
from cxt.config.variants import Variant, list_variants
from cxt.data.masks import draw_synthetic_mask
from cxt.errors import BadRequest, suggest_nearest
from cxt.evaluation.members import Member, read_members
from cxt.evaluation.protocol import evaluate
from cxt.scenarios.batches import write_batch
from cxt.scenarios.indices import EVALUATION_START
from cxt.scenarios.registry import check_variant
from cxt.scenarios.tree_pieces import count_held_out_pieces

MASK_LENGTH = 5
"""Length of a synthetic mask, in regions of the checkpoint: each simulation gets a part of it."""


def read_shape(checkpoint: Checkpoint) -> dict:
    """The shape of a checkpoint's input: window_size, sequence_length, samples and scales."""
    network = checkpoint.model
    return {
        "window_size": network.window_size,
        "sequence_length": network.windows * network.window_size,
        "samples": network.samples if checkpoint.adapter is None else checkpoint.adapter.samples,
        "scales": list(checkpoint.record["dataset"]["scales"]),
    }


def find_piece_length(members: Sequence[Member], shape: dict) -> int:
    """Base pairs of the examples that checkpoints were trained on, of which each network may read a part only.

    Raises
    ------
    BadRequest
        If they differ between the members of an ensemble, of which one could then be evaluated on what it was trained on.
    """
    lengths = {
        str(member.path): int(member.checkpoint.record["dataset"].get("sequence_length") or shape["sequence_length"])
        for member in members
    }
    first = next(iter(lengths.values()))
    if other := next((path for path, length in lengths.items() if length != first), None):
        raise BadRequest(
            f"{other} was trained on examples of {lengths[other]:,} bp, and {members[0].path} on examples of {first:,} bp, so "
            "that they hold out different pieces of files; evaluate them one by one, or on scenarios that are simulated"
        )
    return first


def choose_variants(config: dict, names: Sequence[str], shape: dict, *, pieces: int) -> list[Variant]:
    """The variants of the scenarios *names*, as long as a checkpoint's region; a swept scenario has several.

    Those of files are cut into pieces of *pieces* base pairs, as the examples of the checkpoint's dataset, which may be longer.

    Raises
    ------
    BadRequest
        For an unknown name, with the nearest, a scenario with too few samples, or one that cannot be simulated.
    """
    chosen: dict[str, Variant] = {}
    for name in names:
        if name not in config["scenarios"]:
            raise BadRequest(f"unknown scenario '{name}'{suggest_nearest(name, config['scenarios'])}")
        scenario = config["scenarios"][name]
        length = pieces if scenario["kind"] == "trees" else shape["sequence_length"]
        if scenario["kind"] == "trees" and scenario["sequence_length"] != length:
            raise BadRequest(
                f"scenario '{name}' is cut into pieces of {scenario['sequence_length']:,} bp, but the checkpoint was trained "
                f"on examples of {length:,} bp, and pieces of another length may contain what it was trained on; if these were "
                f"whole pieces, set sequence_length to {length}, and if pieces were longer, evaluate it in the workflow"
            )
        for variant in list_variants(name, scenario | {"sequence_length": length}):
            haplotypes = 2 * count_individuals(variant.spec)
            if haplotypes < shape["samples"]:
                raise BadRequest(
                    f"the checkpoint takes {shape['samples']} haplotypes, but scenario '{variant.name}' simulates only "
                    f"{haplotypes}; raise its individuals in a file for --configfile"
                )
            check_variant(variant.spec)
            chosen[variant.name] = variant
    return list(chosen.values())


def evaluate_on_scenarios(
    checkpoint,
    config: dict,
    names: Sequence[str],
    *,
    ensemble: str | None = None,
    simulations: int | None = None,
    pairs: int | None = None,
    replicates: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    reading: str = "auto",
    mask=None,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str], object] = print,
) -> tuple[dict, dict]:
    """Simulate scenarios and evaluate a checkpoint, or an ensemble of several, on them.

    Parameters
    ----------
    checkpoint : str or path-like, or a list of them
        Name, file, run directory or exported directory.
    config : dict
        A resolved configuration: its scenarios, and defaults of all that is None below (`evaluation` and `seed`).
    names : sequence of str
        Scenarios.
    ensemble : str, optional
        Name of the ensemble, which several checkpoints need.
    simulations, pairs, replicates, batch_size : int, optional
        Simulations of each variant, pairs of each, decoded sequences of each pair, and pairs that are decoded together.
    seed : int, optional
        Seed of simulations, pairs and sampling.
    reading : str
        `auto`, `marginal` or `sampled`.
    mask : bool array, optional
        Accessibility mask, True = inaccessible. Without one, a checkpoint that reads missingness gets a synthetic mask.
    device : str
        torch's name of a device.
    threads : int, optional
        CPU threads; torch's own choice by default.
    progress : callable
        Called with lines of text.

    Returns
    -------
    result, tracks : dict
        As from `cxt.evaluation.protocol.evaluate`; the settings also have *simulations* and *seed*.

    Raises
    ------
    BadRequest
        If a checkpoint cannot be read, several cannot be averaged, or the scenarios do not fit.
    """
    members = read_members(checkpoint, ensemble=ensemble)
    paths, (path, stored) = [member.path for member in members], members[0]
    shape = read_shape(stored)
    defaults = config["evaluation"]
    count = simulations or defaults["simulations"]
    seed = config["seed"] if seed is None else seed
    spec = shape | {
        "pairs": pairs or min(defaults["pairs"], count_pairs(shape["samples"])),
        "replicates": replicates or defaults["replicates"],
        "batch_size": batch_size or defaults["batch_size"],
        "seed": seed,
        "reading": reading,
    }
    if spec["pairs"] > count_pairs(shape["samples"]):
        raise BadRequest(
            f"--pairs {spec['pairs']}, but the {shape['samples']} samples that the checkpoint takes have only "
            f"{count_pairs(shape['samples'])}"
        )
    has_files = any(config["scenarios"].get(name, {}).get("kind") == "trees" for name in names)
    pieces = find_piece_length(members, shape) if has_files else shape["sequence_length"]
    variants = choose_variants(config, names, shape, pieces=pieces)
    if stored.record["dataset"]["missing"] and mask is None:
        made = Mask().resolved() | {"length": MASK_LENGTH * shape["sequence_length"]}
        mask = draw_synthetic_mask({key: made[key] for key in ("length", "accessible_run", "inaccessible_run")}, seed=seed)
        progress(f"{path} reads missingness: a synthetic mask makes {mask.mean():.0%} inaccessible; --mask takes another")
    with tempfile.TemporaryDirectory(prefix="cxt-evaluate-") as directory:
        batches = []
        for number, variant in enumerate(variants):
            batch = {"path": Path(directory, f"{number}.trees.batch"), "scenario": variant.name, "start": EVALUATION_START}
            number_of_simulations, length = count, f"{variant.spec['sequence_length']:,} bp"
            if variant.spec["kind"] == "trees":
                number_of_simulations = min(count, count_held_out_pieces(variant.spec))
                limit = "" if number_of_simulations == count else f", all that are held out of training, instead of {count}"
                progress(f"{variant.name}: cutting {number_of_simulations} pieces of {length}{limit}")
            else:
                progress(f"{variant.name}: simulating {count} times {length}")
            write_batch(batch["path"], variant.spec, start=EVALUATION_START, count=number_of_simulations, seed=seed)
            batches.append(batch | {"count": number_of_simulations})
        result, tracks = evaluate(
            paths, spec, batches, ensemble=ensemble, mask=mask, device=device, threads=threads, progress=progress
        )
    result["settings"] |= {"simulations": count, "seed": seed}
    return result, tracks
