"""Ancestral alleles from a FASTA file: one sequence for each contig, with the ancestral base at each position."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cxt.console import get_logger
from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.genotypes.records import Contig

logger = get_logger(__name__)

BLOCK = 2**20
"""Base pairs that are fetched at once."""

ROUNDING = 1
"""Base pairs by which lengths may differ: where tskit transforms the positions of a VCF, it transforms the length as well."""


def list_names(names: Sequence[str]) -> str:
    """Names for a message, of which there may be thousands."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def suggest_contig(name: str, contigs: Iterable[str]) -> str:
    """The end of a message about a contig that is not there; the usual mistake is `chr`."""
    contigs = list(contigs)
    other = name.removeprefix("chr") if name.startswith("chr") else f"chr{name}"
    return f"; did you mean '{other}'?" if other in contigs else suggest_nearest(name, contigs)


class AncestralFasta:
    """A FASTA file with an index, which is made if there is none.

    Parameters
    ----------
    path : path-like
        Plain or compressed by bgzip. Sequences are found by the name of the contig; those of Ensembl's ancestral genomes, such
        as `ANCESTOR_for_chromosome:GRCh38:22:1:50818468:1`, by the name within.

    Raises
    ------
    BadRequest
        If it cannot be read or indexed.
    """

    def __init__(self, path):
        import pysam

        self.path = Path(path)
        verbosity = pysam.set_verbosity(0)
        try:
            self._file = pysam.FastaFile(str(path))
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"FASTA {path} cannot be read or indexed: {first_line(error)}; it must be plain or compressed by bgzip, and "
                "its index is made with samtools faidx, where the directory can be written"
            ) from None
        finally:
            pysam.set_verbosity(verbosity)
        lengths = dict(zip(self._file.references, self._file.lengths, strict=True))
        if not lengths:
            raise BadRequest(f"FASTA {path} has no sequences")
        self._names = {name: name for name in lengths}
        for name in lengths:
            if match := re.match(r"ANCESTOR_for_[a-z]+:[^:]*:([^:]+):", name):
                self._names.setdefault(match[1], name)
        self._lengths = lengths

    def check_contigs(self, contigs: Iterable[str]) -> None:
        """BadRequest if none of *contigs* is there."""
        contigs = list(contigs)
        if contigs and not any(name in self._names for name in contigs):
            raise self._explain_missing(contigs[0])

    def check_request(self, contigs: Sequence[Contig], *, named: bool) -> None:
        """Check the sequences of the contigs that are asked for, before work starts.

        Parameters
        ----------
        contigs : sequence of Contig
        named : bool
            Whether they were asked for by name. Otherwise one without a sequence is not refused, because a header may list
            contigs without records; the ancestral alleles there are unknown, and a warning says so.

        Raises
        ------
        BadRequest
            If there is no such sequence, it has another length than the contig, or cannot be read.
        """
        absent = [name for name, _ in contigs if name not in self._names]
        if absent and (named or len(absent) == len(contigs)):
            raise self._explain_missing(absent[0])
        if absent:
            logger.warning(
                f"FASTA {self.path} has no sequences for {list_names(absent)}: the ancestral alleles there are unknown, and "
                "records are dropped"
            )
        for contig, length in contigs:
            if contig not in self._names:
                continue
            found = self._lengths[self._names[contig]]
            if length is not None and abs(found - length) > ROUNDING:
                raise BadRequest(
                    f"FASTA {self.path}: {self._names[contig]} has {found:,} bp, but contig {contig} has {length:,}; is it of "
                    "another assembly?"
                )
            self.fetch(contig, np.array([found - 1]))  # so that a file that was cut off is noticed

    def _explain_missing(self, contig: str) -> BadRequest:
        return BadRequest(f"FASTA {self.path} has no sequence called '{contig}'{suggest_contig(contig, self._names)}")

    def fetch(self, contig: str, positions: np.ndarray) -> list[str] | list[None]:
        """The base at each of *positions*, counted from 0; None for a contig without a sequence.

        Raises
        ------
        BadRequest
            If the sequence is shorter, or cannot be read.
        """
        if contig not in self._names:
            return [None] * len(positions)
        name = self._names[contig]
        length = self._lengths[name]
        if len(positions) and positions.max() >= length:
            raise BadRequest(
                f"FASTA {self.path}: {name} has {length:,} bp, but there is a record at {contig}:{int(positions.max()) + 1}; "
                "is it of another assembly?"
            )
        bases = np.empty(len(positions), dtype="U1")
        blocks = positions // BLOCK
        for block in np.unique(blocks):
            rows = np.flatnonzero(blocks == block)
            first, last = int(positions[rows].min()), int(positions[rows].max())
            try:
                text = self._file.fetch(name, first, last + 1)
            except (OSError, ValueError) as error:
                raise BadRequest(
                    f"FASTA {self.path} is damaged, or its index is of another file: {first_line(error)}"
                ) from None
            if len(text) != last + 1 - first:
                raise BadRequest(
                    f"FASTA {self.path} is damaged, or its index is of another file; make it anew with samtools faidx"
                )
            bases[rows] = np.array(list(text))[positions[rows] - first]
        return bases.tolist()
