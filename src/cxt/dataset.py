"""Reading a dataset: items are (simulation, pair), features are computed when an item is asked for."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cxt.errors import BadRequest
from cxt.features import missing_fraction, pair_counts, window_of
from cxt.store import SPLITS, read_manifest, read_shard
from cxt.targets import Grid


class Item(NamedTuple):
    """Which training example an item is."""

    scenario: str
    index: int
    pair: tuple[int, int]


class Batch(NamedTuple):
    """Items as they travel to the training device; `model_input` makes the network's input of them there."""

    counts: torch.Tensor  # (B, 2, scales, windows, samples) int16 or int32, bin 0 zero
    missing: torch.Tensor | None  # (B, scales, windows) float32 fractions, or None
    tokens: torch.Tensor  # (B, windows + 1) int64


def model_input(counts: torch.Tensor, missing: torch.Tensor | None) -> torch.Tensor:
    """log1p of raw counts, float32; missing fractions f become ln(1 + e^f) and ln(1 + e^(1-f)) in frequency bin 0."""
    x = torch.log1p(counts.float())
    if missing is not None:
        x[:, 0, :, :, 0] = torch.nn.functional.softplus(missing)
        x[:, 1, :, :, 0] = torch.nn.functional.softplus(1 - missing)
    return x


class PairDataset(Dataset):
    """The items of one split of a dataset.

    ``len()`` is the number of items; ``[i]`` gives (X, y): X float32 log1p counts (2, scales, windows, samples), and y
    int64 tokens (windows + 1,), start token first. ``describe(i)`` tells scenario, simulation index and pair.

    Parameters
    ----------
    path : dataset directory, with dataset.json, train/ and test/
    split : "train" or "test"
    grid : of log times, for the tokens; the published one by default

    Raises
    ------
    BadRequest
        If the directory, a split or the manifest is missing, or a shard is damaged or not the one that the manifest lists.
    """

    def __init__(self, path, split: str, *, grid: Grid | None = None):
        if split not in SPLITS:
            raise BadRequest(f"split '{split}': expected one of {', '.join(SPLITS)}")
        self.path = Path(path)
        self.split = split
        self.grid = grid or Grid()
        self.manifest = read_manifest(path)
        self.windows = self.manifest["windows"]
        self.samples = self.manifest["samples"]
        self.scales = np.array(self.manifest["scales"], dtype=np.int64)
        self.pairs_per_simulation = self.manifest["pairs"]
        self._scenarios: list[str] = []
        self._scenario_of: list[int] = []
        parts: dict[str, list] = {
            key: [] for key in ("packed", "derived", "window", "pairs", "log_tmrca", "missing", "index", "start")
        }
        offsets = [np.zeros(1, dtype=np.int64)]
        for row in self.manifest["splits"][split]["shards"]:
            self._add_shard(row, parts, offsets)
        self._offsets = np.concatenate(offsets)
        stacked = {key: np.concatenate(parts.pop(key)) for key in list(parts) if parts[key]}  # one copy at a time
        self._packed = stacked.get("packed")
        self._derived = stacked.get("derived")
        self._window = stacked.get("window")
        self._pairs = stacked.get("pairs", np.empty((0, self.pairs_per_simulation, 2), np.uint16))
        self._log_tmrca = stacked.get("log_tmrca")
        self._missing = stacked.get("missing")
        self._index = stacked.get("index")
        self._start = stacked.get("start")
        # No bin of any window can hold more sites than a simulation has.
        most = int(np.diff(self._offsets).max(initial=0))
        self._dtype = np.int16 if most <= np.iinfo(np.int16).max else np.int32

    def _add_shard(self, row: dict, parts: dict[str, list], offsets: list) -> None:
        path = self.path / row["path"]
        arrays, attributes = read_shard(path, sha256=row["sha256"])
        if not np.isfinite(arrays["log_tmrca"]).all():
            raise BadRequest(f"shard {path} holds targets that are not finite; delete it and run the workflow again")
        parts["packed"].append(arrays["genotypes"])
        parts["derived"].append(np.bitwise_count(arrays["genotypes"]).sum(axis=1, dtype=np.int32))
        parts["window"].append(window_of(arrays["positions"], window_size=self.manifest["window_size"], windows=self.windows))
        for key in ("pairs", "log_tmrca", "index", "start"):
            parts[key].append(arrays[key])
        offsets.append(arrays["site_offsets"][1:] + offsets[-1][-1])
        if self.manifest["missing"]:
            length = self.manifest["sequence_length"]
            masks = np.unpackbits(arrays["mask"], axis=1, count=length, bitorder="little")
            fractions = [
                missing_fraction(m, window_size=self.manifest["window_size"], sequence_length=length, scales=self.scales)
                for m in masks
            ]
            parts["missing"].append(np.stack(fractions).astype(np.float32))
        scenario = attributes["scenario"]
        if scenario not in self._scenarios:
            self._scenarios.append(scenario)
        self._scenario_of += [self._scenarios.index(scenario)] * len(arrays["index"])

    def __len__(self) -> int:
        return len(self._pairs) * self.pairs_per_simulation

    def describe(self, i: int) -> Item:
        """Scenario, simulation index and pair of item *i*."""
        simulation, pair = self._locate(i)
        a, b = map(int, self._pairs[simulation, pair])
        scenario = self._scenarios[self._scenario_of[simulation]]
        return Item(scenario, int(self._index[simulation]), (a, b))

    def start(self, i: int) -> int:
        """Where in its simulation item *i* begins, in base pairs; not 0 only with several regions per simulation."""
        return int(self._start[self._locate(i)[0]])

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        return divmod(int(i) % len(self), self.pairs_per_simulation)

    def log_tmrca(self, i: int) -> np.ndarray:
        """ln TMRCA of item *i* before discretisation: (windows,) float32."""
        return self._log_tmrca[self._locate(i)]

    def batch(self, items) -> Batch:
        """Several items at once, as small integers: what the trainer's loader asks for."""
        items = list(items)
        shape = (len(items), 2, len(self.scales), self.windows, self.samples)
        counts = np.empty(shape, dtype=self._dtype)
        located = [self._locate(i) for i in items]
        for row, (simulation, pair) in enumerate(located):
            sites = slice(self._offsets[simulation], self._offsets[simulation + 1])
            pair_counts(
                self._packed[sites],
                self._derived[sites],
                self._window[sites],
                self._pairs[simulation, pair : pair + 1],
                windows=self.windows,
                samples=self.samples,
                scales=self.scales,
                out=counts[row : row + 1],
            )
        simulations, pairs = np.array(located).T
        missing = None if self._missing is None else torch.from_numpy(self._missing[simulations])
        tokens = self.grid.tokens(self._log_tmrca[simulations, pairs])
        return Batch(torch.from_numpy(counts), missing, torch.from_numpy(tokens))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts, missing, tokens = self.batch([i])
        return model_input(counts, missing)[0], tokens[0]
