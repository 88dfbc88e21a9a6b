"""Genotypes from arrays in a `.npz` file."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.genotypes.records import ABSENT, MISSING, Contig, Records, Region

ARRAYS = ("genotypes", "positions", "sequence_length", "samples", "contig", "populations", "ploidy")
"""Names of the arrays that a file may have; the first three are required."""

CHUNK_SITES = 16_384


class ArraySource:
    """Arrays of a `.npz` file as a source of genotypes; see `cxt.genotypes.records.Source`.

    ========================  ========================================================================================
    array                     what it holds
    ========================  ========================================================================================
    genotypes                 integers, (sites, haplotypes) or (sites, samples, copies): 0 = ancestral allele, 1 = derived
                              (2, 3… further alleles), -1 = missing, -2 = no such copy
    positions                 (sites,), in base pairs counted from 0
    sequence_length           one number, in base pairs
    samples (optional)        names, `tsk_0`, `tsk_1`… by default, as tskit has them
    ploidy (optional)         how many columns of (sites, haplotypes) make a sample, 1 by default
    populations (optional)    of each sample
    contig (optional)         name of the contig, `1` by default
    ========================  ========================================================================================

    Genotypes count as phased.

    Parameters
    ----------
    path : path-like
    ancestral : {"auto", "ref"}
        Both take 0 as the ancestral allele.

    Raises
    ------
    BadRequest
        If the arrays have other names, shapes, types or values, or for another value of *ancestral*.
    """

    kind = "arrays"
    knows_ancestral = True
    any_alleles = True
    fasta = None

    def __init__(self, path, *, ancestral: str = "auto"):
        self.path = Path(path)
        if ancestral not in ("auto", "ref"):
            raise BadRequest(
                f"{path} holds arrays, in which 0 is the ancestral allele; --ancestral must be auto or ref, got '{ancestral}'"
            )
        arrays = self._load()
        self._genotypes = self._check_genotypes(arrays)
        sites, samples, _ = self._genotypes.shape
        length = self._check_length(arrays["sequence_length"])
        self._positions = self._check_positions(arrays["positions"], sites, length)
        self.samples = self._check_names(arrays, "samples", samples) or [f"tsk_{i}" for i in range(samples)]
        populations = self._check_names(arrays, "populations", samples)
        self.populations = {sample: name for sample, name in zip(self.samples, populations, strict=False) if name}
        contig = str(np.ravel(arrays["contig"])[0]) if "contig" in arrays and np.size(arrays["contig"]) == 1 else "1"
        if "contig" in arrays and (np.size(arrays["contig"]) != 1 or not contig):
            raise self._bad("contig", "one name", arrays["contig"])
        self.contigs = [Contig(contig, length)]
        self.notes: list[str] = []
        self.outside: dict[str, int] | None = {}

    def _bad(self, name: str, expected: str, array: np.ndarray) -> BadRequest:
        found = f"the value {array}" if array.ndim == 0 else f"shape {array.shape} and type {array.dtype}"
        return BadRequest(f"{self.path}, array '{name}': expected {expected}, got {found}")

    def _load(self) -> dict[str, np.ndarray]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                for name in file.files:
                    if name not in ARRAYS:
                        raise BadRequest(f"{self.path} has an unknown array '{name}'{suggest_nearest(name, ARRAYS)}")
                if absent := [name for name in ARRAYS[:3] if name not in file.files]:
                    raise BadRequest(f"{self.path} has no array '{absent[0]}'; it needs {', '.join(ARRAYS[:3])}")
                return {name: file[name] for name in file.files}
        except BadRequest:
            raise
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
            raise BadRequest(f"{self.path} cannot be read as arrays of numpy: {first_line(error)}") from None

    def _check_genotypes(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """The genotypes as (sites, samples, copies)."""
        genotypes = arrays["genotypes"]
        if genotypes.dtype.kind not in "iub" or genotypes.ndim not in (2, 3) or 0 in genotypes.shape[1:]:
            raise self._bad("genotypes", "integers of shape (sites, haplotypes) or (sites, samples, copies)", genotypes)
        if not len(genotypes):
            raise BadRequest(f"{self.path} has no sites")
        if genotypes.dtype == bool:
            genotypes = genotypes.view(np.uint8)
        least, most = int(genotypes.min()), int(genotypes.max())
        if least < ABSENT or most > 1000:
            odd = least if least < ABSENT else most
            raise BadRequest(
                f"{self.path}, array 'genotypes': expected 0, 1… for alleles and -1 for missing, got the value {odd}"
            )
        ploidy = arrays.get("ploidy")
        if ploidy is None:
            return genotypes if genotypes.ndim == 3 else genotypes[:, :, None]
        if ploidy.ndim or ploidy.dtype.kind not in "iu" or ploidy < 1:
            raise self._bad("ploidy", "one positive integer", ploidy)
        if genotypes.ndim == 3 and ploidy != genotypes.shape[2]:
            raise BadRequest(f"{self.path}: ploidy is {ploidy}, but 'genotypes' has {genotypes.shape[2]} copies of each sample")
        if genotypes.ndim == 3:
            return genotypes
        if genotypes.shape[1] % ploidy:
            raise BadRequest(f"{self.path}: {genotypes.shape[1]} haplotypes cannot be divided into samples of ploidy {ploidy}")
        return genotypes.reshape(len(genotypes), -1, int(ploidy))

    def _check_length(self, array: np.ndarray) -> int:
        if array.size != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all() or array.min() < 1:
            raise self._bad("sequence_length", "one number of base pairs", array)
        return int(array.item())

    def _check_positions(self, positions: np.ndarray, sites: int, length: int) -> np.ndarray:
        if positions.shape != (sites,) or positions.dtype.kind not in "iuf":
            raise self._bad("positions", f"numbers of shape ({sites},), one for each site", positions)
        with np.errstate(invalid="ignore"):
            whole = np.floor(positions)
        if not np.array_equal(whole, positions):
            odd = positions[np.flatnonzero(whole != positions)[0]]
            raise BadRequest(f"{self.path}, array 'positions': expected whole base pairs, got {odd}; round them down")
        whole = whole.astype(np.int64)
        if whole.min() < 0 or whole.max() >= length:
            odd = whole.min() if whole.min() < 0 else whole.max()
            raise BadRequest(f"{self.path}, array 'positions': {odd} is not within the sequence, 0 to {length - 1}")
        return whole

    def _check_names(self, arrays: dict[str, np.ndarray], name: str, samples: int) -> list[str]:
        if name not in arrays:
            return []
        array = arrays[name]
        if array.shape != (samples,) or array.dtype.kind not in "UST":
            raise self._bad(name, f"names of shape ({samples},), one for each sample", array)
        return [text.decode() if isinstance(text, bytes) else str(text) for text in array.tolist()]

    def read(self, regions: Sequence[Region], samples: Sequence[int]) -> Iterator[Records]:
        """Yield the records within *regions*, all if there are none, with the genotypes of *samples* (indices)."""
        contig, length = self.contigs[0]
        outside = len(self._positions)
        for region in regions or [Region(contig)]:
            end = length if region.end is None else region.end
            sites = np.flatnonzero((self._positions >= region.start) & (self._positions < end))
            outside -= len(sites)
            for start in range(0, len(sites), CHUNK_SITES):
                chosen = sites[start : start + CHUNK_SITES]
                genotypes = self._genotypes[chosen][:, list(samples)].astype(np.int16)
                alleles = [str(allele) for allele in range(max(2, int(genotypes.max(initial=MISSING)) + 1))]
                yield Records(
                    contig=contig,
                    positions=self._positions[chosen],
                    alleles=[alleles] * len(chosen),
                    genotypes=genotypes,
                    phased=np.ones(genotypes.shape[:2], dtype=bool),
                    ancestral=["0"] * len(chosen),
                )
        self.outside = {contig: outside}
