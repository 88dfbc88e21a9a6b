"""Rates as input: what the network makes of them, hiding them in training, and the data they come from."""

import math
import warnings
from pathlib import Path

import msprime
import numpy as np
import pytest
import torch
from helpers.network import SMALL, inputs, model_of
from helpers.training import SMALL as FLAGS
from helpers.training import train

import cxt
from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.load import load_model
from cxt.config.network import AdapterConfig, ModelConfig, log_rates
from cxt.data.examples import Batch, compute_model_input
from cxt.data.grid import Grid
from cxt.data.shards import read_shard
from cxt.decoding.decode import decode
from cxt.errors import BadRequest
from cxt.model.adapter import build_model, freeze_backbone
from cxt.model.inputs import TrainedOn, check_input
from cxt.model.rates import find_scale, scale_tokens
from cxt.trainer.module import hide_rates

UNKNOWN = math.nan


@pytest.fixture
def model():
    """A network that reads rates, with weights at which they matter."""
    model = model_of(SMALL.replace(reads_rates=True))
    with torch.no_grad():
        model.backbone.rate_embedding.weight.normal_()
    return model


def test_embedding_is_added_to_every_source(model):
    """Against the definition: whether each rate is known, and r relative to µ if that is known, or to 1e-8, times a matrix."""
    x, y = inputs(items=6)
    known = [(2e-8, 5e-9), (None, 3e-8), (2e-8, None), (2e-8, 0.0), (None, 0.0), (1e-9, 1e-6)]
    rates = torch.tensor([log_rates(*pair) for pair in known])
    plain = model.backbone.source_embedding(x)
    actual = model.backbone.embed_sources(x, rates)
    by_hand = [[1, 1, math.log(0.25), 0], [0, 1, 0, math.log(3.0)], [1, 0, 0, 0], [1, 1, -5, 0], [0, 1, 0, -5], [1, 1, 5, 0]]
    added = torch.tensor(by_hand) @ model.backbone.rate_embedding.weight.T  # (B, D)
    torch.testing.assert_close(actual - plain, added[:, None].expand_as(plain), atol=2e-5, rtol=1e-4)
    # Unknown rates and no rates are the same.
    for compute in (lambda r: model(x, y, r), lambda r: model.marginal_logits(x, r), lambda r: model.loss(x, y, r)):
        assert torch.equal(compute(torch.full((6, 2), UNKNOWN)), compute(None))
        assert not torch.allclose(compute(rates), compute(None))


def test_new_network_ignores_rates_at_first():
    model = model_of(SMALL.replace(reads_rates=True))
    x, y = inputs()
    assert torch.equal(model(x, y, torch.zeros(3, 2)), model(x, y))
    model.loss(x, y, torch.zeros(3, 2)).backward()
    assert model.backbone.rate_embedding.weight.grad.abs().max() > 0


def batch_of(rates: torch.Tensor, bins=None) -> Batch:
    tokens = torch.randint(100, 200, (len(rates), 13)) if bins is None else torch.as_tensor(bins)
    return Batch(torch.zeros(len(rates), 2, 1, 12, 4), None, tokens, rates)


def test_hiding():
    rates = torch.arange(20_000.0).reshape(-1, 2)
    torch.manual_seed(1)
    hidden = hide_rates(batch_of(rates), 0.3).rates
    missing = hidden.isnan()
    assert torch.equal(hidden[~missing], rates[~missing])
    assert missing.float().mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.02)
    both = missing.all(1).float().mean()
    assert float(both) == pytest.approx(0.09, abs=0.02)  # independent of each other
    assert torch.equal(hide_rates(batch_of(rates), 0.0).rates, rates)
    assert hide_rates(batch_of(rates), 1.0).rates.isnan().all()


def test_scaled_tokens():
    """Each known rate moves times by its logarithm, to the nearest bin, and not beyond the grid."""
    config, grid = ModelConfig(bins=324), Grid()
    rates = torch.tensor([log_rates(mutation, 1e-8) for mutation in (1e-8, 2e-8, 5e-9, 1e-6, None)])
    tokens = torch.tensor([[1, 2, 150, 325]]).expand(5, 4)
    scaled = scale_tokens(tokens, rates, config)
    for row, factor in ((1, 2), (3, 100)):
        assert scaled[row, 2] - 2 == grid.find_bins(grid.centres + math.log(factor))[148]
    bins, many = 16, 106
    assert scaled.tolist() == [
        [1, 2, 150, 325],
        [1, 2 + bins, 150 + bins, 325],
        [1, 2, 150 - bins, 325 - bins],
        [1, 2 + many, 150 + many, 325],
        [1, 2, 150, 325],
    ]
    assert find_scale(rates.numpy()).tolist() == pytest.approx([0, math.log(2), -math.log(2), math.log(100), 0], abs=1e-6)


def test_datasets_hold_the_rates_of_their_simulations(dataset):
    items = cxt.PairDataset(dataset, "train")
    shards = [read_shard(Path(dataset) / row["path"])[0] for row in items.manifest["splits"]["train"]["shards"]]
    mutation, recombination = (
        np.concatenate([shard[f"{name}_rate"] for shard in shards]) for name in ("mutation", "recombination")
    )
    chosen = [0, 7, 50, len(items) - 1]
    rates = items.batch(chosen).rates.numpy()
    rows = [item // items.pairs_per_simulation for item in chosen]
    np.testing.assert_allclose(np.exp(rates), np.stack([mutation[rows], recombination[rows]], axis=1), rtol=1e-5)
    assert all(map(math.isnan, log_rates(0.0, None)))
    assert log_rates(1e-8, 0.0) == (math.log(1e-8), -math.inf)


def test_sampling_reads_rates(model):
    """Teacher-forced decoding equals the network's own logits, with rates."""
    x, y = inputs()
    expected = model(x, y, torch.tensor(log_rates(2e-8, None)).expand(3, 2))[..., 2:].softmax(-1)
    _, actual = model.generate(x, window_size=2000, mutation_rate=2e-8, tokens=y[:, None])
    torch.testing.assert_close(actual[:, 0], expected, atol=1e-5, rtol=1e-3)
    _, without = model.generate(x, window_size=2000, tokens=y[:, None])
    assert not torch.allclose(actual, without)


def test_train_predict_and_warm_start(dataset, tmp_path, monkeypatch):
    """A child learns rates that its parent did not read; predictions depend on those that are given."""
    parent, child, grandchild = (tmp_path / f"{name}.ckpt" for name in ("parent", "child", "grandchild"))

    def fit(out, *flags):
        train(monkeypatch, *FLAGS, "--dataset-path", dataset, "--objective", "marginal", "--out", out, "--run-dir",
              tmp_path / f"{out.stem}-run", *flags)  # fmt: skip

    fit(parent)
    fit(child, "--checkpoint", parent, "--reads-rates", "true", "--rates-dropout", "0.2", "--lr", "1e-2")
    fit(grandchild, "--checkpoint", child)  # inherits it
    assert [read_checkpoint(path).model.reads_rates for path in (parent, child, grandchild)] == [False, True, True]
    with pytest.raises(BadRequest, match="bf16-true would round the rates"):
        fit(tmp_path / "x.ckpt", "--checkpoint", child, "--precision", "bf16-true")
    with pytest.raises(BadRequest, match="reads rates, so that reads_rates cannot be false"):
        fit(tmp_path / "x.ckpt", "--checkpoint", child, "--reads-rates", "false")
    items = cxt.PairDataset(dataset, "test")
    batch = items.batch(range(4))
    for path, reads in ((parent, False), (grandchild, True)):
        model = load_model(path)
        settings = {"grid": items.grid, "replicates": 1, "batch_size": 4, "seed": 1}
        known = decode(model, batch.counts, batch.missing, rates=batch.rates, **settings)
        unknown = decode(model, batch.counts, batch.missing, **settings)
        assert np.array_equal(known.mean, unknown.mean) == (not reads)


def test_predictions_are_inversely_proportional_to_the_mutation_rate(model):
    model.objective = "marginal"
    ts = msprime.sim_mutations(
        msprime.sim_ancestry(5, population_size=1e4, sequence_length=24_000, recombination_rate=1e-8, random_seed=1),
        rate=1e-7,
        random_seed=1,
    )

    def predict(mutation_rate, recombination_rate=None, model=model):
        return cxt.predict_ts(model, ts, [(0, 1)], mutation_rate=mutation_rate, recombination_rate=recombination_rate)

    without, slow, fast = predict(None), predict(1e-9), predict(3e-9)
    np.testing.assert_array_equal(slow.distribution, fast.distribution)
    np.testing.assert_allclose(slow.tmrca / fast.tmrca, 3.0)
    np.testing.assert_allclose(slow.log_tmrca - fast.log_tmrca, math.log(3.0))
    assert not np.allclose(without.distribution, fast.distribution)
    np.testing.assert_allclose(predict(1e-9, 2e-9).log_tmrca - predict(1e-8, 2e-8).log_tmrca, math.log(10.0), atol=1e-5)
    plain = model_of(SMALL)
    plain.objective = "marginal"
    assert np.array_equal(predict(None, model=plain).log_tmrca, predict(1e-9, 1e-8, model=plain).log_tmrca)


def test_evaluation_reads_with_and_without_rates(dataset, tmp_path, monkeypatch):
    """Truth, mean, interval and rank on the scale of generations, by the network's own distribution."""
    path = tmp_path / "x.ckpt"
    train(monkeypatch, *FLAGS, "--dataset-path", dataset, "--objective", "marginal", "--reads-rates", "true", "--rates-dropout",
          "0", "--out", path, "--run-dir", tmp_path / "run")  # fmt: skip
    model, items = load_model(path), cxt.PairDataset(dataset, "test")
    batch, settings = items.batch(range(4)), {"grid": items.grid, "replicates": 1, "batch_size": 3, "seed": 1}
    truth = np.full((4, items.windows), 10.0)
    summaries = decode(model, batch.counts, batch.missing, rates=batch.rates, truth=truth, **settings)
    with torch.no_grad():
        logits = model.marginal_logits(compute_model_input(batch.counts, batch.missing), batch.rates)
    distribution = logits[..., 2:].double().softmax(-1).numpy()
    scale = float(batch.rates[0, 0]) - math.log(1e-8)
    np.testing.assert_allclose(summaries.mean, distribution @ items.grid.centres - scale, rtol=1e-5)
    below = distribution[..., items.grid.edges[1:] <= 10.0 + scale].sum(-1)
    at_most = distribution[..., items.grid.edges[:-1] <= 10.0 + scale].sum(-1)
    assert ((below - 1e-9 <= summaries.rank) & (summaries.rank <= at_most + 1e-9)).all()


def test_warnings_are_about_the_ratio_of_rates(model):
    """The same factor on both rates is no reason to warn; another ratio is."""
    x, _ = inputs()
    ranges = {"mutation_rate": [1e-8, 2e-8], "recombination_rate": [1e-8, 1e-8]}
    model.trained_on = TrainedOn(scales=(1, 1, 1, 1), ranges=ranges)

    def warned(mutation_rate, recombination_rate):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_input(model, x, window_size=2000, mutation_rate=mutation_rate, recombination_rate=recombination_rate)
        return " ".join(str(warning.message) for warning in caught)

    assert "rate" not in warned(1e-9, 1e-9).replace("training", "").replace("accuracy of estimates", "")
    assert "recombination per mutation 5, trained on 0.5 to 1" in warned(1e-9, 5e-9)
    assert "recombination rate 5e-08, trained on 1e-08 to 1e-08" in warned(None, 5e-8)
    assert "mutation rate 1.29, which is no usual rate" in warned(1.29, None)


def test_adapters_train_the_embedding():
    backbone = SMALL.replace(reads_rates=True)
    model = build_model(backbone, AdapterConfig(samples=5, unfreeze_strategy="none"))
    freeze_backbone(model)
    assert [name for name, p in model.backbone.named_parameters() if p.requires_grad] == ["rate_embedding.weight"]
