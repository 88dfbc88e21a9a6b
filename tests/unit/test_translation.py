"""The parts of a translation against plain definitions: gaps, blocks, counts with missing genotypes, calibration."""

import itertools

import numpy as np
import pytest
import torch
from helpers.simulations import simulate

import cxt
from cxt.data.grid import Grid
from cxt.errors import BadRequest
from cxt.genotypes.records import Region
from cxt.genotypes.store import Sites
from cxt.translation.accessibility import count_accessible, find_gaps
from cxt.translation.blocks import choose_flank, list_blocks
from cxt.translation.calibration import Diversity, compute_implied, compute_offsets
from cxt.translation.contigs import extend_regions, find_segments, merge_windows
from cxt.translation.estimates import COLUMNS, LEVELS, summarise
from cxt.translation.pair_input import (
    choose_panel,
    compute_missing,
    count_alleles,
    count_differences,
    count_pair_sites,
    share_compared,
)

SCALES = (2, 8, 32, 64)


def list_gaps(positions, **settings):
    """The gaps without the rule that they were found by."""
    return find_gaps(positions, **settings)[0]


def test_gaps():
    rng = np.random.default_rng(1)
    positions = np.sort(rng.choice(1_000_000, 4000, replace=False))
    assert list_gaps(positions, start=0, end=1_000_000, window_size=1000) == []
    cut = positions[(positions > 100_000) & ~((positions > 400_000) & (positions < 440_000))]
    (left, right), (low, high) = list_gaps(cut, start=0, end=1_000_000, window_size=1000)
    assert (left, right) == (0, cut[0])
    assert low == cut[cut < 400_001][-1] + 1
    assert high == cut[cut >= 440_000][0]
    # Less than 25 windows, but more than 50 mean distances: a gap at an end only.
    short = positions[(positions > 15_000) & ~((positions > 400_000) & (positions < 420_000))]
    assert list_gaps(short, start=0, end=1_000_000, window_size=1000) == [(0, short[0])]
    assert list_gaps(short, start=0, end=1_000_000, window_size=1000, max_gap=0) == []
    assert len(list_gaps(short, start=0, end=1_000_000, window_size=1000, max_gap=14_000)) == 2
    # Low diversity: long distances are usual.
    sparse = np.sort(rng.choice(1_000_000, 20, replace=False))
    assert list_gaps(sparse, start=0, end=1_000_000, window_size=1000) == []
    assert list_gaps(np.array([], dtype=np.int64), start=5, end=10, window_size=1000) == [(5, 10)]


@pytest.mark.parametrize("seed", range(8))
def test_gaps_are_of_accessible_bases(seed, monkeypatch):
    """Against a loop over bases; the sums of the mask are made in chunks of 97 bases."""
    monkeypatch.setattr("cxt.translation.accessibility.CHUNK_BASES", 97)
    rng = np.random.default_rng(seed)
    length = 3000
    start, end = sorted(int(i) for i in rng.choice(length, 2, replace=False))
    mask = np.repeat(rng.random(length // 50) < 0.4, 50)[: int(rng.integers(500, length + 1))]
    is_open = [base < len(mask) and not mask[base] for base in range(length)]
    positions = np.arange(start, end)[rng.random(end - start) < 0.02]
    if seed % 2:  # as they are: sites inside the mask are dropped
        positions = positions[[is_open[p] for p in positions]]
    edges = [start - 1, *positions.tolist(), end]
    stretches = [(a + 1, b) for a, b in itertools.pairwise(edges)]
    lengths = [sum(is_open[a:b]) for a, b in stretches]
    for max_gap in (None, 40):
        found, rule = find_gaps(positions, start=start, end=end, window_size=1, mask=mask, max_gap=max_gap)
        if len(positions) < 2:
            assert rule.spacing is None
            continue
        spacing = (sum(lengths[1:-1]) + len(positions) - 1) / (len(positions) - 1)
        assert rule.spacing == pytest.approx(spacing)
        limits = (max(25, 50 * spacing), max(2, 50 * spacing)) if max_gap is None else (max_gap, max_gap)
        assert (rule.inner, rule.ends) == pytest.approx(limits)
        last = len(lengths) - 1
        expected = [
            stretch for k, stretch in enumerate(stretches) if lengths[k] >= (limits[1] if k in (0, last) else limits[0])
        ]
        assert found == expected


def test_a_mask_makes_no_gap():
    """A stretch that is masked for the most part has no variants for that reason, and the rest of it is not taken away."""
    rng = np.random.default_rng(3)
    mask = np.zeros(1_000_000, dtype=bool)
    mask[400_000:440_000] = True
    positions = np.sort(rng.choice(1_000_000, 4000, replace=False))
    positions = positions[~mask[positions]]
    settings = {"start": 0, "end": 1_000_000, "window_size": 1000}
    assert len(list_gaps(positions, **settings)) == 1
    found, rule = find_gaps(positions, mask=mask, **settings)
    assert found == []
    assert rule.spacing == pytest.approx(250, rel=0.01)
    assert find_gaps(positions, mask=np.zeros_like(mask), **settings) == find_gaps(positions, **settings)


@pytest.mark.parametrize("seed", range(8))
def test_accessible_bases(seed):
    rng = np.random.default_rng(seed)
    length, size = int(rng.integers(900, 2100)), 100
    start, end = sorted(int(i) for i in rng.choice(length, 2, replace=False))
    mask = None if seed % 4 == 0 else rng.random(int(rng.integers(500, 2500))) < 0.3
    gaps = []
    for left, right in np.sort(rng.choice(np.arange(start, end), 4, replace=False)).reshape(2, 2):
        gaps.append((int(left), int(right)))
    found = count_accessible(length=length, window_size=size, start=start, end=end, mask=mask, gaps=gaps)
    is_open = np.zeros(length, dtype=bool)
    for base in range(start, end):
        masked = mask is not None and (base >= len(mask) or mask[base])
        is_open[base] = not masked and not any(left <= base < right for left, right in gaps)
    expected = [is_open[k : k + size].sum() for k in range(0, length, size)]
    assert found.accessible.tolist() == expected
    assert found.widths.tolist() == [min(size, length - k) for k in range(0, length, size)]


@pytest.mark.parametrize(
    ("total", "regions"), [(1000, [(0, 1000)]), (103, [(0, 103)]), (777, [(5, 6), (300, 420), (700, 777)])]
)
def test_blocks_cover_each_window_once(total, regions):
    windows, flank = 100, choose_flank(100)
    blocks = list_blocks(3, total=total, regions=regions, read=[(0, total)], windows=windows, flank=flank)
    covered = [k for block in blocks for k in range(block.keep_from, block.keep_to)]
    assert covered == [k for low, high in regions for k in range(low, high)]
    for block in blocks:
        assert block.contig == 3
        assert 0 <= block.first <= total - windows
        left, right = block.keep_from - block.first, block.first + windows - block.keep_to
        assert left >= flank or block.first == 0
        assert right >= flank or block.first + windows == total


def test_blocks_do_not_depend_on_the_region():
    def first_of(k, regions, read):
        blocks = list_blocks(0, total=2000, regions=regions, read=read, windows=100, flank=20)
        return next(block.first for block in blocks if block.keep_from <= k < block.keep_to)

    for k in range(500, 700):
        whole = first_of(k, [(0, 2000)], [(0, 2000)])
        assert first_of(k, [(500, 700)], [(400, 800)]) == whole  # with a context of as many windows as the network reads
        assert first_of(k, [(k, k + 1)], [(k - 100, k + 101)]) == whole


def test_blocks_stay_where_data_are():
    blocks = list_blocks(0, total=1000, regions=[(300, 500)], read=[(300, 500)], windows=100, flank=20)
    assert all(300 <= block.first <= 400 for block in blocks)
    for block in list_blocks(0, total=1000, regions=[(0, 1000)], read=[(0, 430), (470, 1000)], windows=100, flank=20):
        for low in range(block.keep_from, block.keep_to, 7):  # a part of the region has the same blocks
            part = list_blocks(0, total=1000, regions=[(low, low + 1)], read=[(0, 430), (470, 1000)], windows=100, flank=20)
            assert [one.first for one in part] == [block.first]
    short = list_blocks(0, total=1000, regions=[(300, 350)], read=[(300, 350)], windows=100, flank=20)
    assert {block.first for block in short} == {300}
    assert {block.first for block in list_blocks(0, total=60, regions=[(0, 60)], read=[(0, 60)], windows=100, flank=20)} == {0}
    assert choose_flank(100, 0) == 0
    with pytest.raises(BadRequest, match="flank must be from 0 to 49 windows for a model that reads 100, got 50"):
        choose_flank(100, 50)


def test_regions_in_windows():
    regions = [Region("a", 250, 900), Region("a", 0, 100), Region("a", 850, 1200)]
    assert merge_windows(regions, size=100, total=50) == [(0, 1), (2, 12)]
    assert merge_windows([Region("a")], size=100, total=50) == [(0, 50)]
    with pytest.raises(BadRequest, match="region a:6001-7000 is empty"):
        merge_windows([Region("a", 6000, 7000)], size=100, total=50)
    assert extend_regions(regions, context=80) == [Region("a", 0, 1280)]
    assert extend_regions([Region("b"), Region("a", 500, 600)], context=60) == [Region("a", 440, 660), Region("b", 0, None)]
    has_data = np.array([0, 1, 1, 0, 0, 1, 0, 0, 0, 1], dtype=bool)
    assert find_segments(has_data, 3) == [(1, 6), (9, 10)]
    assert find_segments(has_data, 0) == [(1, 3), (5, 6), (9, 10)]


@pytest.fixture(scope="module")
def sites():
    """Biallelic sites of 12 haplotypes, and the same with a fifth of the genotypes missing in places."""
    ts = simulate(seed=4, individuals=6, length=50_000, rate=3e-7)
    genotypes = ts.genotype_matrix()
    keep = genotypes.max(axis=1) <= 1
    positions, derived = ts.sites_position[keep].astype(np.int64), genotypes[keep].astype(np.uint8)
    missing = np.random.default_rng(1).random(derived.shape) < 0.2
    missing[:100] = False
    missing[100:120, 2:] = True
    return Sites(positions, derived, np.zeros_like(missing)), Sites(positions, derived * ~missing, missing)


def test_counts_without_missing_genotypes_are_those_of_the_training_data(sites):
    complete, _ = sites
    found = count_pair_sites(complete, (3, 7), np.arange(12), start=10_000, window_size=500, windows=50, scales=SCALES)
    inside = (complete.positions >= 10_000) & (complete.positions < 35_000)
    complete_inside = Sites(*(array[inside] for array in complete))
    found = count_pair_sites(complete_inside, (3, 7), np.arange(12), start=10_000, window_size=500, windows=50, scales=SCALES)
    expected = cxt.pair_features(
        complete.derived[inside], complete.positions[inside], [(3, 7)], window_size=500, sequence_length=25_000, start=10_000
    )[0]
    assert np.array_equal(found.counts, expected)
    assert (found.called == 1).all()
    subset = np.array([0, 3, 5, 7])
    found = count_pair_sites(complete_inside, (3, 7), subset, start=10_000, window_size=500, windows=50, scales=SCALES)
    expected = cxt.pair_features(
        complete.derived[inside][:, subset], complete.positions[inside], [(1, 3)], window_size=500, sequence_length=25_000,
        start=10_000,
    )[0]  # fmt: skip
    assert np.array_equal(found.counts, expected)


def test_counts_with_missing_genotypes(sites):
    _, incomplete = sites
    panel, (a, b), size, windows = np.array([0, 2, 3, 4, 7, 8, 9, 11]), (3, 9), 1000, 50
    found = count_pair_sites(incomplete, (a, b), panel, start=0, window_size=size, windows=windows, scales=SCALES)
    counts = np.zeros((2, len(SCALES), windows, len(panel)), dtype=int)
    used, lost = np.zeros(windows, dtype=int), np.zeros(windows, dtype=int)
    for position, derived, missing in zip(*incomplete, strict=True):
        called = [h for h in panel if not missing[h]]
        carriers = sum(int(derived[h]) for h in called)
        if not 1 <= carriers < len(called):
            continue
        k = position // size
        if missing[a] or missing[b] or len(called) < len(panel) / 2:
            lost[k] += 1
            continue
        used[k] += 1
        frequency = min(max(round(carriers * len(panel) / len(called)), 1), len(panel) - 1)
        for i, scale in enumerate(SCALES):
            for window in range(max(0, k - min(scale, windows) + 1), k + 1):
                counts[0 if derived[a] != derived[b] else 1, i, window, frequency] += 1
    assert np.array_equal(found.counts, counts)
    assert lost.sum() > 100
    overall = used.sum() / (used.sum() + lost.sum())  # in windows without sites
    for i, scale in enumerate(SCALES):
        for window in range(windows):
            sums = used[window : window + scale].sum(), lost[window : window + scale].sum()
            assert found.called[i, window] == (sums[0] / sum(sums) if sum(sums) else overall)
    assert np.array_equal(found.called_once, [u / (u + m) if u + m else overall for u, m in zip(used, lost, strict=True)])
    differ = [
        position
        for position, derived, missing in zip(*incomplete, strict=True)
        if derived[a] != derived[b] and not missing[a] and not missing[b]
    ]
    expected = np.histogram(differ, np.arange(windows + 1) * size)[0]
    assert np.array_equal(count_differences(incomplete, (a, b), start=0, window_size=size, windows=windows), expected)


@pytest.mark.parametrize("lost", [0.1, 0.3, 0.5])
def test_differences_per_base_do_not_depend_on_missing_genotypes(lost):
    """Alleles removed at random: ln ratio of differences per compared base to those of complete data, over pairs.

    The share of the sites that the network is given, by which differences were divided before, is biased: it leaves out sites
    of which most are missing, and does not see sites that only the missing haplotype shows to vary.
    """
    size, length = 1000, 300_000
    ts = simulate(seed=6, individuals=10, length=length, rate=2e-7)
    genotypes = ts.genotype_matrix()
    keep = genotypes.max(axis=1) <= 1
    positions, derived = ts.sites_position[keep].astype(np.int64), genotypes[keep].astype(np.uint8)
    missing = np.random.default_rng(2).random(derived.shape) < lost
    incomplete = Sites(positions, derived * ~missing, missing)
    shape = {"start": 0, "window_size": size, "windows": length // size}
    totals = count_alleles(incomplete)
    ratios: dict[str, list[float]] = {"before": [], "after": []}
    for pair in [(2 * i, 2 * i + 1) for i in range(10)]:
        true = np.count_nonzero(derived[:, pair[0]] != derived[:, pair[1]])  # in all bases
        observed = count_differences(incomplete, pair, **shape).sum()
        before = count_pair_sites(incomplete, pair, np.arange(20), scales=SCALES, **shape).called_once
        after = share_compared(incomplete, pair, totals, **shape)
        for name, share in (("before", before), ("after", after)):
            ratios[name].append(np.log(observed / (share.mean() * true)))
    bias = {name: np.mean(values) for name, values in ratios.items()}
    print(lost, bias)
    assert abs(bias["after"]) < 0.02
    if lost >= 0.3:
        assert abs(bias["before"]) > 2 * abs(bias["after"])


def test_compared_share_against_a_plain_loop(sites):
    _, incomplete = sites
    (a, b), size, windows = (3, 9), 5000, 10
    used, lost = np.zeros(windows), np.zeros(windows)
    for position, derived, missing in zip(*incomplete, strict=True):
        others = [derived[h] for h in range(12) if h not in (a, b) and not missing[h]]
        if len(set(others)) == 2:
            (lost if missing[a] or missing[b] else used)[position // size] += 1
    found = share_compared(incomplete, (a, b), count_alleles(incomplete), start=0, window_size=size, windows=windows)
    assert (used + lost > 0).all()
    assert found == pytest.approx(used / (used + lost))


def test_panels_contain_the_pair_and_are_reproducible():
    candidates = np.array([0, 1, 4, 5, 6, 7, 9])
    panels = [choose_panel((9, 4), candidates, samples=4, seed=1, panel=i) for i in range(20)]
    for panel in panels:
        assert {4, 9} < set(panel) <= set(candidates)
        assert len(set(panel)) == 4
        assert np.array_equal(panel, np.sort(panel))
    assert len({tuple(panel) for panel in panels}) > 5
    assert np.array_equal(panels[3], choose_panel((4, 9), candidates, samples=4, seed=1, panel=3))
    assert not all(
        np.array_equal(panel, choose_panel((4, 9), candidates, samples=4, seed=2, panel=i)) for i, panel in enumerate(panels)
    )


def test_missing_share_of_windows():
    accessible, widths = np.array([10, 0, 5, 10, 3]), np.array([10, 10, 10, 10, 5])
    found = compute_missing(accessible, widths, (1, 2, 64))
    assert found[0] == pytest.approx([0, 1, 0.5, 0, 0.4])
    assert found[1] == pytest.approx([0.5, 0.75, 0.25, 2 / 15, 0.4])
    assert found[2] == pytest.approx([17 / 45, 17 / 35, 7 / 25, 2 / 15, 0.4])


def test_summaries():
    grid = Grid(3, 17, 20)
    distribution = torch.from_numpy(np.random.default_rng(1).dirichlet(np.ones(20), size=7))
    found = summarise(distribution, grid)
    # A large sample of the distribution, uniform within bins.
    rng = np.random.default_rng(2)
    for row, probabilities in zip(found, distribution.numpy(), strict=True):
        bins = rng.choice(20, 400_000, p=probabilities)
        sample = grid.edges[bins] + grid.step * rng.random(len(bins))
        assert row[COLUMNS.index("mean")] == pytest.approx(sample.mean(), abs=0.02)
        assert row[COLUMNS.index("sd")] == pytest.approx(sample.std(), abs=0.02)
        assert row[3:] == pytest.approx(np.quantile(sample, LEVELS), abs=0.1)
        centres = np.exp(grid.centres)
        assert row[COLUMNS.index("log_mean")] == pytest.approx(np.log((probabilities * centres).sum()))


def test_calibration():
    log_mean = np.log(np.array([[1000.0, 3000, np.nan], [500, 500, 500]]))
    bases = np.array([[100.0, 50, 100], [100, 100, 0]])
    implied = compute_implied(log_mean, bases, mutation_rate=1e-3)
    assert implied == pytest.approx([2e-3 * (1000 * 100 + 3000 * 50), 2e-3 * 500 * 200])
    names = [("a", "b"), ("c", "d")]
    settings = {"seed": 1, "names": names, "contig": "x"}
    offsets = compute_offsets(Diversity(np.array([250, 0]), implied), method="diversity", **settings)
    assert offsets == pytest.approx(np.log([250 / implied[0], 0.5 / implied[1]]))
    assert (compute_offsets(Diversity(np.array([250, 0]), implied), method="none", **settings) == 0).all()
    # A wrong rate moves a track by the ratio of the rates.
    other = compute_offsets(
        Diversity(np.array([250, 0]), compute_implied(log_mean, bases, mutation_rate=2e-3)), method="diversity", **settings
    )
    assert offsets - other == pytest.approx([np.log(2)] * 2)
    # Gamma draws: mean (y + 1) / R over seeds, in any order of the pair, whatever the other pairs.
    draws = [
        np.exp(
            compute_offsets(Diversity(np.array([24]), np.array([30.0])), method="gamma", seed=s, names=[("a", "b")], contig="x")
        )
        for s in range(3000)
    ]
    assert np.mean(draws) == pytest.approx(25 / 30, rel=0.02)
    assert np.std(draws) == pytest.approx(5 / 30, rel=0.05)
    again = compute_offsets(Diversity(np.array([24]), np.array([30.0])), method="gamma", seed=7, names=[("b", "a")], contig="x")
    assert np.exp(again) == draws[7]
    assert (
        compute_offsets(Diversity(np.array([3]), np.array([0.0])), method="gamma", seed=1, names=names, contig="x") == 0
    ).all()
