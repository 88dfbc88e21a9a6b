"""What to read of a file: regions, samples, and the populations of samples."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from cxt.errors import BadRequest, suggest_nearest
from cxt.genotypes.ancestral_fasta import suggest_contig
from cxt.genotypes.records import Contig, Region

RANGE = re.compile(r"(?P<contig>.+):(?P<start>[\d,]+)-(?P<end>[\d,]*)")

HEADER_WORDS = ("sample", "samples", "sample_id", "sampleid", "sample_name", "id", "iid", "individual", "name")
"""First words, in lower case, that make the first line of a table of populations a header."""


def parse_region(text: str, contigs: Iterable[str] = ()) -> Region:
    """Read a region as bcftools and samtools write it: `chr1`, `chr1:1,000,001-2,000,000` or `chr1:1000001-`.

    Parameters
    ----------
    text : str
        Positions count from 1, and the end is included. A contig with a colon in its name may stand in braces, as in
        `{HLA-A*01:01}:1-100`.
    contigs : iterable of str, optional
        Names of contigs; a *text* that is one of them is never taken apart. Needed for names such as `HLA-A*01:01`.

    Returns
    -------
    Region
        Counted from 0, without the end; its end is None where *text* has none.

    Raises
    ------
    BadRequest
        If it is not such a text, or the region is empty.
    """
    names = set(contigs)
    if text in names:
        return Region(text)
    if braces := re.fullmatch(r"\{(.+)\}", text):
        return Region(braces[1])
    match = RANGE.fullmatch(text)
    if not match:
        if not text or re.search(r":[-\d,]*$", text):
            raise BadRequest(
                f"region '{text}': expected CONTIG, CONTIG:START-END or CONTIG:START-, such as chr1:1,000,001-2,000,000"
            )
        return Region(text)
    contig = match["contig"]
    if braces := re.fullmatch(r"\{(.+)\}", contig):
        contig = braces[1]
    start, end = (int(number.replace(",", "") or 0) for number in (match["start"], match["end"]))
    if start < 1:
        raise BadRequest(f"region '{text}': positions count from 1, got {start}")
    if match["end"] and end < start:
        raise BadRequest(f"region '{text}' is empty: it ends before it starts")
    return Region(contig, start - 1, end if match["end"] else None)


def format_region(region: Region) -> str:
    """Write a region as `parse_region` reads it."""
    if region.start == 0 and region.end is None:
        return region.contig
    return f"{region.contig}:{region.start + 1:,}-{'' if region.end is None else format(region.end, ',')}"


def resolve_regions(regions: Sequence[Region], contigs: Sequence[Contig], *, clip: bool = False) -> list[Region]:
    """Check regions against the contigs of a file, sort them in its order, and merge those that overlap or touch.

    Parameters
    ----------
    regions : sequence of Region
    contigs : sequence of Contig
    clip : bool
        Whether regions that go past the end of a contig are cut there; refused by default.

    Returns
    -------
    list of Region
        An end of None becomes the length of the contig, if that is known.

    Raises
    ------
    BadRequest
        If the file has no such contig, or the region goes past its end.
    """
    lengths = dict(contigs)
    for region in regions:
        if region.contig not in lengths:
            raise BadRequest(
                f"region {format_region(region)}: there is no contig '{region.contig}'{suggest_contig(region.contig, lengths)}"
            )
        length = lengths[region.contig]
        if length is not None and max(region.start + 1, 0 if clip else region.end or 0) > length:
            raise BadRequest(
                f"region {format_region(region)} goes past the end of contig {region.contig}, which has {length:,} bp"
            )
    order = {name: place for place, name in enumerate(lengths)}
    endless = float("inf")
    merged: list[tuple[str, int, float]] = []
    for region in sorted(regions, key=lambda region: (order[region.contig], region.start)):
        length = lengths[region.contig]
        end = min(endless if bound is None else bound for bound in (region.end, length))
        if merged and merged[-1][0] == region.contig and region.start <= merged[-1][2]:
            contig, start, other = merged.pop()
            merged.append((contig, start, max(end, other)))
        else:
            merged.append((region.contig, region.start, end))
    return [Region(contig, start, None if end == endless else int(end)) for contig, start, end in merged]


def read_sample_names(text: str) -> list[str]:
    """Names of samples from `a,b,c`, or from a file with a name on each line.

    Parameters
    ----------
    text : str
        The path of a file if there is one of that name; names with commas between them otherwise.

    Raises
    ------
    BadRequest
        If it holds no name.
    """
    path = Path(text)
    if _is_file(path):
        names = [line.strip() for line in _read_lines(path) if line.strip()]
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise BadRequest(
            f"--samples '{text}' names no samples; give names with commas between them, or a file with one on each line"
        )
    return names


def find_samples(names: Iterable[str], samples: Sequence[str]) -> list[int]:
    """Indices of samples, ascending: the order is that of the file, not of the request.

    Parameters
    ----------
    names : iterable of str
        Requested samples.
    samples : sequence of str
        Samples of the file.

    Raises
    ------
    BadRequest
        If the file has no such sample, or one is requested twice.
    """
    places = {name: place for place, name in enumerate(samples)}
    names = list(names)
    for name, times in Counter(names).items():
        if name not in places:
            raise BadRequest(f"there is no sample '{name}'{suggest_nearest(name, samples)}")
        if times > 1:
            raise BadRequest(f"sample '{name}' is given {times} times")
    return sorted(places[name] for name in names)


def read_populations(path, samples: Sequence[str]) -> dict[str, str]:
    """Read the populations of samples from a table of two columns, sample and population.

    Parameters
    ----------
    path : path-like
        Columns are separated by tabs or blanks. A first line such as `sample population`, and lines that start with #, are
        skipped.
    samples : sequence of str
        Samples of the file of genotypes. Those that are not in the table have no population.

    Returns
    -------
    dict
        {sample: population}

    Raises
    ------
    BadRequest
        If the file cannot be read, has other columns, an unknown sample, or a sample twice.
    """
    known = set(samples)
    populations: dict[str, str] = {}
    is_first = True
    for number, line in enumerate(_read_lines(Path(path)), 1):
        fields = [field.strip() for field in line.rstrip().split("\t")] if "\t" in line.strip() else line.split()
        if not fields or (fields[0].startswith("#") and fields[0] not in known):
            continue
        if len(fields) != 2 or not all(fields):
            raise BadRequest(
                f"populations {path}, line {number}: expected two columns, sample and population, got {len(fields)}"
            )
        sample, population = fields
        was_first, is_first = is_first, False
        if was_first and sample not in known and sample.lower() in HEADER_WORDS:
            continue
        if sample not in known:
            raise BadRequest(
                f"populations {path}, line {number}: there is no sample '{sample}'{suggest_nearest(sample, samples)}"
            )
        if sample in populations:
            raise BadRequest(f"populations {path}, line {number}: sample '{sample}' is there twice")
        populations[sample] = population
    if not populations:
        raise BadRequest(f"populations {path}: the file names no samples; expected two columns, sample and population")
    return populations


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a list of names longer than a path may be
        return False


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadRequest(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from None
