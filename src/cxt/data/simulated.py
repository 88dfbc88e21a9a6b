"""Training on the fly, with examples that are simulated when they are needed and never stored.

Example i is a pure function of (seed, i): one random pair of a simulation of its own, with the variants in turn. The first
examples are held out for validation, and those after them are for training.
"""

import numpy as np
import torch

from cxt.config.network import log_rates
from cxt.data.examples import Batch, Example, ExampleDataset
from cxt.data.features import compute_pair_counts, find_first_sites
from cxt.data.grid import Grid
from cxt.data.kernels import pack_haplotype_words
from cxt.data.noise import BatchNoise
from cxt.data.preprocessing import preprocess_simulation
from cxt.data.shards import PreprocessedSimulation
from cxt.errors import BadRequest
from cxt.scenarios.indices import SPLITS
from cxt.scenarios.registry import simulate_tree_sequence

ON_THE_FLY_START = 2_000_000_000
"""First index of simulations on the fly; simulation batches and evaluation use smaller ones."""


def build_simulated_manifest(
    variants: list[dict], *, window_size: int, samples: int | None, scales, held_out: int, examples: int
) -> dict:
    """The equivalent of dataset.json for a dataset that is simulated on the fly.

    Parameters
    ----------
    variants : parameters of the variants, from `cxt.config.variants.list_variants`
    samples : haplotypes; None = as many as the scenario with the fewest has
    held_out, examples : numbers of examples for validation and for training

    Raises
    ------
    BadRequest
        If a scenario is repeated, the scenarios differ in length, the length is not a multiple of *window_size*, or there are
        too few samples.
    """
    names = [variant["name"] for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadRequest(f"--simulate: {', '.join(twice)} repeated; training and held-out examples would be the same")
    if window_size < 1:
        raise BadRequest(f"--window-size must be positive, got {window_size}")
    lengths = {int(variant["sequence_length"]) for variant in variants}
    if len(lengths) > 1:
        raise BadRequest(f"--simulate: the scenarios must have sequences of the same length, got {sorted(lengths)} bp")
    (length,) = lengths
    if length % window_size:
        raise BadRequest(f"--simulate: sequences of {length} bp are not a multiple of --window-size {window_size}")
    if held_out + examples > ON_THE_FLY_START:
        raise BadRequest(
            f"--simulate: {held_out + examples:,} examples requested, but only {ON_THE_FLY_START:,} can be simulated"
        )
    fewest = min(_count_haplotypes(variant) for variant in variants)
    if samples is None:
        samples = fewest
    if not 2 <= samples <= fewest:
        raise BadRequest(f"--samples must be from 2 to {fewest}, the haplotypes of the scenarios, got {samples}")
    return {
        "window_size": window_size, "sequence_length": length, "samples": samples, "pairs": 1, "scales": list(scales),
        "missing": False, "windows": length // window_size,
        "splits": {"train": {"items": examples}, "test": {"items": held_out}},
    }  # fmt: skip


def _count_haplotypes(variant: dict) -> int:
    individuals = variant.get("individuals", variant.get("samples"))
    return 2 * (sum(individuals.values()) if isinstance(individuals, dict) else individuals)


class SimulatedDataset(ExampleDataset):
    """Examples simulated on the fly, with the interface of `cxt.data.pair_dataset.PairDataset`.

    Parameters
    ----------
    variants : parameters of the variants; example i is of variant i modulo their number
    manifest : from `build_simulated_manifest`
    split : "test" for the first examples, "train" for those after them
    seed : seed of all random numbers
    """

    def __init__(self, variants: list[dict], manifest: dict, split: str, *, seed: int, grid: Grid | None = None):
        if split not in SPLITS:
            raise BadRequest(f"split must be one of {', '.join(SPLITS)}, got '{split}'")
        self.variants, self.manifest, self.split, self.seed = variants, manifest, split, seed
        self.grid = grid or Grid()
        self.windows, self.samples, self.scales = manifest["windows"], manifest["samples"], manifest["scales"]
        self._first = 0 if split == "test" else manifest["splits"]["test"]["items"]
        self._spec = {key: manifest[key] for key in ("window_size", "sequence_length", "samples", "pairs")}

        self._dtype = self._noisy_dtype = np.dtype(np.int32)

    def __len__(self) -> int:
        return self.manifest["splits"][self.split]["items"]

    def _simulate(self, i: int):
        number = self._first + self._from_start(i)
        variant = self.variants[number % len(self.variants)]
        ts = simulate_tree_sequence(variant, index=ON_THE_FLY_START + number // len(self.variants), seed=self.seed)
        return preprocess_simulation(ts, self._spec)

    def describe(self, i: int) -> Example:
        """Scenario, simulation index and pair of example *i*; this simulates it."""
        simulation = self._simulate(i)
        return Example(simulation.scenario, simulation.index, tuple(map(int, simulation.pairs[0])))

    def batch(self, examples, *, noise: BatchNoise | None = None, out: Batch | None = None) -> Batch:
        """Compute several examples at once, with *noise*, and into the first places of *out*, if given."""
        examples = list(examples)
        batch = self._room_for(len(examples), out, noisy=noise is not None)
        for row, i in enumerate(examples):
            simulation = self._simulate(i)
            self._count(simulation, self._from_start(i), noise, batch.counts[row : row + 1].numpy())
            batch.rates[row] = torch.tensor(log_rates(simulation.mutation_rate, simulation.recombination_rate))
            # Rounded to float32, as stored targets are.
            batch.tokens[row] = torch.from_numpy(self.grid.tokens(simulation.log_tmrca.astype(np.float32))[0])
        return batch

    def _count(self, simulation: PreprocessedSimulation, example: int, noise: BatchNoise | None, counts: np.ndarray) -> None:
        """Fill *counts* (1, 2, scales, windows, samples) of an example."""
        packed, positions, pairs = simulation.genotypes, simulation.positions, simulation.pairs
        shape = {"window_size": self._spec["window_size"], "windows": self.windows}
        if noise is None:
            compute_pair_counts(packed, positions, pairs, **shape, samples=self.samples, scales=self.scales, out=counts)
            return
        words = np.empty((self.samples, -(-len(packed) // 64)), dtype=np.uint64)
        pack_haplotype_words(packed, words)
        scales = np.minimum(np.array(self.scales, dtype=np.int64), self.windows)  # wider windows end at the same place
        noise.count_pair(words, find_first_sites(positions, **shape), pairs[0], scales=scales, example=example, out=counts[0])
