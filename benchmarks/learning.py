"""What training learns per second: trials of settings, compared on held-out validation simulations.

    python benchmarks/learning.py run  benchmarks/trials.yaml [NAME ...] --results DIR
    python benchmarks/learning.py table --results DIR

`run` trains each trial of the file (all, or those named) with `python -m cxt.train`, unless it has a result, and reads the
validation examples with the finished checkpoint: those of the dataset's held-out simulations, never those of an evaluation. It
writes DIR/<name>.json. `table` prints all results as Markdown, the mean over scenarios first.

A trials file holds `defaults`, settings of `cxt.train`, and `trials`, {name: settings that differ}. `read_items` validation
examples are read; `note` is printed in the table.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.load import load_model
from cxt.config.network import SPECIAL_TOKENS
from cxt.data.grid import Grid
from cxt.data.pair_dataset import open_dataset
from cxt.decoding.decode import decode
from cxt.evaluation.metrics import clustered_standard_error, pearson_per_pair, score_recent
from cxt.io import atomic_write, json_text

OWN_KEYS = ("read_items", "note", "replicates")


def train(name: str, settings: dict, directory: Path) -> tuple[Path, float]:
    """Train a trial; its checkpoint, and the core-minutes that its processes took."""
    config, out, minutes = (directory / f"{name}{end}" for end in (".yaml", ".ckpt", ".minutes"))
    if minutes.exists():
        return out, float(minutes.read_text())
    config.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key not in OWN_KEYS}))
    command = [sys.executable, "-m", "cxt.train", "--config", config, "--out", out, "--run-dir", directory / f"{name}.run"]
    before, began = children_seconds(), time.monotonic()
    with (directory / f"{name}.log").open("w") as log:
        subprocess.run([*map(str, command)], check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"{name}: trained in {(time.monotonic() - began) / 60:.1f} min", flush=True)
    minutes.write_text(str((children_seconds() - before) / 60))
    return out, float(minutes.read_text())


def children_seconds() -> float:
    """CPU seconds of this process's finished children."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def score(checkpoint: Path, dataset, *, items: int, replicates: int) -> dict:
    """Accuracy on *items* validation examples, evenly spaced, by scenario and in the mean."""
    model, record = load_model(checkpoint), read_checkpoint(checkpoint)
    config = record.model
    grid = Grid(config.grid_low, config.grid_high, config.bins)
    test = open_dataset(str(dataset), "test", grid=grid, storage="memory", progress=lambda line: None)
    chosen = np.unique(np.linspace(0, len(test) - 1, min(items, len(test))).astype(int))
    batch = test.batch([int(item) for item in chosen])
    truth = grid.centres[batch.tokens[:, 1:].numpy() - SPECIAL_TOKENS]
    torch.set_num_threads(1)
    began = time.monotonic()
    settings = {"grid": grid, "replicates": replicates, "batch_size": 20, "seed": 1}
    read = decode(model, batch.counts, batch.missing, rates=batch.rates, **settings)
    seconds = time.monotonic() - began
    about = [test.describe(int(item)) for item in chosen]
    result = score_reading(read, truth, about) | {"items": len(chosen), "read_seconds": seconds}
    if config.reads_rates:
        result["rates_inferred"] = score_reading(decode(model, batch.counts, batch.missing, **settings), truth, about)
    return result


def score_reading(read, truth: np.ndarray, about: list) -> dict:
    """Accuracy by scenario and in the mean, given summaries, true ln TMRCA (examples, windows), and what each example is."""
    rows = {}
    for scenario in sorted({example.scenario for example in about}):
        mine = np.array([example.scenario == scenario for example in about])
        indices = np.array([example.index for example in about])[mine]
        squared = (read.mean - truth)[mine] ** 2
        by_simulation = np.stack([squared[indices == index].mean() for index in sorted(set(indices))])
        rows[scenario] = {
            "mse": float(squared.mean()), "mse_se": clustered_standard_error(by_simulation[:, None]),
            "r": pearson_per_pair(truth[mine], read.mean[mine]), "bias": float((read.mean - truth)[mine].mean()),
            "coverage95": float(((truth >= read.low) & (truth <= read.high))[mine].mean()),
        }  # fmt: skip
    mean = {key: float(np.mean([row[key] for row in rows.values()])) for key in ("mse", "r", "coverage95")}
    mean["mse_se"] = float(np.sqrt(np.sum([row["mse_se"] ** 2 for row in rows.values()])) / len(rows))
    mean["recent"] = score_recent(truth, read.mean, read.low, read.high)
    return {"mean": mean, "scenarios": rows}


def run(args) -> None:
    """Run the trials that have no result."""
    content = yaml.safe_load(args.trials.read_text())
    args.results.mkdir(parents=True, exist_ok=True)
    for name in args.names or content["trials"]:
        out = args.results / f"{name}.json"
        if out.exists():
            continue
        settings = content["defaults"] | (content["trials"][name] or {})
        checkpoint, core_minutes = train(name, settings, args.results)
        dataset, items = settings["dataset_path"], settings.get("read_items", 10**9)
        result = score(checkpoint, dataset, items=items, replicates=settings.get("replicates", 12))
        record = read_checkpoint(checkpoint).record
        result |= {"name": name, "settings": settings, "step": record["step"], "core_minutes": core_minutes}
        atomic_write(out, json_text(result).encode())
        print(f"{name}: MSE {result['mean']['mse']:.3f} ± {result['mean']['mse_se']:.3f}", flush=True)


def table(args) -> None:
    """Print the results as a Markdown table, best first."""
    results = sorted((json.loads(path.read_text()) for path in args.results.glob("*.json")), key=lambda r: r["mean"]["mse"])
    print("| trial | what | steps | core-minutes | MSE | ± | r | cover 95% | MSE below 1000 gen. | MSE, rates inferred |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        mean, settings = result["mean"], result["settings"]
        recent, inferred = mean["recent"]["mse"], result.get("rates_inferred")
        cells = (
            result["name"], settings.get("note", ""), result["step"], f"{result['core_minutes']:.1f}", f"{mean['mse']:.3f}",
            f"{mean['mse_se']:.3f}", f"{mean['r']:.3f}", f"{mean['coverage95']:.1%}",
            "-" if recent is None else f"{recent:.2f}",
            "" if inferred is None else f"{inferred['mean']['mse']:.3f}",
        )  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    """Run trials, or print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("trials", type=Path)
    running.add_argument("names", nargs="*")
    running.set_defaults(run=run)
    printing = commands.add_parser("table")
    printing.set_defaults(run=table)
    for command in (running, printing):
        command.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
