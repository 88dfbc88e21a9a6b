"""One translation: its plan, the blocks that are done and those that are left, and the tracks that are put together at the end.

The estimates of each block and chunk of pairs are a file in the work directory, written atomically. An interrupted translation
goes on where it was, and several processes or machines can share the blocks.
"""

import os
import re
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxt.console import get_logger
from cxt.genotypes.store import GenotypeStore, Sites
from cxt.io import atomic_file
from cxt.translation.blocks import Block
from cxt.translation.contigs import ContigPlan
from cxt.translation.estimates import Estimates, Reader, read_block
from cxt.translation.request import count_read_windows

logger = get_logger(__name__)

PAIRS_PER_FILE = 64

PROGRESS_SECONDS = 10
"""Seconds between two lines of progress."""

EMPTY_BLOCKS = 8
"""Blocks without sites whose estimates are kept for others like them."""


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
    remove_damaged(units, work=work)
    missing = set(list_missing(units, work=work))
    left = [unit for unit in units if unit.file_name in missing]
    if len(left) < len(units):
        logger.info(f"{len(units) - len(left)} of {len(units)} blocks are done, and are kept")
    size = reader.model.config.window_size
    began = reported = time.monotonic()
    said: set[str] = set()
    loaded, sites = None, None
    empty: dict[tuple, Estimates] = {}
    for done, unit in enumerate(left, 1):
        plan, block = unit.plan, unit.block
        first, last = block.first, block.first + count_read_windows(reader.model, len(plan.windows.widths))
        if sites is None or loaded != (plan.place, first):  # once for all pairs of a block
            loaded, sites = (plan.place, first), store.load(plan.name, first * size, min(last * size, plan.length))
        beyond = max(0, last - len(plan.windows.widths))  # windows after the end of a short contig
        accessible = np.pad(plan.windows.accessible[first:last], (0, beyond))
        widths = np.pad(plan.windows.widths[first:last], (0, beyond), constant_values=size)
        key = identify_empty(unit, sites, reader, accessible=accessible, widths=widths)
        estimates = None if key is None else empty.get(key)
        if estimates is None:
            estimates = read_block(
                reader,
                sites,
                pairs[unit.from_pair : unit.to_pair],
                block,
                contig=plan.name,
                called=plan.called[unit.from_pair : unit.to_pair],
                candidates=plan.candidates,
                accessible=accessible,
                widths=widths,
            )
        if key is not None:
            if len(empty) >= EMPTY_BLOCKS:
                empty.clear()
            empty[key] = estimates
        for text in estimates.warnings:  # at once, and how many blocks it concerns, at the end
            if (kind := describe_kind(text)) not in said:
                said.add(kind)
                logger.warning(f"{plan.name}:{first * size + 1:,}-{min(last * size, plan.length):,}: {text}")
        with atomic_file(work / unit.file_name, durable=False) as file:
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


def identify_empty(unit: Unit, sites: Sites, reader: Reader, *, accessible: np.ndarray, widths: np.ndarray) -> tuple | None:
    """What the estimates of a block without any site depend on, equal for blocks with equal estimates; None for other blocks.

    Data with few variants, or a long stretch without any that is taken as it is, have thousands of such blocks.
    """
    if len(sites.positions) or reader.reading != "marginal":  # sampled sequences depend on the place of the block
        return None
    block = unit.block
    called = unit.plan.called[unit.from_pair : unit.to_pair] > 0
    bounds = block.keep_from - block.first, block.keep_to - block.first
    return *bounds, len(unit.plan.candidates), called.tobytes(), accessible.tobytes(), widths.tobytes()


def remove_damaged(units: list[Unit], *, work: Path) -> None:
    """Remove files of units that a crash of the machine left empty or cut off, so that these are translated again."""
    for unit in units:
        path = work / unit.file_name
        if path.is_file() and not zipfile.is_zipfile(path):
            logger.warning(f"{path} is damaged: that block is translated again")
            path.unlink()


def describe_kind(text: str) -> str:
    """A warning without its numbers, which differ from block to block."""
    return re.sub(r" in \d+ of \d+ examples|\d[\d.e+-]*", "", text)


def list_missing(units: list[Unit], *, work: Path) -> list[str]:
    """Names of the files of units that are not translated yet."""
    done = {entry.name for entry in os.scandir(work)} if work.is_dir() else set()
    return [unit.file_name for unit in units if unit.file_name not in done]
