"""The accessibility mask of a request: read and checked for all of its contigs before work starts."""

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxt.console import get_logger
from cxt.data.masks import check_interval_names, check_memory, describe_mask, read_intervals, read_mask, refuse_unreadable
from cxt.errors import BadRequest
from cxt.genotypes.ancestral_fasta import ROUNDING, list_names, suggest_contig
from cxt.genotypes.records import Contig

logger = get_logger(__name__)


class MaskFile:
    """An accessibility mask for contigs of a file of genotypes.

    In a BED file of accessible intervals, a contig without any is inaccessible as a whole; in one of inaccessible intervals, it
    is accessible as a whole. Either is logged.

    Parameters
    ----------
    path : path-like
        A BED file, or a .npz file with one value for each base.
    marks : {"accessible", "inaccessible"}
        Meaning of the intervals, or of the true values.
    contigs : sequence of Contig
        Those that are asked for.

    Raises
    ------
    BadRequest
        If it cannot be read, names none of the contigs, has intervals past the end of one, or is a .npz file of another length
        or for several contigs.
    """

    def __init__(self, path, *, marks: str, contigs: Sequence[Contig]):
        self.path, self.marks = Path(path), marks
        self._array: np.ndarray | None = None
        self._intervals: dict[str, np.ndarray] = {}  # int64 (intervals, 2) of each contig that has any
        if self.path.name.lower().endswith(".npz"):
            self._array = self._read_array(contigs)
        else:
            with refuse_unreadable(self.path):
                self._intervals = _read_bed(self.path, contigs)
            self._report_absent(contigs)

    def _read_array(self, contigs: Sequence[Contig]) -> np.ndarray:
        if len(contigs) != 1:
            raise BadRequest(
                f"mask {self.path} has one array, but there are {len(contigs)} contigs; pass a BED file, or choose a contig "
                "(--regions)"
            )
        mask = read_mask(self.path, marks=self.marks)
        name, length = contigs[0]
        if length is not None and abs(len(mask) - length) > ROUNDING:
            raise BadRequest(
                f"mask {self.path} has {len(mask):,} values, but contig {name} has {length:,} bp; expected one value for each "
                "base"
            )
        return mask

    def _report_absent(self, contigs: Sequence[Contig]) -> None:
        absent = [name for name, _ in contigs if name not in self._intervals]
        if not absent:
            return
        if self.marks == "accessible":
            logger.warning(
                f"mask {self.path} has no intervals on {list_names(absent)}: as its intervals mark what is accessible, all "
                "bases there are inaccessible"
            )
        else:
            logger.info(
                f"mask {self.path} has no intervals on {list_names(absent)}: as its intervals mark what is inaccessible, all "
                "bases there are accessible"
            )

    def load(self, contig: str, length: int | None) -> np.ndarray:
        """The mask of a contig, and log how much of it is accessible.

        After the last interval of a BED file, everything is inaccessible if intervals mark what is accessible, and the reverse.

        Parameters
        ----------
        contig : str
        length : int or None
            Base pairs; if it is not known, the mask ends with the last interval.

        Returns
        -------
        bool array (length,)
            True = inaccessible.
        """
        if self._array is not None:
            mask = self._array
            if length is not None:
                missing = max(0, length - len(mask))
                mask = np.pad(mask[:length], (0, missing), constant_values=self.marks == "accessible")
        else:
            intervals = self._intervals.get(contig, np.zeros((0, 2), dtype=np.int64))
            size = int(intervals[:, 1].max(initial=0)) if length is None else length
            check_memory(self.path, size)
            mask = np.full(size, self.marks == "accessible")
            for left, right in intervals.tolist():
                mask[left:right] = self.marks == "inaccessible"
        if len(mask):
            logger.info(describe_mask(f"{self.path}, {contig}", mask))
        return mask


def _read_bed(path: Path, contigs: Sequence[Contig]) -> dict[str, np.ndarray]:
    """Intervals of those of *contigs* that the file names, int64 (intervals, 2)."""
    lengths = dict(contigs)
    columns: dict[str, tuple[array, array, list[str | None]]] = {}
    known: dict[str | None, str | None] = {}  # the same object for equal names, of which there may be millions
    others: dict[str, None] = {}
    for name, left, right, label in read_intervals(path):
        if name not in lengths:
            others[name] = None
            continue
        length = lengths[name]
        if length is not None and right > length:
            raise BadRequest(
                f"mask {path}: an interval of contig {name} ends at {right:,}, but the contig has {length:,} bp; is it of "
                "another assembly?"
            )
        lefts, rights, labels = columns.setdefault(name, (array("q"), array("q"), []))
        lefts.append(left)
        rights.append(right)
        labels.append(known.setdefault(label, label))
    if not columns:
        if not others:
            raise BadRequest(f"mask {path} has no intervals")
        first = next(iter(lengths))
        raise BadRequest(f"mask {path} has no intervals on {list_names(list(lengths))}{suggest_contig(first, others)}")
    intervals = {}
    for name, (lefts, rights, labels) in columns.items():
        if lefts == rights:
            raise BadRequest(f"mask {path}: all intervals of '{name}' are empty")
        if any(label is not None for label in labels):
            check_interval_names(path, list(zip(lefts, rights, labels, strict=True)))
        intervals[name] = np.column_stack([np.frombuffer(lefts, dtype=np.int64), np.frombuffer(rights, dtype=np.int64)])
    return intervals
