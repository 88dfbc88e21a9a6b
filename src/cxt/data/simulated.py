"""Training on the fly: items that are simulated when they are asked for, and never stored.

Item i is a pure function of (seed, i): it comes from a simulation of its own, of the variants in turn, of which one
random pair is taken. The first items are held out, and training begins after them.
"""

import numpy as np
import torch

from cxt.data.features import compute_pair_counts
from cxt.data.grid import Grid
from cxt.data.pair_dataset import Batch, Example, ExampleDataset
from cxt.data.preprocessing import preprocess_simulation
from cxt.errors import BadRequest
from cxt.scenarios.indices import SPLITS
from cxt.scenarios.registry import simulate_tree_sequence

ON_THE_FLY_START = 2_000_000_000
"""First index of simulations on the fly; batches on disk and evaluation use smaller ones."""


def build_simulated_manifest(
    variants: list[dict], *, window_size: int, samples: int | None, scales, held_out: int, items: int
) -> dict:
    """What dataset.json says of a dataset, for one that is simulated on the fly.

    Parameters
    ----------
    variants : parameters of the variants, as `cxt.config.variants.variants` gives them
    samples : haplotypes; None takes all of the scenario with the fewest
    held_out, items : items for validation and for training

    Raises
    ------
    BadRequest
        If a scenario is named twice, the scenarios differ in length, a length is not a multiple of *window_size*, or there
        are too few samples.
    """
    names = [variant["name"] for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadRequest(f"--simulate: {', '.join(twice)} named twice; its items would be the same, held out or not")
    if window_size < 1:
        raise BadRequest(f"--window-size {window_size}: expected at least 1")
    lengths = {int(variant["sequence_length"]) for variant in variants}
    if len(lengths) > 1:
        raise BadRequest(f"--simulate: the scenarios have sequences of {sorted(lengths)} bp; they must be equally long")
    (length,) = lengths
    if length % window_size:
        raise BadRequest(f"--simulate: sequences of {length} bp are not a multiple of --window-size {window_size}")
    if held_out + items > ON_THE_FLY_START:
        raise BadRequest(f"--simulate: {held_out + items:,} items asked, at most {ON_THE_FLY_START:,} can be simulated")
    fewest = min(_count_haplotypes(variant) for variant in variants)
    if samples is None:
        samples = fewest
    if not 2 <= samples <= fewest:
        raise BadRequest(f"--samples {samples}: expected 2 to {fewest}, the haplotypes of the scenarios")
    return {
        "window_size": window_size, "sequence_length": length, "samples": samples, "pairs": 1, "scales": list(scales),
        "missing": False, "windows": length // window_size, "splits": {"train": {"items": items}, "test": {"items": held_out}},
    }  # fmt: skip


def _count_haplotypes(variant: dict) -> int:
    individuals = variant.get("individuals", variant.get("samples"))
    return 2 * (sum(individuals.values()) if isinstance(individuals, dict) else individuals)


class SimulatedDataset(ExampleDataset):
    """Items simulated on the fly, with the interface of `cxt.data.pair_dataset.PairDataset`.

    Parameters
    ----------
    variants : parameters of the variants; item i is of variant i modulo their number
    manifest : from `build_simulated_manifest`
    split : "test" for the first items, "train" for those after them
    seed : of everything random
    """

    def __init__(self, variants: list[dict], manifest: dict, split: str, *, seed: int, grid: Grid | None = None):
        if split not in SPLITS:
            raise BadRequest(f"split '{split}': expected one of {', '.join(SPLITS)}")
        self.variants, self.manifest, self.split, self.seed = variants, manifest, split, seed
        self.grid = grid or Grid()
        self.windows, self.samples, self.scales = manifest["windows"], manifest["samples"], manifest["scales"]
        self._first = 0 if split == "test" else manifest["splits"]["test"]["items"]
        self._spec = {key: manifest[key] for key in ("window_size", "sequence_length", "samples", "pairs")}

        self._dtype = np.dtype(np.int32)

    def __len__(self) -> int:
        return self.manifest["splits"][self.split]["items"]

    def _simulated(self, i: int):
        number = self._first + self._from_start(i)
        variant = self.variants[number % len(self.variants)]
        ts = simulate_tree_sequence(variant, index=ON_THE_FLY_START + number // len(self.variants), seed=self.seed)
        return preprocess_simulation(ts, self._spec)

    def describe(self, i: int) -> Example:
        """Scenario, simulation index and pair of item *i*, which is simulated for it."""
        entry = self._simulated(i)
        return Example(entry.scenario, entry.index, tuple(map(int, entry.pairs[0])))

    def batch(self, items, *, out: Batch | None = None) -> Batch:
        """Several items at once; in the first places of *out* if that is given."""
        items = list(items)
        batch = self._room_for(len(items), out)
        for row, i in enumerate(items):
            entry = self._simulated(i)
            compute_pair_counts(
                entry.genotypes,
                entry.positions,
                entry.pairs,
                window_size=self._spec["window_size"],
                windows=self.windows,
                samples=self.samples,
                scales=self.scales,
                out=batch.counts[row : row + 1].numpy(),
            )
            # Rounded as stored targets are.
            batch.tokens[row] = torch.from_numpy(self.grid.tokens(entry.log_tmrca.astype(np.float32))[0])
        return batch
