"""The network against a dense-mask rendering of the same, decoding against teacher forcing, and the adapter."""

import pytest
import torch
from helpers.network import SMALL, dense_logits, inputs, model_of

from cxt.config.network import PRESETS, AdapterConfig, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.errors import BadRequest
from cxt.model.adapter import build_model, freeze_backbone
from cxt.model.attention import build_rotary_table, rotate
from cxt.trainer.optimizers import parameter_groups


@pytest.mark.parametrize("start_token_in_prefix", [False, True])
@pytest.mark.parametrize("mask_singletons", [False, True])
@pytest.mark.parametrize("separate_embeddings", [False, True])
def test_equals_dense_mask(start_token_in_prefix, mask_singletons, separate_embeddings):
    config = SMALL.replace(
        start_token_in_prefix=start_token_in_prefix, mask_singletons=mask_singletons, separate_embeddings=separate_embeddings
    )
    model = model_of(config)
    x, y = inputs()
    given = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(model(x, y), dense_logits(model, x, y), atol=1e-5, rtol=1e-5)
    assert torch.equal(x, given)  # the caller's tensor is left alone


def test_logits_do_not_see_the_future():
    model = model_of()
    x, y = inputs()
    changed = y.clone()
    changed[:, 7:] = 5
    with torch.no_grad():
        before, after = model(x, y), model(x, changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("adapter", [None, AdapterConfig(samples=6, bottleneck=4)])
def test_cached_decoding_equals_uncached(adapter):
    model = model_of(adapter=adapter)
    x, y = inputs(samples=None if adapter is None else 6)
    replicates = torch.stack([y, y.flip(0), y.roll(1, 0)], dim=1)  # (B, R, W + 1)
    _, probabilities = model.generate(x, window_size=2000, replicates=3, tokens=replicates)
    with torch.no_grad():
        for r in range(3):
            logits = model(x, replicates[:, r])[..., 2:]
            torch.testing.assert_close(probabilities[:, r], logits.softmax(-1), atol=1e-5, rtol=1e-4)


def test_sampling():
    model = model_of()
    with torch.no_grad():  # special tokens would be drawn all the time, if they could be
        model.backbone.head.weight[:2] = 100 * model.backbone.norm.weight
    x, _ = inputs()
    tokens, probabilities = model.generate(x, window_size=2000, replicates=4, seed=1)
    again, _ = model.generate(x, window_size=2000, replicates=4, seed=1)
    other, _ = model.generate(x, window_size=2000, replicates=4, seed=2)
    assert tokens.shape == (3, 4, 12)
    assert probabilities.shape == (3, 4, 12, 324)
    assert tokens.min() >= 2
    assert torch.equal(tokens, again)
    assert not torch.equal(tokens, other)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 4, 12))
    greedy, probabilities = model.generate(x, window_size=2000, top_k=1)
    assert torch.equal(greedy - 2, probabilities.argmax(-1))
    assert not model.training


def test_sampled_frequencies_are_the_probabilities():
    model = model_of()
    x, _ = inputs(items=1)
    tokens, probabilities = model.generate(x, window_size=2000, replicates=4000, seed=3)
    first = torch.bincount(tokens[0, :, 0] - 2, minlength=324) / 4000
    assert (first - probabilities[0, 0, 0]).abs().max() < 0.03


def test_published_sizes():
    for name, parameters in {"narrow": 11_801_200, "broad": 19_484_400, "w200_wmissing": 19_484_400}.items():
        assert sum(p.numel() for p in build_model(PRESETS[name]).parameters()) == parameters
    assert [name for name, config in PRESETS.items() if not config.mask_singletons] == ["w200_wmissing"]
    model = build_model(PRESETS["broad"], AdapterConfig())
    freeze_backbone(model)
    assert sum(p.numel() for p in model.adapter.parameters()) == 2913
    assert sum(p.numel() for p in model.backbone.parameters() if p.requires_grad) == 3_848_400
    groups = parameter_groups(model, TrainingConfig())
    assert [group["lr"] for group in groups] == pytest.approx([3e-4, 1.5e-5, 1.5e-5])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert sum(p.numel() for p in groups[2]["params"]) == 21 * 400
    groups = parameter_groups(build_model(PRESETS["broad"]), TrainingConfig())
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [19_475_800, 8_600]


def test_initial_weights():
    model = build_model(PRESETS["broad"].replace(layers=2))
    block = model.backbone.blocks[1]
    assert float(block.attention.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.mlp.down.weight.std()) == pytest.approx(0.02 / 2, rel=0.05)
    assert float(model.backbone.token_embedding.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not model.backbone.source_embedding.inner.bias.any()


@pytest.mark.parametrize("mask_singletons", [True, False])
@pytest.mark.parametrize("overwrite_bin0", [True, False])
def test_adapter_and_bin_0(mask_singletons, overwrite_bin0):
    """Missingness reaches the adapter, unless the backbone masks bin 0 or the published behaviour is asked for."""
    config = SMALL.replace(mask_singletons=mask_singletons)
    model = model_of(config, AdapterConfig(samples=6, bottleneck=4, overwrite_bin0=overwrite_bin0))
    x, y = inputs(samples=6)
    other = x.clone()
    other[..., 0] += 1
    with torch.no_grad():
        same = torch.equal(model(x, y), model(other, y))
    assert same == (mask_singletons or overwrite_bin0)


@pytest.mark.parametrize(
    ("strategy", "blocks", "norms"),
    [("none", 0, False), ("ln", 0, True), ("lastN", 2, False), ("ln_lastN", 2, True), ("all", 3, True)],
)
def test_unfreezing(strategy, blocks, norms):
    model = build_model(SMALL, AdapterConfig(samples=6, bottleneck=4, unfreeze_strategy=strategy))
    freeze_backbone(model)
    free = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    for name, _ in model.backbone.named_parameters():
        last = name.startswith(("blocks.1.", "blocks.2.")) and blocks > 0
        assert (name in free) == (strategy == "all" or last or (norms and "norm" in name)), name


def test_backbone_of_an_adapter_stays_in_eval_mode():
    model = build_model(SMALL, AdapterConfig(samples=6)).train()
    assert model.adapter.training
    assert not any(module.training for module in model.backbone.modules())
    assert build_model(SMALL).train().backbone.training


def test_sizes_come_from_the_config():
    config = ModelConfig(layers=1, heads=3, width=36, windows=7, samples=5, scales=3, bins=11)
    x, y = inputs(config, items=2)
    assert build_model(config)(x, y).shape == (2, 7, 13)
    with pytest.raises(ValueError, match=r"X must have shape .* got"):
        build_model(config)(x[:, :, :2], y)


def test_bad_sizes():
    with pytest.raises(BadRequest, match="width 30 is not a multiple of the number of scales, 4"):
        ModelConfig(width=30)
    with pytest.raises(BadRequest, match="even width"):
        ModelConfig(width=36, heads=4)
    with pytest.raises(BadRequest, match="fewer samples than the backbone's 10, got 10"):
        build_model(SMALL, AdapterConfig(samples=10))


def test_rotation_is_relative():
    table = build_rotary_table(50, 8)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1)).unbind()

    def product(a, b):
        return float((rotate(q, table[:, a : a + 1]) * rotate(k, table[:, b : b + 1])).sum())

    assert product(3, 7) == pytest.approx(product(20, 24), abs=1e-5)
    assert product(3, 7) != pytest.approx(product(3, 9), abs=1e-3)
