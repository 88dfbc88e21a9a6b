"""What reading other numbers of windows at once than in training does to the accuracy of a checkpoint.

    python benchmarks/window_counts.py --checkpoint small --windows 125 250 500 1000 --out small.md

The same pairs of the same simulations, of constant population size, are read in pieces of each number of windows. Errors of ln
TMRCA are means over simulations, with standard errors. With several checkpoints, each is read with each number.
"""

import argparse
import time
import warnings
from pathlib import Path

import msprime
import numpy as np
import torch

import cxt
from cxt.io import atomic_write

RATES = {"mutation_rate": 1.29e-8, "recombination_rate": 1.28e-8}


def simulate(args) -> list:
    """Tree sequences with mutations."""
    result = []
    for seed in range(args.seed, args.seed + args.simulations):
        ts = msprime.sim_ancestry(
            args.samples // 2, population_size=20_000, sequence_length=args.length,
            recombination_rate=RATES["recombination_rate"], random_seed=seed,
        )  # fmt: skip
        result.append(msprime.sim_mutations(ts, rate=RATES["mutation_rate"], random_seed=seed))
    return result


def score(model, simulations, pairs, truth) -> tuple[np.ndarray, float]:
    """Mean squared error of each simulation, and the seconds it took to read all of them."""
    errors, began = [], time.monotonic()
    mask = None if model.config.mask_singletons else np.zeros(int(simulations[0].sequence_length), dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cxt.OutsideTraining)  # which is what is measured
        for ts, values in zip(simulations, truth, strict=True):
            posterior = cxt.predict_ts(model, ts, pairs, mask=mask, **RATES)
            errors.append(((posterior.log_tmrca - values) ** 2).mean())
    return np.array(errors), time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", required=True)
    parser.add_argument("--windows", type=int, nargs="+", required=True)
    parser.add_argument("--length", type=int, default=2_000_000, help="base pairs of each simulation")
    parser.add_argument("--simulations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of each simulation: haplotypes 0 and 1, 2 and 3, …")
    parser.add_argument("--seed", type=int, default=90_001)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    simulations = simulate(args)
    pairs = [(2 * i, 2 * i + 1) for i in range(args.pairs)]
    lines = ["| checkpoint | windows read at once | MSE of ln TMRCA | seconds |", "| --- | --- | --- | --- |"]
    for name in args.checkpoint:
        trained = cxt.load_model(name)
        size = trained.config.window_size
        truth = [cxt.pair_log_tmrca(ts, pairs, window_size=size, sequence_length=args.length) for ts in simulations]
        for windows in args.windows:
            errors, seconds = score(cxt.load_model(name, windows=windows), simulations, pairs, truth)
            error = errors.std(ddof=1) / len(errors) ** 0.5
            mark = " (as trained)" if windows == trained.config.windows else ""
            lines.append(f"| {Path(name).stem} | {windows}{mark} | {errors.mean():.3f} ± {error:.3f} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    if args.out is not None:
        atomic_write(args.out, ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()
