"""Tracks for other programs: a table, compressed and indexed for tabix, and bigWig files for genome browsers."""

import contextlib
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from cxt.errors import BadRequest
from cxt.genotypes.records import Contig
from cxt.io import atomic_write
from cxt.translation.tracks import CHUNK_PAIRS, CHUNK_WINDOWS, Tracks

VALUES_IN_MEMORY = 2**18
"""Pairs times windows that are formatted at once."""

VALUES_IN_FILE = 2**22
"""Pairs times windows that are turned from chunks of pairs to windows in memory; more are turned in a temporary file."""

LARGEST_TBI = 2**29
"""Largest position that a .tbi index can hold; beyond it, the index is a .csi."""

LARGEST_BIGWIG = 2**32 - 1
"""Largest length of a contig in bigWig format."""

UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\:*?\"<>|\s]")
"""Characters that are replaced in names of files."""


def format_header(tracks: Tracks) -> str:
    """The lines before the rows of the table, of which the last has the names of the columns. Their number does not vary."""
    about = tracks.attributes
    years = about.get("generation_time")
    columns = [
        "#chrom", "start", "end", "haplotype_1", "haplotype_2", "mean_ln_tmrca", "sd_ln_tmrca", "tmrca_generations",
        "tmrca_2.5", "tmrca_97.5", *(["tmrca_years"] if years else []), "accessible",
    ]  # fmt: skip
    calibration = about.get("calibration")
    lines = [
        "TMRCA of pairs of haplotypes in windows; start is counted from 0 and end is excluded, as in BED",
        f"model: {about.get('model')} (sha256 {about.get('checkpoint_sha256')})",
        f"time scale: {about.get('time_scale')}",
        f"mutation rate: {_or_none(about.get('mutation_rate'), ' per bp and generation')}",
        f"generation time: {_or_none(years, ' years')}",
        f"calibration: {calibration if isinstance(calibration, str) else _or_none(calibration)}",
        "units: mean_ln_tmrca and sd_ln_tmrca of the natural logarithm of generations; tmrca_generations (the posterior "
        "median), tmrca_2.5 and tmrca_97.5 (ends of the 95% interval) in generations",
        f"accessible: share of the bases of the window; windows with less than {about.get('min_accessible')} are missing (nan)",
    ]
    return "".join(f"# {_cell(line)}\n" for line in lines) + "\t".join(columns) + "\n"


def _or_none(value, unit: str = "") -> str:
    return "none" if value is None else f"{value}{unit}"


def _cell(text: str) -> str:
    """Text without line breaks and tabs, which would break the table."""
    return re.sub(r"[\t\r\n]", " ", text)


def write_table(tracks: Tracks, path) -> None:
    """Write tracks as a table, `tracks.tsv.gz`, with its index.

    Rows are ordered by contig, window and pair. The index is `<path>.tbi`, or `<path>.csi` if a window ends beyond 2^29 bp.
    Both are put in place when they are complete.

    Parameters
    ----------
    tracks : Tracks
    path : path-like
    """
    import pysam

    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    indices = {kind: path.with_name(f"{path.name}.{kind}") for kind in ("tbi", "csi")}
    largest = 0
    try:
        with pysam.BGZFile(str(temporary), "w") as file:
            file.write(format_header(tracks).encode())
            for name, _ in tracks.contigs:
                for text, last in _format_rows(tracks, name, directory=path.parent):
                    file.write(text.encode())
                    largest = max(largest, last)
        kind = "tbi" if largest <= LARGEST_TBI else "csi"
        made = temporary.with_name(f"{temporary.name}.{kind}")
        shift = {} if kind == "tbi" else {"csi": True, "min_shift": 14}
        pysam.tabix_index(
            str(temporary), seq_col=0, start_col=1, end_col=2, zerobased=True, force=True, index=str(made), **shift
        )
        for index in indices.values():  # never an index of another table
            index.unlink(missing_ok=True)
        temporary.replace(path)
        made.replace(indices[kind])
    finally:
        for one in (temporary, *(temporary.with_name(f"{temporary.name}.{kind}") for kind in indices)):
            one.unlink(missing_ok=True)


def _format_rows(tracks: Tracks, contig: str, *, directory: Path) -> Iterator[tuple[str, int]]:
    """Yield rows of the table, by blocks of windows, and the end of the last window of each block."""
    years = tracks.attributes.get("generation_time")
    # A tenth of a generation is resolved, whatever the unit.
    digits = max(0, 1 - math.floor(math.log10(years))) if years else 0
    names = [f"{_cell(first)}\t{_cell(second)}" for first, second in tracks.pair_names]
    numbers = f"%.4f\t%.4f\t%.1f\t%.1f\t%.1f{f'{chr(9)}%.{digits}f' if years else ''}"
    line = f"%s\t%s\t{numbers}\t%s\n"
    missing = [f"\t{name}\t{numbers % ((math.nan,) * numbers.count('%'))}\t" for name in names]
    start, end, accessible = (np.asarray(tracks.array(contig, key)[:]) for key in ("start", "end", "accessible"))
    # A chunk on disk has many windows of some pairs, and the table all pairs of a window: each chunk is read once.
    most = VALUES_IN_MEMORY // max(len(names), 1) // CHUNK_WINDOWS
    stretch = CHUNK_WINDOWS * min(max(most, 1), 16)
    for left in range(0, len(start), stretch):
        right = min(left + stretch, len(start))
        with tempfile.TemporaryFile(dir=directory) as file:
            columns = _read_columns(tracks, contig, slice(left, right), file=file)
            block = max(1, VALUES_IN_MEMORY // max(len(names), 1))
            for begin in range(left, right, block):
                part = slice(begin, min(begin + block, right))
                places = [f"{_cell(contig)}\t{a}\t{b}" for a, b in zip(start[part], end[part], strict=True)]
                shares = [f"{share:.3f}" for share in accessible[part]]
                one = columns[part.start - left : part.stop - left]  # (windows, pairs, columns)
                if np.isnan(one[:, :, 0]).all():  # a large part of a chromosome may be missing: the same, quicker
                    lines = [
                        f"{place}{middle_part}{share}\n"
                        for place, share in zip(places, shares, strict=True)
                        for middle_part in missing
                    ]
                    yield "".join(lines), int(end[part.stop - 1])
                    continue
                times = np.exp(one[:, :, 2:].astype(np.float64))
                values = [one[:, :, :2], times] + ([times[:, :, :1] * years] if years else [])
                lines = [
                    line % (place, name, *row, share)
                    for place, share, rows in zip(places, shares, np.concatenate(values, axis=-1), strict=True)
                    for name, row in zip(names, rows.tolist(), strict=True)
                ]
                yield "".join(lines), int(end[part.stop - 1])


def _read_columns(tracks: Tracks, contig: str, windows: slice, *, file: IO[bytes]) -> np.ndarray:
    """Mean, standard deviation, median and ends of the 95% interval, float32 (windows, pairs, 5).

    Where they are many, they are in *file*.
    """
    levels = tracks.quantile_levels
    places = [levels.index(level) for level in (0.5, 0.025, 0.975)]
    pairs, number = len(tracks.pairs), windows.stop - windows.start
    shape = (number, pairs, 2 + len(places))
    if number * pairs <= VALUES_IN_FILE:
        out = np.empty(shape, dtype=np.float32)
    else:
        out = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
    arrays = [tracks.array(contig, key) for key in ("mean", "sd", "quantiles")]
    for begin in range(0, pairs, CHUNK_PAIRS):
        rows = slice(begin, min(begin + CHUNK_PAIRS, pairs))
        mean, sd, quantiles = (np.asarray(array[rows, windows]) for array in arrays)
        out[:, rows] = np.stack([mean, sd, *(quantiles[:, :, place] for place in places)], axis=-1).transpose(1, 0, 2)
    return out


NUMBERED = re.compile(r"\.pair\d+$", flags=re.IGNORECASE)
"""Names that look as if they ended in the number of a pair."""


def name_files(pair_names: list[tuple[str, str]], suffix: str) -> list[str]:
    """A file name for each pair: those of its haplotypes, with `_` for characters that file names should not have.

    Names that are too long, or that would then be the same, end in the number of the pair.
    """
    stems = [UNSAFE.sub("_", f"{first}-{second}") for first, second in pair_names]
    counts = Counter(stem.casefold() for stem in stems)  # some file systems ignore case
    names = []
    for number, stem in enumerate(stems):
        is_long, is_known = len(stem.encode()) > 200, counts[stem.casefold()] > 1
        if is_long or is_known or NUMBERED.search(stem):
            stem = f"{stem.encode()[:190].decode(errors='ignore')}.pair{number}"
        names.append(f"{stem}{suffix}")
    return names


def check_bigwig(contigs: Iterable[Contig]) -> None:
    """BadRequest if a contig is one that a bigWig file cannot hold: too long, or without a length."""
    for name, length in contigs:
        if length is None or not 0 < length <= LARGEST_BIGWIG:
            found = "has no length" if length is None else f"has {length:,} bp"
            raise BadRequest(
                f"contig {name} {found}, but bigWig files need lengths up to {LARGEST_BIGWIG:,} bp; leave out --bigwig, or "
                "name other contigs (--regions)"
            )


def write_bigwigs(tracks: Tracks, directory) -> None:
    """Write one bigWig file for each pair, with the posterior median of the TMRCA in generations, and a list of the files.

    Missing windows are left out. The list, `files.tsv`, has the columns file, haplotype_1 and haplotype_2. The directory gets
    its name, and replaces an earlier one, when it is complete.

    Parameters
    ----------
    tracks : Tracks
    directory : path-like

    Raises
    ------
    BadRequest
        If a contig is longer than 4 294 967 295 bp, which the format cannot hold, or has no length.
    """
    import pyBigWig

    check_bigwig(tracks.contigs)
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = name_files(tracks.pair_names, ".bw")
    for begin in range(0, len(files), CHUNK_PAIRS):  # as they are on disk: each part is read once
        rows = slice(begin, min(begin + CHUNK_PAIRS, len(files)))
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(contextlib.closing(pyBigWig.open(str(temporary / f), "w"))) for f in files[rows]]
            for file in opened:
                file.addHeader([(name, length) for name, length in tracks.contigs])
            for name, _ in tracks.contigs:
                _add_medians(tracks, name, rows, opened)
    table = ["\t".join(("file", "haplotype_1", "haplotype_2"))]
    table += ["\t".join((file, *map(_cell, names))) for file, names in zip(files, tracks.pair_names, strict=True)]
    atomic_write(temporary / "files.tsv", ("\n".join(table) + "\n").encode())
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


def _add_medians(tracks: Tracks, contig: str, rows: slice, files: list) -> None:
    """Add the medians of the pairs *rows* on a contig to their files."""
    windows, middle = tracks.array(contig, "start").shape[0], tracks.quantile_levels.index(0.5)
    for begin in range(0, windows, 16 * CHUNK_WINDOWS):
        part = slice(begin, min(begin + 16 * CHUNK_WINDOWS, windows))
        start, end = (np.asarray(tracks.array(contig, key)[part]) for key in ("start", "end"))
        medians = np.exp(np.asarray(tracks.array(contig, "quantiles")[rows, part])[:, :, middle]).astype(np.float64)
        for file, values in zip(files, medians, strict=True):
            known = ~np.isnan(values)
            if known.any():
                file.addEntries([contig] * int(known.sum()), start[known], ends=end[known], values=values[known])
