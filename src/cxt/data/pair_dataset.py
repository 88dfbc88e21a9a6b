"""Reading a dataset, whose examples are (simulation, pair), with features computed when they are needed.

    cxt dataset info results/datasets/processed
    cxt dataset verify results/datasets/processed
    cxt dataset export results/datasets/processed --out arrays

The data is in one arena of shared memory: one bit per genotype, and as few bits per target as the grid of times needs (9 as
published). That is about the size of the shards on disk.
"""

import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from cxt.config.network import SPECIAL_TOKENS, START_TOKEN, log_rates
from cxt.config.training import Storage
from cxt.console import counted
from cxt.data.examples import Batch, Example, ExampleDataset
from cxt.data.features import (
    compute_missing_fraction,
    compute_region_missing_fraction,
    count_inaccessible,
    find_first_sites,
)
from cxt.data.grid import Grid
from cxt.data.kernels import (
    accumulate,
    count_all_sites,
    fill_batch,
    find_largest_count,
    pack_bins,
    pack_haplotype_words,
    unpack_bins,
)
from cxt.data.manifest import read_manifest
from cxt.data.noise import BatchNoise
from cxt.data.regions import Cut
from cxt.data.shards import MANIFEST, check_content, read_shard
from cxt.data.shared_memory import Arena, free_memory
from cxt.data.soft_targets import LEVELS, read_soft_targets, soft_targets_path
from cxt.errors import BadRequest
from cxt.io import digest, find_directory
from cxt.scenarios.indices import SPLITS

LARGEST_SHARE = 0.7
"""Fraction of the free memory that a dataset may take with `auto`."""


# The threads of torch's OpenMP do not survive a fork, and a child that uses them waits forever. With one thread, it needs none.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


class PairDataset(ExampleDataset):
    """The examples of one split of a dataset.

    ``len()`` is the number of examples; ``[i]`` gives (X, y): X float32 log1p counts (2, scales, windows, samples), and y
    int64 tokens (windows + 1,), start token first. ``describe(i)`` returns scenario, simulation index and pair. Forked and
    spawned processes and threads can read it, and share one copy of the data. Forked processes compute with one torch
    thread.

    Parameters
    ----------
    path : path-like
        Directory of the dataset, with dataset.json, train/ and test/.
    split : {"train", "test"}
    grid : Grid, optional
        Grid of ln TMRCA for the tokens; the published one by default.
    storage : {"auto", "memory", "disk"}
        Where to hold the data; "auto" uses memory if the data takes at most 70% of what is free.
    scratch : str, optional
        Directory for the temporary file that holds the data on disk; the one for temporary files by default. Environment
        variables in it are replaced.
    soft_targets : path-like, optional
        Directory of a teacher's soft targets for this dataset, see `cxt.data.soft_targets`.
    progress : callable, optional
        Called with a line of text every 10 seconds and at the end.

    Raises
    ------
    BadRequest
        If the directory, a split or the manifest is missing, or a shard is damaged or not the one listed in the manifest; or if
        the data is to be on disk, and *scratch* does not exist or has too little space.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str,
        *,
        grid: Grid | None = None,
        storage: Storage = "auto",
        scratch: str | None = None,
        soft_targets: str | os.PathLike[str] | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        if split not in SPLITS:
            raise BadRequest(f"split must be one of {', '.join(SPLITS)}, got '{split}'")
        if storage not in get_args(Storage):
            raise BadRequest(f"storage must be one of {', '.join(get_args(Storage))}, got '{storage}'")
        began = time.monotonic()
        self._describe_shape(path, split, read_manifest(path), grid or Grid(), soft_targets)
        free = free_memory()
        size = self._layout()[1]
        on_disk = storage == "disk" or (storage == "auto" and size > LARGEST_SHARE * free)
        directory = find_directory(scratch, setting="scratch") if scratch and on_disk else tempfile.gettempdir()
        self._arena = Arena(size, on_disk=on_disk, directory=directory)
        self._attach()
        self._read(progress)
        if progress is not None:
            place = f"in a temporary file in {directory}" if on_disk else "in memory"
            progress(
                f"{self.path} {split}: {counted(len(self), 'example')}, {size / 1e6:,.1f} MB {place} "
                f"({free / 1e9:.1f} GB of memory free), read in {time.monotonic() - began:.1f} s"
            )

    def _describe_shape(self, path, split: str, manifest: dict, grid: Grid, soft_targets) -> None:
        self.path, self.split, self.grid, self.manifest = Path(path), split, grid, manifest
        self._soft_target_directory, self.has_soft_targets = soft_targets, soft_targets is not None
        self.windows, self.samples = manifest["windows"], manifest["samples"]
        self.scales = np.minimum(
            np.array(manifest["scales"], dtype=np.int64), self.windows
        )  # wider windows end at the same place
        self.pairs_per_simulation = manifest["pairs"]
        self._shards = manifest["splits"][split]["shards"]
        self._width = max(1, (grid.bins - 1).bit_length())
        self._dtype = np.dtype(np.int16)

    def _layout(self) -> tuple[dict, int]:
        """({name: (offset, dtype, shape)} of the arrays in the arena, its size); shapes may be upper bounds."""
        rows = sum(row["items"] for row in self._shards) // self.pairs_per_simulation
        sites = sum(row["sites"] for row in self._shards)
        bin_words = -(-self.windows * self._width // 64)
        fields = {
            "words": (np.uint64, ((sites // 64 + rows) * self.samples,)),  # 64 sites of a haplotype each
            "word_offsets": (np.int64, (rows + 1,)),
            "derived": (np.uint8 if self.samples <= 256 else np.uint16, (sites,)),
            "site_offsets": (np.int64, (rows + 1,)),
            "first_site": (np.int32, (rows, self.windows + 1)),
            "totals": (np.uint8, (rows, self.windows * self.samples)),
            "total_fits": (np.bool_, (rows,)),
            "pairs": (np.uint16, (rows, self.pairs_per_simulation, 2)),
            "bins": (np.uint64, (rows, self.pairs_per_simulation, bin_words)),
            "missing": (np.float32, (rows if self.manifest["missing"] else 0, len(self.scales), self.windows)),
            "inaccessible": (np.int32, (rows if self.manifest["missing"] else 0, self.windows)),  # bases of each base window
            "rates": (np.float32, (rows, 2)),
            "soft_targets": (np.int16, (rows * self.has_soft_targets, self.pairs_per_simulation, self.windows, len(LEVELS))),
            "index": (np.int64, (rows,)),
            "start": (np.int64, (rows,)),
        }
        layout, end = {}, 0
        for name, (dtype, shape) in fields.items():
            layout[name] = (end, dtype, shape)
            end += -(-int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize // 64) * 64
        return layout, end

    def _attach(self) -> None:
        for name, (offset, dtype, shape) in self._layout()[0].items():
            setattr(self, f"_{name}", self._arena.array(offset, dtype, shape))
        self._shard_indices = np.repeat(
            np.arange(len(self._shards)), [row["items"] // self.pairs_per_simulation for row in self._shards]
        )

    def handle(self) -> dict:
        """A description for `shared`, with which another process of this machine can share the data while this one lives."""
        return {
            "path": str(self.path.absolute()), "split": self.split, "manifest": digest(self.manifest),
            "grid": dataclasses.astuple(self.grid), "dtype": self._dtype.name, "arena": [self._arena.path, self._arena.size],
            "soft_targets": self._soft_target_directory,
        }  # fmt: skip

    @classmethod
    def shared(cls, handle: dict) -> "PairDataset":
        """Share the dataset of another process by its `handle`; BadRequest if its manifest has changed since."""
        self = cls.__new__(cls)
        manifest = read_manifest(handle["path"])
        if digest(manifest) != handle["manifest"]:
            raise BadRequest(f"{Path(handle['path']) / MANIFEST} has changed while it was in use; run the command again")
        self._describe_shape(handle["path"], handle["split"], manifest, Grid(*handle["grid"]), handle["soft_targets"])
        self._dtype = np.dtype(handle["dtype"])
        self._arena = Arena.attach(*handle["arena"])
        self._attach()
        return self

    def __reduce__(self):
        return PairDataset.shared, (self.handle(),)

    def _read(self, progress) -> None:
        self._word_offsets[0] = self._site_offsets[0] = 0
        row = widest = 0
        last_report = time.monotonic()
        for number, shard in enumerate(self._shards):
            row, largest = self._read_shard(shard, row)
            widest = max(widest, largest)
            if progress is not None and time.monotonic() - last_report > 10:
                last_report = time.monotonic()
                progress(f"{self.path} {self.split}: {number + 1}/{len(self._shards)} shards read")
        if widest > np.iinfo(np.int16).max:
            self._dtype = np.dtype(np.int32)

    def _read_shard(self, shard: dict, row: int) -> tuple[int, int]:
        """Read the simulations of a shard into the rows from *row* on; return (next row, largest count of any window)."""
        path = self.path / shard["path"]
        arrays, attributes = read_shard(path, sha256=shard["sha256"])
        check_content(path, arrays, attributes, row=shard, shape=self.manifest)
        widest, length = 0, self.manifest["sequence_length"]
        if self._soft_target_directory is not None:
            file = soft_targets_path(self._soft_target_directory, shard["path"])
            rows = slice(row, row + len(arrays["index"]))
            self._soft_targets[rows] = read_soft_targets(file, shard=shard["sha256"], shape=arrays["log_tmrca"].shape)
        total = np.empty((self.windows + 1) * self.samples, dtype=np.int32)
        for i in range(len(arrays["index"])):
            sites = slice(arrays["site_offsets"][i], arrays["site_offsets"][i + 1])
            packed, count = arrays["genotypes"][sites], int(sites.stop - sites.start)
            first, words = int(self._site_offsets[row]), -(-count // 64) * self.samples
            begin = int(self._word_offsets[row])
            pack_haplotype_words(packed, self._words[begin : begin + words].reshape(self.samples, -1))
            derived = np.bitwise_count(packed).sum(axis=1, dtype=self._derived.dtype)
            self._derived[first : first + count] = derived
            self._site_offsets[row + 1], self._word_offsets[row + 1] = first + count, begin + words
            self._first_site[row] = find_first_sites(
                arrays["positions"][sites], window_size=self.manifest["window_size"], windows=self.windows
            )
            total[:] = 0
            count_all_sites(derived, self._first_site[row], self.samples, total[self.samples :])
            self._total_fits[row] = total.max() <= np.iinfo(self._totals.dtype).max
            if self._total_fits[row]:
                self._totals[row] = total[self.samples :]
            accumulate(total, self.samples)
            widest = max(widest, find_largest_count(total, self.samples, self.scales.max()))
            pack_bins(self.grid.find_bins(arrays["log_tmrca"][i]), self._width, self._bins[row])
            for key, column in (("pairs", self._pairs), ("index", self._index), ("start", self._start)):
                column[row] = arrays[key][i]
            self._rates[row] = log_rates(arrays["mutation_rate"][i], arrays["recombination_rate"][i])
            if self.manifest["missing"]:
                mask = np.unpackbits(arrays["mask"][i], count=length, bitorder="little")
                self._missing[row] = compute_missing_fraction(
                    mask, window_size=self.manifest["window_size"], sequence_length=length, scales=self.scales
                )
                self._inaccessible[row] = count_inaccessible(mask, window_size=self.manifest["window_size"])
            row += 1
        return row, widest

    def __len__(self) -> int:
        return len(self._index) * self.pairs_per_simulation

    def describe(self, i: int) -> Example:
        """Scenario, simulation index and pair of example *i*."""
        row, pair = self._locate(i)
        a, b = map(int, self._pairs[row, pair])
        return Example(self._shards[self._shard_indices[row]]["scenario"], int(self._index[row]), (a, b))

    def start(self, i: int) -> int:
        """Start of example *i* in its simulation, in base pairs; 0 except with several regions per simulation."""
        return int(self._start[self._locate(i)[0]])

    def _locate(self, i: int) -> tuple[int, int]:
        return divmod(self._from_start(i), self.pairs_per_simulation)

    @functools.cached_property
    def _noisy_dtype(self) -> np.dtype:
        """int32 if a window has more sites than int16 can count, since noise may bring all of them into one bin."""
        widest = self.scales.max()
        most = max((int((first[widest:] - first[:-widest]).max()) for first in self._first_site), default=0)
        return np.promote_types(self._dtype, np.int32 if most > np.iinfo(np.int16).max else np.int16)

    def batch(
        self,
        examples: Sequence[int],
        *,
        noise: BatchNoise | None = None,
        cut: Cut | None = None,
        out: Batch | None = None,
    ) -> Batch:
        """Compute several examples at once, as small integers, with *noise*, and into the first places of *out*, if given.

        With *cut*, only a region of each, as if the example had no other sites; several of them are side by side in a row if
        the cut is packed.
        """
        rows, columns = np.array([self._locate(i) for i in examples], dtype=np.int64).reshape(-1, 2).T.copy()
        whole = cut is None
        per_row = 1 if cut is None else cut.per_row
        batch = self._room_for(len(rows) // per_row, out, noisy=noise is not None, cut=cut)
        cut = Cut.whole(len(rows), self.windows) if cut is None else cut
        tokens = batch.tokens.numpy()
        tokens[:, 0] = START_TOKEN  # the memory may have held other batches
        bins = tokens[:, 1:]
        regions = np.column_stack([rows, columns, cut.starts, cut.lengths, *cut.places()])
        if noise is None:
            self._fill(regions, batch.counts.numpy(), bins)
        else:
            self._fill_noisy(regions, noise, batch.counts.numpy(), bins)
        bins += SPECIAL_TOKENS
        if whole:  # the most frequent case, which is not to be slower for the others
            if batch.missing is not None:
                np.take(self._missing, rows, axis=0, out=batch.missing.numpy())
            np.take(self._rates, rows, axis=0, out=batch.rates.numpy())
            if batch.soft_targets is not None:
                batch.soft_targets.numpy()[:] = self._soft_targets[rows, columns]
            return batch
        self._fill_others(regions, batch)
        if cut.carry:
            self._carry_bins(regions, tokens)
        return batch

    def _fill(self, regions: np.ndarray, counts: np.ndarray, bins: np.ndarray) -> None:
        data = (
            self._words, self._word_offsets, self._derived, self._site_offsets, self._first_site, self._totals,
            self._total_fits, self._pairs, self._bins,
        )  # fmt: skip
        fill_batch(regions, data, self.scales, self._width, counts, bins)

    def _fill_noisy(self, regions: np.ndarray, noise: BatchNoise, counts: np.ndarray, bins: np.ndarray) -> None:
        for row, column, start, windows, place, first in regions.tolist():
            words = self._words[self._word_offsets[row] : self._word_offsets[row + 1]].reshape(self.samples, -1)
            noise.count_pair(
                words, self._first_site[row], self._pairs[row, column], scales=np.minimum(self.scales, windows),
                example=row * self.pairs_per_simulation + column, out=counts[place], start=start, windows=windows, first=first,
            )  # fmt: skip
            unpack_bins(self._bins[row, column], self._width, start, bins[place, first : first + windows])

    def _fill_others(self, regions: np.ndarray, batch: Batch) -> None:
        """Fill missing fractions, rates, soft targets, and the numbers of packed regions."""
        number = 0
        for row, column, start, windows, place, first in regions.tolist():
            there = slice(first, first + windows)
            number = 0 if first == 0 else number + 1
            if batch.missing is not None:
                batch.missing.numpy()[place, :, there] = compute_region_missing_fraction(
                    self._inaccessible[row, start : start + windows],
                    window_size=self.manifest["window_size"],
                    scales=self.scales,
                )
            if batch.soft_targets is not None:
                batch.soft_targets.numpy()[place, there] = self._soft_targets[row, column, start : start + windows]
            if batch.regions is None:
                batch.rates.numpy()[place] = self._rates[row]
            else:
                batch.rates.numpy()[place, there] = self._rates[row]
                batch.regions.numpy()[place, there] = number

    def _carry_bins(self, regions: np.ndarray, tokens: np.ndarray) -> None:
        """Let each region that has a window before it begin with the token of that window, in place of the start token."""
        before = np.empty(1, dtype=np.int64)
        for row, column, start, _, place, _ in regions.tolist():
            if start:
                unpack_bins(self._bins[row, column], self._width, start - 1, before)
                tokens[place, 0] = before[0] + SPECIAL_TOKENS


def open_dataset(
    path: str | os.PathLike[str],
    split: str,
    *,
    grid: Grid,
    storage: Storage,
    scratch: str | None = None,
    soft_targets: str | None = None,
    progress: Callable[[str], None],
) -> PairDataset:
    """Open a split for training: read by the first process of a machine, and shared with the other ranks that it starts."""
    key = f"CXT_SHARED_{split.upper()}"
    if os.environ.get("LOCAL_RANK", "0") != "0" and key in os.environ:
        return PairDataset.shared(json.loads(os.environ[key]))
    dataset = PairDataset(
        path, split, grid=grid, storage=storage, scratch=scratch, soft_targets=soft_targets, progress=progress
    )
    os.environ[key] = json.dumps(dataset.handle())
    return dataset
