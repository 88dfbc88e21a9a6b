"""Metrics and baselines against plain loops, posterior summaries, and what evaluation refuses."""

import json

import numpy as np
import pytest
import torch
from helpers.simulations import constant_scenario
from helpers.training import objective_record

from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.record import build_checkpoint_record
from cxt.config.network import ModelConfig
from cxt.config.variants import list_variants
from cxt.data.grid import Grid
from cxt.data.preprocessing import preprocess_simulation
from cxt.data.targets import pair_log_moments
from cxt.decoding.decode import Summaries, decode
from cxt.decoding.posterior import posterior_mean, posterior_quantile, posterior_rank
from cxt.errors import BadRequest, Failed
from cxt.evaluate import main
from cxt.evaluation.figures import draw_calibration, draw_scatter
from cxt.evaluation.metrics import (
    BASELINE_WIDTHS,
    average_scenarios,
    clustered_standard_error,
    combine_recent,
    count_accessible_bases,
    count_differences,
    estimate_from_heterozygosity,
    measure_coverage,
    pearson_per_pair,
    score_heterozygosity,
    score_recent,
    score_sites,
    score_variant,
)
from cxt.evaluation.protocol import evaluate
from cxt.evaluation.table import format_accuracy_table
from cxt.io import json_text
from cxt.model.adapter import build_model
from cxt.scenarios.batches import write_batch
from cxt.scenarios.indices import EVALUATION_START
from cxt.scenarios.registry import simulate_tree_sequence
from cxt.trainer.validation import DecodedExamples

SPEC = list_variants("constant", constant_scenario())[0].spec
SHAPE = {"window_size": 1000, "sequence_length": 20_000, "samples": 10, "pairs": 5, "scales": [2, 4]}


@pytest.fixture(scope="module")
def mask():
    return np.random.default_rng(1).random(60_000) < 0.3


@pytest.mark.parametrize("masked", [False, True])
def test_baseline_against_loops(mask, masked):
    ts = simulate_tree_sequence(SPEC, index=1, seed=1)
    entry = preprocess_simulation(ts, SHAPE, mask=mask if masked else None)
    few = ts.simplify(ts.samples()[:10])
    crop = np.zeros(20_000, bool) if entry.mask is None else entry.mask
    haplotypes = few.genotype_matrix()
    differences = count_differences(entry, window_size=1000, windows=20)
    bases = count_accessible_bases(entry, window_size=1000, windows=20)
    estimate = estimate_from_heterozygosity(entry, 5, window_size=1000, windows=20, constant=10.0)
    for p, (a, b) in enumerate(entry.pairs):
        sites = [
            int(position // 1000)
            for position, row in zip(few.sites_position, haplotypes, strict=True)
            if row[a] != row[b] and not crop[int(position)]
        ]
        for k in range(20):
            assert differences[p, k] == sites.count(k)
            near = range(max(0, k - 2), min(20, k + 3))
            d = sum(sites.count(w) for w in near)
            length = sum(int((~crop[w * 1000 : (w + 1) * 1000]).sum()) for w in near)
            prior = 0.5 / (2 * 1.29e-8 * np.exp(10.0))  # bases on which half a difference is expected
            assert estimate[p, k] == pytest.approx(np.log((d + 0.5) / (2 * 1.29e-8 * (length + prior))))
    assert bases.sum() == (~crop).sum()


def test_best_window_is_the_best():
    entries = [preprocess_simulation(simulate_tree_sequence(SPEC, index=i, seed=1), SHAPE) for i in range(4)]
    best = score_heterozygosity(entries, window_size=1000, windows=20)
    truth = np.concatenate([e.log_tmrca for e in entries])
    for width in (1, 3, 9, 25):
        estimate = np.concatenate(
            [estimate_from_heterozygosity(e, width, window_size=1000, windows=20, constant=truth.mean()) for e in entries]
        )
        assert best["mse"] <= ((estimate - truth) ** 2).mean() + 1e-12
        assert best["r"] >= pearson_per_pair(truth, estimate) - 1e-12
    assert best["mse_width"] % 1000 == 0


def test_baseline_takes_the_constant_where_nothing_is_accessible():
    hidden = np.zeros(20_000, bool)
    hidden[5000:12_000] = True
    entries = [preprocess_simulation(simulate_tree_sequence(SPEC, index=i, seed=1), SHAPE, mask=hidden) for i in range(4)]
    truth = np.concatenate([e.log_tmrca for e in entries])
    estimate = estimate_from_heterozygosity(entries[0], 1, window_size=1000, windows=20, constant=truth.mean())
    np.testing.assert_allclose(estimate[:, 5:12], truth.mean())
    assert (estimate < truth.mean() + 3).all()  # half a difference on one base would be 17
    widths = [w for w in BASELINE_WIDTHS if w // 2 < 20]
    plain = min(np.mean([(plain_estimate(e, w, constant=truth.mean()) - e.log_tmrca) ** 2 for e in entries]) for w in widths)
    assert score_heterozygosity(entries, window_size=1000, windows=20)["mse"] == pytest.approx(plain)


@pytest.mark.parametrize("samples", [10, 20])
def test_correlation_along_base_pairs(samples):
    """Against ln TMRCA written out at every base pair, from tskit's trees."""
    ts = simulate_tree_sequence(SPEC, index=3, seed=2)
    assert ts.num_samples == 20
    entry = preprocess_simulation(ts, SHAPE | {"samples": samples})
    few = ts.simplify(ts.samples()[:samples])
    means, variances = pair_log_moments(few, entry.pairs, window_size=1000, sequence_length=20_000)
    estimate = entry.log_tmrca + np.random.default_rng(1).normal(0, 0.5, entry.log_tmrca.shape)
    estimate[0] = 10.0  # does not vary, and is left out
    expected, limits = [], []
    for p, (a, b) in enumerate(entry.pairs):
        truth = np.full(20_000, np.nan)
        for tree in few.trees():
            left, right = (min(20_000, int(end)) for end in tree.interval)
            assert (left, right) == tuple(min(20_000, end) for end in tree.interval)
            truth[left:right] = np.log(tree.tmrca(a, b))
        windows = truth.reshape(20, 1000)
        np.testing.assert_allclose(means[p], windows.mean(axis=1), rtol=1e-9)
        np.testing.assert_allclose(variances[p], truth.var(), rtol=1e-6, atol=1e-10)
        if p and truth.var() > 0:
            expected.append(np.corrcoef(truth, np.repeat(estimate[p], 1000))[0, 1])
            limits.append(np.corrcoef(truth, np.repeat(windows.mean(axis=1), 1000))[0, 1])
    assert len(expected) >= 3
    scores = score_sites(estimate, means, variances)
    assert scores == pytest.approx({"r": np.mean(expected), "r_limit": np.mean(limits)}, rel=1e-6)
    assert scores["r"] < scores["r_limit"]
    perfect = score_sites(means[1:], means[1:], variances[1:])
    assert perfect["r"] == pytest.approx(perfect["r_limit"])


def plain_estimate(entry, width, *, constant):
    """The baseline of a 20 kb entry with a mask, window by window from the packed haplotypes."""
    bits = np.unpackbits(entry.genotypes, axis=1, bitorder="little")
    result = np.empty((len(entry.pairs), 20))
    for p, (a, b) in enumerate(entry.pairs):
        for k in range(20):
            low, high = max(0, k - width // 2) * 1000, min(20, k + width // 2 + 1) * 1000
            d = sum(low <= at < high and row[a] != row[b] for at, row in zip(entry.positions, bits, strict=True))
            bases = sum(not hidden for hidden in entry.mask[low:high])
            theta = 2 * entry.mutation_rate
            result[p, k] = np.log((d + 0.5) / (theta * (bases + 0.5 / (theta * np.exp(constant)))))
    return result


def test_what_is_not_known_is_null(tmp_path):
    entry = preprocess_simulation(simulate_tree_sequence(SPEC, index=1, seed=1), SHAPE)
    entry.log_tmrca = np.full_like(entry.log_tmrca, 9.5)  # a pair of one tree: nothing to correlate with
    truth = entry.log_tmrca[None]
    rank = np.linspace(0, 1, truth.size).reshape(truth.shape)
    flat = score_variant(truth, truth + 0.1, truth, truth + 1, rank, [entry], window_size=1000, windows=20, samples=10)
    assert flat["r"] is flat["mse_se"] is flat["baseline"]["heterozygosity"]["r"] is None
    flat["site"] = score_sites(truth + 0.1, truth, np.zeros(truth.shape[:-1]))
    assert flat["site"] == {"r": None, "r_limit": None}
    flat["distribution"] = {"crps": 0.25}
    assert average_scenarios({"flat": flat})["site"] == flat["site"]
    both = {"flat": flat, "known": flat | {"r": 0.5, "mse_se": 0.1, "site": {"r": 0.25, "r_limit": 0.75}}}
    assert average_scenarios(both)["r"] == 0.5
    assert average_scenarios(both)["site"] == {"r": 0.25, "r_limit": 0.75}
    result = {"checkpoint": "x", "scenarios": both, "overall": average_scenarios({"flat": flat})}
    assert result["overall"]["recent"] == flat["recent"] == {"windows": 0, "mse": None, "bias": None, "coverage95": None}
    assert json.loads(json_text(result), parse_constant=pytest.fail) == result
    (row,) = [line for line in format_accuracy_table([result]).splitlines() if "| flat" in line]
    assert [cell.strip() for cell in row.split("|")][3:8] == ["0.010", "-", "-", "-", "0.250"]
    draw_scatter(dict.fromkeys(both, (truth, truth + 0.1, truth, truth + 1)), tmp_path / "s.png", title="x", scenarios=both)
    assert (tmp_path / "s.png").stat().st_size > 1000
    assert all(abs(share - float(level)) <= 1 / truth.size + 1e-9 for level, share in flat["coverage"].items())
    draw_calibration(both, tmp_path / "c.png", title="x")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_ranks_and_coverage():
    """The rank of a value is where it is a quantile; intervals hold it as often as the ranks say."""
    grid = Grid(low=0.0, high=9.0, bins=10)
    rng = np.random.default_rng(3)
    distribution = torch.from_numpy(rng.dirichlet(np.ones(10), size=(400,)))
    for q in (0.03, 0.5, 0.9):
        value = posterior_quantile(distribution, grid, q)
        np.testing.assert_allclose(posterior_rank(distribution, grid, value), q, atol=1e-9)
    outside = torch.full((400,), -5.0), torch.full((400,), 50.0)
    assert [float(posterior_rank(distribution, grid, value).mean()) for value in outside] == [0.0, 1.0]
    truth = torch.from_numpy(rng.uniform(0, 10, 400))
    coverage = measure_coverage(posterior_rank(distribution, grid, truth).numpy())
    for level in (0.1, 0.5, 0.95):
        low, high = (posterior_quantile(distribution, grid, (1 + sign * level) / 2) for sign in (-1, 1))
        assert coverage[f"{level:g}"] == float(((truth >= low) & (truth <= high)).double().mean())


def test_training_and_evaluation_mean_the_same_by_r():
    examples = DecodedExamples.__new__(DecodedExamples)
    rng = np.random.default_rng(1)
    examples.truth = rng.normal(size=(6, 20)) + 3 * rng.normal(size=(6, 1))  # pairs differ more than windows of a pair
    mean = examples.truth + rng.normal(size=(6, 20))
    scores = examples.scores(Summaries(mean, mean, mean))
    by_pair = [np.corrcoef(t, e)[0, 1] for t, e in zip(examples.truth, mean, strict=True)]
    assert scores["val_r"] == pytest.approx(np.mean(by_pair)) == pytest.approx(pearson_per_pair(examples.truth, mean))
    assert abs(scores["val_r"] - np.corrcoef(examples.truth.ravel(), mean.ravel())[0, 1]) > 0.1  # pooled over pairs
    examples.truth = np.ones((6, 20))
    assert scores.keys() - examples.scores(Summaries(mean, mean, mean)).keys() == {"val_r"}


def test_metrics():
    rng = np.random.default_rng(1)
    truth, estimate = rng.normal(size=(3, 4, 50)), rng.normal(size=(3, 4, 50))
    estimate += truth
    expected = np.mean([np.corrcoef(t, e)[0, 1] for t, e in zip(truth.reshape(-1, 50), estimate.reshape(-1, 50), strict=True)])
    assert pearson_per_pair(truth, estimate) == pytest.approx(expected)
    truth[0] = 1.0  # pairs without variation are left out
    part = np.mean(
        [np.corrcoef(t, e)[0, 1] for t, e in zip(truth[1:].reshape(-1, 50), estimate[1:].reshape(-1, 50), strict=True)]
    )
    assert pearson_per_pair(truth, estimate) == pytest.approx(part)
    truth[0] += 1e-13 * rng.normal(size=(4, 50))  # nor those that vary by rounding, whatever the scale of the estimate
    assert pearson_per_pair(truth, 1000 * estimate) == pytest.approx(part)
    errors = rng.random((5, 4, 50))
    means = errors.mean(axis=(1, 2))
    assert clustered_standard_error(errors) == pytest.approx(means.std(ddof=1) / np.sqrt(5))
    assert np.isnan(clustered_standard_error(errors[:1]))


def test_posterior_summaries():
    grid = Grid()
    rng = np.random.default_rng(1)
    distribution = rng.dirichlet(np.ones(324) * 0.05, size=(4, 6))
    draws = np.array([[rng.choice(324, p=cell, size=200_000) for cell in row] for row in distribution[:1, :2]])  # (1, 2, draws)
    values = grid.edges[draws] + grid.step * rng.random(draws.shape)
    tensor = torch.from_numpy(distribution)
    np.testing.assert_allclose(posterior_mean(tensor, grid)[:1, :2], values.mean(-1), atol=0.05)
    for q in (0.025, 0.5, 0.975):
        low = posterior_quantile(tensor, grid, q)[:1, :2].numpy()
        np.testing.assert_allclose((values < low[..., None]).mean(-1), q, atol=0.005)
    point = torch.zeros(324, dtype=torch.float64)
    point[100] = 1
    assert float(posterior_quantile(point, grid, 0.5)) == pytest.approx(grid.centres[100])


def tiny_model(**changes):
    torch.manual_seed(1)
    return build_model(ModelConfig(layers=1, heads=2, width=16, windows=20, samples=10, scales=2, **changes)).eval()


def test_decoding_averages_replicates_distributions():
    model, grid = tiny_model(), Grid()
    counts = np.random.default_rng(1).integers(0, 5, (3, 2, 2, 20, 10)).astype(np.int32)
    arguments = {"grid": grid, "replicates": 7, "seed": 5, "batch_size": 3}
    one = decode(model, counts, None, **arguments)
    assert all(np.array_equal(a, b) for a, b in zip(one, decode(model, counts, None, **arguments), strict=True))
    x = torch.log1p(torch.from_numpy(counts).float())
    _, probabilities = model.generate(x, window_size=2000, replicates=7, seed=5)
    average = probabilities.double().mean(1)
    np.testing.assert_allclose(one.mean, average.numpy() @ grid.centres, atol=1e-6)
    np.testing.assert_allclose(one.high, posterior_quantile(average, grid, 0.975), atol=1e-6)
    for batch_size in (1, 2):
        parts = decode(model, counts, None, **arguments | {"batch_size": batch_size})
        np.testing.assert_allclose(parts.mean, one.mean, atol=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "x.ckpt"
    model = tiny_model(window_size=1000)
    record = build_checkpoint_record(
        model.config, None, name="x", preset="broad", lineage="abc", dataset={"scales": [2, 4], "missing": False}
    )
    write_checkpoint(path, model.state_dict(), record)
    return path


def test_evaluate(tmp_path, checkpoint, mask):
    batch = tmp_path / "b.trees.batch"
    write_batch(batch, SPEC, start=EVALUATION_START, count=3, seed=1)
    batches = [{"path": str(batch), "scenario": "constant", "start": EVALUATION_START, "count": 3}]
    spec = SHAPE | {"replicates": 2, "batch_size": 4, "seed": 1}
    result, tracks = evaluate(checkpoint, spec, batches, progress=lambda _: None)
    truth, mean, low, high = tracks["constant"]
    figures = result["scenarios"]["constant"]
    assert truth.shape == (3, 5, 20)
    assert figures["mse"] == pytest.approx(((mean - truth) ** 2).mean())
    assert figures["bias"] == pytest.approx((mean - truth).mean())
    assert figures["coverage95"] == pytest.approx(((low <= truth) & (truth <= high)).mean())
    assert figures["baseline"]["constant"]["mse"] == pytest.approx(truth.var())
    assert (low < mean).all()
    assert (mean < high).all()
    assert json.dumps(result)
    table = format_accuracy_table([result])
    assert "| x          | constant " in table
    assert "| x          | below 1000 gen. " in table
    again, _ = evaluate(checkpoint, spec, batches, progress=lambda _: None)
    assert again == result
    for change, message in (
        ({"samples": 20}, "was trained with .*'samples': 10.*'samples': 20"),
        ({"sequence_length": 10_000}, "'windows': 10"),
        ({"sequence_length": 40_000, "window_size": 2000}, "'window_size': 1000.*'window_size': 2000"),
        ({"scales": [2, 8]}, r"'scales': \[2, 8\]"),
    ):
        with pytest.raises(BadRequest, match=message):
            evaluate(checkpoint, spec | change, batches)
    with pytest.raises(BadRequest, match="'missingness': True"):
        evaluate(checkpoint, spec, batches, mask=mask)


def test_a_joint_checkpoint_is_read_both_ways(tmp_path, checkpoint):
    batch = tmp_path / "b.trees.batch"
    write_batch(batch, SPEC, start=EVALUATION_START, count=3, seed=1)
    batches = [{"path": str(batch), "scenario": "constant", "start": EVALUATION_START, "count": 3}]
    spec = SHAPE | {"replicates": 2, "batch_size": 4, "seed": 1}
    stored, results = read_checkpoint(checkpoint), {}
    for objective in ("autoregressive", "marginal", "joint"):
        path = tmp_path / f"{objective}.ckpt"
        write_checkpoint(path, stored.state_dict, stored.record | objective_record(objective))
        results[objective], _ = evaluate(path, spec, batches, progress=lambda _: None)
    both = results["joint"]
    assert both["scenarios"] == results["marginal"]["scenarios"]
    assert both["sampled"]["scenarios"] == results["autoregressive"]["scenarios"]
    assert both["settings"]["reading"] == "marginal"
    assert both["overall"]["mse"] != both["sampled"]["overall"]["mse"]
    names = [line.split("|")[1].strip() for line in format_accuracy_table([both]).splitlines()[2:]]
    assert names == ["x"] * 3 + ["x, sampled"] * 3
    one, _ = evaluate(tmp_path / "joint.ckpt", spec | {"reading": "sampled"}, batches, progress=lambda _: None)
    assert one["scenarios"] == results["autoregressive"]["scenarios"]
    assert "sampled" not in one
    with pytest.raises(BadRequest, match="objective autoregressive, so that reading must be sampled, got 'marginal'"):
        evaluate(tmp_path / "autoregressive.ckpt", spec | {"reading": "marginal"}, batches)


def test_recent_windows():
    rng = np.random.default_rng(1)
    truth = rng.normal(7.5, 1, (2, 3, 50))
    mean, low, high = truth + rng.normal(size=truth.shape), truth - 0.5, truth + rng.normal(size=truth.shape)
    recent = np.exp(truth) < 1000
    scores = score_recent(truth, mean, low, high)
    assert scores["windows"] == recent.sum() > 0
    assert scores["mse"] == pytest.approx(((mean - truth)[recent] ** 2).mean())
    assert scores["bias"] == pytest.approx((mean - truth)[recent].mean())
    assert scores["coverage95"] == pytest.approx((high >= truth)[recent].mean())
    parts = {str(i): {"recent": score_recent(truth[i], mean[i], low[i], high[i])} for i in range(2)}
    assert combine_recent(parts) == pytest.approx(scores)


def test_numbers_are_written_before_pictures(tmp_path, checkpoint, monkeypatch, capsys):
    batch = tmp_path / "b.trees.batch"
    write_batch(batch, SPEC, start=EVALUATION_START, count=2, seed=1)
    batches = [{"path": str(batch), "scenario": "constant", "start": EVALUATION_START, "count": 2}]
    spec = SHAPE | {"replicates": 2, "batch_size": 4, "seed": 1}
    words = ["--checkpoint", str(checkpoint), "--spec", json.dumps(spec), "--batches", json.dumps(batches)]
    words += ["--out", str(tmp_path / "x.json"), "--figures", str(tmp_path / "x")]
    monkeypatch.setattr("sys.argv", ["cxt.evaluate", *words])

    def fails(*_, **__):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("cxt.evaluation.figures.draw_tracks", fails)
    with pytest.raises(Failed, match=r"could not be drawn \(RuntimeError: no fonts\)"):
        main()
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["scenarios"]["constant"]["mse"] > 0
    assert "constant: MSE" in capsys.readouterr().out
