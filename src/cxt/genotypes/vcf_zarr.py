"""Genotypes from VCF Zarr (`.vcz`), a directory or a zip file, of Zarr format 2 or 3."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import zarr

from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.genotypes.ancestral_fasta import AncestralFasta
from cxt.genotypes.records import ABSENT, Contig, Records, Region

REQUIRED = ("call_genotype", "contig_id", "sample_id", "variant_allele", "variant_contig", "variant_position")
"""Arrays that a file must have."""

METADATA_FILES = ("zarr.json", ".zgroup")
"""Files of the root group that show that a directory is in Zarr format."""

CHUNK_GENOTYPES = 2**22
"""Genotypes to read at once; never less than a chunk of the file."""

SCAN_RECORDS = 2**20
"""Records of which contig and position are read at once."""


class VcfZarrSource:
    """A VCF Zarr file as a source of genotypes; see `cxt.genotypes.records.Source`.

    Records at position 0, which is the telomere, are outside of every region, as in VCF.
    Genotypes count as unphased where the file does not say that they are phased (`call_genotype_phased`).

    Parameters
    ----------
    path : path-like
        A directory or a zip file.
    ancestral : str
        `auto` = `variant_AA` if the file has it, else the reference allele; `ref` = the reference allele;
        `INFO/TAG` = `variant_TAG`; or the path of a FASTA file.

    Raises
    ------
    BadRequest
        If the file cannot be read, lacks an array, or has no records, or for an *ancestral* that it does not have.
    """

    kind = "VCF Zarr"
    any_alleles = False

    def __init__(self, path, *, ancestral: str = "auto"):
        self.path = Path(path)
        self._group = _open(self.path)
        names = set(self._group.array_keys())
        for name in REQUIRED:
            if name not in names:
                raise BadRequest(f"{path} has no array '{name}', which VCF Zarr needs{_explain(name, names)}")
        self._genotypes = self._group["call_genotype"]
        self._phased = self._group["call_genotype_phased"] if "call_genotype_phased" in names else None
        self.samples = self._read_names("sample_id")
        self._check_shapes()
        contigs = self._read_names("contig_id")
        lengths = [int(length) for length in self._read("contig_length")] if "contig_length" in names else []
        lengths += [0] * (len(contigs) - len(lengths))
        self.contigs = [Contig(name, length if length > 0 else None) for name, length in zip(contigs, lengths, strict=True)]
        self._filters = self._find_filters(names)
        self.fasta: AncestralFasta | None = None
        self._ancestral = self._find_ancestral(ancestral, names)
        self.knows_ancestral = self._ancestral is not None or self.fasta is not None
        self.populations: dict[str, str] = {}
        self.notes: list[str] = []
        self.outside: dict[str, int] | None = {}
        if self._phased is None:
            self.notes.append("the file has no array call_genotype_phased: all genotypes count as unphased")

    def _check_shapes(self) -> None:
        group, genotypes = self._group, self._genotypes
        if genotypes.ndim != 3 or genotypes.dtype.kind not in "iu":
            raise BadRequest(
                f"{self.path}, array 'call_genotype': expected integers of shape (records, samples, copies), "
                f"got shape {genotypes.shape} and type {genotypes.dtype}"
            )
        records, samples, _ = genotypes.shape
        expected = {"variant_contig": (records,), "variant_position": (records,), "sample_id": (samples,)}
        if self._phased is not None:
            expected["call_genotype_phased"] = (records, samples)
        for name, shape in expected.items():
            if group[name].shape != shape:
                raise BadRequest(f"{self.path}, array '{name}': expected shape {shape}, got {group[name].shape}")
        shape = group["variant_allele"].shape
        if len(shape) != 2 or shape[0] != records:
            raise BadRequest(f"{self.path}, array 'variant_allele': expected shape ({records}, alleles), got {shape}")
        if not samples:
            raise BadRequest(f"{self.path} has no samples")
        if not records:
            raise BadRequest(f"{self.path} has no records")

    def _find_filters(self, names: set[str]) -> np.ndarray | None:
        """Columns of 'variant_filter' of filters that a record can fail; None if there are none."""
        if not {"variant_filter", "filter_id"} <= names:
            return None
        filters = self._read_names("filter_id")
        if self._group["variant_filter"].shape != (self._genotypes.shape[0], len(filters)):
            raise BadRequest(f"{self.path}, array 'variant_filter': expected a column for each of the {len(filters)} filters")
        return np.flatnonzero([name != "PASS" for name in filters])

    def _find_ancestral(self, ancestral: str, names: set[str]) -> str | None:
        """Name of the array of ancestral alleles; None for the reference allele, or if a FASTA file has them."""
        if ancestral == "auto":
            return "variant_AA" if "variant_AA" in names else None
        if ancestral == "ref":
            return None
        tag = ancestral.removeprefix("INFO/")
        if tag == ancestral:
            if not Path(ancestral).is_file():
                raise BadRequest(
                    f"--ancestral '{ancestral}' is no file, and {self.path} is VCF Zarr: use INFO/TAG, a FASTA file, or ref"
                )
            self.fasta = AncestralFasta(ancestral)
            self.fasta.check_contigs(contig.name for contig in self.contigs)
            return None
        tags = [name.removeprefix("variant_") for name in names if name.startswith("variant_")]
        if tag not in tags:
            raise BadRequest(
                f"{self.path} has no array 'variant_{tag}' for --ancestral {ancestral}{suggest_nearest(tag, tags)}"
            )
        array = self._group[f"variant_{tag}"]
        if array.ndim != 1 or array.dtype.kind not in "OUST":
            raise BadRequest(f"{self.path}, array 'variant_{tag}': expected one text for each record, as ancestral allele")
        return f"variant_{tag}"

    def _read(self, name: str, selection=slice(None)) -> np.ndarray:
        try:
            return np.asarray(self._group[name][selection])
        except Exception as error:  # zarr and its codecs raise any kind for a damaged chunk
            raise BadRequest(f"{self.path}, array '{name}' cannot be read: {first_line(error)}") from None

    def _read_names(self, name: str) -> list[str]:
        return [_to_text(value) for value in self._read(name).tolist()]

    def read(self, regions: Sequence[Region], samples: Sequence[int]) -> Iterator[Records]:
        """Yield the records within *regions*, all if there are none, with the genotypes of *samples* (indices)."""
        numbers = {contig.name: number for number, contig in enumerate(self.contigs)}
        records, _, copies = self._genotypes.shape
        columns = slice(min(samples), max(samples) + 1)
        chosen = np.asarray(samples) - columns.start
        chunk = self._genotypes.chunks[0]
        step = chunk * max(1, CHUNK_GENOTYPES // (chunk * (columns.stop - columns.start) * copies))
        scan = step * max(1, SCAN_RECORDS // step)
        outside = np.zeros(len(self.contigs), dtype=np.int64)
        for start in range(0, records, scan):
            contigs = self._read("variant_contig", slice(start, start + scan))
            positions = self._read("variant_position", slice(start, start + scan)).astype(np.int64) - 1
            wanted = np.zeros(len(positions), dtype=bool)
            for region in regions:
                end = np.iinfo(np.int64).max if region.end is None else region.end
                wanted |= (contigs == numbers[region.contig]) & (positions >= region.start) & (positions < end)
            if not regions:
                wanted[:] = positions >= 0
            self._check_contigs(contigs)
            outside += np.bincount(contigs[~wanted], minlength=len(outside))
            for first in range(0, len(positions), step):
                rows = np.flatnonzero(wanted[first : first + step])
                if not len(rows):
                    continue
                block = slice(start + first + int(rows[0]), start + first + int(rows[-1]) + 1)
                rows = rows - rows[0]
                yield from self._read_block(block, rows, columns, chosen)
        self.outside = {contig.name: count for contig, count in zip(self.contigs, outside.tolist(), strict=True) if count}

    def _check_contigs(self, numbers: np.ndarray) -> None:
        if numbers.min() < 0 or numbers.max() >= len(self.contigs):
            raise BadRequest(
                f"{self.path}, array 'variant_contig': numbers must be below {len(self.contigs)}, the contigs in 'contig_id'"
            )

    def _read_block(self, block: slice, rows: np.ndarray, columns: slice, chosen: np.ndarray) -> Iterator[Records]:
        """The records *rows* of the records *block*, one chunk for each run of records of a contig."""
        contigs = self._read("variant_contig", block)[rows]
        positions = self._read("variant_position", block)[rows].astype(np.int64) - 1
        genotypes = self._read("call_genotype", (block, columns))[rows][:, chosen].astype(np.int16)
        one_copy = (genotypes != ABSENT).sum(axis=2) <= 1
        phased = (
            one_copy
            if self._phased is None
            else one_copy | (self._read("call_genotype_phased", (block, columns))[rows][:, chosen] > 0)
        )
        alleles = [[text for text in map(_to_text, row) if text] for row in self._read("variant_allele", block)[rows].tolist()]
        if self._ancestral is None:
            ancestral = [row[0] if row else None for row in alleles]
        else:
            ancestral = [_to_text(text) or None for text in self._read(self._ancestral, block)[rows].tolist()]
        failed = None if self._filters is None else self._read("variant_filter", block)[rows][:, self._filters].any(axis=1)
        ends = [*(np.flatnonzero(np.diff(contigs)) + 1).tolist(), len(contigs)]
        start = 0
        for end in ends:
            part = slice(start, end)
            contig = self.contigs[contigs[start]].name
            if self.fasta is not None:
                ancestral[part] = self.fasta.fetch(contig, positions[part])
            yield Records(
                contig=contig,
                positions=positions[part],
                alleles=alleles[part],
                genotypes=genotypes[part],
                phased=phased[part],
                ancestral=ancestral[part],
                failed=None if failed is None else failed[part],
            )
            start = end


def _to_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _explain(name: str, names: set[str]) -> str:
    if name == "call_genotype" and "variant_position" in names:
        return "; it has no genotypes"
    return f"; it has {', '.join(sorted(names)[:8])}" if names else "; it has no arrays"


def _open(path: Path) -> zarr.Group:
    """Open the root group; of a zip file, also if it is in a directory of that."""
    try:
        if path.is_dir():
            store, prefix = zarr.storage.LocalStore(path, read_only=True), ""
        else:
            store, prefix = zarr.storage.ZipStore(path, mode="r"), find_zarr_root(path) or ""
        # Consolidated metadata is a copy, which may be older than what it describes.
        return zarr.open_group(store, path=prefix, mode="r", use_consolidated=False)
    except Exception as error:  # damaged metadata makes zarr raise any kind
        raise BadRequest(f"{path} cannot be read as VCF Zarr: {first_line(error)}") from None


def find_zarr_root(path) -> str | None:
    """Directory of a zip file that holds a root group in Zarr format, "" if not in a directory; None if there is none."""
    with zipfile.ZipFile(path) as file:
        directories = [PurePosixPath(name).parent for name in file.namelist() if PurePosixPath(name).name in METADATA_FILES]
    if not directories:
        return None
    return str(min(directories, key=lambda directory: len(directory.parts))).removeprefix(".")
