"""From records to usable sites: which are dropped and why, which allele is derived, and how much is unphased."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cxt.errors import BadRequest
from cxt.genotypes.records import ABSENT, MISSING, Haplotype, Records
from cxt.genotypes.store import Sites

BASES = "ACGT"

OTHER, SYMBOLIC = -3, -4
"""Codes of alleles that no usable site has: longer than one base, or not a base; and symbolic ones."""

BLOCKS = ("<NON_REF>", "<*>", "<X>")
"""Alternative alleles that stand for any other allele. Alone they mark a stretch without variants, as in gVCF."""

DROPPED = {
    "failed_filter": "failed a filter of the file (FILTER)",
    "masked": "inside the mask",
    "no_alternative": "no alternative allele (invariant sites, gVCF blocks)",
    "not_snv": "indels and others that are not SNVs",
    "symbolic": "symbolic alleles, spanning deletions",
    "all_missing": "no genotype called",
    "multiallelic": "more than two alleles",
    "not_segregating": "not segregating among the samples",
    "ancestral_unknown": "ancestral allele unknown",
    "same_position": "several SNVs at the same position",
}
"""{field of `Counts`: description}, in the order in which the reasons are tried: a record is counted for the first one."""

_REASONS = {name: code for code, name in enumerate(DROPPED, 1)}

TABLE_CONTIGS = 5
"""A table of counts has columns for at most this many contigs; if there are more, it has the totals only."""


@dataclasses.dataclass
class Counts:
    """What became of the records of a contig, or of several: `used`, or dropped for one of the reasons in `DROPPED`.

    outside : records outside the regions, or before the first base; None if they were not counted, because an index was used
    missing_genotypes and genotypes : of haplotypes, at the used sites
    """

    used: int = 0
    outside: int | None = 0
    failed_filter: int = 0
    masked: int = 0
    no_alternative: int = 0
    not_snv: int = 0
    symbolic: int = 0
    all_missing: int = 0
    multiallelic: int = 0
    not_segregating: int = 0
    ancestral_unknown: int = 0
    same_position: int = 0
    missing_genotypes: int = 0
    genotypes: int = 0

    @property
    def read(self) -> int:
        """Number of records within the regions: those used and those dropped."""
        return self.used + sum(getattr(self, name) for name in DROPPED)

    def as_dict(self) -> dict[str, int | None]:
        """All counts, for JSON, beginning with the records read."""
        return {"read": self.read} | dataclasses.asdict(self)

    def __add__(self, other: "Counts") -> "Counts":
        names = [field.name for field in dataclasses.fields(self) if field.name != "outside"]
        total = Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})
        total.outside = None if self.outside is None or other.outside is None else self.outside + other.outside
        return total


def format_counts(counts: Mapping[str, Counts]) -> str:
    """The counts as a table for the screen.

    Parameters
    ----------
    counts : mapping
        {contig: `Counts`}

    Returns
    -------
    str
        One line for the records outside the regions, if there are any or they were not counted; one for the records read, one
        for each reason that records were dropped for, and one for those used; a column for each contig if there are few, and
        one for the total.
    """
    total = sum(counts.values(), Counts())
    shown = dict(counts) if 1 < len(counts) <= TABLE_CONTIGS else {}
    columns = [*shown.values(), total]
    header = [*shown, "total" if len(counts) != 1 else next(iter(counts))]
    rows: list[tuple[str, list[int | None]]] = []
    if total.outside != 0:
        why = " (not counted: an index was used)" if total.outside is None else ""
        rows.append((f"outside the regions{why}", [column.outside for column in columns]))
    beside = len(rows)
    rows.append(("records read", [column.read for column in columns]))
    rows += [
        (f"- {description}", [getattr(column, name) for column in columns])
        for name, description in DROPPED.items()
        if getattr(total, name)
    ]
    rows.append(("used", [column.used for column in columns]))
    share = [f"{(values[-1] or 0) / total.read:.1%}" if total.read else "" for _, values in rows]
    share[:beside] = [""] * beside
    cells = [["", *header, ""]]
    cells += [
        [name, *("-" if n is None else f"{n:,}" for n in values), percent]
        for (name, values), percent in zip(rows, share, strict=True)
    ]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    )


def parse_ancestral(text: str | None) -> str:
    """The ancestral base in an annotation such as `A`, `a` (low confidence) or `A|||`: one of ACGT, or "" if unknown."""
    base = (text or "").partition("|")[0].strip().upper()
    return base if len(base) == 1 and base in BASES else ""


class _Alleles(NamedTuple):
    """The alleles of a record: a code for each, and the reason to drop the record whatever its genotypes are (0: none).

    An allele that can be used has a code from 0, the same for equal alleles.
    """

    codes: list[int]
    reason: int


def _encode_bases(alleles: tuple[str, ...]) -> _Alleles:
    codes, has_block, has_other = [], False, False
    for allele in map(str.upper, alleles):
        if len(allele) == 1 and allele in BASES:
            codes.append(BASES.index(allele))
        elif allele == "*":
            codes.append(MISSING)  # the base is deleted, by a deletion that begins before it
        elif allele[:1] == "<" or any(mark in allele for mark in "[]") or allele[:1] == "." or allele[-1:] == ".":
            codes.append(SYMBOLIC)
            has_block = has_block or allele in BLOCKS
        else:
            codes.append(OTHER)
            has_other = True
    alternative = [allele.upper() for allele in alleles[1:] if allele not in (".", "")]
    if all(allele in BLOCKS for allele in alternative):
        return _Alleles(codes, _REASONS["no_alternative"])
    if codes[0] < 0:
        return _Alleles(codes, _REASONS["not_snv"])
    if all(code < 0 for code in codes[1:]):
        return _Alleles(codes, _REASONS["not_snv" if has_other else "symbolic"])
    return _Alleles(codes, 0)


def _encode_any(alleles: tuple[str, ...]) -> _Alleles:
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(allele, len(numbers)) for allele in alleles]
    return _Alleles(codes, 0 if len(numbers) > 1 else _REASONS["no_alternative"])


class _Rows(NamedTuple):
    """SNVs whose position may still repeat. Only the *usable* ones become sites."""

    positions: np.ndarray
    usable: np.ndarray
    derived: np.ndarray
    missing: np.ndarray
    unphased: np.ndarray

    def take(self, index) -> "_Rows":
        return _Rows(*(array[index] for array in self))


class SiteFilter:
    """Turns the records of any format into biallelic sites with a known ancestral allele, and counts what it drops.

    A site is used if the called genotypes of the chosen samples have exactly two alleles, both single bases, of which one
    is the ancestral allele. Alleles that none of them has do not matter. Genotypes with a spanning deletion (`*`) are
    missing. If several SNVs that vary share a position, as after splitting of multi-allelic records, none of them is used;
    an indel at the same position, which by convention is anchored at the base before it, does not matter.

    Parameters
    ----------
    haplotypes : sequence of Haplotype
        Columns of the sites.
    samples : sequence of str
        Samples of the records' genotypes, in that order.
    any_alleles : bool
        Whether any two alleles make a site, as in a tree sequence; by default they must be two of ACGT.
    mask : bool array, optional
        True = *in*accessible, for each base. It belongs to one contig: set the attribute before the first records of the next
        one.
    beyond_mask : bool
        Whether positions beyond its end are inaccessible.
    keep_failed : bool
        Whether records that failed a filter of the file are used.

    Attributes
    ----------
    counts : dict
        {contig: `Counts`}; one that was not there is made when it is asked for. They are complete after `finish_contig`.
        Records that a source does not yield are for the caller to add, to `outside`.
    """

    def __init__(
        self,
        haplotypes: Sequence[Haplotype],
        samples: Sequence[str],
        *,
        any_alleles: bool = False,
        mask: np.ndarray | None = None,
        beyond_mask: bool = True,
        keep_failed: bool = False,
    ):
        self.samples = list(samples)
        self.any_alleles = any_alleles
        self.mask, self.beyond_mask, self.keep_failed = mask, beyond_mask, keep_failed
        self.counts: defaultdict[str, Counts] = defaultdict(Counts)
        places = {name: place for place, name in enumerate(self.samples)}
        self._columns = np.array([places[haplotype.sample] for haplotype in haplotypes], dtype=np.intp)
        self._copies = np.array([haplotype.copy for haplotype in haplotypes], dtype=np.intp)
        self._unphased = np.zeros(len(self.samples), dtype=np.int64)
        self._contig: str | None = None
        self._finished: set[str] = set()
        self._last = -1
        self._pending: _Rows | None = None

    @property
    def unphased(self) -> dict[str, int]:
        """Number of unphased heterozygous genotypes at used sites, by sample."""
        return dict(zip(self.samples, self._unphased.tolist(), strict=True))

    def push(self, records: Records) -> Sites | None:
        """Filter the records that follow, and return the sites that are settled: all but those at the last position.

        Parameters
        ----------
        records : Records
            Of the same contig as those before, unless `finish_contig` was called.

        Returns
        -------
        Sites or None
            None if there are none.

        Raises
        ------
        BadRequest
            If records are not sorted, or a genotype is not valid.
        """
        if not len(records.positions):
            return None
        self._check_order(records)
        counts = self.counts[records.contig]
        reasons, rows = self._examine(records)
        for name, code in _REASONS.items():
            setattr(counts, name, getattr(counts, name) + int(np.count_nonzero(reasons == code)))
        if self._pending is not None:
            rows = _Rows(*(np.concatenate(pair) for pair in zip(self._pending, rows, strict=True)))
        settled = rows.positions < self._last
        self._pending = rows.take(~settled)
        return self._settle(rows.take(settled), counts)

    def finish_contig(self) -> Sites | None:
        """Return the last sites of the contig, after which records of another one may follow."""
        contig, rows = self._contig, self._pending
        if contig is None:
            return None
        self._finished.add(contig)
        self._contig, self._pending, self._last = None, None, -1
        return None if rows is None else self._settle(rows, self.counts[contig])

    def _check_order(self, records: Records) -> None:
        contig, positions = records.contig, records.positions
        if self._contig is None:
            if contig in self._finished:
                raise BadRequest(
                    f"the records of contig {contig} are not together: {contig}:{positions[0] + 1} comes after those of "
                    "another contig; sort the file, for example with bcftools sort"
                )
            self._contig = contig
        elif contig != self._contig:
            raise ValueError(f"records of {contig} follow those of {self._contig} without finish_contig()")
        before = np.concatenate([[self._last], positions[:-1]])
        wrong = np.flatnonzero(positions < before)
        if len(wrong):
            first = wrong[0]
            raise BadRequest(
                f"the records are not sorted: {contig}:{positions[first] + 1} comes after {contig}:{before[first] + 1}; sort "
                "the file, for example with bcftools sort"
            )
        self._last = int(positions[-1])

    def _examine(self, records: Records) -> tuple[np.ndarray, _Rows]:
        """The reason to drop each record, 0 if none is known yet, and the SNVs that vary."""
        genotypes = records.genotypes
        numbers: dict[tuple[str, ...], int] = {}
        which = np.array([numbers.setdefault(tuple(alleles), len(numbers)) for alleles in records.alleles])
        encode = _encode_any if self.any_alleles else _encode_bases
        encoded = [encode(alleles) for alleles in numbers]
        widths = np.array([len(alleles.codes) for alleles in encoded])
        # A genotype of MISSING or ABSENT takes one of the last two columns.
        table = np.full((len(encoded), widths.max() + 2), OTHER, dtype=np.int16)
        for row, alleles in zip(table, encoded, strict=True):
            row[: len(alleles.codes)] = alleles.codes
        table[:, MISSING], table[:, ABSENT] = MISSING, ABSENT
        self._check_genotypes(records, widths[which])
        codes = table[which[:, None, None], genotypes]
        called = self._to_haplotypes(codes)

        number = max(int(table.max()) + 1, 1) if self.any_alleles else len(BASES)
        states = np.stack([(called == code).any(axis=1) for code in range(number)], axis=1)
        used = states.sum(axis=1)
        ancestral = self._find_ancestral(records, list(numbers), which)
        knows = (ancestral >= 0) & states[np.arange(len(states)), ancestral]
        reasons = np.array([alleles.reason for alleles in encoded])[which]
        for condition, name in (
            ((called == OTHER).any(axis=1), "not_snv"),
            ((called == SYMBOLIC).any(axis=1), "symbolic"),
            (used == 0, "all_missing"),
            (used > 2, "multiallelic"),
            (used == 1, "not_segregating"),
            (~knows, "ancestral_unknown"),
        ):
            reasons[(reasons == 0) & condition] = _REASONS[name]
        if self.mask is not None:
            positions = records.positions
            masked = np.full(len(positions), self.beyond_mask)
            covered = positions < len(self.mask)
            masked[covered] = self.mask[positions[covered]]
            reasons[masked] = _REASONS["masked"]
        if records.failed is not None and not self.keep_failed:
            reasons[records.failed] = _REASONS["failed_filter"]

        # A record in which only the reference allele occurs says nothing against another one at the same position.
        varies = np.isin(reasons, [0] + [_REASONS[name] for name in ("multiallelic", "ancestral_unknown", "not_segregating")])
        reference = table[which, 0]
        is_reference = (reference >= 0) & states[np.arange(len(states)), reference] & (used == 1)
        rows = np.flatnonzero(varies & ~is_reference)
        usable = reasons[rows] == 0
        first = ancestral[rows, None]
        derived = (called[rows] >= 0) & (called[rows] != first)
        heterozygous = (codes[rows] == first[..., None]).any(axis=2) & (
            (codes[rows] >= 0) & (codes[rows] != first[..., None])
        ).any(axis=2)
        return reasons, _Rows(
            positions=np.asarray(records.positions, dtype=np.int64)[rows],
            usable=usable,
            derived=derived.astype(np.uint8),
            missing=called[rows] < 0,
            unphased=heterozygous & ~records.phased[rows],
        )

    def _check_genotypes(self, records: Records, alleles: np.ndarray) -> None:
        """BadRequest for a genotype with an allele that its record does not have, or with more copies than the sample has."""
        genotypes = records.genotypes
        highest = genotypes.max(axis=(1, 2), initial=ABSENT)
        if (wrong := np.flatnonzero(highest >= alleles)).size:
            raise BadRequest(
                f"record {records.contig}:{records.positions[wrong[0]] + 1} has {alleles[wrong[0]]} alleles, but a genotype "
                f"with allele {highest[wrong[0]]}, counted from 0; the file is damaged, or was edited"
            )
        copies = genotypes.shape[2]
        expected = np.zeros((len(self.samples), max(copies, int(self._copies.max(initial=0)) + 1)), dtype=bool)
        expected[self._columns, self._copies] = True
        surplus = ~expected[:, :copies]
        if surplus.any() and (genotypes[:, surplus] >= 0).any():
            record, sample, copy = np.argwhere((genotypes >= 0) & surplus)[0]
            raise BadRequest(
                f"record {records.contig}:{records.positions[record] + 1}: sample {self.samples[sample]} has {copy + 1} or "
                f"more copies, but {int(expected[sample].sum())} were expected"
            )

    def _to_haplotypes(self, codes: np.ndarray) -> np.ndarray:
        """(records, samples, copies) to (records, haplotypes)."""
        there = self._copies < codes.shape[2]
        called = np.full((len(codes), len(self._columns)), ABSENT, dtype=np.int16)
        called[:, there] = codes[:, self._columns[there], self._copies[there]]
        return called

    def _find_ancestral(self, records: Records, alleles: list[tuple[str, ...]], which: np.ndarray) -> np.ndarray:
        """Code of the ancestral allele of each record, -1 if it is not known."""
        if self.any_alleles:
            codes = [dict(zip(texts, _encode_any(texts).codes, strict=True)) for texts in alleles]
            found = [
                -1 if text is None else codes[number].get(text, -1)
                for number, text in zip(which.tolist(), records.ancestral, strict=True)
            ]
        else:
            known: dict[str | None, int] = {}
            for text in set(records.ancestral):
                base = parse_ancestral(text)
                known[text] = BASES.index(base) if base else -1
            found = [known[text] for text in records.ancestral]
        return np.array(found, dtype=np.int16)

    def _settle(self, rows: _Rows, counts: Counts) -> Sites | None:
        """The sites among *rows*, which hold all SNVs at their positions."""
        _, inverse, times = np.unique(rows.positions, return_inverse=True, return_counts=True)
        alone = times[inverse] == 1
        counts.same_position += int(np.count_nonzero(rows.usable & ~alone))
        rows = rows.take(rows.usable & alone)
        if not len(rows.positions):
            return None
        counts.used += len(rows.positions)
        counts.genotypes += rows.missing.size
        counts.missing_genotypes += int(np.count_nonzero(rows.missing))
        self._unphased += rows.unphased.sum(axis=0)
        return Sites(rows.positions, rows.derived, rows.missing)
