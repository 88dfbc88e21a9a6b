"""Blocks of a genome: what the network reads at once, and the windows that are kept of it.

A network reads a fixed number of windows. It knows less about windows at the ends of what it reads than about those in the
middle, so that it reads flanks, of which the estimates are dropped. Blocks begin at multiples of a fixed number of windows
from the start of the contig. So the estimate of a window does not depend on the region that a user asks for.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cxt.errors import BadRequest


class Block(NamedTuple):
    """A block of a contig, in windows counted from its start.

    contig : place of the contig in the list of contigs
    first : first window that the network reads
    keep_from, keep_to : windows [keep_from, keep_to) that are kept
    """

    contig: int
    first: int
    keep_from: int
    keep_to: int


def choose_flank(windows: int, flank: int | None = None) -> int:
    """Windows of a flank for a network that reads *windows*: a fifth, or *flank*.

    Raises
    ------
    BadRequest
        If the flanks would leave nothing.
    """
    if flank is None:
        return windows // 5
    if flank < 0 or 2 * flank >= windows:
        raise BadRequest(f"flank must be from 0 to {(windows - 1) // 2} windows for a model that reads {windows}, got {flank}")
    return flank


def list_blocks(
    contig: int, *, total: int, regions: Sequence[tuple[int, int]], read: Sequence[tuple[int, int]], windows: int, flank: int
) -> list[Block]:
    """Cut the *regions* of a contig into blocks.

    Parameters
    ----------
    contig : int
        Place of the contig in the list of contigs.
    total : int
        Windows of the contig.
    regions : sequence of (int, int)
        Windows [from, to) to estimate, ascending and disjoint.
    read : sequence of (int, int)
        Windows [from, to) with data. A block is moved into the only one that overlaps its core, so that it does not read
        windows without data in place of a flank; if several do, it stays where it is.
    windows : int
        Windows that the network reads.
    flank : int
        Windows on each side that are dropped, except at the ends of the contig and of *read*.

    Returns
    -------
    list of Block
    """
    core = windows - 2 * flank
    blocks = []
    for low, high in regions:
        for number in range(low // core, -(-high // core)):
            core_from, core_to = number * core, (number + 1) * core
            # By the whole core, whatever part of it is asked for, so that estimates do not depend on that.
            around = [(a, b) for a, b in read if a < core_to and core_from < b]
            begin, end = around[0] if len(around) == 1 else (0, total)
            first = max(begin, min(core_from - flank, end - windows))
            first = max(0, min(first, total - windows))
            # Windows outside of the segment have no data.
            keep_from, keep_to = max(core_from, low, first), min(core_to, high, first + windows)
            if keep_from < keep_to:
                blocks.append(Block(contig, first, keep_from, keep_to))
    return blocks
