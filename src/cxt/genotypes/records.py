"""What the readers of all file formats have in common: regions, contigs, haplotypes, and chunks of records."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # it needs the contigs of this module
    from cxt.genotypes.ancestral_fasta import AncestralFasta

MISSING, ABSENT = -1, -2
"""Codes of a genotype's allele: not called; and not there, because the individual has fewer copies of this contig."""


class Contig(NamedTuple):
    """A sequence of the reference, and its length in base pairs (None if the file does not say)."""

    name: str
    length: int | None


class Region(NamedTuple):
    """A part of a contig, [start, end) in base pairs counted from 0; an end of None is that of the contig."""

    contig: str
    start: int = 0
    end: int | None = None


class Haplotype(NamedTuple):
    """One copy of the genome of an individual: its sample, the number of the copy from 0, and its population if known."""

    sample: str
    copy: int
    copies: int
    population: str | None = None

    @property
    def name(self) -> str:
        """The sample's name, followed by `/1`, `/2`… if the individual has several copies."""
        return self.sample if self.copies == 1 else f"{self.sample}/{self.copy + 1}"


class Records(NamedTuple):
    """Consecutive records of one contig as a file has them, before anything is dropped.

    positions : int64 (records,), base pairs counted from 0; may repeat or be out of order
    alleles : for each record, the reference allele and the alternative ones
    genotypes : int16 (records, samples, copies), index of the allele, `MISSING` or `ABSENT`
    phased : bool (records, samples); True also where phase does not matter, as for one copy
    ancestral : for each record, the ancestral allele as text, or None if it is not known
    failed : bool (records,), whether a record failed a filter of the file; None if the format has none
    """

    contig: str
    positions: np.ndarray
    alleles: Sequence[Sequence[str]]
    genotypes: np.ndarray
    phased: np.ndarray
    ancestral: Sequence[str | None]
    failed: np.ndarray | None = None


class Source(Protocol):
    """A file of genotypes that is open for reading.

    kind : name of the format, for messages
    samples : names of the individuals, in the order of the file
    contigs : in the order of the file
    knows_ancestral : whether records may have an ancestral allele
    any_alleles : whether any two alleles make a usable site, as in a tree sequence; False if they must be two of ACGT
    populations : {sample: population} if the file says so
    fasta : the FASTA file that ancestral alleles come from, or None
    notes : what the user should know about the file, for the report
    outside : {contig: records that the last `read` passed over because they are outside the regions, or before the first
        base}; None if it did not count them, because an index leaves them unread
    """

    kind: str
    samples: list[str]
    contigs: list[Contig]
    knows_ancestral: bool
    any_alleles: bool
    populations: dict[str, str]
    fasta: "AncestralFasta | None"
    notes: list[str]
    outside: dict[str, int] | None

    def read(self, regions: Sequence[Region], samples: Sequence[int]) -> Iterator[Records]:
        """Yield the records within *regions* in the order of the file, with the genotypes of *samples* (indices)."""
        ...
