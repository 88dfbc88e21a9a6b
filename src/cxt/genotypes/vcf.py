"""Genotypes from VCF and BCF files."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.genotypes.ancestral_fasta import AncestralFasta
from cxt.genotypes.records import ABSENT, MISSING, Contig, Records, Region
from cxt.genotypes.vcf_header import Header, read_header

CHUNK_RECORDS = 4096

CHUNK_GENOTYPES = 2**23
"""Alleles of a chunk: with many samples, it has fewer records."""

ENDLESS = 2**62


class VcfSource:
    """A VCF or BCF file as a source of genotypes; see `cxt.genotypes.records.Source`.

    Regions are read by the index (`.tbi` or `.csi`) if there is one that is not older than the file. Otherwise the whole file
    is read, in its order.

    Parameters
    ----------
    path : path-like
        VCF or BCF, plain or compressed by bgzip or gzip.
    ancestral : str
        Where ancestral alleles come from: `auto` = `INFO/AA` if the header has it, else the reference allele; `INFO/TAG`; `ref`
        = the reference allele; or the path of a FASTA file.

    Attributes
    ----------
    outside : dict or None
        {contig: records that were skipped, because they are outside the regions or at position 0}, of the last `read`; None if
        it used the index.

    Raises
    ------
    BadRequest
        If the file is not VCF or BCF, is cut off or damaged, or has no samples, genotypes or records; or for an *ancestral*
        that it does not have.
    """

    any_alleles = False

    def __init__(self, path, *, ancestral: str = "auto"):
        from cyvcf2.cyvcf2 import set_htslib_log_level

        set_htslib_log_level(0)  # what is wrong with a file, our own messages say
        self.path = Path(path)
        self.notes: list[str] = []
        self.populations: dict[str, str] = {}
        self.outside: dict[str, int] | None = {}
        self._header: Header = read_header(self.path)
        self.kind, self.samples = self._header.kind, self._header.samples
        self._index = self._find_index()
        first = self._read_first()
        self.contigs = self._list_contigs(first)
        self._tag, self.fasta = self._find_ancestral(ancestral)
        self.knows_ancestral = self._tag is not None or self.fasta is not None

    def read(self, regions: Sequence[Region], samples: Sequence[int]) -> Iterator[Records]:
        """Yield the records within *regions*, all if there are none, with the genotypes of *samples* (indices).

        Parameters
        ----------
        regions : sequence of Region
            That do not overlap.
        samples : sequence of int
            In any order, which is that of the genotypes.

        Raises
        ------
        BadRequest
            If the file is damaged, or no record has genotypes.
        """
        uses_index = bool(regions) and self._index is not None
        outside: dict[str, int] = {}
        chosen = [self.samples[sample] for sample in samples]
        vcf = self._open(chosen)
        places = {name: place for place, name in enumerate(vcf.samples)}
        order = [places[name] for name in chosen]
        limits: dict[str, list[tuple[int, int]]] = {}
        for contig, start, end in regions:
            limits.setdefault(contig, []).append((start, ENDLESS if end is None else end))
        read = with_genotypes = 0
        limit = min(CHUNK_RECORDS, max(1, CHUNK_GENOTYPES // (3 * len(vcf.samples))))
        chunk = _Chunk("", order)
        for variant in self._query(vcf, regions) if uses_index else self._stream(vcf):
            contig, position = variant.CHROM, variant.start
            # Position 0 of a VCF file is the telomere, before the first base.
            if position < 0 or (regions and not any(start <= position < end for start, end in limits.get(contig, ()))):
                outside[contig] = outside.get(contig, 0) + 1
                continue
            if contig != chunk.contig or len(chunk.positions) >= limit:
                yield from self._finish(chunk)
                chunk = _Chunk(contig, order)
            read += 1
            with_genotypes += chunk.add(variant, self._tag)
        yield from self._finish(chunk)
        self.outside = None if uses_index else outside
        if read and not with_genotypes:
            raise BadRequest(f"{self.path} has no genotypes: no record that was read has GT in the column FORMAT")

    def _finish(self, chunk: "_Chunk") -> Iterator[Records]:
        if chunk.positions:
            records = chunk.build()
            if self.fasta is not None:
                records = records._replace(ancestral=self.fasta.fetch(chunk.contig, records.positions))
            elif self._tag is None:
                records = records._replace(ancestral=[alleles[0] for alleles in records.alleles])
            yield records

    def _open(self, samples: Sequence[str] | None = None):
        """Open the file; with *samples*, the others are not decoded if that is possible."""
        from cyvcf2 import VCF

        # They are passed on as a text with commas, in which a leading ^ would exclude them.
        some = None
        if samples is not None and len(samples) < len(self.samples) and not any("," in s or s[0] == "^" for s in samples):
            some = list(samples)
        try:
            return VCF(str(self.path), samples=some)
        except Exception as error:  # cyvcf2 raises any kind
            raise BadRequest(
                f"{self.path}: the header is damaged ({first_line(error)}); bcftools view --header-only may say more"
            ) from None

    def _read_first(self):
        """Look at the first record, so that a file that cannot be read is refused before work starts."""
        vcf = self._open()
        if list(vcf.samples) != self.samples:
            raise BadRequest(f"{self.path}: the header is damaged: the names of the samples cannot be read")
        first = next(self._stream(vcf), None)
        if first is None:
            raise BadRequest(f"{self.path} has no records, only a header")
        if "GT" not in self._header.formats and "GT" not in first.FORMAT:
            raise BadRequest(f"{self.path} has no genotypes: there is no GT in the header, nor in the column FORMAT")
        if first.REF.isdigit():
            raise BadRequest(
                f"{self.path}: the reference allele of the first record is '{first.REF}', not a base; if the file was "
                "written from a tree sequence with alleles 0 and 1, give the tree sequence, or simulate nucleotides"
            )
        return first

    def _stream(self, vcf):
        records = iter(vcf)
        last = "the header"
        while True:
            try:
                variant = next(records)
            except StopIteration:
                return
            except Exception as error:
                if type(error) is not Exception:
                    raise
                raise BadRequest(
                    f"{self.path} is damaged or cut off: it cannot be read after {last}; copy or make it again, or see what "
                    "bcftools view says about it"
                ) from None
            if variant.start == 0 and not variant.ALT and not variant.FORMAT:
                # A line without columns: to ask for its alleles would crash.
                raise BadRequest(f"{self.path} is damaged: the line after {last} has no columns separated by tabs")
            last = f"{variant.CHROM}:{variant.start + 1}"
            yield variant

    def _query(self, vcf, regions: Sequence[Region]):
        """Records within *regions*, by the index."""
        for region in regions:
            number = self._count(region)
            if not number:
                continue
            contig = f"{{{region.contig}}}" if ":" in region.contig else region.contig
            found = 0
            for variant in vcf(f"{contig}:{region.start + 1}-{'' if region.end is None else region.end}"):
                found += 1
                if variant.start >= region.start:  # and no deletion that begins before it
                    yield variant
            # cyvcf2 takes an error while it reads a region for its end.
            if found != number:
                raise BadRequest(
                    f"{self.path} is damaged, or its index {self._index} is of another file: {found:,} of {number:,} records "
                    f"of {region.contig} could be read; make the index anew with bcftools index --force"
                )

    def _count(self, region: Region) -> int:
        """Number of records that overlap a region, according to the index."""
        import pysam

        verbosity = pysam.set_verbosity(0)
        try:
            if self.kind == "BCF":
                file = pysam.VariantFile(str(self.path), index_filename=str(self._index))
            else:
                file = pysam.TabixFile(str(self.path), index=str(self._index), encoding="utf-8")
            try:
                names = file.header.contigs if self.kind == "BCF" else file.contigs
                if region.contig not in names:
                    return 0
                return sum(1 for _ in file.fetch(region.contig, region.start, region.end))
            finally:
                file.close()
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"{self.path}, {region.contig}: the file or its index {self._index} is damaged ({first_line(error)}); "
                "copy it again, or make the index anew with bcftools index --force"
            ) from None
        finally:
            pysam.set_verbosity(verbosity)

    def _find_index(self) -> Path | None:
        if not self._header.bgzipped:
            return None
        for ending in (".csi", ".tbi"):
            index = self.path.with_name(self.path.name + ending)
            if index.is_file():
                if os.stat(index).st_mtime >= os.stat(self.path).st_mtime:
                    return index
                self.notes.append(
                    f"the index {index} is older than the file, and is not used: the whole file is read; make it anew with "
                    "bcftools index --force"
                )
        return None

    def _list_contigs(self, first) -> list[Contig]:
        contigs = [Contig(name, length) for name, length in self._header.contigs.items()]
        if first.CHROM not in self._header.contigs:
            # A header that does not know the contig of its first record may not know others.
            names = [name for name in self._list_names() if name not in self._header.contigs]
            self.notes.append(f"the header has no contig {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}")
            contigs += [Contig(name, None) for name in names]
        return contigs

    def _list_names(self) -> list[str]:
        """Names of the contigs of all records, in the order of the file."""
        names: dict[str, None] = {}
        last = None
        for variant in self._stream(self._open(self.samples[:1])):
            name = variant.CHROM
            if name != last:
                names[name] = None
                last = name
        return list(names)

    def _find_ancestral(self, ancestral: str) -> tuple[str | None, AncestralFasta | None]:
        """The tag, or the FASTA file; neither for the reference allele."""
        if ancestral == "ref" or (ancestral == "auto" and "AA" not in self._header.info):
            return None, None
        if ancestral == "auto" or ancestral.startswith("INFO/"):
            tag = "AA" if ancestral == "auto" else ancestral.removeprefix("INFO/")
            if tag not in self._header.info:
                raise BadRequest(
                    f"{self.path} has no INFO/{tag} for ancestral alleles{suggest_nearest(tag, self._header.info)}"
                )
            if self._header.info[tag] not in ("String", "Character"):
                raise BadRequest(f"{self.path}: INFO/{tag} must hold text, the ancestral allele; got {self._header.info[tag]}")
            return tag, None
        if ancestral == "tree":
            raise BadRequest(
                f"{self.path} is {self.kind}, which has no tree; ancestral alleles come from INFO/TAG, a FASTA file, or ref"
            )
        if not Path(ancestral).is_file():
            hint = f"; did you mean INFO/{ancestral}?" if ancestral in self._header.info else ""
            raise BadRequest(f"ancestral '{ancestral}' is neither auto, INFO/TAG, ref, nor a FASTA file{hint}")
        fasta = AncestralFasta(ancestral)
        fasta.check_contigs(contig.name for contig in self.contigs)
        return None, fasta


class _Chunk:
    """Records of a contig, one after another; *order* picks and sorts the samples."""

    def __init__(self, contig: str, order: list[int]):
        self.contig, self.order = contig, order
        self.positions: list[int] = []
        self.alleles: list[list[str]] = []
        self.ancestral: list[str | None] = []
        self.genotypes: list[np.ndarray | None] = []
        self.failed: list[bool] = []

    def add(self, variant, tag: str | None) -> bool:
        """Add a record, and return whether it has genotypes."""
        self.positions.append(variant.start)
        self.alleles.append([variant.REF, *variant.ALT])
        self.failed.append(variant.FILTER is not None)  # None also stands for PASS
        if tag is not None:
            text = variant.INFO.get(tag)
            self.ancestral.append(text if isinstance(text, str) else None)
        try:
            genotypes = variant.genotype.array()
        except Exception:  # of no particular kind
            if "GT" in variant.FORMAT:
                raise
            genotypes = None
        if genotypes is not None and genotypes.shape[1] > 3:
            _correct_phase(variant, genotypes)
        self.genotypes.append(genotypes)
        return genotypes is not None

    def build(self) -> Records:
        copies = max((array.shape[1] - 1 for array in self.genotypes if array is not None), default=1)
        genotypes = np.full((len(self.positions), len(self.order), copies), ABSENT, dtype=np.int16)
        phased = np.zeros(genotypes.shape[:2], dtype=bool)
        for k, array in enumerate(self.genotypes):
            if array is None:
                genotypes[k, :, 0] = MISSING
            else:
                genotypes[k, :, : array.shape[1] - 1] = array[self.order, :-1]
                phased[k] = array[self.order, -1]
        phased |= (genotypes[:, :, 1:] == ABSENT).all(axis=2)
        positions = np.array(self.positions, dtype=np.int64)
        failed = np.array(self.failed, dtype=bool)
        return Records(self.contig, positions, self.alleles, genotypes, phased, self.ancestral, failed)


def _correct_phase(variant, genotypes: np.ndarray) -> None:
    """With more than two copies, `0|1/1` is not phased, but cyvcf2 looks at the first separator only."""
    if not genotypes[:, -1].any():
        return
    fields = str(variant).rstrip("\r\n").split("\t")
    place = fields[8].split(":").index("GT")
    for row, field in zip(genotypes, fields[9:], strict=True):
        row[-1] = "/" not in field.split(":")[place]
