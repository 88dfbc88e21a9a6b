"""Regions, samples, populations and pairs, against plain loops."""

import itertools

import numpy as np
import pytest

from cxt.errors import BadRequest
from cxt.genotypes.pairs import _draw_distinct, choose_pairs
from cxt.genotypes.records import Contig, Haplotype, Region
from cxt.genotypes.selection import (
    find_samples,
    format_region,
    parse_region,
    read_populations,
    read_sample_names,
    resolve_regions,
)

SAMPLES = (("a", 2, "x"), ("b", 1, "x"), ("c", 3, "y"), ("d", 2, None), ("e", 2, "z"))
HAPLOTYPES = [Haplotype(name, copy, copies, pop) for name, copies, pop in SAMPLES for copy in range(copies)]


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("chr1", Region("chr1")),
        ("chr1:1-100", Region("chr1", 0, 100)),
        ("chr1:1,000,001-2,000,000", Region("chr1", 1_000_000, 2_000_000)),
        ("chr1:5-5", Region("chr1", 4, 5)),
        ("chr1:5-", Region("chr1", 4, None)),
        ("HLA-A*01:01", Region("HLA-A*01:01")),
        ("HLA-A*01:01:7-9", Region("HLA-A*01:01", 6, 9)),
        ("x:1-2", Region("x:1-2")),
        ("{x:1-2}", Region("x:1-2")),
        ("{x:1-2}:3-4", Region("x:1-2", 2, 4)),
        ("x:1-2:3-4", Region("x:1-2", 2, 4)),
        ("é:3000000000-3000000001", Region("é", 2_999_999_999, 3_000_000_001)),
    ],
)
def test_parse_region(text, region):
    contigs = ["HLA-A*01:01", "x:1-2"]
    assert parse_region(text, contigs) == region
    assert parse_region(format_region(region), contigs) == region


@pytest.mark.parametrize(
    "text", ["", "chr1:", "chr1:100", "chr1:-100", "chr1:0-5", "chr1:5-4", "chr1:,-5", "HLA-A*01:01:7", "1:5-6-7"]
)
def test_bad_regions(text):
    with pytest.raises(BadRequest, match="region '"):
        parse_region(text)


def test_resolve_regions():
    contigs = [Contig("1", 100), Contig("2", None), Contig("3", 50)]
    regions = [
        Region("3", 40),
        Region("2", 7),
        Region("1", 20, 30),
        Region("1", 30, 40),
        Region("1", 0, 5),
        Region("2", 3, 6),
        Region("1", 25, 28),
    ]
    expected = [Region("1", 0, 5), Region("1", 20, 40), Region("2", 3, 6), Region("2", 7, None), Region("3", 40, 50)]
    assert resolve_regions(regions, contigs) == expected
    assert resolve_regions([Region("2", 5), Region("2", 8, 9)], contigs) == [Region("2", 5, None)]
    assert resolve_regions([Region("1", 50, 101)], contigs, clip=True) == [Region("1", 50, 100)]
    for region in (Region("1", 50, 101), Region("1", 100)):
        with pytest.raises(BadRequest, match="goes past the end of contig 1, which has 100 bp"):
            resolve_regions([region], contigs)
    with pytest.raises(BadRequest, match="goes past the end"):
        resolve_regions([Region("1", 100, 120)], contigs, clip=True)
    with pytest.raises(BadRequest, match="no contig 'chr1'; did you mean '1'"):
        resolve_regions([Region("chr1")], contigs)


def test_sample_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_sample_names("a, b,c") == ["a", "b", "c"]
    (tmp_path / "names").write_text("\ufeffa\n\nzwei Wörter\r\n")
    assert read_sample_names("names") == ["a", "zwei Wörter"]
    assert read_sample_names("x" * 5000) == ["x" * 5000]
    assert find_samples(["c", "a"], ["a", "b", "c"]) == [0, 2]
    for text in ("", ","):
        with pytest.raises(BadRequest, match="names no samples"):
            read_sample_names(text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRequest, match="not a text file"):
        read_sample_names("binary")


@pytest.mark.parametrize(
    "text",
    [
        "a x\nc y\n",
        "sample\tpopulation\na\tx\nc\ty\n",
        "#sample pop\na x\n\nc  y\n",
        "\ufeffID pop\r\na x\r\nc y\r\n",
        "# x\n# y\na x\nc y",
    ],
)
def test_populations(text, tmp_path):
    (tmp_path / "p").write_text(text)
    assert read_populations(tmp_path / "p", ["a", "b", "c"]) == {"a": "x", "c": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a x\nb2 y\n", "line 2: there is no sample 'b2'"),
        ("a x\na y\n", "line 2: sample 'a' is there twice"),
        ("a x 3\n", "line 1: expected two columns, sample and population, got 3"),
        ("a\n", "got 1"),
        ("a\t\n", "got 1"),
        ("", "names no samples"),
        ("sample population\n", "names no samples"),
    ],
)
def test_bad_populations(text, message, tmp_path):
    (tmp_path / "p").write_text(text)
    with pytest.raises(BadRequest) as error:
        read_populations(tmp_path / "p", ["a", "b", "c"])
    assert message in str(error.value)
    with pytest.raises(BadRequest, match="cannot be read"):
        read_populations(tmp_path / "nothing", ["a"])


def slow_pairs(spec):
    def belongs(first, second):
        if spec == "within-individual":
            return first.sample == second.sample
        if spec == "all":
            return True
        if first.population is None or second.population is None:
            return False
        return (first.population == second.population) == (spec == "within")

    indices = range(len(HAPLOTYPES))
    return [[i, j] for i, j in itertools.combinations(indices, 2) if belongs(HAPLOTYPES[i], HAPLOTYPES[j])]


@pytest.mark.parametrize("spec", ["all", "within", "between", "within-individual"])
def test_named_pairs(spec):
    pairs = choose_pairs(HAPLOTYPES, spec)
    assert pairs.dtype == np.int64
    assert pairs.tolist() == slow_pairs(spec)


def test_random_pairs():
    every = slow_pairs("all")
    drawn = [choose_pairs(HAPLOTYPES, 7, seed=seed).tolist() for seed in range(200)]
    assert all(pair in every for pairs in drawn for pair in pairs)
    assert all(pairs == sorted(pairs) and len({tuple(pair) for pair in pairs}) == 7 for pairs in drawn)
    assert choose_pairs(HAPLOTYPES, "7", seed=5).tolist() == drawn[5]
    times = [sum(pair in pairs for pairs in drawn) for pair in every]
    assert max(abs(t - 200 * 7 / 45) for t in times) < 4 * np.sqrt(200 * 7 / 45)
    assert choose_pairs(HAPLOTYPES, 45).tolist() == every
    assert len(choose_pairs(HAPLOTYPES, 40)) == 40
    with pytest.raises(BadRequest, match="10 haplotypes have 45 pairs only"):
        choose_pairs(HAPLOTYPES, 46)
    with pytest.raises(BadRequest, match="at least one pair"):
        choose_pairs(HAPLOTYPES, 0)
    many = [Haplotype(str(i), 0, 1) for i in range(100_000)]
    pairs = choose_pairs(many, 1000, seed=3)
    assert np.unique(pairs, axis=0).shape == (1000, 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert pairs.max() > 99_000


def test_random_pairs_do_not_change_with_versions():
    """Recorded: a translation that goes on after an upgrade has to find the same pairs."""
    assert choose_pairs(HAPLOTYPES, 4, seed=1).tolist() == [[0, 6], [2, 9], [5, 6], [5, 8]]
    assert len(_draw_distinct(10, 5, key=3)) == 5


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs"
    path.write_text("# pairs\ne/2\ta/1\nb d\nc c\n\n")
    expected = [[0, 9], [2, 6], [2, 7], [3, 4], [3, 5], [4, 5]]
    assert choose_pairs(HAPLOTYPES, str(path)).tolist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/1 a/1\n", "line 1: a pair needs two different haplotypes, got 'a/1' twice"),
        ("b b\n", "got 'b' twice"),
        ("a a/1\n", "a pair needs two different haplotypes, got a/1 and a/1"),
        ("a/1 b\nb a/1\n", "line 2: the pair of a/1 and b is in line 1 too"),
        ("a/1 b\nb a\n", "line 2: the pair of a/1 and b is in line 1 too"),
        ("a/3 b\n", "line 1: there is no haplotype or sample 'a/3'"),
        ("a/1\n", "expected two columns"),
        ("a/1 b c\n", "got 3"),
        ("\n", "has no pairs"),
    ],
)
def test_bad_pair_files(text, message, tmp_path):
    (tmp_path / "pairs").write_text(text)
    with pytest.raises(BadRequest) as error:
        choose_pairs(HAPLOTYPES, str(tmp_path / "pairs"))
    assert message in str(error.value)


def test_there_are_no_such_pairs():
    haploid = [Haplotype(name, 0, 1) for name in "abc"]
    for spec, haplotypes, message in (
        ("within-individual", haploid, "no individual has two haplotypes"),
        ("within", haploid, "no sample has a population"),
        ("between", HAPLOTYPES[:3], "all samples are of one population, x"),
        ("within", [Haplotype("a", 0, 1, "x"), Haplotype("b", 0, 1, "y")], "no population has two haplotypes"),
        ("all", haploid[:1], "a pair needs two haplotypes"),
        ("withn", haploid, "did you mean 'within'?"),
        ("2", haploid[:2], "2 haplotypes have 1 pair only"),
        ("all", [Haplotype(str(i), 0, 1) for i in range(2000)], "1,999,000 pairs, more than 1,000,000"),
        ("within-individual", [Haplotype("a", i, 2000) for i in range(2000)], "1,999,000 pairs"),
        ("between", [Haplotype(str(i), 0, 1, str(i % 2)) for i in range(2002)], "1,002,001 pairs"),
    ):
        with pytest.raises(BadRequest) as error:
            choose_pairs(haplotypes, spec)
        assert message in str(error.value)


def test_phase():
    """The two copies of a diploid need no phase; every other pair of someone with unphased genotypes does."""
    unphased = {"a": 3, "c": 1, "b": 0}
    for spec in ("all", "within", "between", "20"):
        with pytest.raises(
            BadRequest, match=r"4 heterozygous genotypes of a, c are unphased .*within-individual.*--assume-phased"
        ):
            choose_pairs(HAPLOTYPES, spec, unphased=unphased)
        assert len(choose_pairs(HAPLOTYPES, spec, unphased=unphased, assume_phased=True))
    with pytest.raises(BadRequest, match="1 heterozygous genotype of c is unphased .* with more than two copies"):
        # c has three copies
        choose_pairs(HAPLOTYPES, "within-individual", unphased=unphased)
    assert len(choose_pairs(HAPLOTYPES, "within-individual", unphased={"a": 3, "d": 1, "e": 5})) == 6
    many = [Haplotype(str(i), copy, 2) for i in range(9) for copy in range(2)]
    with pytest.raises(BadRequest, match="of 0, 1, 2, 3, 4 and 4 more are unphased"):
        choose_pairs(many, "all", unphased={str(i): 1 for i in range(9)})
