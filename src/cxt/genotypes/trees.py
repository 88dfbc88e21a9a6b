"""Genotypes from tree sequences (`.trees`, and `.tsz` compressed by tszip)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tskit

from cxt.errors import BadRequest
from cxt.genotypes.records import ABSENT, Contig, Records, Region
from cxt.scenarios.tree_file import load_tree_sequence

CONTIG = "1"
"""Name of the only contig of a tree sequence, which is also tskit's when it writes a VCF."""

CHUNK_GENOTYPES = 2**22
"""Genotypes of a chunk of records, at most."""


class TreesSource:
    """A tree sequence as a source of genotypes; see `cxt.genotypes.records.Source`.

    Samples are named, and have the copies, that `tskit.TreeSequence.write_vcf` gives them: individual i is `tsk_<i>` with as
    many copies as it has sample nodes; without individuals, each sample node is a haploid sample. Isolated samples without a
    mutation above them are missing. The ancestral allele is the ancestral state of the site.

    Positions are those of the tree sequence, counted from 0 (`write_vcf` writes the same numbers, which a VCF counts from 1,
    unless it is called with ``position_transform=lambda x: 1 + x``). Those that are not whole numbers are rounded down, and a
    site that shares its base pair with the one before moves to the next free one, so that no site is lost.

    Parameters
    ----------
    path : path-like
    ancestral : {"auto", "tree", "ref"}
        All three are the ancestral state.

    Raises
    ------
    BadRequest
        If the file is not a whole tree sequence, has no samples or no sites, or more sites than base pairs; or for another
        value of *ancestral*.
    """

    kind = "tree sequence"
    knows_ancestral = True
    any_alleles = True
    fasta = None

    def __init__(self, path, *, ancestral: str = "auto"):
        self.path = Path(path)
        if ancestral not in ("auto", "tree", "ref"):
            raise BadRequest(
                f"{path} is a tree sequence, which has the ancestral states of its sites; "
                f"--ancestral must be tree or auto, got '{ancestral}'"
            )
        self._ts, has_others = load_tree_sequence(self.path)
        ts = self._ts
        self.notes: list[str] = []
        self.outside: dict[str, int] | None = {}
        if has_others:
            self.notes.append(
                "the file holds several tree sequences, of which the first was read; `cxt trees` extracts another"
            )
        if ts.num_sites == 0:
            raise BadRequest(f"{path} has no sites; add mutations, for example with msprime.sim_mutations")
        length = int(ts.sequence_length)
        if ts.num_sites > length:
            raise BadRequest(
                f"{path} has {ts.num_sites:,} sites on {ts.sequence_length:g} bp; positions must be in base pairs, "
                "at most one site at each"
            )
        self.contigs = [Contig(CONTIG, length)]
        self._positions = self._whole_positions(length)
        self._nodes = self._find_nodes()  # of each sample
        self.samples = [name for name, _ in self._nodes]
        self.populations = self._name_populations()

    def _whole_positions(self, length: int) -> np.ndarray:
        """Positions of all sites in whole base pairs, strictly ascending from 0 to *length* - 1."""
        exact = self._ts.sites_position
        rounded = np.floor(exact).astype(np.int64)
        order = np.arange(len(exact))
        free = np.maximum.accumulate(rounded - order) + order  # no earlier than one after the site before
        positions = np.minimum(free, length - len(exact) + order)
        moved = np.count_nonzero(positions != rounded)
        if np.any(rounded != exact):
            self.notes.append(
                f"positions are not whole numbers and were rounded down; {moved:,} sites moved to a free base pair"
            )
        return positions

    def _find_nodes(self) -> list[tuple[str, list[int]]]:
        """Name and sample nodes of each sample."""
        ts = self._ts
        samples = ts.samples()
        if not len(samples):
            raise BadRequest(f"{self.path} has no sample nodes")
        owners = ts.nodes_individual[samples]
        if np.all(owners == tskit.NULL):
            return [(f"tsk_{i}", [int(node)]) for i, node in enumerate(samples)]
        if left_out := int(np.count_nonzero(owners == tskit.NULL)):
            self.notes.append(f"{left_out:,} sample nodes belong to no individual and were left out")
        is_sample = set(samples.tolist())
        nodes = (
            (individual.id, [node for node in individual.nodes.tolist() if node in is_sample])
            for individual in ts.individuals()
        )
        return [(f"tsk_{i}", nodes) for i, nodes in nodes if nodes]

    def _name_populations(self) -> dict[str, str]:
        """Population of each sample, if they come from more than one."""
        ts = self._ts
        population_of = {name: int(ts.nodes_population[nodes[0]]) for name, nodes in self._nodes}
        if len(set(population_of.values())) < 2:
            return {}
        names = {}
        for population in ts.populations():
            named = population.metadata.get("name") if isinstance(population.metadata, dict) else None
            names[population.id] = named or f"pop_{population.id}"
        return {sample: names[number] for sample, number in population_of.items() if number != tskit.NULL}

    def read(self, regions: Sequence[Region], samples: Sequence[int]) -> Iterator[Records]:
        """Yield the records within *regions*, all if there are none, with the genotypes of *samples* (indices)."""
        ts = self._ts
        chosen = [self._nodes[sample][1] for sample in samples]
        copies = max(map(len, chosen), default=0)
        rows = np.repeat(np.arange(len(chosen)), [len(nodes) for nodes in chosen])
        columns = np.concatenate([np.arange(len(nodes)) for nodes in chosen])
        variant = tskit.Variant(ts, samples=np.concatenate(chosen).astype(np.int32))
        phased_row = np.ones(len(chosen), dtype=bool)
        chunk = max(1, CHUNK_GENOTYPES // max(1, len(chosen) * copies))
        outside = len(self._positions)
        for region in regions or [Region(CONTIG)]:
            ends = [region.start, self._positions[-1] + 1 if region.end is None else region.end]
            first, last = (int(site) for site in np.searchsorted(self._positions, ends))
            outside -= last - first
            for start in range(first, last, chunk):
                stop = min(last, start + chunk)
                genotypes = np.full((stop - start, len(chosen), copies), ABSENT, dtype=np.int16)
                alleles = []
                for site in range(start, stop):
                    variant.decode(site)
                    genotypes[site - start, rows, columns] = variant.genotypes
                    alleles.append(tuple(allele for allele in variant.alleles if allele is not None))
                yield Records(
                    contig=CONTIG,
                    positions=self._positions[start:stop],
                    alleles=alleles,
                    genotypes=genotypes,
                    phased=np.broadcast_to(phased_row, (stop - start, len(chosen))),
                    ancestral=[names[0] for names in alleles],
                )
        self.outside = {CONTIG: outside}
