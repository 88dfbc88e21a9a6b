"""Reading a user's file of any format into a store of usable genotypes."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from cxt.console import get_logger
from cxt.errors import BadRequest
from cxt.genotypes.ancestral_fasta import list_names
from cxt.genotypes.filters import Counts, SiteFilter, format_counts
from cxt.genotypes.records import ABSENT, Haplotype, Records, Region, Source
from cxt.genotypes.selection import find_samples, format_region, read_populations, read_sample_names, resolve_regions
from cxt.genotypes.store import GenotypeStore, GenotypeWriter, Sites

logger = get_logger(__name__)

PROGRESS_SECONDS = 10


def read_genotypes(
    source: Source,
    *,
    out: str | os.PathLike[str],
    regions: Sequence[Region] = (),
    samples: Sequence[str] | str | None = None,
    populations: Mapping[str, str] | str | os.PathLike[str] | None = None,
    masks: Callable[[str], np.ndarray | None] | None = None,
    beyond_mask: bool = True,
    keep_failed: bool = False,
    least_lengths: Mapping[str, int] | None = None,
) -> GenotypeStore:
    """Read a file of genotypes, keep what can be used, and count what is dropped and why.

    Each sample has as many haplotypes as its largest ploidy among the records read; where it has fewer, as on the X chromosome
    of a male, those that are not there are missing. Haplotypes are in the order of the samples in the file, and contigs in the
    order of its header, whatever the order of the records and of *regions*; those that the header does not have come last.

    Parameters
    ----------
    source : Source
        From `cxt.genotypes.sources.open_source`.
    out : path-like
        Directory to write.
    regions : sequence of Region
        What to read; by default everything. An end past that of the contig is cut.
    samples : sequence of str, or str, optional
        Names; or as one text, names with commas between them, or a file with one on each line. All samples by default.
    populations : mapping or path-like, optional
        {sample: population}, or a file for `read_populations`; by default what the file of genotypes says.
    masks : callable, optional
        From a contig's name to its mask, a bool array, True = inaccessible, or None; see `SiteFilter`.
    beyond_mask : bool
        Whether positions beyond the end of a mask are inaccessible.
    keep_failed : bool
        Whether records that failed a filter of the file are used.
    least_lengths : mapping, optional
        {contig: base pairs that it has at least}, used where the file does not say how long it is. Such a contig ends with the
        last record read, or there if that is farther.

    Returns
    -------
    GenotypeStore
        Its report has the keys `format`; `regions`, as [contig, start, end]; `counts`, of each contig, and `total`, see
        `Counts`, of which `outside` is None where an index was used; `unphased`, the number of unphased heterozygous genotypes
        of each sample that has any; `notes`, texts that were logged as warnings, too.

    Raises
    ------
    BadRequest
        If there is no such contig or sample, a region begins past the end of its contig, the FASTA file of ancestral alleles
        does not fit the contigs, records are not sorted or are
        damaged, or no usable site is left; with a table of the counts.
    """
    listed = read_sample_names(samples) if isinstance(samples, str) else samples
    chosen = list(range(len(source.samples))) if listed is None else find_samples(listed, source.samples)
    if not chosen:
        raise BadRequest("there are no samples; expected genotypes of at least one")
    _check_unique(source.samples)
    if populations is None:
        populations = source.populations
    elif not isinstance(populations, Mapping):
        populations = read_populations(populations, source.samples)
    wanted = resolve_regions(regions, source.contigs, clip=True)
    if source.fasta is not None:
        names = {region.contig for region in wanted}
        asked = [contig for contig in source.contigs if contig.name in names or not names]
        source.fasta.check_request(asked, named=bool(names))
    reading = _Reading(source, chosen, populations, wanted, out, masks, beyond_mask, keep_failed, least_lengths or {})
    copies = None
    while True:
        more = reading.run(copies)
        if isinstance(more, GenotypeStore):
            return more
        copies = more


class _Reading:
    """Passes over a file: another one is needed where a sample turns out to have more copies than the first records have."""

    def __init__(
        self,
        source: Source,
        chosen: list[int],
        populations: Mapping[str, str],
        wanted: list[Region],
        out,
        masks,
        beyond_mask: bool,
        keep_failed: bool,
        least_lengths: Mapping[str, int],
    ):
        self.source, self.chosen, self.populations, self.wanted = source, chosen, populations, wanted
        self.out, self.masks, self.beyond_mask, self.keep_failed = out, masks, beyond_mask, keep_failed
        self.samples = [source.samples[sample] for sample in chosen]
        self.lengths, self.least_lengths = dict(source.contigs), least_lengths

    def run(self, copies: int | None) -> GenotypeStore | int:
        """Read the file with *copies* of each sample, by default those of its first records; or return how many it needs."""
        self.contig: str | None = None
        self.last: dict[str, int] = {}  # position of each contig
        self.seen = np.ones(len(self.chosen), dtype=np.int64)  # copies of each sample
        self.writer: GenotypeWriter | None = None
        self.with_sites: set[str] = set()
        self.unknown_length: list[str] = []
        self.notes = list(self.source.notes)
        self.records, self.reported = 0, time.monotonic()
        try:
            for records in self.source.read(self.wanted, self.chosen):
                if not len(records.positions):
                    continue
                self._look_at_copies(records)
                if copies is None:
                    copies = records.genotypes.shape[2]
                if self.seen.max() > copies:
                    self._discard()
                    return max(int(self.seen.max()), copies + 1)
                if self.writer is None:
                    self._begin(copies)
                self._add(records)
            if self.writer is None:
                raise BadRequest(f"there are no records{self._where()}")
            self._finish_contig()
            return self._finish()
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        if self.writer is not None:
            self.writer.discard()

    def _where(self) -> str:
        return f" in {', '.join(map(format_region, self.wanted))}" if self.wanted else ""

    def _look_at_copies(self, records: Records) -> None:
        is_there = (records.genotypes != ABSENT).any(axis=0)
        copies = np.where(is_there, np.arange(1, records.genotypes.shape[2] + 1), 1)
        self.seen = np.maximum(self.seen, copies.max(axis=1))

    def _list_haplotypes(self, copies: Sequence[int]) -> list[Haplotype]:
        return [
            Haplotype(sample, copy, int(count), self.populations.get(sample))
            for sample, count in zip(self.samples, copies, strict=True)
            for copy in range(count)
        ]

    def _begin(self, copies: int) -> None:
        haplotypes = self._list_haplotypes([copies] * len(self.samples))
        self.writer = GenotypeWriter(self.out, haplotypes)
        self.filter = SiteFilter(
            haplotypes,
            self.samples,
            any_alleles=self.source.any_alleles,
            beyond_mask=self.beyond_mask,
            keep_failed=self.keep_failed,
        )

    def _add(self, records: Records) -> None:
        if records.contig != self.contig:
            self._finish_contig()
            self.contig = records.contig
            self.filter.mask = self.masks(records.contig) if self.masks is not None else None
        self._write(self.filter.push(records))
        self.last[records.contig] = int(records.positions[-1])
        self.records += len(records.positions)
        if time.monotonic() - self.reported > PROGRESS_SECONDS:
            self.reported = time.monotonic()
            logger.info(f"{self.records:,} records read, up to {records.contig}:{self.last[records.contig] + 1:,}")

    def _write(self, sites: Sites | None) -> None:
        if sites is None or not len(sites.positions):
            return
        assert self.writer is not None
        assert self.contig is not None
        if self.contig not in self.with_sites:
            self.with_sites.add(self.contig)
            self.writer.add_contig(self.contig, None)
        self.writer.append(*sites)

    def _finish_contig(self) -> None:
        if self.contig is None:
            return
        self._write(self.filter.finish_contig())
        if self.contig in self.with_sites:
            self.writer.set_length(self._find_length(self.contig))

    def _find_length(self, contig: str) -> int:
        """Length of a contig; where the file does not know it, that of what was read."""
        known = self.lengths.get(contig)
        after_last = self.last[contig] + 1
        if known is not None and known >= after_last:
            return known
        if known is None:
            self.unknown_length.append(contig)
            return max(after_last, self.least_lengths.get(contig, 0))
        self.notes.append(f"contig {contig} has records up to {after_last:,}, past the length that the file states, {known:,}")
        return after_last

    def _finish(self) -> GenotypeStore:
        assert self.writer is not None
        counts = self._count()
        table = format_counts(counts)
        if not self.with_sites:
            total = sum(counts.values(), Counts())
            hint = " (--ancestral ref takes the reference allele as ancestral)" if total.ancestral_unknown else ""
            if total.masked and total.masked == total.read:
                hint = " (all records are inside the mask: does --mask-marks say what its intervals mean?)"
            raise BadRequest(f"no usable site is left{self._where()}{hint}:\n{table}")
        if self.unknown_length:
            names = list_names(self.unknown_length)
            self.notes.append(
                f"the file does not say how long {names} is; taken to end with the last record read, or with the region that "
                "was asked for if that is farther"
            )
        if empty := [contig for contig in counts if contig not in self.with_sites]:
            self.notes.append(f"no usable site on {list_names(empty)}: left out")
        logger.info(table)
        for note in self.notes:
            logger.warning(f"note: {note}")
        lengths = {name: length or 0 for name, length in self.writer.contigs}  # all were set
        regions = self.wanted or [Region(contig) for contig in self._in_order(lengths)]
        report = {
            "format": self.source.kind,
            "regions": [
                [contig, start, lengths[contig] if end is None else min(end, lengths[contig])]
                for contig, start, end in regions
                if contig in lengths
            ],
            "counts": {contig: one.as_dict() for contig, one in counts.items()},
            "total": sum(counts.values(), Counts()).as_dict(),
            "unphased": {sample: number for sample, number in self.filter.unphased.items() if number},
            "notes": self.notes,
        }
        return self.writer.finish(report, self._list_haplotypes(self.seen), order=self.lengths)

    def _in_order(self, contigs: Iterable[str]) -> list[str]:
        """Contigs in the order of the header, which with an index is not that in which they are read; others last."""
        ranks = {name: rank for rank, name in enumerate(self.lengths)}
        return sorted(contigs, key=lambda contig: ranks.get(contig, len(ranks)))

    def _count(self) -> dict[str, Counts]:
        """Counts of each contig that was asked for, or has records."""
        outside = self.source.outside
        names = dict.fromkeys([*self.last, *(region.contig for region in self.wanted)])
        if not self.wanted:
            names |= dict.fromkeys(contig for contig, number in (outside or {}).items() if number)
        counts = {contig: self.filter.counts[contig] for contig in self._in_order(names)}
        for contig, one in counts.items():
            one.outside = None if outside is None else outside.get(contig, 0)
        return counts


def _check_unique(samples: Sequence[str]) -> None:
    """BadRequest if two samples have the same name."""
    if len(set(samples)) < len(samples):
        name = next(name for place, name in enumerate(samples) if name in samples[:place])
        raise BadRequest(f"two samples are called '{name}'; names must be unique")
