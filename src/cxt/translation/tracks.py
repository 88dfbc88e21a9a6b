"""TMRCA tracks on disk: `tracks.zarr`, a directory in Zarr format 3 that this module writes and reads.

Arrays are written and read in parts, so that memory grows neither with the genome nor with the number of pairs. The same tracks
give the same bytes.
"""

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from cxt.errors import BadRequest, suggest_nearest
from cxt.genotypes.records import Contig

VERSION = 1

CHUNK_PAIRS, CHUNK_WINDOWS = 64, 1024
"""Pairs and windows of a chunk on disk, which is the smallest part that can be read or written."""

DIMENSIONS = {
    "start": ("window",),
    "end": ("window",),
    "accessible": ("window",),
    "called": ("pair",),
    "mean": ("pair", "window"),
    "sd": ("pair", "window"),
    "quantiles": ("pair", "window", "quantile"),
    "replicates": ("replicate", "pair", "window"),
}
"""{array of a contig: its dimensions}."""

PER_PAIR = ("mean", "sd", "quantiles", "replicates")
"""Arrays that are written by chunks of pairs."""


class ContigTracks(NamedTuple):
    """Tracks of pairs on one contig.

    start, end : int64 (windows,), in base pairs counted from 0, end excluded; ascending, with gaps between regions
    mean, sd : float32 (pairs, windows), of ln TMRCA in ln generations; NaN in missing windows
    quantiles : float32 (pairs, windows, levels), of ln TMRCA, at `Tracks.quantile_levels`
    accessible : float32 (windows,), share of the bases of each window that can be read
    called : float32 (pairs,), share of the sites of the contig at which both haplotypes are called
    replicates : float32 (replicates, pairs, windows) of sampled ln TMRCA, or None
    """

    start: np.ndarray
    end: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray
    accessible: np.ndarray
    called: np.ndarray
    replicates: np.ndarray | None

    @property
    def tmrca(self) -> np.ndarray:
        """Posterior median of the TMRCA in generations, (pairs, windows)."""
        return np.exp(self.quantiles[:, :, self.quantiles.shape[2] // 2])


class Tracks:
    """Tracks that `cxt translate` wrote.

    Parameters
    ----------
    path : path-like
        `tracks.zarr`, or the directory of the translation that has it.

    Attributes
    ----------
    attributes : dict
        How the tracks were made: model, window_size, time_scale, mutation_rate, generation_time (years), calibration, etc.
    haplotypes : list of (str, str or None)
        Name and population.
    pairs : int64 array (pairs, 2)
        Haplotypes of each pair, as indices into *haplotypes*.
    contigs : list of Contig
        Name, and length in base pairs.

    Raises
    ------
    BadRequest
        If there are no tracks at *path*, they are of another version, or files are missing.
    """

    def __init__(self, path):
        self.path = Path(path)
        if (self.path / "tracks.zarr").is_dir():
            self.path = self.path / "tracks.zarr"
        if not (self.path / "zarr.json").is_file():
            raise BadRequest(f"{path} holds no tracks; give the directory that `cxt translate --out` wrote, or its tracks.zarr")
        try:
            self._group = zarr.open_group(self.path, mode="r", zarr_format=3)
            self.attributes = dict(self._group.attrs)
        except (OSError, KeyError, ValueError) as error:
            raise BadRequest(f"{self.path} cannot be read in Zarr format ({type(error).__name__}: {error})") from None
        if (version := self.attributes.get("cxt_tracks")) != VERSION:
            found = "has other content" if version is None else f"holds tracks of version {version}, not {VERSION}"
            raise BadRequest(f"{path} {found}; give a directory that `cxt translate --out` wrote with this version of cxt")
        self.haplotypes: list[tuple[str, str | None]] = [
            (name, population) for name, population in self.attributes["haplotypes"]
        ]
        self.pairs = np.array(self.attributes["pairs"], dtype=np.int64).reshape(-1, 2)
        self.contigs = [Contig(contig["name"], contig["length"]) for contig in self.attributes["contigs"]]
        for name, _ in self.contigs:
            for key in DIMENSIONS:
                array = self._find(name, key)
                # Zarr would read a chunk that is not there as missing values.
                if array is not None and array.nchunks_initialized < array.nchunks:
                    lost = array.nchunks - array.nchunks_initialized
                    raise BadRequest(
                        f"{path} is incomplete: {lost} of {array.nchunks} files of {array.path} are missing; copy it again, as "
                        "a whole directory"
                    )

    def __repr__(self) -> str:
        return f"<Tracks of {len(self.pairs)} pairs on {len(self.contigs)} contigs, by {self.attributes['model']}>"

    @functools.cached_property
    def pair_names(self) -> list[tuple[str, str]]:
        """Names of the two haplotypes of each pair."""
        return [(self.haplotypes[i][0], self.haplotypes[j][0]) for i, j in self.pairs]

    @functools.cached_property
    def population_pairs(self) -> list[tuple[str, str]]:
        """Populations of each pair, in alphabetical order: ("all", "all") if none is known, `unknown` where one is not."""
        if all(population is None for _, population in self.haplotypes):
            return [("all", "all")] * len(self.pairs)
        names = ["unknown" if population is None else population for _, population in self.haplotypes]
        return [(min(names[i], names[j]), max(names[i], names[j])) for i, j in self.pairs]

    @property
    def quantile_levels(self) -> list[float]:
        """Probabilities of the quantiles, ascending; the one in the middle is 0.5."""
        return list(self.attributes["quantile_levels"])

    def find_pair(self, first: str, second: str) -> int:
        """Row of the pair of two haplotypes, which are given by name, in any order; BadRequest if there is none."""
        known = {name for name, _ in self.haplotypes}
        for name in (first, second):
            if name not in known:
                raise BadRequest(f"the tracks have no haplotype '{name}'{suggest_nearest(name, known)}")
        for row, names in enumerate(self.pair_names):
            if set(names) == {first, second}:
                return row
        partners = sorted({name for names in self.pair_names if first in names for name in names if name != first})
        raise BadRequest(
            f"the tracks do not have the pair {first},{second}; {first} is paired with {', '.join(partners[:10])}"
            f"{' …' if len(partners) > 10 else ''}"
        )

    def array(self, contig: str, name: str) -> zarr.Array:
        """One array of a contig without reading it, by its name in `ContigTracks`; for work in parts."""
        array = self._find(contig, name)
        if array is None:
            raise BadRequest(f"{self.path} has no array '{name}' of contig {contig}")
        return array

    def _find(self, contig: str, name: str) -> zarr.Array | None:
        names = [contig.name for contig in self.contigs]
        if contig not in names:
            raise BadRequest(f"the tracks have no contig '{contig}'{suggest_nearest(contig, names)}")
        array = self._group.get(f"{names.index(contig)}/{name}")
        return array if isinstance(array, zarr.Array) else None

    def read(
        self, contig: str, pairs: slice | Sequence[int] = slice(None), windows: slice | Sequence[int] = slice(None)
    ) -> ContigTracks:
        """Read tracks into memory.

        Parameters
        ----------
        contig : str
            Its name.
        pairs, windows : slice or sequence of int
            Rows of *pairs*, and windows of the contig, counted from 0; by default all.

        Returns
        -------
        ContigTracks

        Raises
        ------
        BadRequest
            If there is no such contig.
        """
        chosen = {"pair": pairs, "window": windows, "quantile": slice(None), "replicate": slice(None)}
        parts = {}
        for name, dimensions in DIMENSIONS.items():
            array = self._find(contig, name)
            parts[name] = None if array is None else np.asarray(array.oindex[tuple(chosen[key] for key in dimensions)])
        return ContigTracks(**parts)


class TrackWriter:
    """Writes `Tracks`: `add_contig`, then `write_pairs` until all rows are there, and so on; `finish` gives the final name.

    Parameters
    ----------
    path : path-like
        Final name of the directory. What is there is replaced in the end.
    attributes : dict
        Of the tracks, see `Tracks`, without contigs; with haplotypes, pairs and quantile_levels.
    replicates : int
        Sampled sequences of each pair that will be written, too.
    """

    def __init__(self, path, attributes: dict, *, replicates: int = 0):
        self.path, self.attributes, self.replicates = Path(path), dict(attributes), replicates
        self.temporary = self.path.with_name(f".{self.path.name}.part")
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.parent.mkdir(parents=True, exist_ok=True)
        self.contigs: list[Contig] = []
        self._sizes = {
            "pair": len(self.attributes["pairs"]),
            "quantile": len(self.attributes["quantile_levels"]),
            "replicate": replicates,
        }
        self._written = np.zeros(self._sizes["pair"], dtype=np.int64)  # windows of each pair
        self._windows = 0
        self._arrays: dict[str, zarr.Array] = {}  # of the last contig; opened again, they would leave out chunks without values
        self._group = zarr.open_group(self.temporary, mode="w", zarr_format=3)

    def add_contig(
        self, name: str, length: int | None, *, start: np.ndarray, end: np.ndarray, accessible: np.ndarray, called: np.ndarray
    ) -> None:
        """Begin a contig, given its arrays that are not written by pairs; see `ContigTracks`."""
        self._check_rows()
        self._written[:], self._windows = 0, len(start)
        place = str(len(self.contigs))
        self.contigs.append(Contig(name, length))
        sizes = self._sizes | {"window": len(start)}
        chunks = {"pair": CHUNK_PAIRS, "window": CHUNK_WINDOWS}
        given = {"start": start, "end": end, "accessible": accessible, "called": called}
        for key, dimensions in DIMENSIONS.items():
            if key == "replicates" and not self.replicates:
                continue
            shape = tuple(sizes[one] for one in dimensions)
            whole = key in given  # read as a whole, at most 8 bytes a window
            array = self._group.create_array(
                f"{place}/{key}",
                shape=shape,
                chunks=tuple(max(1, size if whole else min(size, chunks.get(one, 1 if one == "replicate" else size)))
                             for one, size in zip(dimensions, shape, strict=True)),
                dtype="int64" if key in ("start", "end") else "float32",
                fill_value=0 if key in ("start", "end") else np.nan,
                compressors=[ZstdCodec(level=3)],
                dimension_names=dimensions,
                config={"write_empty_chunks": True},  # so that a file that was lost is noticed
            )  # fmt: skip
            self._arrays[key] = array
            if whole and array.size:
                array[:] = np.asarray(given[key])

    def write_pairs(self, rows: slice, windows: slice | None = None, **arrays: np.ndarray) -> None:
        """Write rows of the contig that was added last, or a part of them.

        Parameters
        ----------
        rows : slice
            Of pairs, without a step. It is quickest if it begins at a multiple of 64 and has as many pairs.
        windows : slice, optional
            Without a step; by default all. It is quickest if it begins at a multiple of 1024 and has as many windows.
        **arrays
            mean, sd and quantiles, and replicates if they were announced; see `ContigTracks`.
        """
        expected = set(PER_PAIR) - (set() if self.replicates else {"replicates"})
        if set(arrays) != expected:
            raise ValueError(f"arrays {sorted(expected)} are needed, got {sorted(arrays)}")
        windows = slice(0, self._windows) if windows is None else windows
        for key, values in arrays.items():
            array = self._arrays[key]
            if array.size:
                place = (slice(None), rows, windows) if key == "replicates" else (rows, windows)
                array[place] = np.asarray(values, dtype=np.float32)
        self._written[rows] += windows.stop - windows.start

    def _check_rows(self) -> None:
        """ValueError if rows of the last contig were not written, which would look like missing windows."""
        if self.contigs and (lost := int((self._written < self._windows).sum())):
            raise ValueError(f"{lost} of {len(self._written)} pairs of contig {self.contigs[-1].name} were not written")

    def finish(self) -> Tracks:
        """Write the attributes and rename the directory to its final name."""
        self._check_rows()
        contigs = [{"name": contig.name, "length": contig.length} for contig in self.contigs]
        attributes = {"cxt_tracks": VERSION, **self.attributes, "contigs": contigs}
        self._group.attrs.update(json.loads(json.dumps(attributes)))
        shutil.rmtree(self.path, ignore_errors=True)
        self.temporary.rename(self.path)
        return Tracks(self.path)
