"""Parity with the outputs of the published code, in tests/golden."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import tskit
from conftest import GOLDEN

from cxt import pair_features, pair_log_tmrca
from cxt.adapter import build_model
from cxt.checkpoint import load_weights
from cxt.config import AdapterConfig, ModelConfig


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
    x = pair_features(ts.genotype_matrix(), ts.sites_position, pairs, window_size=window_size, sequence_length=length)
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
        ts.genotype_matrix(),
        ts.sites_position,
        features["pairs200"][: len(expected)],
        window_size=200,
        sequence_length=100_000,
        mask=features["mask"],
    )
    assert np.array_equal(x[..., 1:], expected[..., 1:])
    np.testing.assert_allclose(x[..., 0], expected[..., 0], atol=1e-3)


NAMES = {
    "transformer.bt2ls.proj01": "source_embedding.inner", "transformer.bt2ls.proj02": "source_embedding.outer",
    "transformer.ote": "token_embedding", "transformer.ln_f": "norm", "transformer.h": "blocks", "lm_head": "head",
    "ln_1": "norm_attention", "ln_2": "norm_mlp", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
}  # fmt: skip
ADAPTER_NAMES = {"se": "excite", "proj": "residual", "ln": "norm", "fc_in": "gated", "fc_out": "out"}


@dataclass
class Anything:
    """Stands for the published classes inside the pickles, whose code is not here."""

    def __setstate__(self, state):
        self.__dict__.update(state)


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return Anything if module.startswith("cxt") else super().find_class(module, name)


class PublishedPickle:
    Unpickler = Unpickler
    load = staticmethod(lambda file, **kwargs: Unpickler(file).load())


def published_weights(name: str) -> dict:
    """The state dict of a published-style checkpoint under this package's names."""
    content = torch.load(GOLDEN / name, weights_only=False, pickle_module=PublishedPickle)
    result = {}
    for key, value in content["state_dict"].items():
        key = key.removeprefix("model.")
        if key == "mask_token":
            result["adapter.mask_token"] = value
        elif key.startswith("adapter."):
            first, *rest = key.removeprefix("adapter.").split(".")
            result[".".join(["adapter", ADAPTER_NAMES.get(first, first), *rest])] = value
        elif not key.endswith("bt2ls.weights"):
            key = key.removeprefix("backbone.")
            for old, new in NAMES.items():
                key = key.replace(old, new)
            result[f"backbone.{key}"] = value
    return result


PUBLISHED = ModelConfig(layers=2, width=80, samples=10, start_token_in_prefix=True)


@pytest.mark.parametrize(
    ("checkpoint", "adapter", "suffix"),
    [
        ("published_style.ckpt", None, ""),
        ("published_style_adapter.ckpt", AdapterConfig(samples=5, bottleneck=8, overwrite_bin0=True), "5"),
    ],
)
def test_logits_and_loss(checkpoint, adapter, suffix):
    expected = np.load(GOLDEN / "model.npz")
    model = build_model(PUBLISHED, adapter)
    load_weights(model, published_weights(checkpoint), source=checkpoint)
    model.eval()
    x, y = torch.from_numpy(expected[f"x{suffix}"]), torch.from_numpy(expected["y"])
    with torch.no_grad():
        logits = model(x, y).numpy()
        loss = float(model.loss(x, y))
    np.testing.assert_allclose(logits, expected[f"logits{suffix}"][:, :500], atol=1e-5)
    assert loss == pytest.approx(float(expected[f"loss{suffix}"]), abs=1e-5)
