"""Indices of simulations: their ranges, their grouping into simulation batches, and which are held out for testing."""

EVALUATION_START = 1_000_000_000
"""First index of evaluation simulations. Datasets use indices from 0 on; the configuration's bounds keep them below this."""


def simulation_batches(*, simulations: int, batch: int, start: int = 0) -> list[tuple[int, int]]:
    """Group consecutive indices into simulation batches.

    Parameters
    ----------
    simulations : int
        Number of indices.
    batch : int
        Simulations in a batch; the last batch may have fewer.
    start : int
        First index.

    Returns
    -------
    list of (int, int)
        First index and number of simulations of each batch.
    """
    return [(start + i, min(batch, simulations - i)) for i in range(0, simulations, batch)]


def assign_split(index: int) -> str:
    """The split of simulation *index*: "test" if it is a multiple of 10, and otherwise "train".

    The rule is the same in all datasets, so that no checkpoint is tested on simulations that its ancestors were trained on.
    """
    return "test" if index % 10 == 0 else "train"


def count_in_split(start: int, count: int, split: str) -> int:
    """Number of indices among *start*, …, *start* + *count* - 1 that belong to *split*."""
    return sum(assign_split(i) == split for i in range(start, start + count))


SPLITS = ("train", "test")
"""The splits of a dataset."""
