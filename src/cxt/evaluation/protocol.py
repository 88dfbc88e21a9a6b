"""Evaluating a checkpoint: its input from held-out simulations, decoding, and the metrics of each variant."""

import time

import numpy as np

from cxt.config.bounds import COUNT, Range
from cxt.data.features import compute_missing_fraction, compute_pair_counts
from cxt.data.grid import Grid
from cxt.data.preprocessing import preprocess_simulation
from cxt.data.shards import PreprocessedSimulation
from cxt.errors import BadRequest
from cxt.evaluation.metrics import average_scenarios, score_variant
from cxt.evaluation.table import format_or_dash
from cxt.io import digest
from cxt.lineage import check_lineage
from cxt.scenarios.batches import read_batch
from cxt.seeds import check_seed

SPEC_KEYS = {
    "window_size", "sequence_length", "samples", "scales", "pairs", "replicates", "batch_size", "seed",
}  # fmt: skip


SPEC_RANGES = {
    "window_size": Range(1, 10**10), "sequence_length": Range(1, 10**10), "samples": Range(3, 60_000), "pairs": COUNT,
    "replicates": COUNT, "batch_size": COUNT, "seed": Range(0),
}  # fmt: skip


def read_evaluation_simulations(batches: list[dict], spec: dict, mask) -> dict[str, list[PreprocessedSimulation]]:
    """{variant: its evaluation simulations, preprocessed} from [{path, scenario, start, count, lineage}, …].

    The lineage may be left out, and is checked where it is given.
    """
    result: dict[str, list[PreprocessedSimulation]] = {}
    for batch in batches:
        expected = {key: batch[key] for key in ("start", "count", "scenario")}
        for ts in read_batch(batch["path"], **expected, lineage=batch.get("lineage")):
            result.setdefault(batch["scenario"], []).append(preprocess_simulation(ts, spec, mask=mask))
    return result


def compute_features(entries: list[PreprocessedSimulation], spec: dict, windows: int):
    """Raw counts (items, 2, scales, windows, samples) int32 and missing fractions (items, scales, windows) or None."""
    counts, missing = [], []
    for entry in entries:
        counts.append(
            compute_pair_counts(
                entry.genotypes,
                entry.positions,
                entry.pairs,
                window_size=spec["window_size"],
                windows=windows,
                samples=spec["samples"],
                scales=spec["scales"],
            )
        )
        if entry.mask is not None:
            fraction = compute_missing_fraction(
                entry.mask,
                window_size=spec["window_size"],
                sequence_length=spec["sequence_length"],
                scales=spec["scales"],
            )
            missing.append(np.broadcast_to(fraction, (len(entry.pairs), *fraction.shape)))
    return np.concatenate(counts), np.concatenate(missing) if missing else None


def evaluate(
    checkpoint,
    spec: dict,
    batches: list[dict],
    *,
    mask=None,
    device="cpu",
    threads=None,
    checkpoint_lineage=None,
    lineage=None,
    progress=print,
):
    """Evaluate a checkpoint; ({scenarios: {variant: figures}, overall}, tracks to draw).

    Parameters
    ----------
    checkpoint : path or name
    spec : window_size, sequence_length, samples, scales, pairs per simulation, replicates, batch_size and seed
    batches : evaluation batches [{path, scenario, start, count}, …], each also with the `lineage` that it must have
    mask : accessibility mask (True = inaccessible), or None
    threads : CPU threads; torch's own choice if None
    checkpoint_lineage : lineage that the checkpoint must have, or None
    lineage : digest of everything that the result depends on, stored in it, or None

    Raises
    ------
    BadRequest
        If checkpoint and spec disagree on windows, their size, samples, scales or missingness, a batch is damaged, or
        checkpoint or a batch are of another lineage.
    """
    import torch

    from cxt.checkpoints.file import read_checkpoint
    from cxt.checkpoints.load import find_checkpoint, load_model
    from cxt.decoding.posterior import decode, use_precision

    check_seed(spec["seed"], at="the evaluation's seed")
    if threads is not None:
        torch.set_num_threads(threads)
    path = find_checkpoint(checkpoint)
    about = read_checkpoint(path)
    check_lineage(f"checkpoint {path}", found=about.record.get("lineage"), planned=checkpoint_lineage, target=path)
    windows = spec["sequence_length"] // spec["window_size"]
    expected = {
        "windows": about.model.windows,
        "window_size": about.model.window_size,
        "samples": about.model.samples if about.adapter is None else about.adapter.samples,
        "scales": about.record["dataset"]["scales"],
        "missingness": about.record["dataset"]["missing"],
    }
    found = {key: spec[key] for key in ("window_size", "samples", "scales")} | {
        "windows": windows,
        "missingness": mask is not None,
    }
    if found != expected:
        raise BadRequest(f"{path} was trained with {expected}, but the evaluation asks for {found}")
    model = load_model(path, device=device)
    grid = Grid(about.model.grid_low, about.model.grid_high, about.model.bins)
    scenarios, tracks = {}, {}
    for name, entries in read_evaluation_simulations(batches, spec, mask).items():
        began = time.monotonic()
        counts, missing = compute_features(entries, spec, windows)
        seed = int(digest([spec["seed"], name]), 16)
        with use_precision(about.record.get("precision", "32-true"), device):
            posterior = decode(
                model,
                counts,
                missing,
                grid=grid,
                replicates=spec["replicates"],
                batch_size=spec["batch_size"],
                seed=seed,
                device=device,
            )
        truth = np.stack([entry.log_tmrca for entry in entries])
        mean, low, high = (summary.reshape(truth.shape) for summary in posterior)
        scenarios[name] = score_variant(truth, mean, low, high, entries, window_size=spec["window_size"], windows=windows)
        tracks[name] = (truth, mean, low, high)
        figures = scenarios[name]
        progress(
            f"{path}, {name}: MSE {figures['mse']:.3f} ± {format_or_dash(figures['mse_se'], '.3f')}, "
            f"r {format_or_dash(figures['r'], '.3f')} "
            f"({time.monotonic() - began:.0f} s)"
        )
    result = {
        "checkpoint": about.record["name"],
        "lineage": lineage,
        "checkpoint_lineage": about.record["lineage"],
        "device": torch.device(device).type,
        "settings": {key: spec[key] for key in ("window_size", "sequence_length", "samples", "pairs", "replicates")},
        "estimate": "posterior mean of ln TMRCA, from the replicates' averaged predictive distributions",
        "scenarios": scenarios,
        "overall": average_scenarios(scenarios),
    }
    return result, tracks


def draw_figures(tracks: dict, prefix: str, result: dict, *, window_size: int) -> None:
    """The two figures of an evaluation, PREFIX-tracks.png and PREFIX-scatter.png."""
    from cxt.evaluation.figures import draw_scatter, draw_tracks

    draw_tracks(tracks, f"{prefix}-tracks.png", title=result["checkpoint"], window_size=window_size)
    draw_scatter(tracks, f"{prefix}-scatter.png", title=result["checkpoint"], scenarios=result["scenarios"])
