"""What errors of real data do to accuracy, to a network that was trained without them and to one that was trained with them.

    python benchmarks/robustness.py run   --results DIR
    python benchmarks/robustness.py table --results DIR

`run` trains the trials of benchmarks/robustness.yaml, in DIR, as benchmarks/learning.py does, unless they have a checkpoint
there. Each checkpoint then reads the validation examples without noise, with each kind of noise at two rates, and with all at
once. It writes DIR/<trial>.json. `table` prints the results as Markdown.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from learning import score_reading, train

from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.load import load_model
from cxt.config.learning import Noise
from cxt.config.network import SPECIAL_TOKENS
from cxt.data.grid import Grid
from cxt.data.noise import build_noise
from cxt.data.pair_dataset import open_dataset
from cxt.decoding.decode import decode
from cxt.io import atomic_write, json_text

TRIALS = Path(__file__).with_suffix(".yaml")


def score(checkpoint: Path, dataset: str, kinds: list[dict]) -> list[dict]:
    """Accuracy on all validation examples, with each kind of noise; the same examples and the same noise for any checkpoint."""
    model, config = load_model(checkpoint), read_checkpoint(checkpoint).model
    grid = Grid(config.grid_low, config.grid_high, config.bins)
    test = open_dataset(dataset, "test", grid=grid, storage="memory", progress=lambda line: None)
    about = [test.describe(i) for i in range(len(test))]
    torch.set_num_threads(1)
    rows = []
    for kind in kinds:
        batch = test.batch(range(len(test)), noise=build_noise(Noise(**kind), seed=1) if kind else None)
        truth = grid.centres[batch.tokens[:, 1:].numpy() - SPECIAL_TOKENS]
        read = decode(model, batch.counts, batch.missing, rates=batch.rates, grid=grid, replicates=1, batch_size=20, seed=1)
        scores = score_reading(read, truth, about)
        scores["mean"]["bias"] = float(np.mean([row["bias"] for row in scores["scenarios"].values()]))
        rows.append({"noise": kind, "items": len(test)} | scores)
        print(f"{checkpoint.stem}: {describe(kind)}: MSE {scores['mean']['mse']:.3f}", flush=True)
    return rows


def describe(kind: dict) -> str:
    """The noise of a row of the table."""
    return ", ".join(f"{name} {rate:g}" for name, rate in kind.items()) or "none"


def run(args) -> None:
    """Train the trials that have no checkpoint, and read with those that have no result."""
    content = yaml.safe_load(TRIALS.read_text())
    args.results.mkdir(parents=True, exist_ok=True)
    for name, differing in content["trials"].items():
        out, settings = args.results / f"{name}.json", content["defaults"] | differing
        if out.exists():
            continue
        if after := settings.pop("after", None):
            settings["checkpoint"] = str(args.results / f"{after}.ckpt")
        checkpoint, _ = train(name, settings, args.results)
        rows = score(checkpoint, settings["dataset_path"], content["read"])
        record = read_checkpoint(checkpoint).record
        atomic_write(out, json_text({"name": name, "settings": settings, "step": record["step"], "rows": rows}).encode())


def table(args) -> None:
    """Print the results as a Markdown table, with a row for each kind of noise."""
    trials = {name: json.loads((args.results / f"{name}.json").read_text()) for name in ("clean", "noisy")}
    print("| noise | MSE | r | bias | cover 95% | MSE, trained with noise | r | bias | cover 95% |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for rows in zip(*(trial["rows"] for trial in trials.values()), strict=True):
        cells = [describe(rows[0]["noise"])]
        for row in rows:
            mean = row["mean"]
            cells += [f"{mean['mse']:.3f} ± {mean['mse_se']:.3f}", f"{mean['r']:.3f}", f"{mean['bias']:+.2f}"]
            cells.append(f"{mean['coverage95']:.1%}")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Run trials, or print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("table", table)):
        command = commands.add_parser(name)
        command.add_argument("--results", type=Path, required=True)
        command.set_defaults(run=function)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
