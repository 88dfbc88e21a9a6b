"""Minibatches of examples, and what all datasets have in common."""

import math
import operator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cxt.config.network import START_TOKEN
from cxt.data.regions import Cut
from cxt.data.soft_targets import LEVELS


class Example(NamedTuple):
    """The simulation and pair of a training example."""

    scenario: str
    index: int
    pair: tuple[int, int]


class Batch(NamedTuple):
    """A minibatch as it is copied to the training device; `compute_model_input` turns it into the network's input."""

    counts: torch.Tensor  # (B, 2, scales, windows, samples) int16 or int32, bin 0 zero
    missing: torch.Tensor | None  # (B, scales, windows) float32 fractions, or None
    tokens: torch.Tensor  # (B, windows + 1) int64
    rates: torch.Tensor | None = None  # (B, 2) float32 from `log_rates`, or None if all are unknown
    soft_targets: torch.Tensor | None = None  # (B, windows, levels) int16 from `cxt.data.soft_targets`, or None
    regions: torch.Tensor | None = None  # (B, windows) int64, regions of packed rows, whose rates are (B, windows, 2); or None

    def first(self, examples: int) -> "Batch":
        """A batch of the first *examples*, sharing memory."""
        return Batch(*(None if part is None else part[:examples] for part in self))

    def narrow(self, rows: int, windows: int) -> "Batch":
        """A batch of *rows* rows of *windows* windows in the memory of this one, which has at least as many."""
        _, _, scales, most, samples = self.counts.shape
        if windows == most:
            return self.first(rows)
        if self.regions is not None:
            raise ValueError(f"packed rows have {most} windows, got {windows}")
        return Batch(
            _reuse(self.counts, rows, 2, scales, windows, samples),
            None if self.missing is None else _reuse(self.missing, rows, scales, windows),
            _reuse(self.tokens, rows, windows + 1),
            None if self.rates is None else self.rates[:rows],
            None if self.soft_targets is None else _reuse(self.soft_targets, rows, windows, self.soft_targets.shape[2]),
        )


def _reuse(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of a contiguous tensor in another *shape*, sharing memory."""
    return tensor.view(-1)[: math.prod(shape)].view(shape)


def compute_model_input(counts: torch.Tensor, missing: torch.Tensor | None) -> torch.Tensor:
    """The network's input: log1p of raw counts, with missing fractions in frequency bin 0.

    Parameters
    ----------
    counts : integer tensor (B, 2, scales, windows, samples)
    missing : float32 tensor (B, scales, windows), optional
        Missing fractions f, which become ln(1 + e^f) in the XOR channel and ln(1 + e^(1-f)) in the XNOR channel.

    Returns
    -------
    float32 tensor (B, 2, scales, windows, samples)
    """
    x = torch.log1p(counts.float())
    if missing is not None:
        x[:, 0, :, :, 0] = torch.nn.functional.softplus(missing)
        x[:, 1, :, :, 0] = torch.nn.functional.softplus(1 - missing)
    return x


class ExampleDataset(Dataset):
    """Base class of datasets; a single example is computed as a batch of one.

    A subclass has `batch`, `__len__`, *windows*, *samples*, *scales*, *manifest*, and *_dtype* and *_noisy_dtype*, the integer
    types of counts without and with noise.
    """

    has_soft_targets = False

    def _from_start(self, i: int) -> int:
        """Convert the index *i*, which may be negative, to one from the start; IndexError if it is out of range."""
        try:
            i = operator.index(i)
        except TypeError:
            raise TypeError(f"the index of an example must be a whole number from 0 to {len(self) - 1}, got {i!r}") from None
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        return i % len(self)

    def empty_batch(
        self, examples: int, *, pin: bool = False, noisy: bool = False, windows: int | None = None, packed: bool = False
    ) -> Batch:
        """A batch that `batch` can fill repeatedly, with noise if *noisy*; *pin* pins its memory for copies to a GPU.

        Its rows have *windows* windows, by default those of the dataset, and hold several regions if *packed*.
        """
        windows = self.windows if windows is None else windows
        shape = (examples, 2, len(self.scales), windows, self.samples)
        counts = torch.from_numpy(np.empty(shape, dtype=self._noisy_dtype if noisy else self._dtype))
        fractions = torch.empty((examples, len(self.scales), windows)) if self.manifest["missing"] else None
        tokens = torch.full((examples, windows + 1), START_TOKEN, dtype=torch.int64)
        rates = torch.empty((examples, windows, 2) if packed else (examples, 2))
        soft_targets = torch.empty((examples, windows, len(LEVELS)), dtype=torch.int16) if self.has_soft_targets else None
        regions = torch.empty((examples, windows), dtype=torch.int64) if packed else None
        parts = (counts, fractions, tokens, rates, soft_targets, regions)
        return Batch(*(part.pin_memory() if pin and part is not None else part for part in parts))

    def _room_for(self, examples: int, out: Batch | None, *, noisy: bool, cut: Cut | None = None) -> Batch:
        """The first *examples* rows of *out*, or a new batch; ValueError if *out* is too small, or not for noise.

        With *cut*, the rows have its number of windows.
        """
        windows, packed = (self.windows, False) if cut is None else (cut.row_windows, cut.is_packed)
        if out is None:
            return self.empty_batch(examples, noisy=noisy, windows=windows, packed=packed)
        if noisy and out.counts.numpy().dtype < self._noisy_dtype:
            raise ValueError("this batch cannot hold the counts of examples with noise; use empty_batch(…, noisy=True)")
        if len(out.tokens) < examples:
            raise ValueError(f"{examples} examples do not fit into a batch of {len(out.tokens)}")
        if out.counts.shape[3] < windows:
            raise ValueError(f"{windows} windows do not fit into a batch with {out.counts.shape[3]}")
        if packed != (out.regions is not None):
            raise ValueError("packed regions need a batch from empty_batch(…, packed=True), and only they")
        return out.narrow(examples, windows)

    def __getitems__(self, examples) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the examples of a batch, computed at once; called by torch's loaders."""
        batch = self.batch(examples)
        return list(zip(compute_model_input(batch.counts, batch.missing), batch.tokens, strict=True))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.__getitems__([i])[0]
