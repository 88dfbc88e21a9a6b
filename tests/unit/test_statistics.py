"""Simulations against theory and against independent direct calls of msprime: means and variances of TMRCA and of sites."""

import msprime
import numpy as np
import pytest
import stdpopsim

from cxt.scenarios.registry import simulate_tree_sequence

REPLICATES = 200
N, MU, R = 20_000, 1.29e-8, 1.28e-8
RATES = {"mutation_rate": MU, "recombination_rate": R}


def moments(values) -> tuple[float, float, float, float]:
    """Mean, its standard error, variance, its standard error."""
    values = np.asarray(values, dtype=float)
    n, mean, variance = len(values), values.mean(), values.var(ddof=1)
    fourth = ((values - mean) ** 4).mean()
    return mean, np.sqrt(variance / n), variance, np.sqrt(max(fourth - variance**2, 0) / n)


def agree(simulated_values, direct_values) -> None:
    """Means and variances within 4 standard errors."""
    a, b = moments(simulated_values), moments(direct_values)
    for name, i in (("mean", 0), ("variance", 2)):
        error = np.hypot(a[i + 1], b[i + 1])
        assert abs(a[i] - b[i]) < 4 * error, f"{name}: {a[i]:.4g} against {b[i]:.4g}, standard error {error:.3g}"


def summarise(ts) -> tuple[float, float, int]:
    """TMRCA of the first and the last sample at the left end, that of the first two averaged over the sequence, and sites."""
    average = ts.divergence([[0], [1]], mode="branch") / 2
    return ts.first().tmrca(0, ts.num_samples - 1), float(average), ts.num_sites


def simulated(spec: dict):
    return np.array([summarise(simulate_tree_sequence(spec, index=i, seed=11)) for i in range(REPLICATES)]).T


def direct(make) -> np.ndarray:
    rows = []
    for i in range(REPLICATES):
        ancestry, rate, discrete = make(i + 1)
        rows.append(summarise(msprime.sim_mutations(ancestry, rate=rate, random_seed=9_000 + i, discrete_genome=discrete)))
    return np.array(rows).T


def constant(seed):
    ts = msprime.sim_ancestry(
        10, population_size=N, sequence_length=50_000, recombination_rate=R, random_seed=seed, discrete_genome=True
    )
    return ts, MU, False


def sawtooth(seed):
    """The zig-zag as explicit epochs: each begins at the size at which the one before it ended."""
    from test_scenarios import zigzag_sizes

    demography = msprime.Demography()
    demography.add_population(name="one", initial_size=N)
    for time, size, rate in zigzag_sizes(N, 3):
        demography.add_population_parameters_change(time=time, initial_size=size, growth_rate=rate, population="one")
    ts = msprime.sim_ancestry(
        {"one": 10}, demography=demography, sequence_length=50_000, recombination_rate=R, random_seed=seed
    )
    return ts, MU, False


def island(seed):
    demography = msprime.Demography()
    for name, size in (("x", 10_000), ("y", 5_000), ("z", 5_000)):
        demography.add_population(name=name, initial_size=size)
    demography.set_symmetric_migration_rate(["x", "y", "z"], 0.1)
    ts = msprime.sim_ancestry(
        {"x": 6, "y": 2, "z": 2}, demography=demography, sequence_length=5_000, recombination_rate=R, random_seed=seed
    )
    return ts, MU, False


def aratha(seed):
    species = stdpopsim.get_species("AraTha")
    model = species.get_demographic_model("African2Epoch_1H18")
    chromosome = species.genome.chromosomes[seed % 5]  # 5 autosomes, then organelles
    ts = msprime.sim_ancestry(
        10, demography=model.model, sequence_length=20_000, recombination_rate=chromosome.recombination_rate, random_seed=seed
    )
    return ts, chromosome.mutation_rate if model.mutation_rate is None else model.mutation_rate, True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "make"),
    [
        ({"kind": "constant", "population_size": N, "sequence_length": 50_000, **RATES}, constant),
        ({"kind": "sawtooth", "population_size": N, "magnitude": 3, "sequence_length": 50_000, **RATES}, sawtooth),
        pytest.param(
            {"kind": "island", "population_size": 10_000, "migration_rate": 0.1, "sequence_length": 5_000, **RATES},
            island,
            marks=pytest.mark.long,
        ),
        ({"kind": "stdpopsim", "species": "AraTha", "models": ["African2Epoch_1H18"], "sequence_length": 20_000}, aratha),
    ],
    ids=["constant", "sawtooth", "island", "stdpopsim"],
)
def test_moments_against_direct_calls(spec, make):
    simulated_rows, direct_rows = simulated({"name": make.__name__, "individuals": 10} | spec), direct(make)
    for a, b in zip(simulated_rows, direct_rows, strict=True):
        agree(a, b)


def test_constant_against_theory():
    """A pair's TMRCA at a site is exponential with mean 2N; Watterson's expectation of the number of sites."""
    spec = {"name": "theory", "kind": "constant", "population_size": N, "individuals": 10, "sequence_length": 50_000, **RATES}
    tmrca, _, sites = simulated(spec)
    mean, error, variance, error_of_variance = moments(tmrca)
    assert abs(mean - 2 * N) < 4 * error
    assert abs(variance - (2 * N) ** 2) < 4 * error_of_variance
    mean, error, *_ = moments(sites)
    expected = 4 * N * MU * 50_000 * sum(1 / i for i in range(1, 20))
    assert abs(mean - expected) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "constant", "population_size": N, "sequence_length": 50_000, **RATES},
        {"kind": "stdpopsim", "species": "AedAeg", "population_size": 100_000, "sequence_length": 20_000},
        {
            "kind": "demes", "samples": {"A": 5, "B": 5}, "sequence_length": 20_000, **RATES,
            "demography": {
                "time_units": "generations",
                "demes": [{"name": "A", "epochs": [{"start_size": 5000}]}, {"name": "B", "epochs": [{"start_size": 2000}]}],
                "migrations": [{"demes": ["A", "B"], "rate": 1e-3}],
            },
        },
    ],
    ids=["constant", "stdpopsim", "demes"],
)  # fmt: skip
def test_smc_prime_agrees_with_hudson(spec):
    spec = {"name": "smc", "individuals": 10} | spec
    hudson, smc = simulated(spec), simulated(spec | {"ancestry_model": "smc_prime"})
    assert not np.array_equal(hudson[0], smc[0])
    for a, b in zip(hudson, smc, strict=True):
        agree(a, b)
    made = simulate_tree_sequence(spec | {"ancestry_model": "smc_prime"}, index=0, seed=1)
    assert made.metadata["cxt"]["ancestry_model"] == "smc_prime"
    assert simulate_tree_sequence(spec, index=0, seed=1).metadata["cxt"]["ancestry_model"] == "hudson"


def test_hard_sweep_is_the_published_call():
    """Against msprime's sweep called directly: TMRCA where the allele swept, far from it, and sites."""
    spec = {
        "name": "sweep", "kind": "hard_sweep", "population_size": 10_000, "individuals": 10, "sequence_length": 200_000,
        "selection_coefficient": 0.1, "position": 100_000, "mutation_rate": 1e-8, "recombination_rate": 5e-8,
    }  # fmt: skip

    def rows(trees):
        return np.array([(ts.at(100_000).tmrca(0, 19), ts.at(199_999).tmrca(0, 19), ts.num_sites) for ts in trees]).T

    simulated_rows = rows(simulate_tree_sequence(spec, index=i, seed=3) for i in range(REPLICATES))
    direct = []
    for i in range(REPLICATES):
        sweep = msprime.SweepGenicSelection(position=100_000, start_frequency=1e-4, end_frequency=1 - 1e-4, s=0.1, dt=1e-6)
        ts = msprime.sim_ancestry(
            10, population_size=10_000, sequence_length=200_000, recombination_rate=5e-8, random_seed=i + 1,
            model=[sweep, msprime.StandardCoalescent()],
        )  # fmt: skip
        direct.append(msprime.sim_mutations(ts, rate=1e-8, random_seed=i + 1, discrete_genome=False))
    direct_rows = rows(direct)
    for a, b in zip(simulated_rows, direct_rows, strict=True):
        agree(a, b)
    assert np.median(simulated_rows[0]) < 0.1 * np.median(simulated_rows[1])  # a sweep it is
    again = [simulate_tree_sequence(spec, index=0, seed=3).tables for _ in range(2)]
    assert again[0].equals(again[1], ignore_provenance=True)
