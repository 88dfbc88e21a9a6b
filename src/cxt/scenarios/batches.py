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
"""Required keys of the metadata of a simulation."""


def how_to_reproduce(spec: dict, *, index: int, seed: int) -> str:
    """Name a simulation, and the command that reproduces it alone."""
    arguments = [
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
        f"  {shlex.join(['python', '-m', 'cxt.simulate', *arguments])}"
    )


def write_batch(path, spec: dict, *, start: int, count: int, seed: int, lineage: str | None = None, progress=None) -> None:
    """Simulate consecutive indices of a variant into one file, which is created only when it is complete.

    One simulation is in memory at a time. An exception says in which simulation it occurred, and how to reproduce it alone.

    Parameters
    ----------
    path : path-like
        The simulation batch to write.
    spec : dict
        Parameters of the variant.
    start, count : int
        First index, and number of simulations.
    seed : int
        Seed of the workflow.
    lineage : str, optional
        Lineage to store in the metadata of each simulation.
    progress : callable, optional
        Called with each index before it is simulated, and once more before the file is renamed.
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
    """Read the tree sequences of a simulation batch, in order.

    Parameters
    ----------
    path : path-like
    start, count : int
        Expected first index and number of simulations.
    scenario, seed, lineage : optional
        Expected variant, workflow seed and lineage of the simulations, if given.

    Yields
    ------
    tskit.TreeSequence

    Raises
    ------
    BadRequest
        If the file is truncated (within or between two tree sequences), has more than *count* simulations, another simulation
        than (*scenario*, *start* + i) at place i, or another *lineage*.
    """
    remedy = how_to_remake(path, delete=str(path))
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise BadRequest(f"simulation batch {path} cannot be read: {error.strerror}; {how_to_remake(path)}") from None
    with file:
        for i in range(count):
            try:
                ts = tskit.load(file)
            except EOFError:
                raise BadRequest(f"{path} is truncated: it holds only {i} of {count} tree sequences; {remedy}") from None
            except (tskit.FileFormatError, tskit.LibraryError, OSError) as error:
                raise BadRequest(f"{path} is damaged or truncated at tree sequence {i} of {count}: {error}; {remedy}") from None
            identity = ts.metadata.get("cxt") if isinstance(ts.metadata, dict) else None
            if identity is None:
                raise BadRequest(
                    f"{path}: tree sequence {i} has no cxt identity in its metadata; create the file with cxt.simulate"
                )
            if lacking := sorted(IDENTITY - identity.keys()):
                raise BadRequest(
                    f"{path}: tree sequence {i} has no {', '.join(lacking)} in its metadata, perhaps written by an older cxt; "
                    f"{remedy}"
                )
            expected = (identity["scenario"] if scenario is None else scenario, start + i)
            if (identity["scenario"], identity["index"]) != expected:
                raise BadRequest(
                    f"{path}: tree sequence {i} must be simulation {expected[1]} of '{expected[0]}', got "
                    f"{identity['index']} of '{identity['scenario']}'; {remedy}"
                )
            if seed is not None and identity["seed"] != seed:
                raise BadRequest(f"the seed of {path} must be {seed}, got {identity['seed']}; {remedy}")
            check_lineage(f"simulation batch {path}", actual=identity.get("lineage"), planned=lineage, target=path)
            yield ts
        if file.read(1):
            raise BadRequest(f"{path} holds more than {count} tree sequences; {remedy}")


def read_simulation(path, index: int) -> tskit.TreeSequence:
    """Read simulation *index* of a simulation batch.

    Raises
    ------
    BadRequest
        If the file cannot be read, is damaged before that simulation, or does not contain it.
    """
    indices = []
    try:
        with open(path, "rb") as file:
            while True:
                ts = tskit.load(file)
                identity = ts.metadata.get("cxt", {}) if isinstance(ts.metadata, dict) else {}
                if "index" not in identity:
                    raise BadRequest(
                        f"{path}: tree sequence {len(indices)} has no cxt identity in its metadata; create the file with "
                        "cxt.simulate"
                    )
                if identity["index"] == index:
                    return ts
                indices.append(identity["index"])
    except EOFError:
        held_indices = f"{indices[0]} to {indices[-1]}" if indices else "none"
        raise BadRequest(f"{path} does not contain simulation {index}; its indices: {held_indices}") from None
    except (tskit.FileFormatError, tskit.LibraryError) as error:
        raise BadRequest(
            f"{path} is not a simulation batch, or is damaged after {len(indices)} tree sequences: {error}"
        ) from None
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror or error}") from None
