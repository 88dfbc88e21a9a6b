"""Indices of simulations: their ranges, their grouping into simulation batches, and which are held out for testing."""

EVALUATION_START = 1_000_000_000
"""First index of evaluation simulations. Datasets use indices from 0 on; the configuration's bounds keep them below this."""


HELD_OUT_EVERY = 10
"""Of this many consecutive indices of a dataset, one is held out for testing."""


def simulation_batches(*, simulations: int, batch: int, start: int = 0) -> list[tuple[int, int]]:
    """Group consecutive indices into simulation batches.

    Parameters
    ----------
    simulations : int
        Number of indices.
    batch : int
        Simulations in a batch; the last batch may have fewer, or one more: a batch of one would hold no training simulation.
    start : int
        First index.

    Returns
    -------
    list of (int, int)
        First index and number of simulations of each batch.
    """
    starts = list(range(0, simulations, batch))
    if len(starts) > 1 and simulations - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], simulations][: len(starts)]
    return [(start + first, end - first) for first, end in zip(starts, ends, strict=True)]


def assign_split(index: int) -> str:
    """The split of simulation *index*: "test" if it is a multiple of 10, and otherwise "train".

    The rule is the same in all datasets, so that no checkpoint is tested on simulations that its ancestors were trained on.
    """
    return "test" if index % HELD_OUT_EVERY == 0 else "train"


def count_in_split(start: int, count: int, split: str) -> int:
    """Number of indices among *start*, …, *start* + *count* - 1 that belong to *split*."""
    held_out = (start + count + HELD_OUT_EVERY - 1) // HELD_OUT_EVERY - (start + HELD_OUT_EVERY - 1) // HELD_OUT_EVERY
    return held_out if split == "test" else count - held_out


SPLITS = ("train", "test")
"""The splits of a dataset."""
