"""Simulations that are pieces of tree sequences of one's own: SLiM's after recapitation, tsinfer's after dating, msprime's."""

import functools
from pathlib import Path

import numpy as np
import tskit

from cxt.config.tree_files import CONTENT_KEYS, check_units, count_pieces, locate_piece
from cxt.errors import BadRequest, suggest_nearest
from cxt.io import file_sha256
from cxt.scenarios.indices import EVALUATION_START, HELD_OUT_EVERY
from cxt.scenarios.seeds import EngineSeeds
from cxt.scenarios.tree_file import load_tree_sequence


def count_held_out_pieces(spec: dict) -> int:
    """Pieces of a variant that are held out, and with which it is evaluated."""
    return -(-count_pieces(spec) // HELD_OUT_EVERY)


def number_of_piece(index: int) -> int:
    """The piece that simulation *index* is.

    The k-th simulation for evaluation is the k-th piece that is held out: there are no other pieces, and no dataset trains on
    these.
    """
    return index if index < EVALUATION_START else (index - EVALUATION_START) * HELD_OUT_EVERY


def drop_content(spec: dict) -> dict:
    """The parameters of a variant that determine, with an index, its random numbers: all but which files there are."""
    return {key: value for key, value in spec.items() if key not in CONTENT_KEYS}


def identify_pieces(spec: dict, *, start: int, count: int) -> dict:
    """What *count* simulations of a variant depend on: its parameters, and the digest and number of each piece.

    The paths of the files are not in it, nor files that these simulations are not cut from.
    """
    pieces: list[list] = []
    for index in range(start, start + count):
        file, number = locate_piece(spec, number_of_piece(index))
        pieces.append([spec["sha256"][file], number])
    return drop_content(spec) | {"pieces": pieces}


def list_piece_files(spec: dict, *, start: int, count: int) -> list[str]:
    """The files that *count* simulations of a variant are cut from."""
    files = (locate_piece(spec, number_of_piece(index))[0] for index in range(start, start + count))
    return [spec["files"][file] for file in dict.fromkeys(files)]


def take_piece(spec: dict, seeds: EngineSeeds, *, index: int, rng: np.random.Generator) -> tuple[tskit.TableCollection, dict]:
    """Cut simulation *index* out of its file.

    Parameters
    ----------
    spec : dict
        Parameters of the variant, completed by `cxt.config.tree_files.fill_tree_files`.
    seeds : EngineSeeds
        Of which the mutations are drawn, if they are overlaid.
    index : int
        Index of the simulation.
    rng : numpy.random.Generator
        Draws individuals.

    Returns
    -------
    tables : tskit.TableCollection
        The piece, with positions from 0 on and times in generations.
    properties : dict
        Rates (None: unknown), the digest of the file, the start of the piece in it, and the sample nodes that were taken.

    Raises
    ------
    BadRequest
        If there is no such piece, the file has changed, or its trees cannot be used.
    """
    file, number = locate_piece(spec, number_of_piece(index))
    path, length = spec["files"][file], spec["sequence_length"]
    ts = _load(path, spec["sha256"][file])
    check_tree_sequence(ts, spec, path=path)
    nodes = _draw_samples(ts, spec, rng, path=path)
    left = number * length
    tables = ts.dump_tables()
    if spec["mutations"] == "overlay":
        tables.sites.clear()
        tables.mutations.clear()
    for table in (tables.nodes, tables.edges, tables.sites, tables.mutations, tables.individuals):
        table.drop_metadata()
    tables.migrations.clear()
    tables.reference_sequence.clear()
    tables.keep_intervals([[left, left + length]], simplify=False, record_provenance=False)
    tables.simplify(nodes, record_provenance=False)
    tables.provenances.clear()
    tables.edges.left, tables.edges.right = tables.edges.left - left, tables.edges.right - left
    tables.sites.position = tables.sites.position - left
    tables.sequence_length = length
    tables.nodes.time = tables.nodes.time / spec.get("generation_time", 1)
    tables.mutations.time = np.full(tables.mutations.num_rows, tskit.UNKNOWN_TIME)
    tables.time_units = "generations"
    tables.sort()
    tables.build_index()
    piece = tables.tree_sequence()
    _check_roots(piece, path=path, left=left)
    if spec["mutations"] == "overlay":
        piece = _overlay_mutations(piece, spec["mutation_rate"], seed=seeds.mutations)
        tables = piece.dump_tables()
        tables.provenances.clear()
    return tables, {
        "mutation_rate": float(spec["mutation_rate"]),
        "recombination_rate": float(spec["recombination_rate"]) if "recombination_rate" in spec else None,
        "file_sha256": spec["sha256"][file],
        "left": left,
        "nodes": nodes.tolist(),
    }


def _overlay_mutations(ts: tskit.TreeSequence, rate: float, *, seed: int) -> tskit.TreeSequence:
    """Infinite-sites mutations at continuous positions, as in the parametric scenarios."""
    import msprime

    return msprime.sim_mutations(
        ts, rate=rate, discrete_genome=False, model=msprime.BinaryMutationModel(), random_seed=seed, record_provenance=False
    )


def inspect_files(spec: dict) -> None:
    """Read all files of a variant and check everything for which they must be read: BadRequest if one cannot be used.

    It takes about as long as loading the files.
    """
    used = spec["sequence_length"]
    for path, digest, length in zip(spec["files"], spec["sha256"], spec["lengths"], strict=True):
        ts = _load(path, digest)
        check_tree_sequence(ts, spec, path=path)
        individuals = _list_individuals(ts, spec, path=path)
        nodes = np.unique(np.concatenate([nodes.ravel() for nodes in individuals.values()]))
        if len(nodes) < ts.num_samples:
            ts = ts.simplify(nodes, record_provenance=False)
        _check_roots(ts, path=path, end=length // used * used)
        if spec["mutations"] == "keep" and not ts.num_sites:
            raise BadRequest(
                f"{path} has no sites, and `mutations: keep` takes those that there are; use `mutations: overlay` to add some"
            )


def check_tree_sequence(ts: tskit.TreeSequence, spec: dict, *, path) -> None:
    """BadRequest unless the times of a tree sequence can be used."""
    check_units(ts.time_units, spec.get("generation_time"), what=str(path))
    times = ts.nodes_time
    if not np.isfinite(times).all():
        raise BadRequest(f"{path} has nodes without a finite time; date them first, with tsdate")
    if len(times) and times.min() < 0:
        raise BadRequest(
            f"{path} has nodes at negative times ({times.min():g}), as old versions of SLiM and pyslim write them; convert it "
            "with `pyslim.update`"
        )


def _check_roots(ts: tskit.TreeSequence, *, path, left: float = 0, end: float | None = None) -> None:
    """BadRequest unless all trees before *end* have one root; messages count positions from *left* on."""
    for tree in ts.trees():
        if end is not None and tree.interval.left >= end:
            return
        if tree.num_roots == 1:
            continue
        where = f"[{tree.interval.left + left:,.0f}, {tree.interval.right + left:,.0f})"
        if tree.num_edges == 0:
            raise BadRequest(
                f"{path} has no ancestry on {where}, as at the ends of a chromosome or at its centromere; cut such regions out "
                "with tskit, `ts.keep_intervals([[left, right]]).trim()`, into one file for each stretch"
            )
        raise BadRequest(
            f"{path} has {tree.num_roots} roots on {where}: its simulation ended before all samples had coalesced. Recapitate "
            "it, with `pyslim.recapitate(ts, recombination_rate=…, ancestral_Ne=…)`, or with "
            "`msprime.sim_ancestry(initial_state=ts, …)`"
        )


def _draw_samples(ts: tskit.TreeSequence, spec: dict, rng: np.random.Generator, *, path) -> np.ndarray:
    """The sample nodes of randomly drawn individuals."""
    individuals = _list_individuals(ts, spec, path=path)
    wanted = spec["samples"] if "samples" in spec else {"": spec["individuals"]}
    return np.concatenate(
        [nodes[rng.choice(len(nodes), size=wanted[name], replace=False)].ravel() for name, nodes in individuals.items()]
    )


def _list_individuals(ts: tskit.TreeSequence, spec: dict, *, path) -> dict[str, np.ndarray]:
    """The sample nodes (individuals, 2) that may be taken from each population of `samples`, or from all those together ("").

    Raises
    ------
    BadRequest
        If there are too few individuals, a population does not exist, individuals are neither haploid nor diploid, or samples
        are not at time 0.
    """
    names = list(spec.get("samples", spec.get("populations", ())))
    numbers = {name: _find_population(ts, name, path=path) for name in names}
    groups = {name: [numbers[name]] for name in names} if "samples" in spec else {"": list(numbers.values())}
    wanted = spec["samples"] if "samples" in spec else {"": spec["individuals"]}
    result = {}
    for name, populations in groups.items():
        nodes = ts.samples()
        if populations:
            nodes = nodes[np.isin(ts.nodes_population[nodes], populations)]
        times = ts.nodes_time[nodes]
        if np.any(times != 0):
            raise BadRequest(
                f"{path}: {np.count_nonzero(times):,} of {len(nodes):,} samples{_of(populations, ts)} are not at time 0 (the "
                f"oldest at {times.max():g}), and ancient samples are not supported; keep those of today with "
                "`ts.simplify(ts.samples(time=0))`, or name populations that have no others"
            )
        pairs = _pair_nodes(ts, nodes, path=path)
        if len(pairs) < wanted[name]:
            setting = "samples" if "samples" in spec else "individuals"
            raise BadRequest(
                f"{path} has {len(pairs):,} diploid individuals{_of(populations, ts)}, but `{setting}` asks for "
                f"{wanted[name]:,}; lower it"
            )
        result[name] = pairs
    return result


def _of(populations: list[int], ts: tskit.TreeSequence) -> str:
    """Names of populations for a message; none if there is no choice among them."""
    return f" of {', '.join(_name_population(ts, number) for number in populations)}" if populations else ""


def _pair_nodes(ts: tskit.TreeSequence, nodes: np.ndarray, *, path) -> np.ndarray:
    """Sample nodes as (individuals, 2): those of diploid individuals, or each two that follow each other."""
    owners = ts.nodes_individual[nodes]
    _, ploidy = np.unique(owners, return_counts=True)
    if np.all(owners == tskit.NULL) or (np.all(owners != tskit.NULL) and np.all(ploidy == 1)):
        return nodes[: len(nodes) // 2 * 2].reshape(-1, 2)
    if np.any(owners == tskit.NULL) or np.any(ploidy != 2):
        raise BadRequest(
            f"{path}: individuals must all be diploid, or all haploid; this file has sample nodes without individual, or "
            "individuals with other numbers of sample nodes. Simplify it to the samples to use"
        )
    return nodes[np.argsort(owners, kind="stable")].reshape(-1, 2)


def _name_population(ts: tskit.TreeSequence, number: int) -> str:
    metadata = ts.population(number).metadata
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return str(number) if name is None else str(name)


def _find_population(ts: tskit.TreeSequence, name: str, *, path) -> int:
    """Number of the population called *name*, which may also be its number."""
    names = [_name_population(ts, number) for number in range(ts.num_populations)]
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < ts.num_populations:
        return int(name)
    raise BadRequest(f"{path} has no population '{name}'{suggest_nearest(name, names)}")


@functools.lru_cache(maxsize=1)
def _load(path: str, sha256: str) -> tskit.TreeSequence:
    """The tree sequence in a file that must have the digest *sha256*; one is kept, because pieces follow the order of files."""
    if not Path(path).is_file():
        raise BadRequest(f"there is no file {path} any more; put it back, or run the workflow with what there is")
    if (found := file_sha256(path)) != sha256:
        raise BadRequest(
            f"{path} has changed since this was planned: its sha256 must be {sha256[:16]}…, got {found[:16]}…; run it again"
        )
    ts, has_others = load_tree_sequence(path)
    if has_others:
        raise BadRequest(
            f"{path} holds more than one tree sequence, as a simulation batch does; write each to a file of its own "
            "(`cxt trees`)"
        )
    return ts
