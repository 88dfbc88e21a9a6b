"""Which indices simulations have, how they are grouped into simulation batches, and which are held out for testing."""

EVALUATION_START = 1_000_000_000
"""First index of evaluation simulations; datasets use indices from 0, and the schema keeps them below."""


def simulation_batches(*, simulations: int, batch: int, start: int = 0) -> list[tuple[int, int]]:
    """(first index, count) of each batch of *simulations* consecutive indices; only the last may be shorter."""
    return [(start + i, min(batch, simulations - i)) for i in range(0, simulations, batch)]


def assign_split(index: int) -> str:
    """`test` if and only if *index* is a multiple of 10, in every dataset, so that nothing tested on was trained on."""
    return "test" if index % 10 == 0 else "train"


def count_in_split(start: int, count: int, split: str) -> int:
    """How many of the indices start..start+count-1 belong to *split*."""
    return sum(assign_split(i) == split for i in range(start, start + count))


SPLITS = ("train", "test")
