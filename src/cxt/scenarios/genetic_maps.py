"""Genetic maps of stdpopsim's catalogue: checking that they are available, fetching and reading them.

cxt catalogue --species HomSap --genetic-map HapMapII_GRCh38     fetch a map into stdpopsim's cache
"""

import functools
import importlib.metadata
import math
import warnings
from pathlib import Path

import msprime
import numpy as np

from cxt.config.variants import get_scenario_name
from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.io import atomic_write, json_text
from cxt.scenarios.stdpopsim_catalogue import get_species, import_stdpopsim, list_autosomes


def get_genetic_map(spec: dict):
    """stdpopsim's genetic map of a scenario; BadRequest with the nearest name if there is none."""
    species = get_species(spec)
    map_ids = [m.id for m in species.genetic_maps]
    if spec["genetic_map"] not in map_ids:
        problem = f"scenario '{spec['name']}': {species.id} has no genetic map '{spec['genetic_map']}'"
        raise BadRequest(problem + suggest_nearest(spec["genetic_map"], map_ids))
    return species.get_genetic_map(spec["genetic_map"])


@functools.cache
def _get_stdpopsim_version() -> str:
    """Reading it from the installation takes a millisecond, and a plan needs it thousands of times."""
    return importlib.metadata.version("stdpopsim")


def catalogue_versions(spec: dict) -> list[str] | None:
    """Versions that a variant depends on besides its parameters: stdpopsim's catalogue, and its map's checksum; or None."""
    if spec["kind"] != "stdpopsim":
        return None
    return [_get_stdpopsim_version(), *([get_genetic_map(spec).sha256] if "genetic_map" in spec else [])]


def advise_on_missing_map(spec: dict) -> str:
    """Advice on a genetic map that is not available."""
    fetch = (
        f"Fetch it on a machine with network access (`cxt catalogue --species {spec['species']} --genetic-map "
        f"{spec['genetic_map']}`) and copy stdpopsim's cache here (STDPOPSIM_CACHE sets its directory)"
    )
    if "kind" not in spec:  # requested on the command line, not by a scenario
        return fetch
    scenario = get_scenario_name(spec["name"])
    return (
        f"{fetch}; or continue with the chromosomes' average rates (`scenarios: {{{scenario}: {{genetic_map: null}}}}` in an "
        f"overlay) or without the scenario (`scenarios: {{{scenario}: null}}`)"
    )


def _missing_map_error(spec: dict, reason: str) -> BadRequest:
    genetic_map = get_genetic_map(spec)
    return BadRequest(
        f"scenario '{spec['name']}' needs the genetic map {genetic_map.id} of {spec['species']}, which is not in "
        f"stdpopsim's cache ({genetic_map.map_cache_dir}){reason}. {advise_on_missing_map(spec)}"
    )


@functools.cache
def _check_url(url: str) -> str:
    """Describe why *url* cannot be fetched; "" if it can."""
    import http.client  # imported here, because most jobs do not need it
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10):
            return ""
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        return f" and cannot be fetched ({getattr(error, 'reason', error)})"


def check_map_available(spec: dict, *, fetched=None) -> None:
    """BadRequest if a scenario's genetic map is neither in stdpopsim's cache nor on its server; fetches nothing.

    *fetched* is the record of an earlier fetch: if it exists but the map does not, the workflow would not fetch the map again.
    """
    genetic_map = get_genetic_map(spec)
    if genetic_map.is_cached():
        return
    if reason := _check_url(genetic_map.url):
        raise _missing_map_error(spec, reason)
    if fetched is not None and Path(fetched).exists():
        raise _missing_map_error(spec, f", although {fetched} says that it was fetched: delete that file to fetch it again")


def fetch_genetic_map(spec: dict) -> None:
    """Fetch a scenario's genetic map into stdpopsim's cache, unless it is cached already; BadRequest if that fails."""
    from http.client import HTTPException

    genetic_map = get_genetic_map(spec)
    if genetic_map.is_cached():
        return
    try:
        genetic_map.download()
    except (OSError, ValueError, EOFError, HTTPException) as error:
        # No network; a checksum that differs from the catalogue's; a truncated archive.
        raise _missing_map_error(spec, f" and could not be fetched ({error})") from None
    if not genetic_map.is_cached():
        raise _missing_map_error(spec, ": something else is in its place; delete it")


def write_fetch_record(spec: dict, path) -> None:
    """Record as JSON that a scenario's genetic map is in stdpopsim's cache, with its name and checksum."""
    record = {"species": spec["species"], "genetic_map": spec["genetic_map"], "sha256": get_genetic_map(spec).sha256}
    atomic_write(path, json_text(record).encode())


def read_genetic_map(path, *, length: float) -> msprime.RateMap:
    """Read the map of a chromosome of *length* bp from a HapMap file, with position and rate (cM/Mb) in columns two and three.

    The rate is missing (NaN) before the first positive rate and after the last one: there the map has no data, even if its file
    has rates of 0.

    Raises
    ------
    BadRequest
        If the file cannot be read, or is not such a map.
    """

    def damaged(reason: str) -> BadRequest:
        return BadRequest(
            f"genetic map {path} {reason}; it must have a header line, then lines with chromosome, position (bp), rate (cM/Mb) "
            "and map position"
        )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input contained no data.*")
            table = np.loadtxt(path, skiprows=1, usecols=(1, 2), ndmin=2, encoding="utf-8")
    except OSError as error:
        raise damaged(f"cannot be read ({error.strerror or error})") from None
    except (ValueError, IndexError) as error:  # lines without these columns or with words in them, or not text
        raise damaged(f"is not a table of numbers ({first_line(error)})") from None
    if len(table) < 2:
        raise damaged(f"must have at least 2 lines with a position, got {len(table)}")
    position, rate = table.T
    if not np.isfinite(table).all():
        raise damaged("holds NaN or infinite numbers")
    if position[0] < 0 or (np.diff(position) <= 0).any():
        raise damaged("has positions that are negative or not in rising order")
    if (rate < 0).any():
        raise damaged(f"holds a negative rate, {rate.min():g} cM/Mb")
    if rate[-1] != 0:
        raise damaged(f"has a rate of {rate[-1]:g} cM/Mb in its last line, which has no end; it may be truncated")
    (with_rate,) = np.nonzero((rate > 0) & (position < length))
    if not with_rate.size:
        raise damaged(f"has no rate above 0 within the {length:.0f} bp of the chromosome")
    position = np.minimum(position[with_rate[0] : with_rate[-1] + 2], length)
    rate = rate[with_rate[0] : with_rate[-1] + 1] / 1e8  # per bp
    if position[0] > 0:
        position, rate = np.insert(position, 0, 0), np.insert(rate, 0, np.nan)
    if position[-1] < length:
        position, rate = np.append(position, length), np.append(rate, np.nan)
    return msprime.RateMap(position=position, rate=rate)


@functools.lru_cache(maxsize=64)
def read_chromosome_map(species: str, name: str, chromosome: str) -> msprime.RateMap | None:
    """The map of one chromosome, cached in the process; None if the map does not cover the chromosome."""
    catalogue_species = import_stdpopsim().get_species(species)
    genetic_map = catalogue_species.get_genetic_map(name)
    path = genetic_map.map_cache_dir / genetic_map.file_pattern.format(id=chromosome)
    if not path.is_file():
        return None
    try:
        return read_genetic_map(path, length=catalogue_species.genome.get_chromosome(chromosome).length)
    except BadRequest as error:
        raise BadRequest(f"{error}. Delete {genetic_map.map_cache_dir}, so that the workflow fetches the map again") from None


def list_mapped_autosomes(spec: dict) -> list:
    """The usable chromosomes that a scenario's genetic map covers; BadRequest if the map is not cached or covers none."""
    genetic_map = get_genetic_map(spec)
    if not genetic_map.is_cached():
        raise _missing_map_error(spec, "")
    covered = [
        chromosome
        for chromosome in list_autosomes(spec)
        if read_chromosome_map(spec["species"], genetic_map.id, chromosome.id) is not None
    ]
    if not covered:
        raise BadRequest(
            f"scenario '{spec['name']}': the genetic map {genetic_map.id} in {genetic_map.map_cache_dir} covers no autosome of "
            f"{spec['species']} as long as sequence_length {spec['sequence_length']}; delete that directory if it is damaged"
        )
    return covered


def find_covered_interval(chromosome, rates: msprime.RateMap) -> tuple[int, int]:
    """Left and right end, in whole base pairs, of the part of a chromosome where its map has rates."""
    (with_rate,) = np.nonzero(~rates.missing)
    return math.ceil(rates.left[with_rate[0]]), min(math.floor(rates.right[with_rate[-1]]), int(chromosome.length))
