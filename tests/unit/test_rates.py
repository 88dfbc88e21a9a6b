"""Rates as input: what the network makes of them, hiding them in training, and the data they come from."""

import math
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
from cxt.config.network import log_rates
from cxt.data.grid import Grid
from cxt.data.pair_dataset import Batch
from cxt.data.shards import read_shard
from cxt.decoding.decode import decode
from cxt.errors import BadRequest
from cxt.trainer.module import hide_rates, shift_times

UNKNOWN = math.nan


@pytest.fixture
def model():
    """A network that reads rates, with weights at which they matter."""
    model = model_of(SMALL.replace(reads_rates=True))
    with torch.no_grad():
        model.backbone.rate_embedding.weight.normal_()
    return model


def test_embedding_is_added_to_every_source(model):
    """Against the definition: ln(rate / 1e-8) or 0, and whether it is known, times a matrix."""
    x, y = inputs()
    rates = torch.tensor([[math.log(2e-8), math.log(5e-9)], [UNKNOWN, math.log(3e-8)], [UNKNOWN, UNKNOWN]])
    plain = model.backbone.source_embedding(x)
    actual = model.backbone.embed_sources(x, rates)
    by_hand = [[math.log(2.0), math.log(0.5), 1, 1], [0, math.log(3.0), 0, 1], [0, 0, 0, 0]]
    added = torch.tensor(by_hand) @ model.backbone.rate_embedding.weight.T  # (B, D)
    torch.testing.assert_close(actual - plain, added[:, None].expand_as(plain), atol=2e-5, rtol=1e-4)
    # Unknown rates and no rates are the same.
    for compute in (lambda r: model(x, y, r), lambda r: model.marginal_logits(x, r), lambda r: model.loss(x, y, r)):
        assert torch.equal(compute(torch.full((3, 2), UNKNOWN)), compute(None))
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


def test_shifting_times():
    """Times and rates change by opposite amounts, of the deviation that was asked for, and stay on the grid."""
    grid = Grid(3.0, 17.0, 324)
    torch.manual_seed(1)
    rates = torch.full((4000, 2), math.log(1e-8))
    rates[::4, 0] = UNKNOWN
    rates[1::4, 1] = UNKNOWN
    batch = batch_of(rates)
    shifted = shift_times(batch, 0.5, grid)
    bins = (shifted.tokens - batch.tokens)[:, 1:]
    assert torch.equal(shifted.tokens[:, 0], batch.tokens[:, 0])
    assert torch.equal(bins, bins[:, :1].expand_as(bins))
    assert not bins[::4].any()
    assert torch.equal(shifted.rates.isnan(), rates.isnan())
    moved = grid.step * bins[:, :1]
    known = ~rates.isnan()
    torch.testing.assert_close((rates - shifted.rates)[known], moved.expand(-1, 2)[known], atol=1e-5, rtol=0)
    assert float(moved[1::4].std()) == pytest.approx(0.5, rel=0.1)
    assert float(moved[1::4].mean()) == pytest.approx(0.0, abs=0.06)
    ends = batch_of(rates[1:2].expand(500, 2), [[1, 2, *[50] * 11]] * 250 + [[1, 325, *[50] * 11]] * 250)
    at_ends = shift_times(ends, 5.0, grid).tokens[:, 1:]
    assert (int(at_ends.min()), int(at_ends.max())) == (2, 325)
    assert torch.equal(shift_times(batch, 0.0, grid).tokens, batch.tokens)


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
    assert log_rates(1e-8, 0.0)[0] == math.log(1e-8)


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


def test_predict_uses_given_rates(model):
    model.objective = "marginal"
    ts = msprime.sim_mutations(
        msprime.sim_ancestry(5, population_size=1e4, sequence_length=24_000, recombination_rate=1e-8, random_seed=1),
        rate=1e-7,
        random_seed=1,
    )
    without, slow, fast = (cxt.predict_ts(model, ts, [(0, 1)], mutation_rate=rate) for rate in (None, 1e-9, 1e-8))
    assert not np.allclose(slow.distribution, fast.distribution)
    assert not np.allclose(without.distribution, fast.distribution)
    plain = model_of(SMALL)
    plain.objective = "marginal"
    first, second = (cxt.predict_ts(plain, ts, [(0, 1)], mutation_rate=rate) for rate in (None, 1e-8))
    assert np.array_equal(first.distribution, second.distribution)
