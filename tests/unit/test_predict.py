"""`cxt.predict`: what its user would compute by hand, and one clear message for what cannot be predicted."""

import re
import warnings

import msprime
import numpy as np
import pytest
import torch
from helpers.simulations import simulate
from helpers.training import objective_record

import cxt
from cxt.checkpoints.file import write_checkpoint
from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.network import AdapterConfig, ModelConfig
from cxt.decoding.pieces import _choose_haplotypes
from cxt.model.adapter import build_model
from cxt.random_seeds import hash_key

WINDOW, WINDOWS, SCALES = 2000, 20, (2, 4)
LENGTH = WINDOW * WINDOWS


def saved(path, *, adapter=None, ranges=None, objective="autoregressive", **changes):
    """A model with random weights, saved and loaded as users have it."""
    config = ModelConfig(
        **{"layers": 1, "heads": 2, "width": 16, "windows": WINDOWS, "samples": 10, "scales": 2, "bins": 20} | changes
    )
    torch.manual_seed(3)
    model = build_model(config, adapter)
    for parameter in model.parameters():  # such that predictions depend on the input
        torch.nn.init.normal_(parameter, std=0.3)
    dataset = {"scales": list(SCALES), "missing": not config.mask_singletons, "ranges": ranges}
    record = build_checkpoint_record(config, adapter, name="x", dataset=dataset, **objective_record(objective))
    write_checkpoint(path, model.state_dict(), record)
    return cxt.load_model(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "x.ckpt")


@pytest.fixture(scope="module")
def ts():
    return simulate(seed=1, rate=2e-7)  # 100 kb, 10 haplotypes


def by_hand(model, genotypes, positions, pair, *, first=0, end=LENGTH, seed=0, mask=None):
    """The distribution (windows, bins) of a pair in the piece from window *first* on, as a user of `generate` computes it."""
    begin = first * WINDOW
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = cxt.pair_features(
            genotypes[(positions >= begin) & (positions < end)],
            positions[(positions >= begin) & (positions < end)],
            [pair],
            window_size=WINDOW,
            sequence_length=end - begin,
            start=begin,
            scales=SCALES,
            mask=None if mask is None else mask[begin:end],
        )
    x = torch.from_numpy(counts)
    x = torch.log1p(x)
    example = hash_key("predict", first, *sorted(pair)) - 2**63
    _, probabilities = model.generate(x, window_size=WINDOW, replicates=3, seed=seed, example_ids=[example])
    return probabilities[0].double().mean(0).numpy()


def test_one_piece(model, ts):
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    genotypes, positions = genotypes[positions < LENGTH], positions[positions < LENGTH]
    pairs = [(0, 1), (7, 2)]
    posterior = cxt.predict(model, genotypes, positions, pairs, sequence_length=LENGTH, replicates=3)
    assert posterior.distribution.shape == (2, WINDOWS, 20)
    np.testing.assert_array_equal(posterior.edges, np.arange(WINDOWS + 1) * WINDOW)
    np.testing.assert_array_equal(posterior.pairs, pairs)
    for got, pair in zip(posterior.distribution, pairs, strict=True):
        np.testing.assert_allclose(got, by_hand(model, genotypes, positions, pair), atol=1e-5)
    assert np.abs(posterior.distribution[0] - posterior.distribution[1]).max() > 0.01

    of_ts = cxt.predict_ts(model, ts, pairs, sequence_length=LENGTH, replicates=3)
    np.testing.assert_allclose(of_ts.distribution, posterior.distribution, atol=1e-6)
    elsewhere = cxt.predict(
        model, genotypes, positions + 5e6, pairs, sequence_length=LENGTH, start=5e6, replicates=3, batch_size=1
    )
    np.testing.assert_allclose(elsewhere.distribution, posterior.distribution, atol=1e-5)
    np.testing.assert_array_equal(elsewhere.edges, posterior.edges + 5e6)


@pytest.mark.parametrize("objective", ["marginal", "joint"])
def test_reading_in_one_pass(objective, tmp_path, ts):
    model = saved(tmp_path / "x.ckpt", objective=objective)
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    genotypes, positions = genotypes[positions < LENGTH], positions[positions < LENGTH]
    posterior = cxt.predict(model, genotypes, positions, [(0, 1), (7, 2)], sequence_length=LENGTH)
    shape = {"window_size": WINDOW, "sequence_length": LENGTH, "scales": SCALES}
    x = np.log1p(cxt.pair_features(genotypes, positions, [(0, 1), (7, 2)], **shape))
    with torch.no_grad():
        expected = model.marginal_logits(torch.from_numpy(x))[..., 2:].softmax(-1)
    np.testing.assert_allclose(posterior.distribution, expected, atol=1e-6)
    assert posterior.log_tmrca.shape == (2, WINDOWS)
    named = cxt.predict_ts(model, ts, [(0, 1), (7, 2)], sequence_length=LENGTH, reading="marginal")
    np.testing.assert_array_equal(named.distribution, posterior.distribution)
    if objective == "joint":
        sampled = cxt.predict_ts(model, ts, [(0, 1)], sequence_length=LENGTH, reading="sampled", replicates=3)
        np.testing.assert_allclose(sampled.distribution[0], by_hand(model, genotypes, positions, (0, 1)), atol=1e-5)
    else:
        with pytest.raises(cxt.BadRequest, match="trained with the objective marginal, so that reading must be marginal"):
            cxt.predict_ts(model, ts, [(0, 1)], sequence_length=LENGTH, reading="sampled")


def test_readings_that_are_refused(model, ts):
    for reading in ("marginal", "margnal", 3):
        with pytest.raises(cxt.BadRequest, match="reading must be sampled, got"):
            cxt.predict_ts(model, ts, [(0, 1)], sequence_length=LENGTH, reading=reading)


def test_longer_regions_are_read_in_pieces(model, ts):
    length = 2 * LENGTH + 5 * WINDOW - 700  # 45 windows, the last one shorter: pieces begin at 0, 20 and 25
    posterior = cxt.predict_ts(model, ts, [(3, 4)], sequence_length=length, replicates=3, seed=5)
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    first, second, third = (
        by_hand(model, genotypes, positions, (3, 4), first=first, end=min(first * WINDOW + LENGTH, length), seed=5)
        for first in (0, 20, 25)
    )
    expected = np.concatenate([first, second, third[15:]])
    np.testing.assert_allclose(posterior.distribution[0], expected, atol=1e-5)
    assert posterior.edges[-1] == length
    assert len(posterior.edges) == 46


def test_more_haplotypes_than_the_model_reads(model):
    ts = simulate(seed=2, rate=2e-7, individuals=10)
    posterior = cxt.predict_ts(model, ts, [(0, 15), (3, 4)], sequence_length=LENGTH, replicates=3, seed=4)
    columns = _choose_haplotypes(np.array([0, 15]), haplotypes=20, samples=10, seed=4)
    assert len(set(columns)) == 10
    assert {0, 15} <= set(columns)
    pair = [int(np.flatnonzero(columns == haplotype)[0]) for haplotype in (0, 15)]
    genotypes, positions = ts.genotype_matrix()[:, columns], ts.sites_position
    counts = cxt.pair_features(
        genotypes[positions < LENGTH], positions[positions < LENGTH], [pair],
        window_size=WINDOW, sequence_length=LENGTH, scales=SCALES,
    )  # fmt: skip
    _, probabilities = model.generate(
        np.log1p(counts), window_size=WINDOW, replicates=3, seed=4, example_ids=[hash_key("predict", 0, 0, 15) - 2**63]
    )
    np.testing.assert_allclose(posterior.distribution[0], probabilities[0].double().mean(0), atol=1e-5)
    alone = cxt.predict_ts(model, ts, [(4, 3)], sequence_length=LENGTH, replicates=3, seed=4)
    np.testing.assert_allclose(alone.distribution[0], posterior.distribution[1], atol=1e-5)
    assert any(
        set(_choose_haplotypes(np.array([0, 15]), haplotypes=20, samples=10, seed=seed)) != set(columns) for seed in (5, 6)
    )


def test_missing_data(tmp_path, ts):
    model = saved(tmp_path / "x.ckpt", mask_singletons=False)
    mask = np.random.default_rng(1).random(100_000) < 0.3
    posterior = cxt.predict_ts(model, ts, [(0, 1)], sequence_length=LENGTH, mask=mask, replicates=3)
    expected = by_hand(model, ts.genotype_matrix(), ts.sites_position, (0, 1), mask=mask)
    np.testing.assert_allclose(posterior.distribution[0], expected, atol=1e-5)
    with pytest.raises(cxt.BadRequest, match=re.escape("numpy.zeros(40000, dtype=bool)")):
        cxt.predict_ts(model, ts, [(0, 1)], sequence_length=LENGTH)


def test_adapter(tmp_path):
    model = saved(tmp_path / "x.ckpt", adapter=AdapterConfig(samples=6))
    ts = simulate(seed=2, rate=2e-7, individuals=3)
    posterior = cxt.predict_ts(model, ts, [(0, 1)], sequence_length=LENGTH, replicates=3)
    expected = by_hand(model, ts.genotype_matrix(), ts.sites_position, (0, 1))
    np.testing.assert_allclose(posterior.distribution[0], expected, atol=1e-5)


def test_what_cannot_be_predicted(model, ts):
    genotypes, positions = ts.genotype_matrix(), ts.sites_position
    for options, message in (
        ({"sequence_length": 14 * WINDOW}, "reads 20 windows of 2000 bp, 40000 bp in all, but 28000 bp are 14 windows."),
        ({"window_size": 200}, "reads windows of 2000 bp, got window_size=200"),
        ({"start": 5e6}, "not inside the tree sequence, which ends at 100000 bp"),
        ({"replicates": 0}, "replicates must be a positive whole number, got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive whole number, got 1.5"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ):  # fmt: skip
        with pytest.raises(cxt.BadRequest, match=re.escape(message)):
            cxt.predict_ts(model, ts, [(0, 1)], **{"sequence_length": LENGTH} | options)
    with pytest.raises(cxt.BadRequest, match=r"reads 10 haplotypes, got 9\. Use a checkpoint for fewer"):
        cxt.predict(model, genotypes[:, :9], positions, [(0, 1)], sequence_length=100_000)
    with pytest.raises(ValueError, match="Pass start= if the region begins elsewhere"):
        cxt.predict(model, genotypes, positions + 5e6, [(0, 1)], sequence_length=100_000)
    with pytest.raises(ValueError, match="each pair must be two different haplotypes from 0 to 9"):
        cxt.predict(model, genotypes, positions, [(0, 10)], sequence_length=100_000)
    with pytest.raises(cxt.BadRequest, match="pairs is empty"):
        cxt.predict(model, genotypes, positions, np.empty((0, 2), int), sequence_length=100_000)
    with pytest.raises(cxt.BadRequest, match="one number for each of the"):
        cxt.predict(model, genotypes, positions[:-1], [(0, 1)], sequence_length=100_000)
    with pytest.raises(cxt.BadRequest, match=re.escape("load one with cxt.load_model")):
        cxt.predict("broad", genotypes, positions, [(0, 1)], sequence_length=100_000)
    with pytest.raises(cxt.BadRequest, match="has no mutations"):
        cxt.predict_ts(model, msprime.sim_ancestry(5, sequence_length=100_000, random_seed=1), [(0, 1)])


def test_outside_the_training_data_is_told_once(tmp_path, ts):
    model = saved(tmp_path / "x.ckpt", ranges={"diversity": [1.0, 2.0], "missingness": [0.0, 0.0]})
    with pytest.warns(cxt.OutsideTraining) as caught:
        cxt.predict_ts(model, ts, [(0, 1), (0, 2)], replicates=1, batch_size=1)
    assert len(caught) == 1
    assert "diversity" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_warning_about_genotypes_names_the_caller(model, ts):
    genotypes = ts.genotype_matrix()
    genotypes[::3][genotypes[::3] == 1] = 3  # a third of the sites
    with pytest.warns(UserWarning, match="more than two alleles") as caught:
        cxt.predict(model, genotypes, ts.sites_position, [(0, 1)], sequence_length=LENGTH * 2, replicates=1)
    assert {warning.filename for warning in caught} == {__file__}


def test_posterior_summaries():
    grid = cxt.Grid(low=0.0, high=9.0, bins=10)
    rng = np.random.default_rng(2)
    distribution = rng.dirichlet(np.ones(10), size=(2, 3)).astype(np.float32)
    posterior = cxt.Posterior(distribution, grid, np.array([[0, 1], [2, 5]]), np.array([0.0, 1000, 2000, 2500]))
    assert repr(posterior) == "<Posterior of 2 pairs in 3 windows, 0 to 2500 bp>"
    np.testing.assert_allclose(posterior.log_tmrca, distribution @ (np.arange(10) + 0.5), rtol=1e-6)
    low, high = posterior.interval(0.5)
    for pair in range(2):
        for window in range(3):
            edges = np.interp([0.25, 0.5, 0.75], np.append(0, np.cumsum(distribution[pair, window])), np.arange(11))
            found = [low[pair, window], np.log(posterior.tmrca[pair, window]), high[pair, window]]
            np.testing.assert_allclose(found, edges, rtol=1e-5)
    assert posterior.quantile([0.1, 0.9]).shape == (2, 2, 3)
    with pytest.raises(cxt.BadRequest, match="q must be from 0 to 1"):
        posterior.quantile(1.5)
    with pytest.raises(cxt.BadRequest, match="level must be between 0 and 1"):
        posterior.interval(95)


def test_plot():
    from matplotlib.figure import Figure

    grid = cxt.Grid(low=5.0, high=10.0, bins=10)
    distribution = np.full((2, 3, 10), 0.1, dtype=np.float32)
    posterior = cxt.Posterior(distribution, grid, np.array([[0, 1], [2, 5]]), np.array([0.0, 1000, 2000, 2500]))
    ax = Figure().subplots()
    assert posterior.plot(1, truth=np.array([6.0, 7.0, 8.0]), ax=ax) is ax
    assert ax.get_title(loc="left") == "haplotypes 2 and 5"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["95% interval", "posterior median", "truth"]
    band, median, truth = ax.patches
    np.testing.assert_allclose(truth.get_data().values, np.exp([6.0, 7.0, 8.0]))
    np.testing.assert_allclose(median.get_data().values, posterior.tmrca[1])
    low, high = posterior.interval()
    np.testing.assert_allclose(band.get_data().values, np.exp(high[1]))
    np.testing.assert_allclose(band.get_data().baseline, np.exp(low[1]))
    with pytest.raises(cxt.BadRequest, match="pair must be from 0 to 1, got 2"):
        posterior.plot(2, ax=ax)
