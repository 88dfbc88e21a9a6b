"""Packed rows against their regions one by one, and networks that read another number of windows."""

import pytest
import torch
from helpers.network import SMALL, dense_logits, inputs, model_of

from cxt.config.network import AdapterConfig, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.data.examples import Batch
from cxt.model.packing import describe_packing
from cxt.trainer.module import hide_rates
from cxt.trainer.objectives import build_objective

LENGTHS = ((3, 5, 4), (6, 2, 4), (1, 1, 10))
"""Windows of the regions of each row; each row has 12 windows."""


def split(rows, lengths=LENGTHS):
    """The parts (1, …) of rows (B, 12, …) along their second axis, by region."""
    return [part for row, sizes in zip(rows, lengths, strict=True) for part in row[None].split(list(sizes), dim=1)]


def regions_of(lengths=LENGTHS):
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])


def one_by_one(x, y):
    """X, tokens (with their own start token) of each region of the packed rows, as examples of their own."""
    parts = split(x.permute(0, 3, 1, 2, 4))  # windows second
    labels = split(y[:, 1:])
    start = torch.ones((1, 1), dtype=torch.int64)
    return [(part.permute(0, 2, 3, 1, 4), torch.cat([start, label], dim=1)) for part, label in zip(parts, labels, strict=True)]


def test_the_mask_by_its_definition():
    lengths = (3, 1, 4)
    regions = regions_of((lengths,))
    for in_prefix in (False, True):
        packing = describe_packing(regions, start_token_in_prefix=in_prefix)
        windows = 8
        expected = torch.zeros(2 * windows, 2 * windows, dtype=torch.bool)
        positions, first = [0] * (2 * windows), 0
        for length in lengths:
            members = range(first, first + length)
            for i, a in enumerate(members):
                positions[a], positions[windows + a] = i, length + i
                assert packing.begins[0, a] == (i == 0)
                for j, b in enumerate(members):
                    expected[a, b] = expected[windows + a, b] = True
                    expected[windows + a, windows + b] = j <= i
                    expected[a, windows + b] = in_prefix and j == 0
            first += length
        assert torch.equal(packing.visible[0, 0], expected)
        assert packing.positions[0].tolist() == positions


@pytest.mark.parametrize("kind", ["plain", "adapter", "start token in the prefix", "gradient checkpointing"])
@pytest.mark.parametrize("path", ["target", "full", "chunked"])
def test_loss_and_gradients_of_packed_rows_are_those_of_their_regions(kind, path):
    adapter = AdapterConfig(samples=4, bottleneck=8) if kind == "adapter" else None
    config = SMALL.replace(start_token_in_prefix=kind.startswith("start"))
    model = model_of(config, adapter)
    model.backbone.gradient_checkpointing = kind.startswith("gradient")
    x, y = inputs(config, samples=4 if adapter else None)
    loss = model.loss(x, y, regions=regions_of(), path=path)
    packed = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    parts = one_by_one(x, y)
    total = sum(model.loss(*part, path=path) * (part[1].shape[1] - 1) for part in parts) / y[:, 1:].numel()
    alone = torch.autograd.grad(total, model.parameters(), allow_unused=True)
    assert abs(loss - total) < 1e-5 * total.abs()
    for (name, _), ours, theirs in zip(model.named_parameters(), packed, alone, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max()), name


@pytest.mark.parametrize("objective", ["marginal", "joint"])
def test_other_objectives_on_packed_rows(objective):
    model = model_of()
    x, y = inputs()
    criterion = build_objective(model, TrainingConfig(objective=objective))
    values = criterion(model, x, y, regions=regions_of())
    parts = one_by_one(x, y)
    expected = sum(criterion(model, *part) * (part[1].shape[1] - 1) for part in parts) / y[:, 1:].numel()
    assert values.shape == expected.shape
    assert torch.allclose(values, expected, atol=1e-5)


def test_rates_of_packed_rows_are_those_of_each_region():
    model = model_of(SMALL.replace(reads_rates=True))
    torch.nn.init.normal_(model.backbone.rate_embedding.weight)
    x, y = inputs()
    rates = torch.tensor([[-18.0, -18.5], [torch.nan, -18.0], [-17.5, torch.nan]])
    regions = regions_of()
    logits = model(x, y, rates[regions], regions=regions)
    expected = [
        model(*part, rates[number % 3][None])[0] for number, part in enumerate(one_by_one(x, y))
    ]  # each row has three regions
    assert torch.allclose(logits.flatten(0, 1), torch.cat(expected), atol=1e-4)


def test_a_region_is_told_all_or_nothing_of_its_rates():
    regions = regions_of()
    batch = Batch(None, None, None, torch.zeros(3, 12, 2), None, regions)
    torch.manual_seed(1)
    hidden = [hide_rates(batch, 0.5).rates.isnan() for _ in range(40)]
    for rows in hidden:
        for row, numbers in zip(rows, regions, strict=True):
            assert all((row[numbers == number] == row[numbers == number][0]).all() for number in range(3))
    assert 0.4 < torch.stack(hidden).float().mean() < 0.6


def test_regions_do_not_see_each_other():
    model = model_of()
    x, y = inputs()
    changed_x, changed_y = x.clone(), y.clone()
    changed_x[0, :, :, 3:8] = 1.0  # the second region of the first row
    changed_y[0, 4:9] = 7
    with torch.no_grad():
        before = model(x, y, regions=regions_of())
        after = model(changed_x, changed_y, regions=regions_of())
    assert torch.equal(before[1:], after[1:])
    assert torch.allclose(before[0, :3], after[0, :3], atol=1e-6)
    assert torch.allclose(before[0, 8:], after[0, 8:], atol=1e-6)
    assert not torch.allclose(before[0, 3:8], after[0, 3:8], atol=1e-3)


def test_rows_may_be_wider_than_the_network():
    narrow = ModelConfig(layers=2, heads=2, width=32, windows=5, samples=10)
    model = model_of(narrow)
    x, y = inputs(narrow.replace(windows=14), items=1)
    lengths = ((5, 4, 5),)
    logits = model(x, y, regions=regions_of(lengths))
    parts = split(x.permute(0, 3, 1, 2, 4), lengths)
    labels = split(y[:, 1:], lengths)
    for part, label, ours in zip(parts, labels, split(logits, lengths), strict=True):
        tokens = torch.cat([torch.ones((1, 1), dtype=torch.int64), label], dim=1)
        assert torch.allclose(ours, model(part.permute(0, 2, 3, 1, 4), tokens), atol=1e-4)


@pytest.mark.parametrize("windows", [1, 7, 11])
def test_fewer_windows_than_the_network_was_built_for(windows):
    model = model_of()
    x, y = inputs(SMALL.replace(windows=windows))
    shorter = model_of(SMALL.replace(windows=windows))
    shorter.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x, y), shorter(x, y))
        assert torch.allclose(model(x, y), dense_logits(shorter, x, y), atol=1e-4)
