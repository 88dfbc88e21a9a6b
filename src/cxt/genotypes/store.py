"""Usable genotypes on disk: what is left of a user's file after reading, in one form for all formats.

A directory in Zarr format. It is read by region, so that memory does not grow with the chromosome.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from cxt.errors import BadRequest, first_line
from cxt.genotypes.records import Contig, Haplotype

VERSION = 2

ARRAYS = ("positions", "derived", "missing")
"""Arrays of a contig."""

CHUNK_SITES = 16_384
"""Sites of a chunk on disk."""


class Sites(NamedTuple):
    """Biallelic sites of a region.

    positions : int64 (sites,), base pairs counted from 0, strictly ascending
    derived : uint8 (sites, haplotypes), 1 = derived allele, 0 = ancestral or missing
    missing : bool (sites, haplotypes)
    """

    positions: np.ndarray
    derived: np.ndarray
    missing: np.ndarray


class GenotypeStore:
    """Genotypes that `GenotypeWriter` wrote.

    Parameters
    ----------
    path : path-like
        Directory.

    Attributes
    ----------
    haplotypes : list of Haplotype
        Columns of the genotypes.
    contigs : list of Contig
        With lengths.
    report : dict
        What was read and dropped, see `cxt.genotypes.filters`.

    Raises
    ------
    BadRequest
        If it holds no genotypes, or those of another version, or files are missing; when it is read, if one is damaged.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self._group = zarr.open_group(self.path, mode="r")
            attributes: dict[str, Any] = dict(self._group.attrs)
        except (OSError, KeyError, ValueError) as error:
            raise BadRequest(f"{path} does not hold genotypes that were read before: {error}") from None
        if attributes.get("cxt_genotypes") != VERSION:
            raise BadRequest(f"{path} holds genotypes of another version; delete it, and the file is read again")
        self.haplotypes = [Haplotype(*row) for row in attributes["haplotypes"]]
        self.contigs = [Contig(*row) for row in attributes["contigs"]]
        self._columns = attributes["columns"]  # of the haplotypes, in the arrays
        self._has_others = self._columns != list(range(len(self._columns)))
        self.report: dict = attributes["report"]
        self._places: dict[str, int] = {  # of the arrays, which were written in the order of the file
            name: place for (name, _), place in zip(self.contigs, attributes["places"], strict=True)
        }
        self._positions: dict[str, np.ndarray] = {}
        self._arrays: dict[tuple[str, str], zarr.Array] = {}  # opened once: that takes longer than to read a block
        for contig, _ in self.contigs:
            for name in ARRAYS:
                self._check_files(contig, name)

    def _check_files(self, contig: str, name: str) -> None:
        """BadRequest if a file of an array is missing; Zarr would read it as zeros."""
        array = self._open(contig, name)
        if (lost := array.nchunks - array.nchunks_initialized) > 0:
            raise BadRequest(
                f"{self.path} is incomplete: {lost} of {array.nchunks} files of {array.path} are missing; delete it, and the "
                "file is read again"
            )

    def positions(self, contig: str) -> np.ndarray:
        """Positions of all sites of a contig, (sites,) int64."""
        if contig not in self._positions:
            self._positions = {contig: self._read(contig, "positions")}  # of one contig at a time
        return self._positions[contig]

    def iterate_missing(self, place: int) -> Iterator[np.ndarray]:
        """Yield which genotypes are missing, bool (sites, haplotypes), of consecutive sites of the contig at *place*."""
        contig = self.contigs[place].name
        for begin in range(0, self._open(contig, "missing").shape[0], CHUNK_SITES):
            yield self._unpack(self._read(contig, "missing", slice(begin, begin + CHUNK_SITES))).astype(bool)

    def _unpack(self, packed) -> np.ndarray:
        """One value for each of the haplotypes, uint8 (sites, haplotypes)."""
        values = np.unpackbits(np.asarray(packed), axis=1, count=self._columns[-1] + 1, bitorder="little")
        return values[:, self._columns] if self._has_others else values

    def _open(self, contig: str, name: str) -> zarr.Array:
        if (contig, name) not in self._arrays:
            path = f"{self._places[contig]}/{name}"
            array = self._group.get(path)
            if not isinstance(array, zarr.Array):
                raise BadRequest(f"{self.path} is incomplete: {path} is missing; delete it, and the file is read again")
            self._arrays[contig, name] = array
        return self._arrays[contig, name]

    def _read(self, contig: str, name: str, rows: slice = slice(None)) -> np.ndarray:
        array = self._open(contig, name)
        try:
            return np.asarray(array[rows])
        except Exception as error:  # zarr and its codecs raise any kind for a damaged chunk
            raise BadRequest(
                f"{self.path} is damaged: {array.path} cannot be read ({first_line(error)}); delete it, and the file is read "
                "again"
            ) from None

    def load(self, contig: str, start: int, end: int) -> Sites:
        """The sites of a contig in [start, end)."""
        positions = self.positions(contig)
        left, right = np.searchsorted(positions, [start, end])
        if left == right:  # Zarr takes as long for no sites as for a block of them
            empty = np.zeros((0, len(self.haplotypes)), dtype=np.uint8)
            return Sites(positions[left:right], empty, empty.astype(bool))
        derived, missing = (self._unpack(self._read(contig, name, slice(left, right))) for name in ("derived", "missing"))
        return Sites(positions[left:right], derived, missing.astype(bool))


class GenotypeWriter:
    """Writes a `GenotypeStore`: `add_contig`, then `append` its sites, and so on; `finish` renames it to its final name.

    Parameters
    ----------
    path : path-like
        Final name of the directory.
    haplotypes : sequence of Haplotype
    """

    def __init__(self, path, haplotypes: Sequence[Haplotype]):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.part")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        self.haplotypes = list(haplotypes)
        self.contigs: list[Contig] = []
        self._group = zarr.open_group(self.temporary, mode="w", zarr_format=3)
        self._arrays: dict[str, zarr.Array] = {}  # of the last contig; opened again, they would leave out chunks of zeros
        self._pending: list[Sites] = []

    def add_contig(self, name: str, length: int | None) -> None:
        """Begin a contig; its length may be set later, by `set_length`."""
        self._flush()
        columns = -(-len(self.haplotypes) // 8)
        place = str(len(self.contigs))
        self.contigs.append(Contig(name, length))
        self._arrays = {
            array: self._group.create_array(
                f"{place}/{array}",
                shape=(0, columns)[:dimensions],
                chunks=(CHUNK_SITES, columns)[:dimensions],
                dtype=dtype,
                compressors=[ZstdCodec(level=0, checksum=True)],
                config={"write_empty_chunks": True},  # so that a file that was lost is noticed
            )
            for array, dimensions, dtype in (("positions", 1, "int64"), ("derived", 2, "uint8"), ("missing", 2, "uint8"))
        }

    def set_length(self, length: int) -> None:
        """Set the length of the contig that was added last."""
        self.contigs[-1] = Contig(self.contigs[-1].name, length)

    def append(self, positions: np.ndarray, derived: np.ndarray, missing: np.ndarray) -> None:
        """Append sites to the contig that was added last; see `Sites` for the arrays."""
        self._pending.append(Sites(positions, derived, missing))
        if sum(len(sites.positions) for sites in self._pending) >= CHUNK_SITES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        positions, derived, missing = (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        self._arrays["positions"].append(positions.astype(np.int64))
        for name, values in (("derived", derived), ("missing", missing)):
            packed = np.packbits(values.astype(np.uint8), axis=1, bitorder="little")
            self._arrays[name].append(packed)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def finish(
        self, report: dict, haplotypes: Sequence[Haplotype] | None = None, *, order: Iterable[str] = ()
    ) -> GenotypeStore:
        """Write the *report* and rename the directory to its final name.

        Parameters
        ----------
        report : dict
        haplotypes : sequence of Haplotype, optional
            Which ones there are after all, where the number of copies of each sample was not known before. They are columns
            of those that the writer was made with.
        order : iterable of str
            Names of contigs, in the order that `GenotypeStore.contigs` is to have; others follow as they were added.
        """
        self._flush()
        ranks = {name: rank for rank, name in enumerate(order)}
        places = sorted(range(len(self.contigs)), key=lambda place: ranks.get(self.contigs[place].name, len(ranks)))
        columns = {(haplotype.sample, haplotype.copy): column for column, haplotype in enumerate(self.haplotypes)}
        haplotypes = self.haplotypes if haplotypes is None else haplotypes
        self._group.attrs.update(
            {
                "cxt_genotypes": VERSION,
                "haplotypes": [list(haplotype) for haplotype in haplotypes],
                "columns": [columns[haplotype.sample, haplotype.copy] for haplotype in haplotypes],
                "contigs": [list(self.contigs[place]) for place in places],
                "places": places,
                "report": json.loads(json.dumps(report)),
            }
        )
        shutil.rmtree(self.path, ignore_errors=True)
        self.temporary.rename(self.path)
        return GenotypeStore(self.path)
