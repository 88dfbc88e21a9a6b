"""Masks and ancestral sequences are checked for all contigs of a request before anything is read."""

import gzip

import numpy as np
import pysam
import pytest

from cxt.errors import BadRequest
from cxt.genotypes.ancestral_fasta import AncestralFasta
from cxt.genotypes.mask_file import MaskFile
from cxt.genotypes.read import read_genotypes
from cxt.genotypes.records import Contig, Region
from cxt.genotypes.sources import open_source

CONTIGS = [Contig("a", 30), Contig("b", None), Contig("c", 20)]
BED = "a\t2\t5\tx\na\t10\t12\tx\nb\t0\t4\na\t4\t11\tx\nother\t0\t1000\n"
INTERVALS = {"a": [(2, 5), (10, 12), (4, 11)], "b": [(0, 4)], "c": []}


def write(path, text=BED):
    path.write_text(text)
    return path


@pytest.mark.parametrize("marks", ["accessible", "inaccessible"])
def test_bed(marks, tmp_path, caplog):
    path = write(tmp_path / "m.bed")
    with gzip.open(tmp_path / "m.bed.gz", "wt") as file:
        file.write(BED)
    for copy in (path, tmp_path / "m.bed.gz"):
        caplog.clear()
        with caplog.at_level("INFO", logger="cxt"):
            mask = MaskFile(copy, marks=marks, contigs=CONTIGS)
        (line,) = caplog.records
        assert f"has no intervals on c: as its intervals mark what is {marks}, all bases there are" in line.message
        assert line.levelname == ("WARNING" if marks == "accessible" else "INFO")
        for (name, length), size in zip(CONTIGS, (30, 4, 20), strict=True):
            marked = np.array([any(left <= base < right for left, right in INTERVALS[name]) for base in range(size)])
            assert np.array_equal(mask.load(name, length), ~marked if marks == "accessible" else marked)
    assert len(mask.load("b", 9)) == 9
    assert mask.load("b", 9)[8] == (marks == "accessible")
    assert len(MaskFile(path, marks=marks, contigs=[Contig("b", 7), Contig("c", None)]).load("c", None)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chra\t0\t5\n", "has no intervals on a, b, c; did you mean 'chra'"),
        ("a\t0\t31\n", "an interval of contig a ends at 31, but the contig has 30 bp; is it of another assembly"),
        ("b\t0\t9\nc\t0\t5\nc\t20\t21\n", "an interval of contig c ends at 21"),
        ("b\t0\t9\nc\t5\t5\n", "all intervals of 'c' are empty"),
        ("a\t0\t9\nc\t1\n", "line 2: expected contig, start and end"),
        ("a\t0\t9\nc\t1\t5\tx\nc\t3\t8\ty\n", "intervals of 'y' and 'x' overlap"),
        ("# nothing\n", "has no intervals"),
    ],
)
def test_bad_bed(text, message, tmp_path):
    """Also where the fault is in the last contig."""
    path = write(tmp_path / "m.bed", text)
    with pytest.raises(BadRequest) as error:
        MaskFile(path, marks="inaccessible", contigs=CONTIGS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(BadRequest, match="the file name must end in"):
        MaskFile(write(tmp_path / "m.txt"), marks="accessible", contigs=CONTIGS)
    with gzip.open(tmp_path / "m.bed.gz", "wt") as file:
        file.write(BED * 1000)
    write_cut(tmp_path / "m.bed.gz")
    with pytest.raises(BadRequest, match="cannot be read"):
        MaskFile(tmp_path / "m.bed.gz", marks="accessible", contigs=CONTIGS)


def write_cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def test_array(tmp_path):
    accessible = np.random.default_rng(1).random(30) < 0.5
    np.savez(tmp_path / "m.npz", accessible=accessible)
    for marks in ("accessible", "inaccessible"):
        expected = ~accessible if marks == "accessible" else accessible
        for length in (None, 30):
            mask = MaskFile(tmp_path / "m.npz", marks=marks, contigs=[Contig("a", length)])
            assert np.array_equal(mask.load("a", length), expected)
        longer = MaskFile(tmp_path / "m.npz", marks=marks, contigs=[Contig("a", 31)]).load("a", 31)
        assert np.array_equal(longer, [*expected, marks == "accessible"])
    for contigs, message in (
        ([Contig("a", 40)], "has 30 values, but contig a has 40 bp"),
        ([Contig("a", 20)], "has 30 values, but contig a has 20 bp"),
        (CONTIGS, "has one array, but there are 3 contigs"),
    ):
        with pytest.raises(BadRequest, match=message):
            MaskFile(tmp_path / "m.npz", marks="accessible", contigs=contigs)


def vcf(path):
    lines = [
        "##fileformat=VCFv4.2", "##contig=<ID=a,length=30>", "##contig=<ID=b>", "##contig=<ID=c,length=20>",
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
        "\t".join("#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT s".split()),
        *("\t".join(f"{contig} {p} . A C . . . GT 0|1".split()) for contig in "abc" for p in (3, 9)),
    ]  # fmt: skip
    return write(path, "\n".join(lines) + "\n")


def test_fasta(tmp_path, caplog):
    source = vcf(tmp_path / "x.vcf")

    def read(text, regions=(), name="f.fa"):
        for path in tmp_path.glob(f"{name}*"):
            path.unlink()
        write(tmp_path / name, text)
        opened = open_source(source, ancestral=str(tmp_path / name))
        # Before the first record is read.
        opened.read, reading = (lambda *_: pytest.fail("it was read")), opened.read
        opened.fasta.check_request(opened.contigs if not regions else [Contig("c", 20)], named=bool(regions))
        opened.read = reading
        return read_genotypes(opened, out=tmp_path / "store", regions=regions)

    a, b, c = (f">{name}\n{'A' * length}\n" for name, length in zip("abc", (30, 50, 20), strict=True))
    assert [name for name, _ in read(a + b + c).contigs] == ["a", "b", "c"]
    for text, regions, message in (
        (a + b + ">c\nAAAA\n", (), "c has 4 bp, but contig c has 20; is it of another assembly"),
        (a + b, [Region("c")], "has no sequence called 'c'"),
        (">A\nA\n", (), "has no sequence called 'a'"),
        (a + b + f">c\n{'A' * 40}\n", (), "c has 40 bp"),
    ):
        with pytest.raises(BadRequest, match=message):
            read(text, regions)
    # A header may list contigs without records; one with records is left out, and does not lower the mutation rate.
    store = read(a + c)
    assert [name for name, _ in store.contigs] == ["a", "c"]
    assert store.report["counts"]["b"]["ancestral_unknown"] == 2
    assert "has no sequences for b: the ancestral alleles there are unknown" in caplog.text
    # Cut off in the last sequence, after the index was made.
    write(tmp_path / "cut.fa", a + b + c)
    pysam.faidx(str(tmp_path / "cut.fa"))
    write_cut(tmp_path / "cut.fa")
    with pytest.raises(BadRequest, match="is damaged, or its index is of another file"):
        AncestralFasta(tmp_path / "cut.fa").check_request(CONTIGS, named=True)
