"""Simulation batches: files of consecutive simulations of one variant, `FILE.trees.batch`.

A batch holds tree sequences in tskit's format, one after another. `tskit.load(path)` would return only the first;
`read_batch` reads all of them and checks that none is missing.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

import tskit

from cxt.errors import BadRequest
from cxt.io import atomic_file, canonical_json, check_writable
from cxt.lineage import check_lineage, how_to_remake
from cxt.scenarios.registry import simulate_tables

IDENTITY = {"scenario", "index", "seed", "spec", "mutation_rate", "recombination_rate"}
"""What the metadata of every simulation say, among other things."""


def how_to_reproduce(spec: dict, *, index: int, seed: int) -> str:
    """Which simulation this is, and the command that makes it alone, in words."""
    words = [
        "--spec",
        canonical_json(spec),
        "--start",
        str(index),
        "--count",
        "1",
        "--seed",
        str(seed),
        "--out",
        "one.trees.batch",
    ]
    return (
        f"This was simulation {index} of '{spec['name']}' with seed {seed}. To reproduce it alone:\n"
        f"  {shlex.join(['python', '-m', 'cxt.simulate', *words])}"
    )


def write_batch(path, spec: dict, *, start: int, count: int, seed: int, lineage: str | None = None, progress=None) -> None:
    """Simulate indices start..start+count-1 of a variant into one file, which appears only when complete.

    One simulation is in memory at a time. *progress*, if given, is called with each index before it is simulated, and once
    more before the file gets its name. *lineage*, if given, goes into the metadata of each. An exception says which simulation
    it came from, and how to reproduce it alone.
    """
    path = Path(path)
    check_writable(path)
    with atomic_file(path) as file:
        for index in range(start, start + count):
            if progress is not None:
                progress(index)
            try:
                tables = simulate_tables(spec, index=index, seed=seed)
                if lineage is not None:
                    tables.metadata = {"cxt": tables.metadata["cxt"] | {"lineage": lineage}}
                tables.dump(file)
            except BadRequest as error:
                raise BadRequest(f"{error}\n{how_to_reproduce(spec, index=index, seed=seed)}") from None
            except Exception as error:
                error.add_note(how_to_reproduce(spec, index=index, seed=seed))
                raise
        if progress is not None:
            progress(index)


def read_batch(
    path, *, start: int, count: int, scenario: str | None = None, seed: int | None = None, lineage: str | None = None
) -> Iterator[tskit.TreeSequence]:
    """The tree sequences of a batch file, in order; *scenario*, *seed* and *lineage* are checked where given.

    Raises
    ------
    BadRequest
        If the file is cut (within or between two tree sequences), holds more than *count*, or holds another simulation
        than (*scenario*, *start* + i) at place i, or of another *lineage*.
    """
    remedy = how_to_remake(path, delete=str(path))
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise BadRequest(f"batch {path} cannot be read: {error.strerror}; {how_to_remake(path)}") from None
    with file:
        for i in range(count):
            try:
                ts = tskit.load(file)
            except EOFError:
                raise BadRequest(f"{path} is truncated: it holds {i} tree sequences, expected {count}; {remedy}") from None
            except (tskit.FileFormatError, tskit.LibraryError, OSError) as error:
                raise BadRequest(f"{path} is damaged or truncated at tree sequence {i} of {count}: {error}; {remedy}") from None
            identity = ts.metadata.get("cxt") if isinstance(ts.metadata, dict) else None
            if identity is None:
                raise BadRequest(
                    f"{path}: tree sequence {i} carries no cxt identity in its metadata; make it with cxt.simulate"
                )
            if lacking := sorted(IDENTITY - identity.keys()):
                raise BadRequest(f"{path}: tree sequence {i} has no {', '.join(lacking)}, as of an older cxt; {remedy}")
            expected = (identity["scenario"] if scenario is None else scenario, start + i)
            if (identity["scenario"], identity["index"]) != expected:
                raise BadRequest(
                    f"{path}: found simulation {identity['index']} of '{identity['scenario']}' at place {i}, "
                    f"expected {expected[1]} of '{expected[0]}'; {remedy}"
                )
            if seed is not None and identity["seed"] != seed:
                raise BadRequest(f"{path} was simulated with seed {identity['seed']}, expected {seed}; {remedy}")
            check_lineage(f"batch {path}", found=identity.get("lineage"), planned=lineage, target=path)
            yield ts
        if file.read(1):
            raise BadRequest(f"{path} holds more than the expected {count} tree sequences; {remedy}")


def read_simulation(path, index: int) -> tskit.TreeSequence:
    """Simulation *index* of a batch file.

    Raises
    ------
    BadRequest
        If the file cannot be read, is damaged before that simulation, or does not hold it.
    """
    found = []
    try:
        with open(path, "rb") as file:
            while True:
                ts = tskit.load(file)
                identity = ts.metadata.get("cxt", {}) if isinstance(ts.metadata, dict) else {}
                if "index" not in identity:
                    raise BadRequest(
                        f"{path}: tree sequence {len(found)} has no cxt identity; expected a batch of cxt.simulate"
                    )
                if identity["index"] == index:
                    return ts
                found.append(identity["index"])
    except EOFError:
        held = f"{found[0]} to {found[-1]}" if found else "none"
        raise BadRequest(f"{path} does not hold simulation {index}; indices in it: {held}") from None
    except (tskit.FileFormatError, tskit.LibraryError) as error:
        raise BadRequest(f"{path} is no batch of tree sequences, or damaged after {len(found)} of them: {error}") from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from None
