"""Evaluating a checkpoint: input from held-out simulations, decoding, and the metrics of each variant."""

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from cxt.config.bounds import BasePairs, PositiveInteger, Seed
from cxt.config.datasets import DatasetSamples
from cxt.config.learning import READINGS, Reading, choose_reading
from cxt.config.network import log_rates
from cxt.data.features import compute_missing_fraction, compute_pair_counts
from cxt.data.grid import Grid
from cxt.data.preprocessing import preprocess_simulation
from cxt.data.shards import PreprocessedSimulation
from cxt.data.targets import pair_log_moments
from cxt.errors import BadRequest
from cxt.evaluation.members import describe_input, read_members
from cxt.evaluation.metrics import average_scenarios, score_sites, score_variant
from cxt.evaluation.table import READING_TITLES, format_or_dash
from cxt.io import digest
from cxt.random_seeds import check_seed
from cxt.scenarios.batches import read_batch

SPEC_KEYS = {
    "window_size", "sequence_length", "samples", "scales", "pairs", "replicates", "batch_size", "seed",
}  # fmt: skip


SPEC_RANGES = {
    "window_size": BasePairs, "sequence_length": BasePairs, "samples": DatasetSamples, "pairs": PositiveInteger,
    "replicates": PositiveInteger, "batch_size": PositiveInteger, "seed": Seed,
    "reading": Literal["auto", "marginal", "sampled"],
}  # fmt: skip


ESTIMATES = {
    "marginal": "posterior mean of ln TMRCA, from the distribution of each window given the whole region",
    "sampled": "posterior mean of ln TMRCA, from the replicates' averaged predictive distributions",
    "as trained": "posterior mean of ln TMRCA, from the distribution of each window",
}
"""What is compared with the truth, by the way in which a checkpoint is read; members of an ensemble may be read differently."""


class EvaluationSimulation(NamedTuple):
    """A preprocessed simulation, and its ln TMRCA at base pairs as from `pair_log_moments`."""

    preprocessed: PreprocessedSimulation
    site_means: np.ndarray
    site_variances: np.ndarray


def read_evaluation_simulations(batches: list[dict], spec: dict, mask) -> dict[str, list[EvaluationSimulation]]:
    """Read and preprocess the evaluation simulations of each variant.

    Parameters
    ----------
    batches : list of dict
        Simulation batches as {path, scenario, start, count, lineage}; the lineage is checked if it is given.
    spec : dict
        The dataset's shape, as for `preprocess_simulation`.
    mask : bool array or None
        Accessibility mask, True = inaccessible.

    Returns
    -------
    dict of str to list of EvaluationSimulation
    """
    result: dict[str, list[EvaluationSimulation]] = {}
    shape = {key: spec[key] for key in ("window_size", "sequence_length")}
    for batch in batches:
        expected = {key: batch[key] for key in ("start", "count", "scenario")}
        for ts in read_batch(batch["path"], **expected, lineage=batch.get("lineage")):
            one = preprocess_simulation(ts, spec, mask=mask)
            if ts.num_samples > spec["samples"]:
                ts = ts.simplify(ts.samples()[: spec["samples"]])
            moments = pair_log_moments(ts, one.pairs, **shape)
            result.setdefault(batch["scenario"], []).append(EvaluationSimulation(one, *moments))
    return result


class Readout(NamedTuple):
    """One way in which an evaluation reads a checkpoint.

    *name* is its key in the result, None for the main one. *way* is `marginal` or `sampled`; with *rates*, a network that
    reads rates is given those of the simulations.
    """

    name: str | None
    way: Reading
    rates: bool


def list_evaluated(objective: str, requested: str, *, reads_rates: bool, checkpoint: str) -> list[Readout]:
    """The ways to read a checkpoint: as requested, and without rates if it reads them, and by sampling if it can do both."""
    way = choose_reading(objective, requested, name=checkpoint)
    result = [Readout(None, way, reads_rates)]
    if reads_rates:
        result.append(Readout("rates_inferred", way, False))
    if requested == "auto" and way != "sampled" and "sampled" in READINGS[objective]:
        result.append(Readout("sampled", "sampled", reads_rates))
    return result


def list_common(members: list[list[Readout]]) -> list[list[Readout]]:
    """The ways to read an ensemble: those that all *members* have in common, each as the readouts of the members."""
    by_name = [{readout.name: readout for readout in readouts} for readouts in members]
    return [[named[name] for named in by_name] for name in by_name[0] if all(name in named for named in by_name)]


def describe_way(readouts: Sequence[Readout]) -> str:
    """The way in which members are read, or `as trained` if that differs between them."""
    ways = {readout.way for readout in readouts}
    return ways.pop() if len(ways) == 1 else "as trained"


def compute_features(simulations: list[PreprocessedSimulation], spec: dict, windows: int):
    """Raw counts (examples, 2, scales, windows, samples) int32 and missing fractions (examples, scales, windows) or None."""
    counts, missing = [], []
    for simulation in simulations:
        counts.append(
            compute_pair_counts(
                simulation.genotypes,
                simulation.positions,
                simulation.pairs,
                window_size=spec["window_size"],
                windows=windows,
                samples=spec["samples"],
                scales=spec["scales"],
            )
        )
        if simulation.mask is not None:
            fraction = compute_missing_fraction(
                simulation.mask,
                window_size=spec["window_size"],
                sequence_length=spec["sequence_length"],
                scales=spec["scales"],
            )
            missing.append(np.broadcast_to(fraction, (len(simulation.pairs), *fraction.shape)))
    return np.concatenate(counts), np.concatenate(missing) if missing else None


def evaluate(
    checkpoint,
    spec: dict,
    batches: list[dict],
    *,
    ensemble: str | None = None,
    mask=None,
    device="cpu",
    threads=None,
    checkpoint_lineage=None,
    lineage=None,
    progress=print,
):
    """Evaluate a checkpoint, or an ensemble of several, on held-out simulations.

    Parameters
    ----------
    checkpoint : str or path-like, or a list of them
        Name or path. Of several, the predictive distributions are averaged.
    spec : dict
        window_size, sequence_length, samples, scales, pairs per simulation, replicates, batch_size and seed; and `reading`, how
        to read the checkpoint, by default as it was trained. One that was trained with the objective `joint` is then read both
        ways.
    batches : list of dict
        Simulation batches as {path, scenario, start, count, lineage}.
    ensemble : str, optional
        Name of the ensemble, which several checkpoints need.
    mask : bool array, optional
        Accessibility mask, True = inaccessible.
    device : torch device
    threads : int, optional
        CPU threads; torch's own choice by default.
    checkpoint_lineage : str or list of str, optional
        Expected lineage of the checkpoint, or of each.
    lineage : str, optional
        Digest of everything the result depends on, stored in it.
    progress : callable
        Called with a line of text for each variant.

    Returns
    -------
    result : dict
        Settings, and the metrics of each variant (`scenarios`) and over all (`overall`); also those of `sampled` for a
        checkpoint that is read both ways, and `rates_inferred` for one that reads rates, without them. An ensemble has the
        readings that all of its `members` have.
    tracks : dict
        Truth, mean, low and high of each variant, to draw: (simulations, pairs, windows) ln TMRCA each.

    Raises
    ------
    BadRequest
        If checkpoint and spec disagree on windows, their size, samples, scales or missingness, a simulation batch is damaged,
        a lineage is not the expected one, or several checkpoints have no name or cannot be averaged.
    """
    import torch

    from cxt.checkpoints.load import load_model
    from cxt.decoding.decode import decode, use_precision
    from cxt.decoding.ensembles import list_models
    from cxt.decoding.scores import score_distributions

    check_seed(spec["seed"], name="the evaluation's seed")
    if threads is not None:
        torch.set_num_threads(threads)
    members = read_members(checkpoint, ensemble=ensemble, lineages=checkpoint_lineage)
    stored, title = members[0].checkpoint, ensemble or members[0].path
    windows = spec["sequence_length"] // spec["window_size"]
    requested = {key: spec[key] for key in ("window_size", "samples", "scales")} | {
        "windows": windows,
        "missingness": mask is not None,
    }
    for member in members:
        if requested != (expected := describe_input(member.checkpoint)):
            raise BadRequest(f"{member.path} was trained with {expected}, but the evaluation requests {requested}")
    models = list_models([load_model(member.path, device=device) for member in members])
    grid = Grid(stored.model.grid_low, stored.model.grid_high, stored.model.bins)
    readings = list_common(
        [
            list_evaluated(
                model.objective, spec.get("reading", "auto"), reads_rates=model.config.reads_rates, checkpoint=str(member.path)
            )
            for member, model in zip(members, models, strict=True)
        ]
    )
    scenarios: list[dict[str, dict]] = [{} for _ in readings]
    tracks = {}
    for name, rows in read_evaluation_simulations(batches, spec, mask).items():
        simulations = [row.preprocessed for row in rows]
        site_means, site_variances = (np.stack(moments) for moments in list(zip(*rows, strict=True))[1:])
        counts, missing = compute_features(simulations, spec, windows)
        seed = int(digest([spec["seed"], name]), 16)
        truth = np.stack([simulation.log_tmrca for simulation in simulations])
        rates = np.repeat([log_rates(one.mutation_rate, one.recombination_rate) for one in simulations], spec["pairs"], axis=0)
        for readouts, scores in zip(readings, scenarios, strict=True):
            reading, way = readouts[0], describe_way(readouts)
            started = time.monotonic()
            with use_precision(models[0].precision, device):
                summaries = decode(
                    models,
                    counts,
                    missing,
                    rates=rates if reading.rates else None,
                    grid=grid,
                    replicates=spec["replicates"],
                    batch_size=spec["batch_size"],
                    seed=seed,
                    device=device,
                    reading=None if way == "as trained" else way,
                    truth=truth.reshape(-1, windows),
                )
            mean, low, high, rank = (summary.reshape(truth.shape) for summary in summaries[:4])
            metrics = score_variant(
                truth, mean, low, high, rank, simulations,
                window_size=spec["window_size"], windows=windows, samples=spec["samples"],
            )  # fmt: skip
            metrics["site"] = score_sites(mean, site_means, site_variances)
            metrics["distribution"] = score_distributions(summaries.scores)
            scores[name] = metrics
            if reading.name is None:
                tracks[name] = (truth, mean, low, high)
            progress(
                f"{title}, {name}: MSE {metrics['mse']:.3f} ± {format_or_dash(metrics['mse_se'], '.3f')}, "
                f"r {format_or_dash(metrics['r'], '.3f')} "
                f"({f'{READING_TITLES[reading.name]}, ' if reading.name else ''}{time.monotonic() - started:.0f} s)"
            )
    settings = {key: spec[key] for key in ("window_size", "sequence_length", "samples", "pairs", "replicates")}
    way = describe_way(readings[0])
    settings |= {"reading": way}
    if readings[0][0].rates:
        settings["rates"] = "those of the simulations"
    result = {
        "checkpoint": stored.record["name"],
        "lineage": lineage,
        "checkpoint_lineage": stored.record["lineage"],
        "device": torch.device(device).type,
        "settings": settings,
        "estimate": ESTIMATES[way],
    }
    if ensemble is not None:
        records = [member.checkpoint.record for member in members]
        result |= {
            "checkpoint": ensemble,
            "members": [record["name"] for record in records],
            "checkpoint_lineage": [record["lineage"] for record in records],
            "estimate": f"{ESTIMATES[way]}, averaged over {len(records)} members",
        }
    for readouts, scores in zip(readings, scenarios, strict=True):
        part = {"scenarios": scores, "overall": average_scenarios(scores)}
        result |= part if readouts[0].name is None else {readouts[0].name: part}
    return result, tracks


def draw_figures(tracks: dict, prefix: str, result: dict, *, window_size: int) -> None:
    """Draw the figures of an evaluation: PREFIX-tracks.png, PREFIX-scatter.png and PREFIX-calibration.png."""
    from cxt.evaluation.figures import draw_calibration, draw_scatter, draw_tracks

    draw_tracks(tracks, f"{prefix}-tracks.png", title=result["checkpoint"], window_size=window_size)
    draw_scatter(tracks, f"{prefix}-scatter.png", title=result["checkpoint"], scenarios=result["scenarios"])
    draw_calibration(result["scenarios"], f"{prefix}-calibration.png", title=result["checkpoint"])
