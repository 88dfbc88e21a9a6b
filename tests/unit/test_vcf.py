"""Reading VCF and BCF: the traits that files have, damage of every kind, and a simulation read back."""

import gzip
import os
import re
import struct

import msprime
import numpy as np
import pytest

pysam = pytest.importorskip("pysam")
pytest.importorskip("cyvcf2")

from cxt.errors import BadRequest  # noqa: E402
from cxt.genotypes.filters import SiteFilter  # noqa: E402
from cxt.genotypes.records import ABSENT, MISSING, Contig, Haplotype, Region  # noqa: E402
from cxt.genotypes.vcf import VcfSource  # noqa: E402

HEADER = """##fileformat=VCFv4.2
##contig=<ID=1,length=1000000>
##contig=<ID=2>
##INFO=<ID=AA,Number=1,Type=String,Description="Ancestral, or not">
##INFO=<ID=END,Number=1,Type=Integer,Description="End">
##INFO=<ID=DP,Number=1,Type=Integer,Description="Depth">
##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">
"""


def make_text(*rows, samples=("a", "b"), header=HEADER):
    """A VCF file; each row is `CHROM POS REF ALT INFO GT…`."""
    lines = ["#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT".split() + list(samples)]
    for row in rows:
        contig, position, reference, alternative, info, *genotypes = row.split()
        lines.append([contig, position, ".", reference, alternative, ".", ".", info, "GT", *genotypes])
    return header + "".join("\t".join(line) + "\n" for line in lines)


@pytest.fixture
def write(tmp_path):
    def write_file(*rows, name="x.vcf", text=None, **options):
        path = tmp_path / name
        content = make_text(*rows, **options) if text is None else text
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def compress(path, *, index=None, name="x.vcf.gz"):
    """A bgzipped copy of *path*, with an index of the kind *index*."""
    packed = path.with_name(name)
    pysam.tabix_compress(str(path), str(packed), force=True)
    if index:
        pysam.tabix_index(str(packed), preset="vcf", csi=index == "csi", force=True)
    return packed


def to_bcf(path, *, index=False, name="x.bcf"):
    target = path.with_name(name)
    with pysam.VariantFile(str(path)) as source, pysam.VariantFile(str(target), "wb", header=source.header) as out:
        for record in source:
            out.write(record)
    if index:
        pysam.tabix_index(str(target), preset="bcf", force=True)
    return target


def read(source, regions=(), samples=None):
    """All records, as (contig, position, alleles, genotypes without those that are absent, phased, ancestral)."""
    chosen = list(range(len(source.samples))) if samples is None else samples
    return [
        (records.contig, p, list(alleles), [[g for g in called if g != ABSENT] for called in genotypes], phased, ancestral)
        for records in source.read(regions, chosen)
        for p, alleles, genotypes, phased, ancestral in zip(
            records.positions.tolist(),
            records.alleles,
            records.genotypes.tolist(),
            records.phased.tolist(),
            records.ancestral,
            strict=True,
        )
    ]


def refuse(path, message, regions=(), **options):
    """Reading *path* must fail with one line that matches *message*."""
    with pytest.raises(BadRequest, match=message) as caught:
        read(VcfSource(path, **options), regions)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_traits(write):
    path = write(
        "1 1 A G AA=a||| 0|1 0/1",
        "1 2 A G,* . 1 ./.",
        "1 3 AT A AA . 0/.",
        "1 4 A <DEL> AA=G 1/1 .|1",
        "1 4 a . . 0/1/1 0|1|1",
        "2 7 A <NON_REF> . 0|1/1 1",
        "2 0 A C . 0/1 0/1",
    )
    # Alleles that a record does not have are for the filter to refuse.
    expected = [
        ("1", 0, ["A", "G"], [[0, 1], [0, 1]], [True, False], "a|||"),
        ("1", 1, ["A", "G", "*"], [[1], [MISSING, MISSING]], [True, False], None),
        ("1", 2, ["AT", "A"], [[MISSING], [0, MISSING]], [True, False], None),
        ("1", 3, ["A", "<DEL>"], [[1, 1], [MISSING, 1]], [False, True], "G"),
        ("1", 3, ["a"], [[0, 1, 1], [0, 1, 1]], [False, True], None),
        ("2", 6, ["A", "<NON_REF>"], [[0, 1, 1], [1]], [False, True], None),
    ]
    for copy in (path, compress(path), to_bcf(path)):
        source = VcfSource(copy)
        assert (source.samples, source.contigs) == (["a", "b"], [Contig("1", 1_000_000), Contig("2", None)])
        assert (source.kind, source.knows_ancestral, source.notes) == ("BCF" if copy.suffix == ".bcf" else "VCF", True, [])
        assert read(source) == expected
        assert source.outside == {"2": 1}  # position 0 is before the first base
        assert read(source, samples=[1]) == [(*row[:3], row[3][1:], row[4][1:], row[5]) for row in expected]
        swapped = [(*row[:3], row[3][::-1], row[4][::-1], row[5]) for row in expected]
        assert read(source, samples=[1, 0]) == swapped


def test_sources_of_ancestral_alleles(write, tmp_path):
    path = write("1 2 A G AA=G 0|1 0|1", "1 5 C T . 0|1 0|1", "2 1100000 C T AA=C 0|1 0|1")
    fasta = tmp_path / "ancestor.fa"
    fasta.write_text(">chromosome one\nAGCCt\n>ANCESTOR_for_chromosome:X1:2:1:1100001:1\n" + "A" * 1_099_999 + "CA\n")
    assert [row[5] for row in read(VcfSource(path))] == ["G", None, "C"]
    assert [row[5] for row in read(VcfSource(path, ancestral="INFO/AA"))] == ["G", None, "C"]
    source = VcfSource(path, ancestral="ref")
    assert [row[5] for row in read(source)] == ["A", "C", "C"]
    assert not source.knows_ancestral
    assert not VcfSource(write("1 2 A G . 0|1 0|1", header=HEADER.replace("ID=AA", "ID=BB"), name="y.vcf")).knows_ancestral
    assert [row[5] for row in read(VcfSource(path, ancestral=str(fasta)))] == [None, None, "C"]
    (tmp_path / "ancestor.fa.fai").unlink()
    fasta.write_text(fasta.read_text().replace(">chromosome one", ">1"))
    source = VcfSource(path, ancestral=str(fasta))
    assert source.knows_ancestral
    assert [row[5] for row in read(source)] == ["G", "t", "C"]
    with pytest.raises(BadRequest, match="1 has 5 bp, but there is a record at 1:6; is it of another assembly"):
        read(VcfSource(write("1 6 A G . 0|1 0|1", name="z.vcf"), ancestral=str(fasta)))
    (tmp_path / "chr.fa").write_text(">chr1\nACGT\n")
    with pytest.raises(BadRequest, match="no sequence called '1'; did you mean 'chr1'"):
        VcfSource(path, ancestral=str(tmp_path / "chr.fa"))
    (tmp_path / "none.fa").write_text("nothing\n")
    with pytest.raises(BadRequest, match="none.fa (cannot be read or indexed|has no sequences)"):
        VcfSource(path, ancestral=str(tmp_path / "none.fa"))
    refuse(path, "has no INFO/AAA for ancestral alleles; did you mean 'AA'", ancestral="INFO/AAA")
    refuse(path, "INFO/DP must hold text", ancestral="INFO/DP")
    refuse(path, "which has no tree", ancestral="tree")
    with pytest.raises(BadRequest, match="'AA' is neither auto, .* did you mean INFO/AA"):
        VcfSource(path, ancestral="AA")


def test_contigs(write):
    rows = ["chrB 5 A G . 0|1 0|1", "chrB 6 A G . 0|1 0|1", "chrA 5 A G . 0|1 0|1", "HLA:1 9 A G . 0|1 0|1"]
    path = write(*rows)
    packed = compress(path, index="tbi")
    for copy in (path, packed):
        source = VcfSource(copy)  # contigs that the header does not have, in the order of the file
        assert source.contigs == [Contig("1", 1_000_000), *(Contig(name, None) for name in ("2", "chrB", "chrA", "HLA:1"))]
        assert "the header has no contig chrB, chrA, HLA:1" in source.notes[0]
        assert [row[:2] for row in read(source)] == [("chrB", 4), ("chrB", 5), ("chrA", 4), ("HLA:1", 8)]
        assert [row[:2] for row in read(source, [Region("HLA:1", 2, 10)])] == [("HLA:1", 8)]
    assert VcfSource(path).outside == {}


def test_position_past_two_to_the_31(write):
    source = VcfSource(write("1 2147483648 A G . 0|1 0|1", "1 5000000000 A G . 0|1 0|1"))
    assert [row[1] for row in read(source)] == [2**31 - 1, 4_999_999_999]


def test_names(write):
    names = ["Åsa", "a,b", "^c"]
    path = write("1 5 A G . 0|1 1|1 0|0", samples=names)
    for copy in (path, to_bcf(path)):
        source = VcfSource(copy)
        assert source.samples == names
        assert read(source, samples=[2, 0])[0][3] == [[0, 0], [0, 1]]
    refuse(write(samples=["a", "b", "a"]), "two samples called 'a'; rename one")
    refuse(write(samples=["a", "", "b"]), r"a sample without a name \(column 11")
    refuse(write(text=make_text(samples=["a", "é"]).encode("latin-1")), "not in UTF-8")


@pytest.mark.parametrize("index", ["tbi", "csi", "bcf"])
def test_regions(write, index):
    rows = [
        f"{contig} {p} {ref} A . 0|1 0|0"
        for contig in "12"
        for p, ref in ((3, "C"), (7, "CTTT"), (9, "G"), (10, "T"), (40, "T"))
    ]
    path = write(*rows)
    plain = VcfSource(path)
    packed = to_bcf(path, index=True) if index == "bcf" else compress(path, index=index)
    indexed = VcfSource(packed)
    assert indexed._index is not None
    for regions in (
        [Region("1", 8, 10)],
        [Region("2")],
        [Region("1", 2, 7), Region("1", 9), Region("2", 0, 3)],
        [Region("1", 500, 600)],
    ):
        expected = [row for row in read(plain) if any(row[0] == c and s <= row[1] < (e or 1e9) for c, s, e in regions)]
        assert read(plain, regions) == expected
        assert sum(plain.outside.values()) == 10 - len(expected)
        assert read(indexed, regions) == expected
    os.utime(packed.with_name(packed.name + (".tbi" if index == "tbi" else ".csi")), (1, 1))
    old = VcfSource(packed)
    assert "is older than the file, and is not used" in old.notes[0]
    assert [row[1] for row in read(old, [Region("1", 8, 10)])] == [8, 9]


def test_not_vcf(write):
    refuse(write(text=""), "is empty")
    refuse(write(text="abc\n"), "is not VCF or BCF")
    refuse(write(text="\ufeff" + make_text("1 5 A G . 0|1 0|1")), "without anything before it")
    refuse(write(text=make_text("1 5 A G . 0|1 0|1").partition("\n")[2]), "the first line must be ##fileformat")
    refuse(write(text=HEADER), "does not end with a line of columns")
    refuse(write(text=make_text("1 5 A G . 0|1 0|1").replace("\t", " ")), "must be separated by tabs")
    refuse(write(), "no records, only a header")
    refuse(write("1 5 A G .", samples=()), "no samples, only sites")
    refuse(write("1 5 0 1 . 0|1 0|1"), "'0', not a base; .* give the tree sequence")
    no_gt = make_text("1 5 A G . 3 4").replace("GT", "DP")
    refuse(write(text=no_gt), "no genotypes: there is no GT in the header")
    refuse(
        write(text=no_gt.replace("ID=DP,Number=1,Type=String", "ID=GT,Number=1,Type=String")), "no record that was read has GT"
    )


def test_record_without_genotypes(write):
    text = make_text("1 5 A G . 0|1 0|1", "1 6 A G . 1 2").replace("GT\t1\t2", "DP\t1\t2")
    assert read(VcfSource(write(text=text)))[1][3] == [[MISSING], [MISSING]]


def list_blocks(data):
    """Where the blocks of a bgzipped file begin."""
    starts, place = [], 0
    while place < len(data):
        starts.append(place)
        place += struct.unpack("<H", data[place + 16 : place + 18])[0] + 1
    return starts


def test_damage(write):
    rng = np.random.default_rng(1)
    genotypes = rng.choice(["0|0", "0|1", "1|0", "1|1"], size=(3000, 20))
    path = write(
        *(f"1 {10 * k + 5} A G . {' '.join(g)}" for k, g in enumerate(genotypes)), samples=[f"s{k}" for k in range(20)]
    )
    text, packed = path.read_bytes(), compress(path, index="tbi")
    data, index = packed.read_bytes(), packed.with_name("x.vcf.gz.tbi").read_bytes()
    blocks = list_blocks(data)
    assert len(blocks) > 4
    end = data[blocks[-1] :]
    half = blocks[2] + 1000
    mark = "mark of the end of the file is missing"
    damaged = bytearray(data)
    damaged[blocks[3] - 8] ^= 255  # checksum of the third block
    overwritten = data[:half] + bytes(50) + data[half + 50 :]
    for name, content, message in (
        ("half.vcf.gz", data[:half], mark),
        ("border.vcf.gz", data[: blocks[2]], mark),
        ("no_end.vcf.gz", data[: -len(end)], mark),
        ("half_end.vcf.gz", data[:half] + end, "it cannot be read after 1:"),
        ("checksum.vcf.gz", bytes(damaged), "it cannot be read after 1:"),
        ("overwritten.vcf.gz", overwritten, "it cannot be read after 1:"),
        ("header.vcf.gz", data[:60] + end, "damaged or cut off"),
        ("gzip.vcf.gz", gzip.compress(text)[:-5000], "it cannot be read after 1:"),
        ("half.vcf", text[: len(text) // 2 + 9], "it cannot be read after 1:"),
        ("first.vcf", text[: text.index(b"\n1\t") + 30], "it cannot be read after the header"),
        ("words.vcf", text.replace(b"\n1\t105\t", b"\nno columns\n1\t105\t"), "the line after 1:95 has no columns"),
        ("blank.vcf", text.replace(b"\n1\t105\t", b"\n\n1\t105\t"), "the line after 1:95 has no columns"),
        ("position.vcf", text.replace(b"\n1\t105\t", b"\n1\tx\t"), "it cannot be read after 1:95"),
        ("genotype.vcf", text.replace(b"0|1", b"x|1", 1), "it cannot be read after"),
    ):
        refuse(write(text=content, name=name), re.escape(message))

    # cyvcf2 alone takes an error within a region for its end.
    for name, content in (("q1.vcf.gz", data[:half] + end), ("q2.vcf.gz", bytes(damaged)), ("q3.vcf.gz", overwritten)):
        copy = write(text=content, name=name)
        write(text=index, name=f"{name}.tbi")
        refuse(copy, "the file or its index .* is damaged", [Region("1", 100, None)])
        assert len(read(VcfSource(copy), [Region("1", 0, 1000)])) == 100
    for content in (b"junk" * 20, index[:60]):
        copy = write(text=data, name="q4.vcf.gz")
        write(text=content, name="q4.vcf.gz.tbi")
        refuse(copy, "the file or its index .* is damaged", [Region("1", 100, 200)])

    binary = to_bcf(path, index=True)
    data = binary.read_bytes()
    blocks = list_blocks(data)
    end, half = data[blocks[-1] :], blocks[2] + 1000
    refuse(write(text=data[:half], name="half.bcf"), mark)
    refuse(write(text=data[:half] + end, name="half_end.bcf"), "it cannot be read after 1:")
    refuse(write(text=gzip.decompress(data)[:-70], name="raw.bcf"), "it cannot be read after 1:")
    write(text=binary.with_name("x.bcf.csi").read_bytes(), name="half_end.bcf.csi")
    refuse(binary.with_name("half_end.bcf"), "the file or its index .* is damaged", [Region("1", 100, None)])
    refuse(write(text=b"BCF\x04" + bytes(50), name="old.bcf"), "is BCF of version 4")


def test_unsorted_records(write):
    source = VcfSource(write("1 9 A G . 0|1 0|1", "1 5 A G . 0|1 0|1"))
    site_filter = SiteFilter([Haplotype("a", 0, 1)], source.samples)
    (records,) = source.read([], [0, 1])
    with pytest.raises(BadRequest, match="1:5 comes after 1:9"):
        site_filter.push(records)


def test_simulation(tmp_path):
    """A simulation with several mutations at some sites, against tskit's genotypes."""
    ts = msprime.sim_ancestry(12, sequence_length=100_000, recombination_rate=1e-8, population_size=10_000, random_seed=3)
    ts = msprime.sim_mutations(ts, rate=8e-7, model=msprime.JC69(), random_seed=4)
    assert ts.num_sites > 5000  # several chunks
    path = tmp_path / "simulation.vcf"
    with open(path, "w") as file:
        ts.write_vcf(file, position_transform=lambda x: 1 + np.round(x))
    positions, derived = [], []
    for variant in ts.variants():  # the reference allele of the file is the ancestral one
        used = sorted(set(variant.genotypes.tolist()))
        if used == [0, 1] or (len(used) == 2 and used[0] == 0):
            positions.append(round(variant.site.position))
            derived.append((variant.genotypes > 0).astype(int))
    counts = []
    for copy in (path, compress(path, index="tbi"), to_bcf(path)):
        source = VcfSource(copy)
        assert source.contigs == [Contig("1", 100_001)]  # tskit transforms the length, too
        haplotypes = [Haplotype(name, k, 2) for name in source.samples for k in (0, 1)]
        site_filter = SiteFilter(haplotypes, source.samples)
        parts = [site_filter.push(records) for records in source.read([], range(12))]
        assert len(parts) > 1
        parts = [part for part in [*parts, site_filter.finish_contig()] if part is not None]
        assert np.array_equal(np.concatenate([part.positions for part in parts]), positions)
        assert np.array_equal(np.concatenate([part.derived for part in parts]), derived)
        assert not any(part.missing.any() for part in parts)
        assert not any(site_filter.unphased.values())
        counts.append(site_filter.counts["1"].as_dict())
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["read"] == ts.num_sites
    assert counts[0]["multiallelic"] > 100
