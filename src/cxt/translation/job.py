"""One translation: its plan, the blocks that are done and those that are left, and the tracks that are put together at the end.

The estimates of each block and chunk of pairs are a file in the work directory, written atomically. An interrupted translation
goes on where it was, and several processes or machines can share the blocks.
"""

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxt.console import get_logger
from cxt.genotypes.store import GenotypeStore
from cxt.io import atomic_file
from cxt.translation.blocks import Block
from cxt.translation.contigs import ContigPlan
from cxt.translation.estimates import Reader, read_block

logger = get_logger(__name__)

PAIRS_PER_FILE = 64

PROGRESS_SECONDS = 10
"""Seconds between two lines of progress."""


class Unit(NamedTuple):
    """The smallest part of a translation: one block, and the pairs [from_pair, to_pair)."""

    plan: ContigPlan
    block: Block
    from_pair: int
    to_pair: int

    @property
    def file_name(self) -> str:
        """Name of the file with its estimates."""
        return f"{self.plan.place}-{self.block.keep_from}-{self.from_pair}.npz"


def list_units(plans: list[ContigPlan], *, pairs: int) -> list[Unit]:
    """All units, by contig, block and pair."""
    return [
        Unit(plan, block, begin, min(begin + PAIRS_PER_FILE, pairs))
        for plan in plans
        for block in plan.blocks
        for begin in range(0, pairs, PAIRS_PER_FILE)
    ]


def run_units(units: list[Unit], *, reader: Reader, store: GenotypeStore, pairs: np.ndarray, work: Path) -> None:
    """Estimate the units whose file does not exist, and log how far it is and how long it will take."""
    missing = set(list_missing(units, work=work))
    left = [unit for unit in units if unit.file_name in missing]
    if len(left) < len(units):
        logger.info(f"{len(units) - len(left)} of {len(units)} blocks are done, and are kept")
    size, windows = reader.model.config.window_size, reader.model.config.windows
    began = reported = time.monotonic()
    said: set[str] = set()
    loaded, sites = None, None
    for done, unit in enumerate(left, 1):
        plan, block = unit.plan, unit.block
        first, last = block.first, block.first + windows
        if sites is None or loaded != (plan.place, first):  # once for all pairs of a block
            loaded, sites = (plan.place, first), store.load(plan.name, first * size, min(last * size, plan.length))
        beyond = max(0, last - len(plan.windows.widths))  # windows after the end of a short contig
        estimates = read_block(
            reader,
            sites,
            pairs[unit.from_pair : unit.to_pair],
            block,
            contig=plan.name,
            called=plan.called[unit.from_pair : unit.to_pair],
            candidates=plan.candidates,
            accessible=np.pad(plan.windows.accessible[first:last], (0, beyond)),
            widths=np.pad(plan.windows.widths[first:last], (0, beyond), constant_values=size),
        )
        for text in estimates.warnings:  # at once, and how many blocks it concerns, at the end
            if (kind := describe_kind(text)) not in said:
                said.add(kind)
                logger.warning(f"{plan.name}:{first * size + 1:,}-{min(last * size, plan.length):,}: {text}")
        with atomic_file(work / unit.file_name) as file:
            np.savez(
                file,
                values=estimates.values,
                differences=estimates.differences.astype(np.int32),
                bases=estimates.bases,
                warnings=np.array(estimates.warnings, dtype=str),
                **({"bins": estimates.bins} if reader.kept_replicates else {}),
            )
        if time.monotonic() - reported > PROGRESS_SECONDS and done < len(left):
            reported = time.monotonic()
            seconds = (reported - began) / done * (len(left) - done)
            logger.info(f"translated {done / len(left):.0%}, {seconds:.0f} s left")


def describe_kind(text: str) -> str:
    """A warning without its numbers, which differ from block to block."""
    return re.sub(r" in \d+ of \d+ examples|\d[\d.e+-]*", "", text)


def list_missing(units: list[Unit], *, work: Path) -> list[str]:
    """Names of the files of units that are not translated yet."""
    done = {entry.name for entry in os.scandir(work)} if work.is_dir() else set()
    return [unit.file_name for unit in units if unit.file_name not in done]
