"""The hidden Markov model against plain enumeration, theory, and simulations of the process that it assumes."""

import itertools
import math

import msprime
import numpy as np
import pytest

from cxt.data.preprocessing import preprocess_simulation
from cxt.evaluation.hmm import STATES, _find_posterior_means, build_transitions, estimate_by_hmm, split_time
from cxt.evaluation.metrics import score_heterozygosity
from cxt.scenarios.registry import simulate_tree_sequence

SHAPE = {"window_size": 1000, "sequence_length": 40_000, "samples": 10, "pairs": 5, "scales": [2, 4]}
SPEC = {
    "kind": "constant", "name": "constant", "population_size": 20_000, "mutation_rate": 2e-8, "recombination_rate": 1e-8,
    "individuals": 5, "sequence_length": 40_000,
}  # fmt: skip


def test_states():
    edges, times, prior = split_time(1000.0)
    assert prior.sum() == pytest.approx(1)
    assert (prior * times).sum() == pytest.approx(1000)
    assert ((edges[:-1] < times) & (times < edges[1:])).all()


def test_transitions_against_sampling():
    """Recombine and coalesce by drawing numbers, from one state, and count."""
    mean, recombination, state = 1000.0, 2e-4, 45
    edges, times, _ = split_time(mean)
    rng, s, draws = np.random.default_rng(1), times[45], 200_000
    new = np.full(draws, s)
    hit = rng.random(draws) < 1 - math.exp(-2 * recombination * s)
    start = rng.random(draws) * s
    first = start + rng.exponential(mean / 2, draws)  # with one of the two lineages below s
    changes = rng.random(draws) < 0.5
    later = s + rng.exponential(mean, draws)
    new = np.where(hit & (first < s) & changes, first, new)
    new = np.where(hit & (first >= s), later, new)
    counted = np.bincount(np.searchsorted(edges, new) - 1, minlength=STATES) / draws
    row = build_transitions(edges, times, mean=mean, recombination=recombination)[state]
    assert row.sum() == pytest.approx(1)
    np.testing.assert_allclose(counted, row, atol=0.003)


def test_posterior_against_all_paths():
    rng = np.random.default_rng(2)
    prior, transitions = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), size=3)
    rates, log_times = np.array([0.1, 0.5, 2.0]), np.array([1.0, 2.0, 4.0])
    differences, exposure = np.array([0, 3, 1, 0]), np.array([1.0, 1.0, 0.5, 0.0])
    weighted, total = np.zeros(4), 0.0
    for path in itertools.product(range(3), repeat=4):
        weight = prior[path[0]]
        for i, state in enumerate(path):
            expected = rates[state] * exposure[i]
            weight *= math.exp(-expected) * (expected ** int(differences[i]) if exposure[i] else 1.0)
            if i:
                weight *= transitions[path[i - 1], state]
        weighted += weight * log_times[list(path)]
        total += weight
    result = np.empty(4)
    _find_posterior_means(differences, exposure, prior, transitions, rates, log_times, result)
    np.testing.assert_allclose(result, weighted / total)


@pytest.mark.parametrize("masked", [False, True])
def test_it_beats_heterozygosity(masked):
    mask = np.repeat(np.random.default_rng(3).random(100) < 0.3, 500) if masked else None
    entries = [
        preprocess_simulation(simulate_tree_sequence(SPEC, index=index, seed=1), SHAPE, mask=mask) for index in range(12)
    ]
    truth = np.stack([entry.log_tmrca for entry in entries])
    estimate = np.stack([estimate_by_hmm(entry, window_size=1000, windows=40, samples=10) for entry in entries])
    error = ((estimate - truth) ** 2).mean()
    assert error < 0.8 * score_heterozygosity(entries, window_size=1000, windows=40)["mse"]
    assert abs((estimate - truth).mean()) < 0.15


def test_no_differences():
    """A sample without mutations, and a window size that is no multiple of a step."""
    ts = msprime.sim_ancestry(5, sequence_length=40_000, population_size=1000, random_seed=1)
    with_metadata = simulate_tree_sequence(SPEC, index=1, seed=1)
    tables = ts.dump_tables()
    tables.metadata_schema, tables.metadata = with_metadata.metadata_schema, with_metadata.metadata
    entry = preprocess_simulation(tables.tree_sequence(), SHAPE | {"window_size": 250, "pairs": 2})
    estimate = estimate_by_hmm(entry, window_size=250, windows=160, samples=10)
    assert estimate.shape == (2, 160)
    assert np.isfinite(estimate).all()
    assert estimate.max() < math.log(1e5)
