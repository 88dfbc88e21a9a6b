"""ln TMRCA against a walk over the trees, the grid, and genealogies that must be refused."""

import msprime
import numpy as np
import pytest
from helpers.simulations import constant_scenario, simulate

from cxt import pair_log_tmrca
from cxt.config.variants import list_variants
from cxt.data.grid import Grid
from cxt.data.preprocessing import preprocess_simulation
from cxt.errors import BadRequest
from cxt.scenarios.registry import simulate_tree_sequence


def slow_log_tmrca(ts, pairs, *, window_size, sequence_length):
    """The definition: walk the trees, weigh each MRCA's time by its overlap with each window."""
    windows = sequence_length // window_size
    total = np.zeros((len(pairs), windows))
    samples = ts.samples()
    for tree in ts.trees():
        for k in range(windows):
            left, right = max(tree.interval.left, k * window_size), min(tree.interval.right, (k + 1) * window_size)
            if left < right:
                for p, (a, b) in enumerate(pairs):
                    total[p, k] += (right - left) * tree.tmrca(samples[a], samples[b])
    return np.log(total / window_size)


PAIRS = np.array([(0, 1), (1, 0), (2, 7), (9, 4)])


@pytest.mark.parametrize("length", [100_000, 40_000])
def test_equals_tree_walk(length):
    ts = simulate(seed=1)
    fast = pair_log_tmrca(ts, PAIRS, window_size=2000, sequence_length=length)
    assert fast.dtype == np.float64
    np.testing.assert_allclose(fast, slow_log_tmrca(ts, PAIRS, window_size=2000, sequence_length=length), rtol=1e-10)


def test_one_tree():
    ts = msprime.sim_ancestry(5, population_size=1e4, sequence_length=10_000, random_seed=1)
    y = pair_log_tmrca(ts, PAIRS, window_size=1000, sequence_length=10_000)
    expected = [np.log(ts.first().tmrca(a, b)) for a, b in PAIRS]
    np.testing.assert_allclose(y, np.tile(np.array(expected)[:, None], 10), rtol=1e-12)


def test_pairs_index_samples_not_nodes():
    ts = simulate(seed=2)
    kept = ts.simplify(ts.samples()[4:], filter_nodes=False)
    np.testing.assert_allclose(
        pair_log_tmrca(kept, [(0, 3)], window_size=2000, sequence_length=100_000),
        pair_log_tmrca(ts, [(4, 7)], window_size=2000, sequence_length=100_000),
        rtol=1e-10,
    )


def test_several_roots_are_refused():
    ts = msprime.sim_ancestry(5, population_size=1e4, sequence_length=1000, end_time=10, random_seed=1)
    with pytest.raises(BadRequest, match="must have one root"):
        pair_log_tmrca(ts, [(0, 1)], window_size=100, sequence_length=1000)


def test_ancient_samples_are_refused():
    samples = [msprime.SampleSet(3), msprime.SampleSet(1, time=50)]
    ts = msprime.sim_ancestry(samples, population_size=1e4, sequence_length=1000, random_seed=1)
    with pytest.raises(BadRequest, match=r"2 of 8 samples are not at time 0 \(the oldest at 50\)"):
        pair_log_tmrca(ts, [(0, 1)], window_size=100, sequence_length=1000)


@pytest.mark.parametrize(
    ("units", "remedy"),
    [
        ("years", "divide node and mutation times by the years per generation"),
        ("ticks", "generations per tick"),
        ("uncalibrated", "date it first"),
        ("unknown", r"tables\.time_units = 'generations'"),
        ("centuries", "convert its times"),
    ],
)
def test_other_units_of_time_are_refused(units, remedy):
    tables = simulate(seed=1).dump_tables()
    tables.time_units = units
    ts = tables.tree_sequence()
    with pytest.raises(BadRequest, match=f"must be in 'generations', got '{units}': .*{remedy}"):
        pair_log_tmrca(ts, [(0, 1)], window_size=1000, sequence_length=100_000)
    identified = simulate_tree_sequence(list_variants("constant", constant_scenario())[0].spec, index=1, seed=1).dump_tables()
    identified.time_units = units
    with pytest.raises(BadRequest, match=f"got '{units}'"):
        preprocess_simulation(
            identified.tree_sequence(), {"window_size": 1000, "sequence_length": 20_000, "samples": 20, "pairs": 6}
        )


def test_negative_times_are_refused():
    tables = msprime.sim_ancestry(5, population_size=1e4, sequence_length=1000, random_seed=1).dump_tables()
    tables.nodes.time = tables.nodes.time - 500  # as SLiM counted, from the start of the simulation
    with pytest.raises(BadRequest, match="negative times .*SLiM"):
        pair_log_tmrca(tables.tree_sequence(), [(0, 1)], window_size=100, sequence_length=1000)


def test_too_short_is_refused():
    with pytest.raises(BadRequest, match="100000 bp long, but 200000"):
        pair_log_tmrca(simulate(seed=1), [(0, 1)], window_size=1000, sequence_length=200_000)


def test_grid():
    grid = Grid()
    assert grid.step == pytest.approx(0.0433437, abs=1e-7)
    y = np.array([2.0, 3.0, 3.0 + grid.step, np.nextafter(3.0 + grid.step, 0), 16.99, 17.0, 99.0])
    assert grid.tokens(y).tolist() == [1, 2, 2, 3, 2, 324, 325, 325]
    assert grid.centres[0] == pytest.approx(3 + grid.step / 2)
    assert len(grid.edges) == 325
    inside = np.random.default_rng(1).uniform(3, 17, (7, 50))
    tokens = grid.tokens(inside)
    assert tokens.shape == (7, 51)
    assert np.all(np.abs(grid.centres[tokens[:, 1:] - 2] - inside) <= grid.step / 2 + 1e-12)
