"""Regions of examples: which windows of which example a batch contains.

All of it is a function of (seed, epoch, example or batch), so that it depends neither on ranks nor on where a run was resumed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cxt.config.regions import RegionPlan
from cxt.random_seeds import GOLDEN, hash_key, mix_bits


@dataclasses.dataclass(frozen=True)
class Cut:
    """The region of each example of a batch, `per_row` of them side by side in each row; all rows have the same length.

    Attributes
    ----------
    starts, lengths : int64 array (examples,)
        First window, and number of windows.
    per_row : int
        Regions in a row.
    is_packed : bool
        Whether the batch tells which region of its row a window belongs to.
    carry : bool
        Whether a region begins with the token of the window before it, where there is one.
    """

    starts: np.ndarray
    lengths: np.ndarray
    per_row: int = 1
    is_packed: bool = False
    carry: bool = False

    @classmethod
    def whole(cls, examples: int, windows: int) -> "Cut":
        """All windows of each example."""
        return cls(np.zeros(examples, np.int64), np.full(examples, windows, np.int64))

    @property
    def row_windows(self) -> int:
        """Windows of each row; ValueError if rows differ."""
        sums = self.lengths.reshape(-1, self.per_row).sum(axis=1)
        if len(sums) and (sums != sums[0]).any():
            raise ValueError("the rows of a batch must have the same number of windows")
        return int(sums[0]) if len(sums) else 0

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The row of each region, and its first window in that row."""
        lengths = self.lengths.reshape(-1, self.per_row)
        firsts = np.cumsum(lengths, axis=1) - lengths
        return np.repeat(np.arange(len(lengths)), self.per_row), firsts.ravel()


def draw_numbers(key: int, counters, numbers) -> np.ndarray:
    """A pseudo-random integer from 0 to *numbers* - 1 for each counter, the same for the same *key* and counter: int64."""
    with np.errstate(over="ignore"):
        words = mix_bits(np.uint64(key) + (np.asarray(counters, dtype=np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    return (words % np.asarray(numbers, dtype=np.uint64)).astype(np.int64)


def cut_for_validation(examples: Sequence[int], plan: RegionPlan) -> Cut:
    """Regions of the plan's largest length, at places that depend on the examples only."""
    places = plan.dataset_windows - plan.windows + 1
    starts = draw_numbers(hash_key("validation region"), examples, places)
    return Cut(starts, np.full(len(starts), plan.windows, np.int64))


def fill_rows(key: int, examples, *, per_row: int, shortest: int, longest: int, windows: int) -> np.ndarray:
    """Lengths of regions that fill rows of *windows* windows exactly.

    Each length is drawn among those with which the others can still fill the row, and the lengths of a row are shuffled.

    Parameters
    ----------
    key : int
        Key of the random numbers.
    examples : (rows,) integers
        The first example of each row, which its lengths depend on.
    per_row : int
        Regions in a row.
    shortest, longest : int
        Limits of a length.
    windows : int
        Windows of a row, from per_row · shortest to per_row · longest.

    Returns
    -------
    int64 array (rows, per_row)
    """
    counters = np.asarray(examples, dtype=np.uint64) * np.uint64(2 * per_row)
    lengths = np.empty((len(counters), per_row), dtype=np.int64)
    left = np.full(len(counters), windows, dtype=np.int64)
    for place in range(per_row):
        others = per_row - place - 1
        low, high = np.maximum(shortest, left - others * longest), np.minimum(longest, left - others * shortest)
        lengths[:, place] = low + draw_numbers(key, counters + np.uint64(place), high - low + 1)
        left -= lengths[:, place]
    for place in range(per_row - 1, 0, -1):  # Fisher and Yates
        chosen = draw_numbers(key, counters + np.uint64(per_row + place), place + 1)
        rows = np.arange(len(lengths))
        lengths[rows, place], lengths[rows, chosen] = lengths[rows, chosen], lengths[rows, place]
    return lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionSchedule:
    """The regions of each batch of a run.

    Attributes
    ----------
    plan : RegionPlan
        Lengths and numbers.
    seed : int
        Seed of the run.
    grad_accum : int
        Batches of an optimizer step; fewer in the last step of an epoch.
    batches_per_epoch, total_steps : int
        Batches of an epoch on each device, and optimizer steps of the run.
    """

    plan: RegionPlan
    seed: int
    grad_accum: int
    batches_per_epoch: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.batches_per_epoch // self.grad_accum)

    def count_row_windows(self, epoch: int, batch: int) -> int:
        """Windows of each row of a batch of an epoch, both counted from 0: the same on all ranks."""
        plan, regions = self.plan, self.plan.regions
        if regions.first_windows:
            step = epoch * self.steps_per_epoch + batch // self.grad_accum
            share = min(1.0, step / max(1.0, regions.growth * (self.total_steps - 1)))
            return round(regions.first_windows + share * (plan.windows - regions.first_windows))
        if regions.shortest and not regions.pack:
            key = hash_key(self.seed, "region length", epoch)
            return regions.shortest + int(draw_numbers(key, batch, plan.windows - regions.shortest + 1))
        return plan.row_windows

    def cut(self, epoch: int, batch: int, examples: Sequence[int]) -> Cut:
        """The regions of the *examples* of a batch of an epoch, both counted from 0."""
        plan, width = self.plan, self.count_row_windows(epoch, batch)
        if plan.regions.in_order:
            starts = np.full(len(examples), batch % plan.chunks * plan.windows, np.int64)
            return Cut(starts, np.full(len(examples), plan.windows, np.int64), carry=plan.regions.carry)
        if plan.regions.pack:
            lengths = fill_rows(
                hash_key(self.seed, "region lengths", epoch), examples[:: plan.per_row], per_row=plan.per_row,
                shortest=plan.shortest, longest=plan.windows, windows=width,
            ).ravel()  # fmt: skip
        else:
            lengths = np.full(len(examples), width, np.int64)
        starts = draw_numbers(hash_key(self.seed, "region", epoch), examples, plan.dataset_windows - lengths + 1)
        return Cut(starts, lengths, plan.per_row, plan.regions.pack, plan.regions.carry)

    def weigh(self, epoch: int, batch: int) -> float:
        """Factor of a batch's loss with which every window of its optimizer step counts the same.

        The loss of a batch is a mean over its windows, and gradients are those of the sum of all losses of a step divided by
        `grad_accum`.
        """
        first = batch // self.grad_accum * self.grad_accum
        batches = range(first, min(first + self.grad_accum, self.batches_per_epoch))
        windows = [self.count_row_windows(epoch, other) for other in batches]
        return windows[batch - first] * self.grad_accum / sum(windows)
