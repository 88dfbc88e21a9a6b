"""Genotypes of people's files: all formats alike, against plain loops; regions, samples, ploidy; one message for bad input."""

import gzip
import shutil
import warnings
import zipfile
from pathlib import Path

import bio2zarr.vcf
import msprime
import numpy as np
import pysam
import pysam.bcftools
import pytest
import tskit
import tszip
import zarr
from helpers.simulations import simulate

from cxt.errors import BadRequest
from cxt.genotypes.read import read_genotypes
from cxt.genotypes.records import Contig, Haplotype, Region
from cxt.genotypes.sources import open_source
from cxt.genotypes.store import GenotypeStore, GenotypeWriter

LENGTH, INDIVIDUALS = 40_000, 4
FORMATS = (
    "a.trees", "a.tsz", "a.vcf", "a.vcf.gz", "indexed/a.vcf.gz", "csi/a.vcf.gz", "a.bcf", "indexed/a.bcf", "2/a.vcz", "3/a.vcz",
    "2/a.vcz.zip", "3/a.vcz.zip", "nested.vcz.zip", "flat.npz", "a.npz",
)  # fmt: skip


def isolate(ts, node, start, end):
    """The tree sequence without what *node* inherits in [start, end)."""
    tables = ts.dump_tables()
    edges = tables.edges.copy()
    tables.edges.clear()
    for edge in edges:
        parts = [(edge.left, edge.right)]
        if edge.child == node:
            parts = [(edge.left, min(edge.right, start)), (max(edge.left, end), edge.right)]
        for left, right in parts:
            if left < right:
                tables.edges.append(edge.replace(left=left, right=right))
    tables.sort()
    tables.build_index()
    tables.compute_mutation_parents()
    return tables.tree_sequence()


def write_vcf(ts, path):
    """The VCF whose positions, counted from 0, are those of the tree sequence."""
    text = ts.as_vcf(position_transform=lambda x: 1 + np.asarray(x, dtype=int), allow_position_zero=True)
    length = int(ts.sequence_length)
    path.write_text(text.replace(f"length={length + 1}>", f"length={length}>"))


def zip_directory(directory, path, *, prefix=""):
    with zipfile.ZipFile(path, "w") as file:
        for entry in sorted(directory.rglob("*")):
            if entry.is_file():
                file.write(entry, f"{prefix}{entry.relative_to(directory)}")


@pytest.fixture(scope="module")
def ts():
    ts = simulate(seed=7, length=LENGTH, individuals=INDIVIDUALS, rate=2e-7)
    return isolate(isolate(ts, 3, 10_000, 15_000), 6, 12_000, 30_000)


@pytest.fixture(scope="module")
def files(ts, tmp_path_factory) -> Path:
    """The same genotypes in all formats."""
    d = tmp_path_factory.mktemp("genotypes")
    for name in ("indexed", "csi", "2", "3"):
        (d / name).mkdir()
    ts.dump(d / "a.trees")
    tszip.compress(ts, d / "a.tsz", chunk_size=5000)
    write_vcf(ts, d / "a.vcf")
    pysam.tabix_compress(str(d / "a.vcf"), str(d / "a.vcf.gz"))
    pysam.bcftools.view("-Ob", "-o", str(d / "a.bcf"), str(d / "a.vcf"), catch_stdout=False)
    for directory, name, options in (
        ("indexed", "a.vcf.gz", {"preset": "vcf"}),
        ("csi", "a.vcf.gz", {"preset": "vcf", "csi": True}),
        ("indexed", "a.bcf", {"preset": "bcf"}),
    ):
        shutil.copy(d / name, d / directory / name)
        pysam.tabix_index(str(d / directory / name), **options)
    for version in (2, 3):
        vcz = d / str(version) / "a.vcz"
        bio2zarr.vcf.convert([d / "indexed" / "a.vcf.gz"], vcz, variants_chunk_size=100, zarr_format=version)
        zip_directory(vcz, d / str(version) / "a.vcz.zip")
    zip_directory(d / "2" / "a.vcz", d / "nested.vcz.zip", prefix="a.vcz/")
    genotypes = ts.genotype_matrix()
    common = {"positions": ts.sites_position.astype(int), "sequence_length": LENGTH}
    np.savez(d / "flat.npz", genotypes=genotypes, ploidy=2, **common)
    np.savez(d / "a.npz", genotypes=genotypes.reshape(len(genotypes), -1, 2).astype(np.int8), contig="1", **common)
    return d


def usable(ts, start=0, end=LENGTH, samples=None):
    """(positions, derived, missing) of the usable sites of a tree sequence, by definition."""
    rows = []
    for variant in ts.variants(samples=samples):
        called = {variant.alleles[g] for g in variant.genotypes if g >= 0}
        ancestral = variant.site.ancestral_state
        if start <= variant.position < end and len(called) == 2 and ancestral in called:
            names = [None if g < 0 else variant.alleles[g] for g in variant.genotypes]
            rows.append((int(variant.position), [n not in (None, ancestral) for n in names], [n is None for n in names]))
    positions, derived, missing = zip(*rows, strict=True)
    return np.array(positions), np.array(derived, dtype=np.uint8), np.array(missing)


def assert_equal(sites, expected):
    for found, wanted in zip(sites, expected, strict=True):
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


def read(path, out, *, ancestral="auto", **options):
    return read_genotypes(open_source(path, ancestral=ancestral), out=out / "store", **options)


def test_the_simulation_has_what_it_is_meant_to_test(ts):
    _, derived, missing = usable(ts)
    assert missing.any(axis=0).sum() == 2
    assert 200 < len(derived) < ts.num_sites - 5


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_alike(name, ts, files, tmp_path):
    store = read(files / name, tmp_path)
    assert [h.name for h in store.haplotypes] == [f"tsk_{i}/{copy}" for i in range(INDIVIDUALS) for copy in (1, 2)]
    assert store.haplotypes[3] == Haplotype("tsk_1", 1, 2)
    assert store.contigs == [Contig("1", LENGTH)]
    assert_equal(store.load("1", 0, LENGTH), usable(ts))
    assert store.report["total"]["read"] == ts.num_sites
    assert store.report["total"]["used"] == len(store.positions("1"))
    assert store.report["unphased"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("name", FORMATS)
def test_regions_and_samples(name, ts, files, tmp_path):
    regions = [Region("1", 11_000, 20_000), Region("1", 5_000, 12_345), Region("1", 39_000, LENGTH + 500)]
    store = read(files / name, tmp_path, regions=regions, samples=["tsk_3", "tsk_1"])
    assert [h.sample for h in store.haplotypes] == ["tsk_1", "tsk_1", "tsk_3", "tsk_3"]
    parts = [usable(ts, *bounds, samples=[2, 3, 6, 7]) for bounds in ((5_000, 20_000), (39_000, LENGTH))]
    assert_equal(store.load("1", 0, LENGTH), [np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
    assert store.report["regions"] == [["1", 5_000, 20_000], ["1", 39_000, LENGTH]]
    assert_equal(store.load("1", 7_000, 8_000), usable(ts, 7_000, 8_000, samples=[2, 3, 6, 7]))
    inside = sum(5_000 <= position < 20_000 or position >= 39_000 for position in ts.sites_position)
    counted = "indexed" not in name and "csi" not in name
    for counts in (store.report["total"], store.report["counts"]["1"]):
        assert counts["read"] == inside
        assert counts["outside"] == (ts.num_sites - inside if counted else None)


def test_masks(ts, files, tmp_path):
    mask = np.zeros(35_000, dtype=bool)
    mask[10_000:20_000] = True
    for name in ("a.trees", "2/a.vcz", "a.npz", "indexed/a.vcf.gz"):
        store = read(files / name, tmp_path, masks={"1": mask}.get)
        positions, *others = usable(ts)
        keep = (positions < 35_000) & ~((positions >= 10_000) & (positions < 20_000))
        assert_equal(store.load("1", 0, LENGTH), [array[keep] for array in (positions, *others)])


def test_small_chunks(ts, files, tmp_path, monkeypatch):
    monkeypatch.setattr("cxt.genotypes.trees.CHUNK_GENOTYPES", 200)
    monkeypatch.setattr("cxt.genotypes.vcf_zarr.CHUNK_GENOTYPES", 1)
    monkeypatch.setattr("cxt.genotypes.vcf_zarr.SCAN_RECORDS", 1)
    monkeypatch.setattr("cxt.genotypes.arrays.CHUNK_SITES", 37)
    monkeypatch.setattr("cxt.genotypes.store.CHUNK_SITES", 200)
    for name in ("a.trees", "2/a.vcz", "a.npz"):
        store = read(files / name, tmp_path)
        assert_equal(store.load("1", 0, LENGTH), usable(ts))
        assert_equal(store.load("1", 9_000, 14_000), usable(ts, 9_000, 14_000))
        assert np.array_equal(np.concatenate(list(store.iterate_missing(0))), usable(ts)[2])
        first = int(store.positions("1")[0])
        assert_equal(store.load("1", 0, first), [array[:0] for array in usable(ts)])


def test_ancestral_alleles_of_vcf_zarr(ts, files, tmp_path):
    """Where the reference is derived, INFO/AA says so."""
    end = 10_000
    rng = np.random.default_rng(3)
    lines = []
    for line in (files / "a.vcf").read_text().splitlines():
        fields = line.split("\t")
        if line.startswith("#CHROM"):
            lines.append('##INFO=<ID=AA,Number=1,Type=String,Description="Ancestral">')
            lines.append('##INFO=<ID=OTHER,Number=1,Type=String,Description="Ancestral">')
        elif not line.startswith("#"):
            if int(fields[1]) > end:
                break
            fields[7] = f"AA={fields[3].lower() if rng.random() < 0.5 else fields[3] + '|||'}"
            if len(fields[4]) == 1 and rng.random() < 0.5:
                fields[3], fields[4] = fields[4], fields[3]
                fields[9:] = [text.translate(str.maketrans("01", "10")) for text in fields[9:]]
        lines.append("\t".join(fields))
    (tmp_path / "aa.vcf").write_text("\n".join(lines) + "\n")
    pysam.tabix_index(str(tmp_path / "aa.vcf"), preset="vcf")
    bio2zarr.vcf.convert([tmp_path / "aa.vcf.gz"], tmp_path / "aa.vcz")
    for ancestral in ("auto", "INFO/AA"):
        store = read(tmp_path / "aa.vcz", tmp_path, ancestral=ancestral)
        assert_equal(store.load("1", 0, end), usable(ts, 0, end))
        assert store.report["notes"] == []
    states = np.full(LENGTH, "N")
    states[ts.sites_position.astype(int)] = [site.ancestral_state for site in ts.sites()]
    (tmp_path / "a.fa").write_text(f">1\n{''.join(states)}\n")
    for name in ("aa.vcz", "aa.vcf.gz"):
        assert_equal(read(tmp_path / name, tmp_path, ancestral=str(tmp_path / "a.fa")).load("1", 0, end), usable(ts, 0, end))
    with pytest.raises(BadRequest, match="'a.fasta' is no file"):
        open_source(tmp_path / "aa.vcz", ancestral="a.fasta")
    flipped = read(tmp_path / "aa.vcz", tmp_path, ancestral="ref").load("1", 0, end)
    assert 0.3 < np.mean((flipped.derived != usable(ts, 0, end)[1]).any(axis=1)) < 0.7
    with pytest.raises(BadRequest, match="no array 'variant_BB' for --ancestral INFO/BB"):
        open_source(tmp_path / "aa.vcz", ancestral="INFO/BB")
    assert "--ancestral INFO/TAG" in read(files / "2" / "a.vcz", tmp_path).report["notes"][0]


def test_consolidated_metadata_may_be_old(files, ts, tmp_path):
    shutil.copytree(files / "2" / "a.vcz", tmp_path / "a.vcz")
    zarr.consolidate_metadata(tmp_path / "a.vcz")
    group = zarr.open_group(tmp_path / "a.vcz", mode="r+", use_consolidated=False)
    del group["contig_id"]
    group.create_array("contig_id", data=np.array(["chr_a_longer_name"], dtype="U17"))
    assert read(tmp_path / "a.vcz", tmp_path).contigs[0].name == "chr_a_longer_name"


def test_populations(ts, files, tmp_path):
    demography = msprime.Demography.island_model([1e4, 1e4], 1e-4)
    two = msprime.sim_ancestry({0: 2, 1: 3}, demography=demography, sequence_length=1e4, random_seed=1)
    two = msprime.sim_mutations(two, rate=1e-6, random_seed=1)
    two.dump(tmp_path / "two.trees")
    store = read(tmp_path / "two.trees", tmp_path)
    assert [h.population for h in store.haplotypes] == ["pop_0"] * 4 + ["pop_1"] * 6
    (tmp_path / "table").write_text("tsk_4 x\ntsk_0 y\n")
    for given in (tmp_path / "table", {"tsk_4": "x", "tsk_0": "y"}):
        store = read(tmp_path / "two.trees", tmp_path, populations=given)
        assert [h.population for h in store.haplotypes][::2] == ["y", None, None, None, "x"]
    with pytest.raises(BadRequest, match="there is no sample 'tsk_4'"):
        read(files / "a.trees", tmp_path, populations=tmp_path / "table")
    np.savez(
        tmp_path / "p.npz", genotypes=[[0, 1]], positions=[3], sequence_length=9, samples=["a", "é"], populations=["x", "y"]
    )
    assert read(tmp_path / "p.npz", tmp_path).haplotypes == [Haplotype("a", 0, 1, "x"), Haplotype("é", 0, 1, "y")]


def test_samples_of_tree_sequences(tmp_path):
    """As tskit writes them to a VCF: individuals with their sample nodes; without individuals, haploids."""
    ts = simulate(seed=3, length=5_000, individuals=3, rate=1e-6)
    tables = ts.dump_tables()
    tables.nodes.flags = np.where(np.arange(ts.num_nodes) == 2, 0, tables.nodes.flags).astype(np.uint32)  # half of tsk_1
    mixed = tables.tree_sequence()
    tables.nodes.individual = np.where(np.arange(ts.num_nodes) == 3, tskit.NULL, tables.nodes.individual).astype(np.int32)
    partly = tables.tree_sequence()
    tables.nodes.individual = np.full(ts.num_nodes, tskit.NULL, dtype=np.int32)
    tables.individuals.clear()
    haploid = tables.tree_sequence()
    for case, names, nodes in (
        (mixed, ["tsk_0/1", "tsk_0/2", "tsk_1", "tsk_2/1", "tsk_2/2"], [0, 1, 3, 4, 5]),
        (partly, ["tsk_0/1", "tsk_0/2", "tsk_2/1", "tsk_2/2"], [0, 1, 4, 5]),
        (haploid, ["tsk_0", "tsk_1", "tsk_2", "tsk_3", "tsk_4"], [0, 1, 3, 4, 5]),
    ):
        case.dump(tmp_path / "x.trees")
        store = read(tmp_path / "x.trees", tmp_path)
        assert [h.name for h in store.haplotypes] == names
        with warnings.catch_warnings(action="ignore"):
            header = next(line for line in case.as_vcf(allow_position_zero=True).splitlines() if line.startswith("#CHROM"))
        assert list(dict.fromkeys(h.sample for h in store.haplotypes)) == header.split("\t")[9:]
        assert_equal(store.load("1", 0, 5_000), usable(case, samples=nodes))
        assert store.report["notes"] == (["1 sample nodes belong to no individual and were left out"] if case is partly else [])


def test_fractional_positions(tmp_path):
    """No site is lost where several share a base pair: it moves to the next free one."""
    ts = msprime.sim_ancestry(5, population_size=1e4, sequence_length=900.5, random_seed=2, discrete_genome=False)
    ts = msprime.sim_mutations(ts, rate=5e-6, random_seed=2, discrete_genome=False)
    ts.dump(tmp_path / "x.trees")
    expected, last = [], -1
    for position in ts.sites_position:
        last = max(last + 1, int(position))
        expected.append(last)
    assert expected[-1] < 900
    store = read(tmp_path / "x.trees", tmp_path)
    assert len(set(ts.sites_position.astype(int))) < len(expected) - 20
    assert store.contigs == [Contig("1", 900)]
    found = store.load("1", 0, 900)
    assert found.positions.tolist() == expected
    assert np.array_equal(found.derived, ts.genotype_matrix())
    assert "rounded down" in store.report["notes"][0]
    part = read(tmp_path / "x.trees", tmp_path, regions=[Region("1", 300, 500)])
    assert_equal(part.load("1", 0, 900), [array[(found.positions >= 300) & (found.positions < 500)] for array in found])


def test_crowded_end_of_fractional_positions(tmp_path):
    tables = tskit.TableCollection(10.7)
    for time in (0, 0, 1):
        tables.nodes.add_row(flags=1 - time, time=time)
    for child in (0, 1):
        tables.edges.add_row(0, 10.7, 2, child)
    for position in (0.1, 8.2, 8.3, 8.9, 9.1, 10.2, 10.6):
        site = tables.sites.add_row(position, "A")
        tables.mutations.add_row(site, 0, "C")
    tables.tree_sequence().dump(tmp_path / "x.trees")
    assert read(tmp_path / "x.trees", tmp_path).positions("1").tolist() == [0, 4, 5, 6, 7, 8, 9]


VCF_HEADER = (
    "##fileformat=VCFv4.2\n##contig=<ID=X,length=1000>\n##contig=<ID=é>\n##contig=<ID=empty,length=7>\n"
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">\n'
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tmale\tfemale\tother\n"
)


def record(contig, position, *genotypes, ref="A", alt="C"):
    return f"{contig}\t{position}\t.\t{ref}\t{alt}\t.\t.\t.\tGT\t" + "\t".join(genotypes) + "\n"


MIXED = VCF_HEADER + "".join([
    record("X", 11, "0", "0", "1"),
    record("X", 21, "1", "0|1", "."),
    record("X", 31, "0", "0|1|1", "0"),
    record("é", 3_000_000_001, "1|0", ".|0", "1"),
    record("empty", 3, "0", "0", "0"),
])  # fmt: skip


@pytest.mark.parametrize("form", ["vcf", "vcz"])
def test_ploidy(form, tmp_path):
    """As many haplotypes as the largest ploidy, also if it comes late in the file."""
    path = tmp_path / "mixed.vcf"
    text = MIXED if form == "vcf" else MIXED.replace("3000000001", "2000000001")  # bio2zarr has 32 bits
    path.write_text(text)
    end = 3_000_000_001 if form == "vcf" else 2_000_000_001
    if form == "vcz":
        pysam.tabix_index(str(path), preset="vcf", csi=True)
        bio2zarr.vcf.convert([tmp_path / "mixed.vcf.gz"], tmp_path / "mixed.vcz")
        path = tmp_path / "mixed.vcz"
    store = read(path, tmp_path)
    names = ["male/1", "male/2", "female/1", "female/2", "female/3", "other"]
    assert [h.name for h in store.haplotypes] == names
    assert store.contigs == [Contig("X", 1000), Contig("é", end)]
    sites = store.load("X", 0, 1000)
    assert sites.positions.tolist() == [10, 20, 30]
    assert sites.derived.tolist() == [[0, 0, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
    assert sites.missing.astype(int).tolist() == [[0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0]]
    sites = store.load("é", 0, 2**40)
    assert sites.positions.tolist() == [end - 1]
    assert sites.derived.tolist() == [[1, 0, 0, 0, 0, 1]]
    assert sites.missing.astype(int).tolist() == [[0, 0, 1, 0, 1, 0]]
    assert np.array_equal(next(store.iterate_missing(1)), sites.missing)
    notes = " ".join(store.report["notes"])
    assert "how long é is" in notes
    assert "no usable site on empty" in notes
    only_x = read(path, tmp_path, regions=[Region("X")], samples="male,other")
    assert [h.name for h in only_x.haplotypes] == ["male", "other"]
    assert only_x.load("X", 0, 1000).derived.tolist() == [[0, 1]]


def test_unphased_genotypes(tmp_path):
    records = [record("X", 1, "0/1", "0|1", "0/0"), record("X", 2, "1/0", "1", "1/1"), record("X", 3, "0|1", "0/1", "0|0")]
    (tmp_path / "a.vcf").write_text(VCF_HEADER + "".join(records))
    pysam.bcftools.view("-Oz", "-o", str(tmp_path / "a.vcf.gz"), str(tmp_path / "a.vcf"), catch_stdout=False)
    pysam.tabix_index(str(tmp_path / "a.vcf.gz"), preset="vcf")
    bio2zarr.vcf.convert([tmp_path / "a.vcf.gz"], tmp_path / "a.vcz")
    for name in ("a.vcf", "a.vcf.gz", "a.vcz"):
        assert read(tmp_path / name, tmp_path).report["unphased"] == {"male": 2, "female": 1}, name
    shutil.rmtree(tmp_path / "a.vcz" / "call_genotype_phased")
    store = read(tmp_path / "a.vcz", tmp_path)
    assert store.report["unphased"] == {"male": 3, "female": 2}
    assert "call_genotype_phased" in store.report["notes"][0]


def test_records_that_failed_a_filter(tmp_path):
    fields = [record("X", k, "0|1", "1|0", "0|0").split("\t") for k in (1, 2, 3, 4)]
    for row, text in zip(fields, ("PASS", ".", "q10", "q10;s50"), strict=True):
        row[6] = text
    filters = "".join(f'##FILTER=<ID={name},Description="x">\n' for name in ("q10", "s50"))
    header = VCF_HEADER.replace("##contig", f"{filters}##contig", 1)
    (tmp_path / "a.vcf").write_text(header + "".join("\t".join(row) for row in fields))
    pysam.bcftools.view("-Oz", "-o", str(tmp_path / "a.vcf.gz"), str(tmp_path / "a.vcf"), catch_stdout=False)
    pysam.tabix_index(str(tmp_path / "a.vcf.gz"), preset="vcf")
    bio2zarr.vcf.convert([tmp_path / "a.vcf.gz"], tmp_path / "a.vcz")
    for name in ("a.vcf", "a.vcf.gz", "a.vcz"):
        store = read(tmp_path / name, tmp_path)
        assert store.positions("X").tolist() == [0, 1], name
        assert store.report["counts"]["X"]["failed_filter"] == 2
        assert read(tmp_path / name, tmp_path, keep_failed=True).positions("X").tolist() == [0, 1, 2, 3]


def test_haplotypes_that_are_not_there(tmp_path):
    """Copies that no record has are no haplotypes, also where the array of the file has room for them."""
    genotypes = np.array([[[0, -2, -2], [1, 0, -2]], [[1, -2, -2], [-1, 1, -2]], [[1, -2, -2], [0, -1, -2]]])
    np.savez(tmp_path / "a.npz", genotypes=genotypes, positions=[1, 5, 8], sequence_length=9)
    store = read(tmp_path / "a.npz", tmp_path)
    assert [h.name for h in store.haplotypes] == ["tsk_0", "tsk_1/1", "tsk_1/2"]
    sites = store.load("1", 0, 9)
    assert sites.positions.tolist() == [1, 8]  # all of those called at 5 are derived
    assert sites.derived.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert sites.missing.astype(int).tolist() == [[0, 0, 0], [0, 0, 1]]


def test_a_store_of_another_version(tmp_path):
    with pytest.raises(BadRequest, match="does not hold genotypes"):
        GenotypeStore(tmp_path / "nothing")
    writer = GenotypeWriter(tmp_path / "store", [Haplotype("a", 0, 1)])
    writer.finish({})
    zarr.open_group(tmp_path / "store", mode="r+").attrs["cxt_genotypes"] = 0
    with pytest.raises(BadRequest, match="another version"):
        GenotypeStore(tmp_path / "store")


def test_files_of_the_store_that_are_lost_or_damaged(ts, files, tmp_path, monkeypatch):
    """Zarr reads a file that is not there as zeros."""
    monkeypatch.setattr("cxt.genotypes.store.CHUNK_SITES", 200)
    read(files / "a.npz", tmp_path)
    chunks = sorted(path for path in (tmp_path / "store").rglob("c/*") if path.is_file() or (path / "0").is_file())
    assert len(chunks) == 3 * -(-len(usable(ts)[0]) // 200)
    for chunk in chunks:
        shutil.copytree(tmp_path / "store", tmp_path / "copy")
        copy = tmp_path / "copy" / chunk.relative_to(tmp_path / "store")
        file = copy / "0" if copy.is_dir() else copy
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(BadRequest, match=r"copy is incomplete: 1 of 6 files of 0/\w+ are missing; delete it"):
            GenotypeStore(tmp_path / "copy")
        damaged = bytearray(data)
        damaged[-8] ^= 255
        for content in (data[: len(data) // 2], b"", bytes(damaged)):
            file.write_bytes(content)
            store = GenotypeStore(tmp_path / "copy")
            with pytest.raises(BadRequest, match=r"copy is damaged: 0/\w+ cannot be read .*; delete it"):
                (store.load("1", 0, LENGTH), list(store.iterate_missing(0)))
        shutil.rmtree(tmp_path / "copy")
    shutil.rmtree(tmp_path / "store" / "0" / "missing")
    with pytest.raises(BadRequest, match="is incomplete: 0/missing is missing"):
        GenotypeStore(tmp_path / "store")


def test_order_of_contigs(tmp_path):
    """That of the header, with an index and without, whatever the order of the records and the regions."""
    header = VCF_HEADER.replace("ID=X", "ID=a").replace("ID=é", "ID=c,length=900").replace("ID=empty,length=7", "ID=b")
    text = header + "".join(record(name, p, "0|1", "1|0", "0|0") for name in "bac" for p in (10, 20, 600))
    (tmp_path / "x.vcf").write_text(text)
    for name in ("x", "y"):
        pysam.tabix_compress(str(tmp_path / "x.vcf"), str(tmp_path / f"{name}.vcf.gz"))
    pysam.tabix_index(str(tmp_path / "y.vcf.gz"), preset="vcf")
    pysam.bcftools.view("-Ob", "-o", str(tmp_path / "x.bcf"), str(tmp_path / "x.vcf"), catch_stdout=False)
    bio2zarr.vcf.convert([tmp_path / "y.vcf.gz"], tmp_path / "x.vcz")
    for names, regions in (
        ("acb", []),
        ("acb", [Region("c", 5), Region("a", 0, 700), Region("b")]),
        ("cb", [Region("b", 5, 700), Region("c")]),
    ):
        reports = []
        for name in ("x.vcf", "x.vcf.gz", "y.vcf.gz", "x.bcf", "x.vcz"):
            store = read(tmp_path / name, tmp_path, regions=regions)
            assert [contig for contig, _ in store.contigs] == list(names), name
            assert list(store.report["counts"]) == list(names), name
            assert list(dict.fromkeys(contig for contig, *_ in store.report["regions"])) == list(names), name
            for place, contig in enumerate(names):
                assert store.positions(contig).tolist() == [9, 19, 599]
                assert len(next(store.iterate_missing(place))) == 3
            reports.append([store.report["regions"], store.contigs])
        assert all(report == reports[0] for report in reports)


def test_position_0(tmp_path):
    """The telomere, before the first base: outside of every region, counted where no index is used."""
    text = VCF_HEADER + "".join(record("X", p, "0|1", "1|0", "0|0") for p in (0, 1, 5))
    (tmp_path / "x.vcf").write_text(text)
    (tmp_path / "z.vcf").write_text(text.replace("X\t0\t", "X\t1\t"))  # bio2zarr refuses position 0
    for source, name in ("xx", "xy", "zz"):
        pysam.tabix_compress(str(tmp_path / f"{source}.vcf"), str(tmp_path / f"{name}.vcf.gz"))
    for name in "yz":
        pysam.tabix_index(str(tmp_path / f"{name}.vcf.gz"), preset="vcf")
    bio2zarr.vcf.convert([tmp_path / "z.vcf.gz"], tmp_path / "x.vcz")
    zarr.open_group(tmp_path / "x.vcz", mode="r+")["variant_position"][0] = 0
    (tmp_path / "a.fa").write_text(f">X\n{'A' * 1000}\n")
    mask = np.zeros(1000, dtype=bool)
    mask[-1] = True  # where a negative index would look
    for regions in ([], [Region("X")], [Region("X", 0, 3)]):
        expected = [0, 4] if len(regions) == 0 or regions[0].end is None else [0]
        for name in ("x.vcf", "x.vcf.gz", "y.vcf.gz", "x.vcz"):
            for options in ({}, {"ancestral": str(tmp_path / "a.fa")}, {"masks": {"X": mask}.get}):
                store = read(tmp_path / name, tmp_path, regions=regions, **options)
                assert store.positions("X").tolist() == expected
                counts = store.report["counts"]["X"]
                assert (counts["read"], counts["masked"]) == (len(expected), 0)
                assert counts["outside"] == (None if name == "y.vcf.gz" and regions else 3 - len(expected)), name


def test_a_contig_without_a_length(tmp_path):
    """It ends with the last record read, or where the caller knows that it goes on."""
    text = VCF_HEADER + "".join(record("é", p, "0|1", "1|0", "0|0") for p in (10, 50, 90))
    (tmp_path / "x.vcf").write_text(text)
    pysam.tabix_compress(str(tmp_path / "x.vcf"), str(tmp_path / "y.vcf.gz"))
    pysam.tabix_index(str(tmp_path / "y.vcf.gz"), preset="vcf", csi=True)
    bio2zarr.vcf.convert([tmp_path / "y.vcf.gz"], tmp_path / "x.vcz")
    for name in ("x.vcf", "y.vcf.gz", "x.vcz"):
        for region, least, length in (
            (None, {}, 90),
            (Region("é", 20), {}, 90),
            (Region("é", 20, 60), {}, 50),
            (Region("é", 20, 2000), {"é": 60}, 90),
            (Region("é", 20, 60), {"é": 60}, 60),
            (Region("é", 0, 200), {"é": 200}, 200),
        ):
            store = read(tmp_path / name, tmp_path, regions=[region] if region else [], least_lengths=least)
            assert store.contigs == [Contig("é", length)]
            start = region.start if region else 0
            end = length if region is None or region.end is None else min(region.end, length)
            assert store.report["regions"] == [["é", start, end]]
            assert "the file does not say how long é is" in " ".join(store.report["notes"])
        with pytest.raises(BadRequest, match="there are no records in é:91-"):
            read(tmp_path / name, tmp_path, regions=[Region("é", 90)])


def test_nothing_left(files, tmp_path):
    with pytest.raises(BadRequest, match=r"no usable site is left in 1:101-200 \(all.*\):\n(.|\n)*inside the mask") as error:
        read(files / "a.trees", tmp_path, regions=[Region("1", 100, 200)], masks=lambda contig: np.ones(5, dtype=bool))
    assert "\nused" in str(error.value)
    same = tmp_path / "same.npz"
    npz(same, genotypes=[[1, 1], [0, 0]])
    with pytest.raises(BadRequest, match="no usable site is left:\n(.|\n)*not segregating"):
        read(same, tmp_path)
    with pytest.raises(BadRequest, match="there are no records in 1:1-1"):
        read(files / "2" / "a.vcz", tmp_path, regions=[Region("1", 0, 1)])
    assert list(tmp_path.iterdir()) == [same]


def test_what_is_asked_for_is_not_there(files, tmp_path):
    for name in ("a.trees", "a.vcf", "indexed/a.vcf.gz", "2/a.vcz", "a.npz"):
        for options, message in (
            ({"regions": [Region("chr1")]}, "region chr1: there is no contig 'chr1'; did you mean '1'"),
            ({"regions": [Region("1", LENGTH)]}, "region 1:40,001- goes past the end of contig 1, which has 40,000 bp"),
            ({"samples": ["tsk_0", "tsk0"]}, "there is no sample 'tsk0'; did you mean 'tsk_0'?"),
            ({"samples": "tsk_1,tsk_1"}, "sample 'tsk_1' is given 2 times"),
            ({"samples": ["a", "b"]}, "there is no sample 'a'; choose from tsk_0, tsk_1, tsk_2, tsk_3"),
        ):
            with pytest.raises(BadRequest) as error:
                read(files / name, tmp_path, **options)
            assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def npz(path, **changes):
    arrays = {"genotypes": np.array([[0, 1], [1, 0]]), "positions": [1, 2], "sequence_length": 10} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genotypes": None}, "has no array 'genotypes'; it needs genotypes, positions, sequence_length"),
        ({"genotype": [1]}, "unknown array 'genotype'; did you mean 'genotypes'?"),
        ({"genotypes": [0, 1]}, r"array 'genotypes': expected integers of shape (sites, haplotypes)"),
        ({"genotypes": [[0.0, 1.0]]}, "type float64"),
        ({"genotypes": np.zeros((0, 4), dtype=int)}, "has no sites"),
        ({"genotypes": [[0, -3], [0, 1]]}, "got the value -3"),
        ({"genotypes": [[0, 2000], [0, 1]]}, "got the value 2000"),
        ({"genotypes": np.array([[0, None]], dtype=object)}, "cannot be read as arrays of numpy"),
        ({"positions": [1, 2, 3]}, "array 'positions': expected numbers of shape (2,)"),
        ({"positions": [1.5, 2]}, "expected whole base pairs, got 1.5"),
        ({"positions": [np.nan, 2]}, "expected whole base pairs, got nan"),
        ({"positions": [1, 10]}, "10 is not within the sequence, 0 to 9"),
        ({"positions": [-1, 1]}, "-1 is not within the sequence"),
        ({"positions": [2, 1]}, "not sorted"),
        ({"sequence_length": [1, 2]}, "array 'sequence_length': expected one number of base pairs"),
        ({"sequence_length": 0}, "got the value 0"),
        ({"samples": ["a"]}, "array 'samples': expected names of shape (2,)"),
        ({"samples": ["a", "a"]}, "two samples are called 'a'"),
        ({"ploidy": 3}, "2 haplotypes cannot be divided into samples of ploidy 3"),
        ({"ploidy": 0}, "expected one positive integer"),
        ({"contig": ["a", "b"]}, "expected one name"),
    ],
)
def test_bad_arrays(changes, message, tmp_path):
    npz(tmp_path / "a.npz", **changes)
    with pytest.raises(BadRequest) as error:
        read(tmp_path / "a.npz", tmp_path)
    assert message in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


CONTENTS = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"hello\n", "holds no genotypes that can be read; expected VCF or BCF"),
    "a.bed": (b"chr1\t10\t20\n", "looks like BED"),
    "a.fa": (b">chr1\nACGT\n", "is FASTA"),
    "a.bam": (gzip.compress(b"BAM\x01xxxx"), "is BAM, which holds reads"),
    "plink.bed": (b"l\x1b\x01\x00", "PLINK's .bed; convert it: plink2 --bfile"),
    "headless.vcf": (b"#CHROM\tPOS\n", "looks like a VCF without its first line"),
    "gz.vcf": (gzip.compress(b"x" * 5000)[:20], "damaged or cut off"),
    "nothing.gz": (gzip.compress(b""), "is compressed, and empty"),
    "array.npy": (b"\x93NUMPY\x01\x00", "single array of numpy"),
    "zip": (b"PK\x03\x04abc", "is a zip file, but damaged or cut off"),
    "kastore": (b"\x89KAS\r\n\x1a\n\x01\x00", "cannot be read as a tree sequence"),
    "index": (gzip.compress(b"TBI\x01"), "is an index"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_foreign_files(name, tmp_path):
    content, message = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest) as error:
        open_source(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_directories(files, tmp_path):
    with pytest.raises(BadRequest, match=r"there is no file .*a.tree; did you mean 'a.trees'\?"):
        open_source(files / "a.tree")
    with pytest.raises(BadRequest, match="there is no directory"):
        open_source(tmp_path / "x" / "y")
    with pytest.raises(BadRequest, match="is a directory, but not VCF Zarr"):
        open_source(tmp_path)
    with pytest.raises(BadRequest, match="not a regular file"):
        open_source("/dev/null")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(BadRequest, match="zip file of something else"):
        open_source(tmp_path / "a.zip")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["a.trees", "a.tsz", "a.npz", "2/a.vcz.zip"])
def test_truncated_files(name, share, files, tmp_path):
    data = (files / name).read_bytes()
    path = tmp_path / "short"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadRequest, match="cannot be read|damaged|ends too early") as error:
        read(path, tmp_path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["short"]


def test_tree_sequences_without_something(ts, files, tmp_path):
    ts.delete_sites(range(ts.num_sites)).dump(tmp_path / "sites")
    with pytest.raises(BadRequest, match=r"has no sites; add mutations"):
        open_source(tmp_path / "sites")
    tables = ts.dump_tables()
    tables.nodes.flags = np.zeros(ts.num_nodes, dtype=np.uint32)
    tables.tree_sequence().dump(tmp_path / "samples")
    with pytest.raises(BadRequest, match="has no sample nodes"):
        open_source(tmp_path / "samples")
    tables = ts.dump_tables()
    tables.sites.position = tables.sites.position / LENGTH
    tables.edges.left, tables.edges.right = tables.edges.left / LENGTH, tables.edges.right / LENGTH
    tables.sequence_length = 1
    tables.tree_sequence().dump(tmp_path / "scaled")
    with pytest.raises(BadRequest, match="sites on 1 bp; positions must be in base pairs"):
        open_source(tmp_path / "scaled")
    (tmp_path / "two").write_bytes(2 * (files / "a.trees").read_bytes())
    store = read(tmp_path / "two", tmp_path)
    assert_equal(store.load("1", 0, LENGTH), usable(ts))
    assert "several tree sequences" in store.report["notes"][0]
    (tmp_path / "more").write_bytes((files / "a.trees").read_bytes() + b"x")
    with pytest.raises(BadRequest, match="other data after the tree sequence"):
        open_source(tmp_path / "more")
    for name, ancestral in (("a.trees", "INFO/AA"), ("a.npz", "tree"), ("2/a.vcz", "tree")):
        with pytest.raises(BadRequest, match=f"'{ancestral}'"):
            open_source(files / name, ancestral=ancestral)


@pytest.mark.parametrize("name", ["call_genotype", "sample_id", "variant_position", "contig_id"])
def test_vcf_zarr_without_an_array(name, files, tmp_path):
    shutil.copytree(files / "3" / "a.vcz", tmp_path / "a.vcz")
    shutil.rmtree(tmp_path / "a.vcz" / name)
    with pytest.raises(BadRequest, match=f"has no array '{name}', which VCF Zarr needs"):
        open_source(tmp_path / "a.vcz")


def test_damaged_vcf_zarr(files, tmp_path):
    shutil.copytree(files / "3" / "a.vcz", tmp_path / "a.vcz")
    chunk = tmp_path / "a.vcz" / "call_genotype" / "c" / "1" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(BadRequest, match="array 'call_genotype' cannot be read"):
        read(tmp_path / "a.vcz", tmp_path)
    (tmp_path / "a.vcz" / "zarr.json").write_text("{")
    with pytest.raises(BadRequest, match="cannot be read as VCF Zarr"):
        open_source(tmp_path / "a.vcz")
    shutil.rmtree(tmp_path / "a.vcz")
    shutil.copytree(files / "2" / "a.vcz", tmp_path / "a.vcz")
    group = zarr.open_group(tmp_path / "a.vcz", mode="r+")
    group["variant_contig"][3] = 5
    with pytest.raises(BadRequest, match="array 'variant_contig'"):
        read(tmp_path / "a.vcz", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.vcz"]
