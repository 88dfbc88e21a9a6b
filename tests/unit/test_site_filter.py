"""Which records become sites, against a slow oracle that looks at one record after the other."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from cxt.errors import BadRequest
from cxt.genotypes.filters import DROPPED, Counts, SiteFilter, format_counts, parse_ancestral
from cxt.genotypes.records import ABSENT, MISSING, Haplotype, Records

SAMPLES = ["a", "b", "c", "d"]
PLOIDY = {"a": 2, "b": 1, "c": 3, "d": 2}
HAPLOTYPES = [Haplotype(name, copy, PLOIDY[name]) for name in SAMPLES for copy in range(PLOIDY[name])]


def make_records(rows, *, contig="1", copies=3, samples=4):
    """Records from (position, alleles, genotypes as lists of alleles for each sample, phased, ancestral)."""
    genotypes = np.full((len(rows), samples, copies), ABSENT, dtype=np.int16)
    for k, row in enumerate(rows):
        for sample, called in enumerate(row[2]):
            genotypes[k, sample, : len(called)] = called
    return Records(
        contig=contig,
        positions=np.array([row[0] for row in rows], dtype=np.int64),
        alleles=[row[1] for row in rows],
        genotypes=genotypes,
        phased=np.array([row[3] for row in rows]).reshape(len(rows), samples),
        ancestral=[row[4] for row in rows],
    )


def examine(row, mask):
    """Oracle: the reason to drop a record (None: usable), whether it varies, and the text of each haplotype's allele."""
    position, alleles, genotypes, _, ancestral = row
    texts = [alleles[g].upper() if g >= 0 else None for called in genotypes for g in called]
    padded = [
        (alleles[called[copy]].upper() if copy < len(called) and called[copy] >= 0 else None)
        for called, name in zip(genotypes, SAMPLES, strict=True)
        for copy in range(PLOIDY[name])
    ]
    padded = [None if text == "*" else text for text in padded]
    if mask is not None and (position >= len(mask) or mask[position]):
        return "masked", False, padded
    alternative = [allele.upper() for allele in alleles[1:]]
    if all(allele in ("<NON_REF>", "<*>") for allele in alternative):
        return "no_alternative", False, padded
    base = set("ACGT")
    if alleles[0].upper() not in base:
        return "not_snv", False, padded
    if not base & set(alternative):
        plain = [allele for allele in alternative if allele != "*" and not allele.startswith("<")]
        return "not_snv" if plain else "symbolic", False, padded
    used = {text for text in texts if text not in (None, "*")}
    if any(text not in base and not text.startswith("<") for text in used):
        return "not_snv", False, padded
    if any(text.startswith("<") for text in used):
        return "symbolic", False, padded
    if not used:
        return "all_missing", False, padded
    varies = used != {alleles[0].upper()}
    if len(used) > 2:
        return "multiallelic", varies, padded
    if len(used) == 1:
        return "not_segregating", varies, padded
    if parse_ancestral(ancestral) not in used:
        return "ancestral_unknown", varies, padded
    return None, varies, padded


def filter_slowly(rows, mask):
    at = defaultdict(int)
    found = [examine(row, mask) for row in rows]
    for row, (_, varies, _) in zip(rows, found, strict=True):
        at[row[0]] += varies
    counts, sites, unphased = Counter(), [], Counter()
    for row, (reason, _, texts) in zip(rows, found, strict=True):
        if reason is None and at[row[0]] > 1:
            reason = "same_position"
        counts[reason or "used"] += 1
        if reason is None:
            ancestral = parse_ancestral(row[4])
            sites.append((row[0], [int(t not in (None, ancestral)) for t in texts], [t is None for t in texts]))
            place = 0
            for name, phased in zip(SAMPLES, row[3], strict=True):
                called = set(texts[place : place + PLOIDY[name]]) - {None}
                place += PLOIDY[name]
                unphased[name] += len(called) > 1 and not phased
    return counts, sites, unphased


def draw_rows(rng, number):
    choices = ["A", "C", "G", "T", "a", "g", "AT", "GTC", "*", "<DEL>", "<NON_REF>", "<*>", "N"]
    weights = np.array([20, 20, 20, 20, 3, 3, 3, 2, 3, 2, 2, 1, 1]) / 100
    rows, position = [], 0
    for _ in range(number):
        position += int(rng.choice([0, 1, 1, 2, 5]))
        alleles = list(dict.fromkeys(rng.choice(choices, size=rng.choice([1, 2, 2, 2, 2, 3, 4]), p=weights).tolist()))
        if alleles[0] in ("*", "<DEL>", "<NON_REF>", "<*>"):
            alleles[0] = "A"
        weight = np.array([6.0, 5.0, *[0.3] * max(0, len(alleles) - 2)])[: len(alleles)]
        genotypes = []
        for name in SAMPLES:
            copies = PLOIDY[name] if rng.random() < 0.9 else 1
            called = rng.choice(len(alleles), size=copies, p=weight / weight.sum())
            called[rng.random(copies) < (0.15 if rng.random() < 0.9 else 1)] = MISSING
            genotypes.append(called.tolist())
        if rng.random() < 0.1:
            genotypes = [[MISSING] * len(called) for called in genotypes]
        ancestral = (
            rng.choice(["A", "c", "G|||", "T", "", ".", "N", "-", "AT|"]) if rng.random() < 0.2 else str(rng.choice(alleles))
        )
        rows.append((position, alleles, genotypes, (rng.random(4) < 0.5).tolist(), ancestral if rng.random() < 0.95 else None))
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_random_records(masked):
    rng = np.random.default_rng(5)
    rows = draw_rows(rng, 4000)
    mask = rng.random(rows[-1][0] - 50) < 0.1 if masked else None
    site_filter = SiteFilter(HAPLOTYPES, SAMPLES, mask=mask)
    parts, start = [], 0
    while start < len(rows):
        size = int(rng.choice([1, 1, 2, 7, 300]))  # borders within groups at the same position
        parts.append(site_filter.push(make_records(rows[start : start + size])))
        start += size
    parts.append(site_filter.finish_contig())
    parts = [part for part in parts if part is not None]
    counts, sites, unphased = filter_slowly(rows, mask)
    assert np.array_equal(np.concatenate([part.positions for part in parts]), [site[0] for site in sites])
    assert np.array_equal(np.concatenate([part.derived for part in parts]), [site[1] for site in sites])
    assert np.array_equal(np.concatenate([part.missing for part in parts]), [site[2] for site in sites])
    found = site_filter.counts["1"]
    assert {name: getattr(found, name) for name in ("used", *DROPPED)} == {name: counts[name] for name in ("used", *DROPPED)}
    assert found.read == len(rows)
    assert (found.genotypes, found.missing_genotypes) == (8 * len(sites), sum(sum(site[2]) for site in sites))
    assert site_filter.unphased == {name: unphased[name] for name in SAMPLES}
    others = {"failed_filter"} | (set() if masked else {"masked"})
    assert min(counts[name] for name in ("used", *DROPPED) if name not in others) > 10


def one_sample(rows, **options):
    """Filter records of one diploid; *rows* are (position, alleles, genotype, ancestral)."""
    site_filter = SiteFilter([Haplotype("x", 0, 2), Haplotype("x", 1, 2)], ["x"], **options)
    records = make_records([(p, alleles, [g], [True], a) for p, alleles, g, a in rows], copies=2, samples=1)
    parts = [site_filter.push(records), site_filter.finish_contig()]
    positions = [p for part in parts if part is not None for p in part.positions.tolist()]
    return positions, {k: v for k, v in site_filter.counts["1"].as_dict().items() if v and k in ("used", *DROPPED)}


def test_same_position():
    snv, other, indel = ["A", "G"], ["A", "T"], ["AT", "A"]
    assert one_sample([(5, snv, [0, 1], "A"), (5, other, [0, 1], "A")]) == ([], {"same_position": 2})
    # An indel is anchored at the base before it, and an SNV that none of the samples has is no conflict.
    assert one_sample([(5, snv, [0, 1], "A"), (5, indel, [0, 1], "A")]) == ([5], {"used": 1, "not_snv": 1})
    assert one_sample([(5, other, [0, 0], "A"), (5, snv, [0, 1], "A")]) == ([5], {"used": 1, "not_segregating": 1})
    # As for the same site before it was split: A, G and T, of which T is ancestral.
    assert one_sample([(5, snv, [0, 1], "T"), (5, other, [0, 1], "T")]) == ([], {"ancestral_unknown": 1, "same_position": 1})
    assert one_sample([(5, ["A", "G", "T"], [1, 2], "A")]) == ([], {"ancestral_unknown": 1})
    assert one_sample([(5, ["A", "G", "T"], [1, 2], "T")]) == ([5], {"used": 1})


def test_any_alleles():
    rows = [(1, ["0", "1"], [0, 1], "0"), (2, ["AT", "A"], [1, 0], "A"), (3, ["", "G"], [0, 1], ""), (4, ["A"], [0, 0], "A")]
    assert one_sample(rows, any_alleles=True) == ([1, 2, 3], {"used": 3, "no_alternative": 1})
    assert one_sample(rows)[1] == {"not_snv": 3, "no_alternative": 1}


def test_order():
    def push(*contigs_and_positions):
        site_filter = SiteFilter([Haplotype("x", 0, 2), Haplotype("x", 1, 2)], ["x"])
        last = None
        for contig, positions in contigs_and_positions:
            if last not in (None, contig):
                site_filter.finish_contig()
            last = contig
            rows = [(p, ["A", "C"], [[0, 1]], [True], "A") for p in positions]
            site_filter.push(make_records(rows, contig=contig, copies=2, samples=1))

    push(("1", [3, 4, 4]), ("1", [4, 9]), ("2", [1]))
    with pytest.raises(BadRequest, match="not sorted: 1:4 comes after 1:10; .* bcftools sort"):
        push(("1", [3, 9, 3]))
    with pytest.raises(BadRequest, match="not sorted: 1:9 comes after 1:10"):
        push(("1", [3, 9]), ("1", [8]))
    with pytest.raises(BadRequest, match="contig 1 are not together: 1:21 comes after those of another"):
        push(("1", [3]), ("2", [3]), ("1", [20]))


def test_invalid_genotypes():
    with pytest.raises(BadRequest, match="record 1:6 has 2 alleles, but a genotype with allele 2"):
        one_sample([(4, ["A", "C", "G"], [2, 1], "A"), (5, ["A", "C"], [0, 2], "A")])
    site_filter = SiteFilter([Haplotype("x", 0, 1)], ["x"])
    with pytest.raises(BadRequest, match="record 1:6: sample x has 2 or more copies, but 1 were expected"):
        site_filter.push(make_records([(5, ["A", "C"], [[0, 1]], [True], "A")], copies=2, samples=1))


def test_table():
    counts = {"chr1": Counts(used=1200, not_snv=34), "chr2": Counts(used=5, outside=1)}
    assert format_counts(counts).splitlines() == [
        "                                        chr1  chr2  total",
        "outside the regions                        0     1      1",
        "records read                           1,234     5  1,239  100.0%",
        "- indels and others that are not SNVs     34     0     34    2.7%",
        "used                                   1,200     5  1,205   97.3%",
    ]
    total = sum(counts.values(), Counts()).as_dict()
    assert (total["read"], total["outside"]) == (1239, 1)
    counts = {"chr1": Counts(used=2, outside=None)}
    assert format_counts(counts).splitlines() == [
        "                                                      chr1",
        "outside the regions (not counted: an index was used)     -",
        "records read                                             2  100.0%",
        "used                                                     2  100.0%",
    ]
    assert sum(counts.values(), Counts()).as_dict()["outside"] is None
    assert format_counts({}).splitlines()[-1].split() == ["used", "0"]
    many = {f"scaffold{k}": Counts(used=1) for k in range(100)}
    assert format_counts(many).splitlines()[0].split() == ["total"]
