"""Stage 4: how good a checkpoint is on simulations that nothing was trained on.

    python -m cxt.evaluate --checkpoint results/broad.ckpt --spec JSON --batches JSON --out FILE.json --figures PREFIX
    python -m cxt.evaluate --table results/evaluation/*.json

Every estimate is decoded autoregressively from the features alone, and compared with the true ln TMRCA of the same
pairs and windows. Two baselines see the same: heterozygosity in the best fixed window, and the best constant.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np

from cxt.config.bounds import COUNT, THREADS, Range, check_flags, problems
from cxt.console import progress_only
from cxt.data.features import first_sites, missing_fraction, pair_counts
from cxt.data.masks import add_mask_flags, mask_from_flags
from cxt.data.shards import Entry
from cxt.data.targets import Grid
from cxt.errors import BadRequest, Failed, exit_on_bad_request, why_not
from cxt.evaluation.metrics import pearson_per_pair
from cxt.io import atomic_write, digest, json_text
from cxt.lineage import check_lineage, stage_lineage
from cxt.preprocess import preprocess_one
from cxt.seeds import check_seed
from cxt.simulate import read_batch

SPEC_KEYS = {
    "window_size", "sequence_length", "samples", "scales", "pairs", "replicates", "batch_size", "seed",
}  # fmt: skip

SPEC_RANGES = {
    "window_size": Range(1, 10**10), "sequence_length": Range(1, 10**10), "samples": Range(3, 60_000), "pairs": COUNT,
    "replicates": COUNT, "batch_size": COUNT, "seed": Range(0),
}  # fmt: skip

BASELINE_WIDTHS = (1, 3, 5, 9, 15, 25, 41, 65, 101, 161, 257, 401)
"""Odd widths, in base windows and centred, among which the heterozygosity baseline takes its best."""


def differences(entry: Entry, *, window_size: int, windows: int) -> np.ndarray:
    """Sites at which each pair differs, per base window: (pairs, windows) int64."""
    window = np.repeat(np.arange(windows), np.diff(first_sites(entry.positions, window_size=window_size, windows=windows)))
    result = np.empty((len(entry.pairs), windows), dtype=np.int64)
    bits = np.unpackbits(entry.genotypes, axis=1, bitorder="little")
    for row, (a, b) in enumerate(entry.pairs):
        result[row] = np.bincount(window[bits[:, a] != bits[:, b]], minlength=windows)
    return result


def accessible_bases(entry: Entry, *, window_size: int, windows: int) -> np.ndarray:
    """Accessible bases per base window: (windows,) float64."""
    if entry.mask is None:
        return np.full(windows, float(window_size))
    return (~entry.mask).reshape(windows, window_size).sum(axis=1).astype(np.float64)


def heterozygosity_estimate(entry: Entry, width: int, *, window_size: int, windows: int, constant: float) -> np.ndarray:
    """ln((d + 1/2) / (2 mu (l + l0))), d differences on l accessible bases in *width* windows around each: (pairs, windows).

    Windows are cut at the ends. Half a difference is added so that windows without any have a logarithm, and the l0 bases on
    which half a difference is expected, l0 = 1/2 / (2 mu exp(*constant*)), so that few bases say little: where none is
    accessible, the estimate is *constant*, the ln TMRCA that one would take without any data.
    """
    half = width // 2
    left = np.maximum(np.arange(windows) - half, 0)
    right = np.minimum(np.arange(windows) + half + 1, windows)

    def summed(values):
        cumulative = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
        return cumulative[..., right] - cumulative[..., left]

    found = summed(differences(entry, window_size=window_size, windows=windows))
    bases = summed(accessible_bases(entry, window_size=window_size, windows=windows))
    return np.log((found + 0.5) / (2 * entry.mutation_rate * bases + 0.5 * np.exp(-constant)))


def best_window(entries: list[Entry], *, window_size: int, windows: int) -> dict:
    """The heterozygosity baseline at its best: the least MSE, and the largest r, over all widths, each on its own.

    It knows the best constant as well, the mean true ln TMRCA of these pairs, and falls back to it where there are few bases.
    """
    truth = np.concatenate([entry.log_tmrca for entry in entries])
    constant = float(truth.mean())
    result = {"mse": np.inf, "mse_width": None, "r": None, "r_width": None}
    for width in (w for w in BASELINE_WIDTHS if w == 1 or w // 2 < windows):
        estimate = np.concatenate(
            [
                heterozygosity_estimate(entry, width, window_size=window_size, windows=windows, constant=constant)
                for entry in entries
            ]
        )
        mse, r = float(((estimate - truth) ** 2).mean()), known(pearson_per_pair(truth, estimate))
        if mse < result["mse"]:
            result |= {"mse": mse, "mse_width": width * window_size}
        if r is not None and (result["r"] is None or r > result["r"]):
            result |= {"r": r, "r_width": width * window_size}
    return result


def known(value: float) -> float | None:
    """None for a figure that is NaN: a correlation where nothing varies, an error of one simulation."""
    return None if np.isnan(value) else value


def shown(value: float | None, form: str) -> str:
    """A figure in a table or a line; "-" if it is not known."""
    return "-" if value is None else format(value, form)


def clustered_error(errors: np.ndarray) -> float:
    """Standard error of the mean of *errors* (simulations, …): simulations are independent, their pairs are not."""
    means = errors.reshape(len(errors), -1).mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def score(truth, mean, low, high, entries, *, window_size: int, windows: int) -> dict:
    """All figures of one leaf scenario; truth, mean, low and high are (simulations, pairs, windows) ln TMRCA.

    None is what cannot be known: `mse_se` of one simulation, `r` where no pair varies.
    """
    squared = (mean - truth) ** 2
    constant = (truth - truth.mean()) ** 2
    return {
        "simulations": len(entries),
        "pairs": int(truth.shape[0] * truth.shape[1]),
        "mse": float(squared.mean()),
        "mse_se": known(clustered_error(squared)),
        "r": known(pearson_per_pair(truth, mean)),
        "bias": float((mean - truth).mean()),
        "coverage95": float(((truth >= low) & (truth <= high)).mean()),
        "baseline": {
            "heterozygosity": best_window(entries, window_size=window_size, windows=windows),
            "constant": {"mse": float(constant.mean()), "value": float(truth.mean())},
        },
    }


def read_entries(batches: list[dict], spec: dict, mask) -> dict[str, list[Entry]]:
    """{leaf scenario: its evaluation simulations, preprocessed} from [{path, scenario, start, count, lineage}, …].

    The lineage may be left out, and is checked where it is given.
    """
    result: dict[str, list[Entry]] = {}
    for batch in batches:
        expected = {key: batch[key] for key in ("start", "count", "scenario")}
        for ts in read_batch(batch["path"], **expected, lineage=batch.get("lineage")):
            result.setdefault(batch["scenario"], []).append(preprocess_one(ts, spec, mask=mask))
    return result


def features_of(entries: list[Entry], spec: dict, windows: int):
    """Raw counts (items, 2, scales, windows, samples) int32 and missing fractions (items, scales, windows) or None."""
    counts, missing = [], []
    for entry in entries:
        counts.append(
            pair_counts(
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
            fraction = missing_fraction(
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
    """Evaluate a checkpoint; ({scenarios: {leaf: figures}, overall}, tracks to draw).

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

    from cxt.checkpoints.checkpoint import find_checkpoint, load_model, read_checkpoint
    from cxt.decoding.posterior import computing_in, decode

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
    for name, entries in read_entries(batches, spec, mask).items():
        began = time.monotonic()
        counts, missing = features_of(entries, spec, windows)
        seed = int(digest([spec["seed"], name]), 16)
        with computing_in(about.record.get("precision", "32-true"), device):
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
        scenarios[name] = score(truth, mean, low, high, entries, window_size=spec["window_size"], windows=windows)
        tracks[name] = (truth, mean, low, high)
        figures = scenarios[name]
        progress(
            f"{path}, {name}: MSE {figures['mse']:.3f} ± {shown(figures['mse_se'], '.3f')}, r {shown(figures['r'], '.3f')} "
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
        "overall": overall(scenarios),
    }
    return result, tracks


def overall(scenarios: dict) -> dict:
    """Means over scenarios, each counted once, of the MSEs of model and baselines and of coverage and, where known, r."""
    rows = list(scenarios.values())
    correlations = [row["r"] for row in rows if row["r"] is not None]
    return {
        "mse": float(np.mean([row["mse"] for row in rows])),
        "r": float(np.mean(correlations)) if correlations else None,
        "coverage95": float(np.mean([row["coverage95"] for row in rows])),
        "heterozygosity_mse": float(np.mean([row["baseline"]["heterozygosity"]["mse"] for row in rows])),
        "constant_mse": float(np.mean([row["baseline"]["constant"]["mse"] for row in rows])),
    }


def table(results: list[dict]) -> str:
    """The accuracy of several checkpoints as a Markdown table, one row per checkpoint and scenario."""
    rows = [("checkpoint", "scenario", "MSE", "±", "r", "bias", "cover 95%", "best window MSE", "its r", "constant MSE")]
    for result in results:
        for name, figures in result["scenarios"].items():
            window, constant = figures["baseline"]["heterozygosity"], figures["baseline"]["constant"]
            rows.append(
                (
                    result["checkpoint"],
                    name,
                    f"{figures['mse']:.3f}",
                    shown(figures["mse_se"], ".3f"),
                    shown(figures["r"], ".3f"),
                    f"{figures['bias']:+.3f}",
                    f"{figures['coverage95']:.1%}",
                    f"{window['mse']:.3f}",
                    shown(window["r"], ".3f"),
                    f"{constant['mse']:.3f}",
                )
            )
        mean = result["overall"]
        rows.append(
            (
                result["checkpoint"],
                "mean",
                f"{mean['mse']:.3f}",
                "",
                shown(mean["r"], ".3f"),
                "",
                f"{mean['coverage95']:.1%}",
                f"{mean['heterozygosity_mse']:.3f}",
                "",
                f"{mean['constant_mse']:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        cells = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])]) + "\n"


def table_lineage_of(evaluations: list[str | None]) -> str | None:
    """The lineage of a table of results with the lineages *evaluations*, in no particular order; None if one has none."""
    return None if None in evaluations else stage_lineage("evaluate", sorted(evaluations))


def read_result(path: Path) -> dict:
    """One evaluation's JSON; BadRequest if it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise BadRequest(f"evaluation {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"evaluation {path} is damaged: {error}") from None


def draw(tracks: dict, prefix: str, result: dict, *, window_size: int) -> None:
    """The two figures of an evaluation, PREFIX-tracks.png and PREFIX-scatter.png."""
    from cxt.evaluation.figures import draw_scatter, draw_tracks

    draw_tracks(tracks, f"{prefix}-tracks.png", title=result["checkpoint"], window_size=window_size)
    draw_scatter(tracks, f"{prefix}-scatter.png", title=result["checkpoint"], scenarios=result["scenarios"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cxt.evaluate", description="Evaluate a checkpoint on held-out simulations."
    )
    parser.add_argument("--table", nargs="+", type=Path, help="print the accuracy table of these JSON files instead")
    parser.add_argument(
        "--lineage", help="digest of everything that the result depends on, stored in it; of --table, what its files must make"
    )
    parser.add_argument("--checkpoint", help="name or path of a checkpoint")
    parser.add_argument("--checkpoint-lineage", help="lineage that the checkpoint must have")
    parser.add_argument("--spec", help="settings as JSON: the dataset's shape, pairs, replicates, batch_size, seed")
    parser.add_argument("--batches", help="evaluation batches as JSON: [{path, scenario, start, count, lineage}, …]")
    add_mask_flags(parser)
    parser.add_argument("--devices", type=int, default=0, choices=(0, 1), help="1 = decode on the first GPU (default 0, CPU)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON file to write (or, with --table, the table)")
    parser.add_argument("--figures", help="prefix of the figures: PREFIX-tracks.png and PREFIX-scatter.png")
    args = parser.parse_args(argv)
    check_flags(args, threads=THREADS)
    if args.table:
        results = [read_result(path) for path in args.table]
        found = table_lineage_of([result.get("lineage") for result in results])
        check_lineage("an evaluation of this table", found=found, planned=args.lineage, target=args.out or args.table[0])
        text = table(results)
        print(text, end="")
        if args.out:
            atomic_write(args.out, text.encode())
        return
    missing = [f"--{name}" for name in ("checkpoint", "spec", "batches", "out", "figures") if getattr(args, name) is None]
    if missing:
        raise BadRequest(f"{', '.join(missing)} must be given, or --table")
    try:
        spec, batches = json.loads(args.spec), json.loads(args.batches)
    except json.JSONDecodeError as error:
        raise BadRequest(f"--spec or --batches is not valid JSON: {error}") from None
    lacking = sorted(SPEC_KEYS - spec.keys()) if isinstance(spec, dict) else ["a mapping"]
    if lacking:
        raise BadRequest(f"--spec lacks {', '.join(lacking)}")
    if wrong := problems(spec, SPEC_RANGES):
        raise BadRequest(f"--spec: {'; '.join(wrong)}")
    if args.devices:
        import torch

        if not torch.cuda.is_available():
            raise BadRequest("--devices 1, but torch sees no GPU; use --devices 0")
    mask = mask_from_flags(args)
    with progress_only():
        result, tracks = evaluate(
            args.checkpoint,
            spec,
            batches,
            mask=mask,
            device="cuda:0" if args.devices else "cpu",
            threads=args.threads,
            checkpoint_lineage=args.checkpoint_lineage,
            lineage=args.lineage,
            progress=functools.partial(print, flush=True),
        )
        atomic_write(args.out, json_text(result).encode())
        print(table([result]), end="", flush=True)
    lost = why_not(lambda: draw(tracks, args.figures, result, window_size=spec["window_size"]))
    if lost:
        raise Failed(f"the accuracy is above and was written to {args.out}, but the figures could not be drawn ({lost})")


if __name__ == "__main__":
    exit_on_bad_request(main)
