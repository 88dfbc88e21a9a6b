"""Opening a file of genotypes of any of the formats, which is told by its content."""

import gzip
import json
import re
import stat
import zipfile
import zlib
from pathlib import Path

from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.genotypes.arrays import ArraySource
from cxt.genotypes.records import Source
from cxt.genotypes.trees import TreesSource
from cxt.genotypes.vcf import VcfSource
from cxt.genotypes.vcf_zarr import METADATA_FILES, VcfZarrSource, find_zarr_root
from cxt.scenarios.tree_file import MAGIC

ACCEPTED = (
    "VCF or BCF (also compressed by bgzip), VCF Zarr (.vcz, also zipped), a tree sequence (.trees or .tsz), or .npz with "
    "arrays of genotypes, positions and sequence_length"
)

BCF, PACKED, ZIP = b"BCF", b"\x1f\x8b", b"PK\x03\x04"

FOREIGN = (
    (b"BAM\x01", "BAM, which holds reads; call genotypes first, for example with bcftools mpileup and bcftools call"),
    (b"CRAM", "CRAM, which holds reads; call genotypes first, for example with bcftools mpileup and bcftools call"),
    (b"@HD\t", "SAM, which holds reads; call genotypes first, for example with bcftools mpileup and bcftools call"),
    (b"l\x1b\x01", "PLINK's .bed; convert it: plink2 --bfile PREFIX --export vcf bgz"),
    (b"l\x1b", "PLINK 2's .pgen; convert it: plink2 --pfile PREFIX --export vcf bgz"),
    (b"\x93NUMPY", "a single array of numpy; save genotypes, positions and sequence_length with numpy.savez"),
    (b"\x89HDF", "HDF5, which is not read; write a VCF, VCF Zarr or a tree sequence"),
    (b"TBI\x01", "an index; give the file that it belongs to"),
    (b"CSI\x01", "an index; give the file that it belongs to"),
    (b">", "FASTA, which holds sequences; --ancestral takes one, the input must hold genotypes"),
    (b"BZh", "compressed by bzip2; compress it by bgzip instead"),
    (b"\xfd7zXZ", "compressed by xz; compress it by bgzip instead"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; compress it by bgzip instead"),
)
"""First bytes of files that people mistake for genotypes, and what to say about them."""


def open_source(path, *, ancestral: str = "auto") -> Source:
    """Open a file of genotypes for reading.

    Parameters
    ----------
    path : path-like
        VCF or BCF, VCF Zarr, tree sequence, or `.npz`. What it is, its content decides, not its name.
    ancestral : str
        How to find ancestral alleles: `auto`, `INFO/TAG`, the path of a FASTA file, `ref`, or `tree`.

    Returns
    -------
    Source

    Raises
    ------
    BadRequest
        If it does not exist, cannot be read, or is something else.
    """
    path = Path(path)
    source = _find_reader(path)(path, ancestral=ancestral)
    if ancestral == "auto" and not source.knows_ancestral:
        source.notes.append(
            "the file does not say which alleles are ancestral: the reference allele is taken, which is wrong at some sites "
            "and makes the estimates less accurate; say where they are known (--ancestral INFO/TAG or a FASTA file)"
        )
    return source


def _find_reader(path: Path) -> type:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise BadRequest(f"there is no file {path}{_suggest_sibling(path)}") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from None
    if stat.S_ISDIR(mode):
        if any((path / name).exists() for name in METADATA_FILES):
            return VcfZarrSource
        raise BadRequest(f"{path} is a directory, but not VCF Zarr; expected {ACCEPTED}")
    if not stat.S_ISREG(mode):
        raise BadRequest(f"{path} is not a regular file; save the data to a file, because it is read more than once")
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from None
    if not start:
        raise BadRequest(f"{path} is empty (0 bytes)")
    if start.startswith(MAGIC):
        return TreesSource
    if start.startswith(ZIP):
        return _find_zip_reader(path)
    if start.startswith(PACKED):
        start = _unpack_start(path)
    if start.startswith(BCF) or start.removeprefix(b"\xef\xbb\xbf").startswith(b"##fileformat=VCF"):
        return VcfSource
    raise BadRequest(f"{path} {_describe(start)}")


def _suggest_sibling(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no directory {path.parent}"
    suggestion = suggest_nearest(path.name, names)
    return suggestion if suggestion.startswith("; did you mean") else ""


def _unpack_start(path: Path) -> bytes:
    """First bytes of the content of a file that gzip or bgzip has compressed."""
    try:
        with gzip.open(path) as file:
            start = file.read(100)
    except (OSError, EOFError, zlib.error) as error:
        raise BadRequest(f"{path} is compressed, but damaged or cut off: {first_line(error)}; copy or make it again") from None
    if not start:
        raise BadRequest(f"{path} is compressed, and empty")
    return start


def _find_zip_reader(path: Path) -> type:
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            root = find_zarr_root(path)
            if "genotypes.npy" in names or (root is None and any(name.endswith(".npy") for name in names)):
                return ArraySource
            if root is not None:
                return TreesSource if _read_attributes(file, root).get("format_name") == "tszip" else VcfZarrSource
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadRequest(f"{path} is a zip file, but damaged or cut off: {first_line(error)}; copy or make it again") from None
    raise BadRequest(f"{path} is a zip file of something else; expected {ACCEPTED}")


def _read_attributes(file: zipfile.ZipFile, root: str) -> dict:
    """Attributes of the root group of a zip file in Zarr format."""
    prefix = f"{root}/" if root else ""
    names = set(file.namelist())
    if f"{prefix}zarr.json" in names:
        return json.loads(file.read(f"{prefix}zarr.json")).get("attributes", {})
    return json.loads(file.read(f"{prefix}.zattrs")) if f"{prefix}.zattrs" in names else {}


def _describe(start: bytes) -> str:
    """What a file of other content is."""
    for magic, description in FOREIGN:
        if start.startswith(magic):
            return f"is {description}"
    lines = start.decode("utf-8", errors="replace").splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith(("track", "browser"))), "")
    if first.startswith(("#CHROM", "##")):
        return "looks like a VCF without its first line, which must be ##fileformat=VCFv4.2 or another version"
    if re.match(r"\S+\s+\d+\s+\d+(\s|$)", first):
        return "looks like BED, which holds intervals; --mask takes one, the input must hold genotypes"
    return f"holds no genotypes that can be read; expected {ACCEPTED}"
