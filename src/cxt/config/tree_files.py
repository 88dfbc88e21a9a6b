"""Tree sequences as training data: finding the files, their lengths and digests, and the pieces that they are cut into."""

import functools
import glob
import json
import os
import zipfile
from pathlib import Path

import tskit

from cxt.errors import BadRequest, first_line, suggest_nearest
from cxt.io import file_sha256

DEFAULT_INDIVIDUALS = 25
"""Diploid individuals that are taken of each piece by default, as in scenarios that are simulated."""

CONTENT_KEYS = ("files", "sha256", "lengths")
"""Parameters of a variant that say which files there are; the others, and an index, determine all random numbers."""

PLANNED = CONTENT_KEYS[1:]
"""Those of them that are no keys of a configuration."""

LONGEST_LIST = 100_000
"""Largest number of characters of all paths and digests: they are passed on command lines, whose arguments hold 131 072."""

HOW_TO_DATE = {
    "uncalibrated": "its times are only an order, as those that tsinfer gives: date it first, with tsdate "
    "(`tsdate.date(ts, mutation_rate=…)`)",
    "ticks": "SLiM counts in ticks: add `generation_time` with the ticks per generation (1 in a Wright-Fisher model)",
    "years": "add `generation_time` with the years per generation",
}
"""Advice on tree sequences whose times are in other units than generations, by unit."""


def fill_tree_files(scenario: dict, *, at: str) -> None:
    """Complete a scenario of kind `trees`: which files it has, their digests and lengths, and the number of simulations.

    Parameters
    ----------
    scenario : dict
        The section, resolved; modified in place.
    at : str
        Its place in messages.

    Raises
    ------
    BadRequest
        If a file is missing or no tree sequence, its times are in units that cannot be used, it is shorter than a piece or
        given twice, or `simulations` is above the number of pieces.
    """
    files = _find_files(scenario["files"], at=f"{at}.files")
    length = scenario["sequence_length"]
    digests, lengths = [], []
    for path in files:
        total, units = read_header(path, at=f"{at}.files")
        if units is not None:
            check_units(units, scenario.get("generation_time"), what=f"{at}.files: {path}")
        if total < length:
            raise BadRequest(
                f"{at}.files: {path} is {total:,} bp long, shorter than one piece of {length:,} bp; lower `sequence_length` of "
                "the scenario, or remove the file"
            )
        digest = digest_file(path)
        if digest in digests:
            raise BadRequest(f"{at}.files: {files[digests.index(digest)]} and {path} are the same; remove one of them")
        digests.append(digest)
        lengths.append(total)
    scenario |= {"files": files, "sha256": digests, "lengths": lengths}
    if (size := len(json.dumps([files, digests, lengths]))) > LONGEST_LIST:
        raise BadRequest(
            f"{at}.files: the paths and digests of {len(files):,} files have {size:,} characters, more than the "
            f"{LONGEST_LIST:,} that fit on a command line; divide them among several scenarios, or join files"
        )
    if "samples" not in scenario:
        scenario.setdefault("individuals", DEFAULT_INDIVIDUALS)
    pieces = count_pieces(scenario)
    if scenario.setdefault("simulations", pieces) > pieces:
        raise BadRequest(
            f"{at}.simulations: {scenario['simulations']:,} requested, but the files have only {pieces:,} pieces of "
            f"{length:,} bp; leave `simulations` out to use all"
        )


def count_pieces(spec: dict) -> int:
    """Number of consecutive pieces of `sequence_length` base pairs into which the files of a scenario or variant are cut."""
    return sum(length // spec["sequence_length"] for length in spec["lengths"])


def locate_piece(spec: dict, piece: int) -> tuple[int, int]:
    """The file that *piece* of a variant is cut from, and its number within that file, both from 0.

    Pieces are numbered from the start of the first file to the end of the last one.

    Raises
    ------
    BadRequest
        If there are fewer pieces.
    """
    left = piece
    for file, length in enumerate(spec["lengths"]):
        count = length // spec["sequence_length"]
        if left < count:
            return file, left
        left -= count
    raise BadRequest(
        f"'{spec['name']}' has {count_pieces(spec):,} pieces of {spec['sequence_length']:,} bp, so that there is no piece "
        f"{piece:,}; pieces are numbered from 0"
    )


def check_shared_files(scenarios: dict) -> None:
    """BadRequest if two scenarios cut the same file into different pieces.

    A piece that is held out of one of them could then be trained on in the other. The same files in the same order and with the
    same `sequence_length` are accepted: both scenarios then hold out the same pieces.
    """
    seen: dict[str, tuple[str, list]] = {}
    for name, scenario in scenarios.items():
        if scenario["kind"] != "trees":
            continue
        cut = [scenario["sequence_length"], scenario["sha256"]]
        for path, digest in zip(scenario["files"], scenario["sha256"], strict=True):
            other, other_cut = seen.setdefault(digest, (name, cut))
            if other_cut != cut:
                raise BadRequest(
                    f"scenarios '{other}' and '{name}' cut {path} into different pieces, so that one may train on what the "
                    "other holds out; give both the same files and sequence_length, or remove the file from one"
                )


def check_units(units: str, generation_time: float | None, *, what: str) -> None:
    """BadRequest if times in *units* cannot be used, or *generation_time* is missing or of no use."""
    if units in ("years", "ticks") and generation_time is not None:
        return
    if units != "generations":
        remedy = HOW_TO_DATE.get(units, "convert its times to generations, and set `tables.time_units = 'generations'`")
        raise BadRequest(f"{what}: times must be in generations, got '{units}': {remedy}")
    if generation_time is not None:
        raise BadRequest(f"{what}: its times are in generations already; remove `generation_time`")


def read_header(path, *, at: str) -> tuple[int, str | None]:
    """Length in base pairs and units of time of a tree sequence, without reading the rest; no units for a .tsz file.

    Raises
    ------
    BadRequest
        If it cannot be read, or its length is not a whole number.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start == b"PK":
            with zipfile.ZipFile(path) as archive:
                attributes = json.loads(archive.read(".zattrs"))
            if attributes.get("format_name") != "tszip":
                raise ValueError("it is another zip file")
            length, units = float(attributes["sequence_length"]), None
        else:
            ts = tskit.load(path, skip_tables=True)
            length, units = ts.sequence_length, ts.time_units
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, tskit.FileFormatError, tskit.LibraryError) as error:
        reason = first_line(error) if str(error) else "it ends too early"
        raise BadRequest(f"{at}: {path} cannot be read as a tree sequence (.trees or .tsz): {reason}") from None
    return int(length), units


def digest_file(path) -> str:
    """sha256 of a file; it is computed again only if the file has changed."""
    state = os.stat(path)
    return _digest(str(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=100_000)
def _digest(path: str, size: int, changed: int) -> str:
    return file_sha256(path)


def _find_files(given: str | list[str], *, at: str) -> list[str]:
    """The paths in *given*, in order; a pattern stands for all files that match it, sorted by name."""
    files: list[str] = []
    for text in [given] if isinstance(given, str) else given:
        if Path(text).is_file():
            files.append(text)
        elif glob.has_magic(text):
            found = sorted(name for name in glob.glob(text, recursive=True) if Path(name).is_file())
            if not found:
                raise BadRequest(f"{at}: no file matches {Path(text).absolute()}")
            files += found
        else:
            remedy = _suggest_sibling(Path(text)) or (
                "; set it to paths or patterns of .trees or .tsz files, absolute or relative to the configuration file that "
                "names them"
            )
            raise BadRequest(f"{at}: there is no file {Path(text).absolute()}{remedy}")
    if twice := next((path for path in files if files.count(path) > 1), None):
        raise BadRequest(f"{at}: {twice} is given twice; remove one of them")
    return files


def _suggest_sibling(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    suggestion = suggest_nearest(path.name, names)
    return suggestion if suggestion.startswith("; did you mean") else ""
