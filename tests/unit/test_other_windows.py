"""Training from a parent that reads another number of windows."""

import math
import warnings

import pytest
import torch
from helpers.simulations import build_dataset, constant_scenario, simulate
from helpers.training import equal, weights

import cxt
from cxt.checkpoints.file import read_checkpoint
from cxt.data.examples import compute_model_input
from cxt.data.pair_dataset import PairDataset

SETTINGS = {
    "model": "broad", "devices": 0, "threads": 1, "batch_size": 8, "grad_accum": 1, "warmup_steps": 2, "lr": 3e-3,
    "min_lr": 1e-4, "decode_items": 0, "workers": 0,
}  # fmt: skip
SIZES = {"layers": 2, "heads": 2, "width": 16}


@pytest.fixture(scope="module")
def parent(dataset, tmp_path_factory):
    """A network of 20 windows after 39 steps."""
    out = tmp_path_factory.mktemp("parent") / "parent.ckpt"
    cxt.train_model(**SETTINGS, **SIZES, epochs=3, dataset_path=str(dataset), run_dir=str(out.parent / "run"), out=str(out))
    return out


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A dataset of 40 windows."""
    entry = constant_scenario(sequence_length=40_000)
    return build_dataset(tmp_path_factory.mktemp("longer"), entry=entry, sequence_length=40_000)


def loss_on(dataset, model) -> float:
    """Mean loss of all test examples."""
    data = PairDataset(dataset, "test")
    batch = data.batch(range(len(data)))
    with torch.no_grad():
        return float(model.loss(compute_model_input(batch.counts, batch.missing), batch.tokens))


@pytest.mark.slow
def test_a_child_with_twice_the_windows(parent, longer, tmp_path, capsys):
    cxt.train_model(
        **SETTINGS, max_steps=2, checkpoint=str(parent), dataset_path=str(longer), run_dir=str(tmp_path / "run"),
        out=str(tmp_path / "child.ckpt"),
    )  # fmt: skip
    assert "note: the number of windows changes from 20 to 40" in capsys.readouterr().out
    child = read_checkpoint(tmp_path / "child.ckpt")
    assert (child.model.windows, child.record["parent"]["name"]) == (40, "broad")
    started = cxt.load_model(parent, windows=40)
    loss, random = loss_on(longer, started), math.log(started.config.vocabulary)
    assert math.isfinite(loss)
    assert loss < random - 0.3, "no better than random weights"
    assert not equal(weights(parent), child.state_dict)
    ts = simulate(seed=1, length=40_000, individuals=10, rate=2e-8)
    model = cxt.load_model(tmp_path / "child.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = cxt.predict_ts(model, ts, [(0, 1)], sequence_length=40_000, replicates=2)
    assert posterior.distribution.shape == (1, 40, 324)
    assert not [warning for warning in caught if "windows" in str(warning.message)]


@pytest.mark.slow
def test_a_child_with_fewer_windows(parent, tmp_path):
    entry = constant_scenario(sequence_length=10_000)
    shorter = build_dataset(tmp_path / "shorter", entry=entry, sequence_length=10_000)
    assert loss_on(shorter, cxt.load_model(parent, windows=10)) < math.log(326) - 0.3
    cxt.train_model(
        **SETTINGS, max_steps=1, checkpoint=str(parent), dataset_path=str(shorter), run_dir=str(tmp_path / "run"),
        out=str(tmp_path / "child.ckpt"),
    )  # fmt: skip
    assert read_checkpoint(tmp_path / "child.ckpt").model.windows == 10
