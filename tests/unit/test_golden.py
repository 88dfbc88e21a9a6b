"""Parity with the outputs of the published code, in tests/golden."""

import numpy as np
import pytest
import torch
import tskit
from helpers.repository import GOLDEN

from cxt import load_model, pair_features, pair_log_tmrca
from cxt.data.preprocessing import decode_sites


@pytest.fixture(scope="module")
def features():
    return np.load(GOLDEN / "features.npz")


@pytest.fixture(scope="module")
def ts():
    return tskit.load(GOLDEN / "constant.trees")


@pytest.mark.parametrize(("name", "window_size", "length"), [("w2000", 2000, 1_000_000), ("w200", 200, 100_000)])
def test_features_and_targets(features, ts, name, window_size, length):
    expected = features[f"X_{name}"].astype(np.float32)
    pairs = features["pairs200"][: len(expected)]
    x = pair_features(*decode_sites(ts, length), pairs, window_size=window_size, sequence_length=length)
    assert np.array_equal(x[..., 1:], expected[..., 1:])
    y = pair_log_tmrca(ts, pairs, window_size=window_size, sequence_length=length)
    assert np.array_equal(y.astype(np.float16), features[f"y_{name}"])


def test_ten_samples(features, ts):
    few = ts.simplify(ts.samples()[:10])
    expected = features["n10_X"].astype(np.float32)
    pairs = features["n10_pairs"][: len(expected)]
    x = pair_features(few.genotype_matrix(), few.sites_position, pairs, window_size=2000, sequence_length=1_000_000)
    assert np.array_equal(x[..., 1:], expected[..., 1:])
    y = pair_log_tmrca(few, pairs, window_size=2000, sequence_length=1_000_000)
    assert np.array_equal(y.astype(np.float16), features["n10_y"])


def test_masked(features, ts):
    expected = features["X_w200_mask"].astype(np.float32)
    x = pair_features(
        *decode_sites(ts, 100_000),
        features["pairs200"][: len(expected)],
        window_size=200,
        sequence_length=100_000,
        mask=features["mask"],
    )
    assert np.array_equal(x[..., 1:], expected[..., 1:])
    np.testing.assert_allclose(x[..., 0], expected[..., 0], atol=1e-3)


@pytest.mark.parametrize(("checkpoint", "suffix"), [("published_style.ckpt", ""), ("published_style_adapter.ckpt", "5")])
def test_logits_and_loss(checkpoint, suffix):
    expected = np.load(GOLDEN / "model.npz")
    model = load_model(GOLDEN / checkpoint)
    x, y = torch.from_numpy(expected[f"x{suffix}"]), torch.from_numpy(expected["y"])
    with torch.no_grad():
        logits = model(x, y).numpy()
        loss = float(model.loss(x, y))
    np.testing.assert_allclose(logits, expected[f"logits{suffix}"][:, :500], atol=1e-5)
    assert loss == pytest.approx(float(expected[f"loss{suffix}"]), abs=1e-5)
