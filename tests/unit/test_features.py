"""The fast kernel against the definition, written out site by site."""

import msprime
import numpy as np
import pytest
from helpers.simulations import simulate

from cxt import pair_features, pair_log_tmrca
from cxt.data.features import (
    compute_missing_fraction,
    compute_pair_counts,
    find_first_sites,
    pack_haplotypes,
    select_usable_sites,
)

SCALES = (2, 8, 32, 64)


def slow_features(genotypes, positions, pairs, *, window_size, sequence_length, mask=None, scales=SCALES):
    """The definition: loop over pairs, scales, windows and sites."""
    n = genotypes.shape[1]
    windows = -(-sequence_length // window_size)
    x = np.zeros((len(pairs), 2, len(scales), windows, n), dtype=np.float32)
    sites = []
    for row, position in zip(genotypes, positions, strict=True):
        if position >= sequence_length or max(row) >= 2 or sum(row) >= n or sum(row) == 0:
            continue
        if mask is not None and mask[int(position)]:
            continue
        sites.append((position, row, sum(row)))
    for p, (a, b) in enumerate(pairs):
        for m, scale in enumerate(scales):
            for k in range(windows):
                left, right = k * window_size, min(k * window_size + scale * window_size, sequence_length)
                for position, row, count in sites:
                    if left <= position < right:
                        x[p, 0 if row[a] != row[b] else 1, m, k, count] += 1
                if mask is not None:
                    f = mask[left:right].mean()
                    x[p, 0, m, k, 0], x[p, 1, m, k, 0] = np.exp(f), np.exp(1 - f)
    return x


PAIRS = np.array([(0, 1), (2, 7), (9, 4), (0, 9)])


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_definition(seed, discrete):
    ts = simulate(seed=seed, discrete=discrete, length=50_000)
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    fast = pair_features(genotypes, positions, PAIRS, window_size=1000, sequence_length=50_000)
    assert fast.dtype == np.float32
    assert fast.shape == (4, 2, 4, 50, 10)
    assert np.array_equal(fast, slow_features(genotypes, positions, PAIRS, window_size=1000, sequence_length=50_000))


def test_multi_allelic_sites_are_there_and_dropped():
    ts = simulate(seed=3, rate=5e-6, length=20_000)
    genotypes = ts.genotype_matrix()
    assert (genotypes.max(axis=1) >= 2).any()
    with pytest.warns(UserWarning, match="more than two alleles"):
        fast = pair_features(genotypes, ts.sites_position, PAIRS, window_size=1000, sequence_length=20_000)
    slow = slow_features(genotypes, ts.sites_position, PAIRS, window_size=1000, sequence_length=20_000)
    assert np.array_equal(fast, slow)


def test_empty_windows_and_windows_past_the_last_site():
    ts = simulate(seed=4, length=30_000, rate=1e-8)
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    keep = (positions < 12_000) & ~((positions > 4_000) & (positions < 8_000))
    fast = pair_features(genotypes[keep], positions[keep], PAIRS, window_size=1000, sequence_length=30_000)
    assert not fast[..., 12:, :].any()
    slow = slow_features(genotypes[keep], positions[keep], PAIRS, window_size=1000, sequence_length=30_000)
    assert np.array_equal(fast, slow)


def test_no_sites():
    empty = pair_features(np.empty((0, 10), np.int8), np.empty(0), PAIRS, window_size=1000, sequence_length=5_000)
    assert empty.shape == (4, 2, 4, 5, 10)
    assert not empty.any()


def test_shorter_than_the_tree_sequence_and_a_short_last_window():
    ts = simulate(seed=5, length=50_000)
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    arguments = {"window_size": 700, "sequence_length": 30_000}
    fast = pair_features(genotypes, positions, PAIRS, **arguments)
    assert np.array_equal(fast, slow_features(genotypes, positions, PAIRS, **arguments))


@pytest.mark.parametrize("where", ["both ends", "random", "all", "none"])
def test_mask(where):
    ts = simulate(seed=6, length=10_000, rate=1e-6)
    mask = np.zeros(10_000, dtype=bool)
    if where == "both ends":
        mask[:1500] = mask[-1500:] = True
    elif where == "random":
        mask = np.random.default_rng(1).random(10_000) < 0.4
    elif where == "all":
        mask[:] = True
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    arguments = {"window_size": 500, "sequence_length": 10_000, "mask": mask}
    fast = pair_features(genotypes, positions, PAIRS, **arguments)
    slow = slow_features(genotypes, positions, PAIRS, **arguments)
    assert np.array_equal(fast[..., 1:], slow[..., 1:])
    np.testing.assert_allclose(fast[..., 0], slow[..., 0], rtol=1e-6)


def test_real_positions_next_to_window_edges():
    positions = np.array([np.nextafter(1000, 0), 1000.0, np.nextafter(2000, 0), 2000.0, 2999.5])
    assert find_first_sites(positions, window_size=1000, windows=3).tolist() == [0, 1, 3, 5]
    assert find_first_sites(np.empty(0), window_size=1000, windows=3).tolist() == [0, 0, 0, 0]


def test_more_than_64_samples():
    ts = msprime.sim_ancestry(70, population_size=1e4, sequence_length=20_000, recombination_rate=1e-8, random_seed=1)
    ts = msprime.sim_mutations(ts, rate=1e-7, random_seed=1)
    pairs = [(0, 139), (63, 64), (70, 8)]
    arguments = {"window_size": 1000, "sequence_length": 20_000}
    fast = pair_features(ts.genotype_matrix(), ts.sites_position, np.array(pairs), **arguments)
    assert np.array_equal(fast, slow_features(ts.genotype_matrix(), ts.sites_position, pairs, **arguments))


def test_missing_fraction_of_truncated_windows():
    mask = np.zeros(100, dtype=bool)
    mask[95:] = True
    f = compute_missing_fraction(mask, window_size=10, sequence_length=100, scales=(1, 4))
    assert f[0].tolist() == [0] * 9 + [0.5]
    np.testing.assert_allclose(f[1], [0] * 6 + [5 / 40, 5 / 30, 5 / 20, 5 / 10])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
@pytest.mark.parametrize("windows", [1, 3, 37])
def test_wherever_the_result_begins_only_it_is_written(windows, dtype):
    """Counts are stored by whole lines of memory where these begin; what is beside them is not touched."""
    samples, size = 10, 1000
    ts = simulate(seed=9, length=windows * size)
    genotypes, positions = select_usable_sites(ts.genotype_matrix(), ts.sites_position, sequence_length=windows * size)
    slow = slow_features(genotypes, positions, PAIRS, window_size=size, sequence_length=windows * size)
    memory = np.empty(slow.size + 160, dtype=dtype)
    for begin in range(0, 64, 5):
        memory[:] = -7
        out = memory[begin : begin + slow.size].reshape(slow.shape)
        compute_pair_counts(
            pack_haplotypes(genotypes), positions, PAIRS, window_size=size, windows=windows, samples=samples, out=out
        )
        assert np.array_equal(out, slow)
        assert (memory[:begin] == -7).all()
        assert (memory[begin + slow.size :] == -7).all()


def test_small_integers_hold_the_same_counts():
    ts = simulate(seed=7)
    derived = ts.genotype_matrix().sum(axis=1)
    keep = (ts.genotype_matrix().max(axis=1) <= 1) & (derived > 0) & (derived < 10)
    genotypes, positions = ts.genotype_matrix()[keep], ts.sites_position[keep]
    packed = np.packbits(genotypes.astype(np.uint8), axis=1, bitorder="little")
    counts = compute_pair_counts(packed, positions, PAIRS, window_size=1000, windows=100, samples=10, dtype=np.int16)
    full = pair_features(genotypes, positions, PAIRS, window_size=1000, sequence_length=100_000)
    assert np.array_equal(counts, full)


def with_value(value, dtype):
    """Genotypes of two sites, with *value* at the second site's haplotype 3."""
    genotypes = np.eye(2, 10, dtype=dtype)
    genotypes[1, 3] = value
    return genotypes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": [(0, 10)]}, "two different haplotypes"),
        ({"pairs": [(3, 3)]}, "two different haplotypes"),
        ({"pairs": [(0.0, 1.0)]}, "integer array"),
        ({"mask": np.zeros(99, bool)}, "shorter than the sequence"),
        ({"genotypes": np.full((2, 10), -1)}, "missing data"),
        ({"positions": np.array([5.0, 1.0])}, "ascend"),
        ({"positions": np.array([5.0])}, "must have shapes"),
        ({"positions": np.array([np.nan, 1.0])}, "the position of site 0 must be a finite number, got nan"),
        ({"positions": np.array([1.0, np.inf])}, "the position of site 1 must be a finite number, got inf"),
        ({"positions": np.array([1.0, 100.0])}, "the last site is at 100, .* outside the region .* subtract 1"),
        ({"positions": np.array([5e6, 5e6 + 3])}, r"2 of 2 sites are outside .* from 0 to 100 bp: .* start="),
        ({"positions": np.array([5.0, 7.0]), "start": 50}, r"2 of 2 sites are outside .* from 50 to 150 bp"),
        ({"genotypes": with_value(255, np.uint8)}, "hold 255 at site 1, haplotype 3, which stands for missing data"),
        ({"genotypes": with_value(-1, np.int8)}, "hold -1 at site 1, haplotype 3, which stands for missing data"),
        ({"genotypes": with_value(np.nan, float)}, "hold NaN at site 1, haplotype 3, which stands for missing data"),
        ({"genotypes": with_value(0.5, float)}, "genotypes must be whole numbers, .*, got 0.5 at site 1, haplotype 3"),
        ({"genotypes": with_value(1, float)}, "genotypes must be whole numbers, .*, got type float64. Convert them"),
        ({"genotypes": with_value("1", object)}, "genotypes must be whole numbers, .*, got type object"),
        ({"genotypes": np.zeros(3, int)}, r"must have shape \(sites, haplotypes\), got \(3,\)"),
        ({"genotypes": np.ma.masked_equal(np.eye(2, 10, dtype=int), 1)}, "masked at site 0, haplotype 0; remove sites"),
        ({"positions": np.ma.masked_equal([1.0, 2.0], 2.0)}, "some positions are masked"),
        ({"mask": np.full(100, np.nan)}, "mask must hold .* got values of type float64"),
        ({"mask": np.full(100, 2)}, "mask must hold True .* got values of type int64"),
        ({"mask": np.zeros(200, bool), "start": 1}, r"mask must have 100 values, got 200: .* mask\[1:101\]"),
        ({"window_size": 0}, "window_size must be a positive whole number of base pairs, got 0"),
        ({"window_size": np.inf}, "window_size must be .*, got inf"),
        ({"window_size": 2.5}, "window_size must be .*, got 2.5"),
        ({"sequence_length": 0}, "sequence_length must be a positive number of base pairs, got 0"),
        ({"scales": (0, 2)}, "scales must be positive whole numbers of windows, got"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "genotypes": np.eye(2, 10, dtype=np.int8), "positions": np.array([1.0, 2.0]), "pairs": [(0, 1)], "mask": None,
        "window_size": 10, "sequence_length": 100,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pair_features(**arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window_size": 0}, "window_size must be .*, got 0"),
        ({"window_size": "2000"}, "window_size must be a number of base pairs, got '2000'"),
        ({"window_size": None}, "window_size must be a number of base pairs, got None"),
        ({"sequence_length": "1e5"}, "sequence_length must be a number of base pairs, got '1e5'"),
        ({"sequence_length": float("nan")}, "sequence_length must be .*, got nan"),
    ],
)
def test_sizes_that_are_none(sizes, message):
    ts, sizes = simulate(seed=1), {"window_size": 2000, "sequence_length": 100_000} | sizes
    with pytest.raises(ValueError, match=message):
        pair_log_tmrca(ts, PAIRS, **sizes)
    with pytest.raises(ValueError, match=message):
        pair_features(ts.genotype_matrix(), ts.sites_position, PAIRS, **sizes)


def test_coordinates_of_a_chromosome():
    ts = simulate(seed=8, length=20_000, rate=2e-7, discrete=False)
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    arguments = {"window_size": 1000, "sequence_length": 20_000}
    expected = pair_features(genotypes, positions, PAIRS, **arguments)
    mask = np.random.default_rng(1).random(20_000) < 0.2
    assert np.array_equal(pair_features(genotypes, np.rint(positions * 2**20) / 2**20, PAIRS, **arguments), expected)
    moved = 5_000_000 + np.rint(positions * 2**20) / 2**20
    assert np.array_equal(pair_features(genotypes, moved, PAIRS, start=5_000_000, **arguments), expected)
    assert np.array_equal(
        pair_features(genotypes, moved, PAIRS, start=5_000_000, mask=mask, **arguments),
        pair_features(genotypes, positions, PAIRS, mask=mask, **arguments),
    )
    assert np.array_equal(pair_features(genotypes.astype(bool), positions, PAIRS, **arguments), expected)


def test_scales_beyond_the_last_window():
    ts = simulate(seed=1, length=20_000)
    mask = np.random.default_rng(1).random(20_000) < 0.2
    wide, widest = (
        pair_features(
            ts.genotype_matrix(), ts.sites_position, PAIRS, window_size=1000, sequence_length=20_000, mask=mask, scales=scales
        )
        for scales in ((2, 20), (2, 2**40))
    )
    assert np.array_equal(wide, widest)


def test_dosages_of_diploids_are_refused():
    ts = simulate(seed=8, individuals=20, discrete=False)
    haplotypes = ts.genotype_matrix()
    dosages = haplotypes[:, ::2] + haplotypes[:, 1::2]
    with pytest.raises(ValueError, match=r"a 2 at \d+% of the sites, like dosages of diploid individuals"):
        pair_features(dosages, ts.sites_position, PAIRS, window_size=1000, sequence_length=100_000)


def test_many_alleles_are_said():
    ts = simulate(seed=3, rate=5e-6, length=20_000)
    with pytest.warns(UserWarning, match=r"793 of 5802 sites, which have more than two alleles .*phased haplotypes"):
        pair_features(ts.genotype_matrix(), ts.sites_position, PAIRS, window_size=1000, sequence_length=20_000)
