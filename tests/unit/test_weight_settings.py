"""Training with noise on weights, and with rounded weights."""

import math

import pytest
import torch
from helpers.network import inputs, model_of
from helpers.training import FINE, SMALL, equal, train, weights

from cxt import load_model
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.config.network import AdapterConfig, LoraConfig
from cxt.errors import BadRequest
from cxt.model.parametrizations import WeightNoise, attach, merge, select_published_tensors
from cxt.model.quantization import round_matrix, round_to_integers


def in_blocks(name: str, value: torch.Tensor) -> bool:
    return name.startswith("backbone.blocks.") and value.ndim == 2


def rounded_slowly(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Each number of each row by itself."""
    result = weight.clone()
    largest = 2 ** (bits - 1) - 1
    for row in result:
        scale = max(abs(value) for value in row) / largest
        for i, value in enumerate(row):
            row[i] = round(float(value / scale)) * scale
    return result


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding(bits):
    torch.manual_seed(3)
    weight = torch.randn(7, 30)
    expected = rounded_slowly(weight, bits)
    integers, scales = round_to_integers(weight, bits=bits)
    assert torch.equal(round_matrix(weight, bits=bits), integers * scales)
    torch.testing.assert_close(integers * scales, expected, rtol=0, atol=1e-6)
    model, (x, y) = model_of(), inputs()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, bits=bits)
    published = select_published_tensors(model.state_dict(), has_lora=False, bits=bits)
    assert published.keys() == plain.keys()
    for name, value in published.items():
        rounds = in_blocks(name, value)
        assert torch.equal(value, round_matrix(plain[name], bits=bits) if rounds else plain[name])
        if rounds:
            assert all(len(row.unique()) <= 2**bits for row in value)
    # What is published is what was trained, bit for bit, and stays so when it is rounded again.
    reference = model_of()
    reference.load_state_dict(published)
    for each in (model, model.train().eval()):
        assert torch.equal(each(x, y), reference(x, y))
    for name, value in published.items():
        if in_blocks(name, value):
            again = round_to_integers(value, bits=bits)[0]
            assert torch.equal(again, round_to_integers(plain[name], bits=bits)[0])


def test_the_gradient_passes_straight_through():
    """It is that of the network with the rounded weights, of which the original ones are then changed."""
    model, (x, y) = model_of(), inputs()
    attach(model, bits=4)
    reference = model_of()
    reference.load_state_dict(select_published_tensors(model.state_dict(), has_lora=False, bits=4))
    for each in (model, reference):
        each.loss(x, y).backward()
    gradients = {name.replace("parametrizations.weight.original", "weight"): p.grad for name, p in model.named_parameters()}
    for name, parameter in reference.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_noise():
    model, (x, y) = model_of(), inputs()
    clean = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(x, y)
    attach(model, noise=0.2)
    linear = model.backbone.blocks[1].mlp.up
    assert torch.equal(model(x, y), plain)  # not in eval mode
    model.train()
    with torch.no_grad():
        draws = torch.stack([linear.weight for _ in range(400)])
    original = clean["backbone.blocks.1.mlp.up.weight"]
    torch.testing.assert_close(draws.mean(0), original, rtol=0, atol=6 * 0.2 * float(original.std()) / 20)
    assert math.isclose(float((draws - original).std()), 0.2 * float(original.std()), rel_tol=0.02)
    torch.manual_seed(5)
    first = linear.weight
    torch.manual_seed(5)
    assert torch.equal(first, linear.weight)
    assert not torch.equal(first, linear.weight)
    noise = WeightNoise(0.5)
    weight = torch.randn(3, 4, requires_grad=True)
    noise(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))
    assert equal(select_published_tensors(model.state_dict(), has_lora=False, bits=0), clean)
    merge(model.eval())
    assert equal(model.state_dict(), clean)


def test_noise_on_a_lora_is_on_the_changed_matrix():
    model = model_of()
    attach(model, lora=LoraConfig(rank=2), noise=0.3)
    linear = model.backbone.blocks[0].attention.out
    with torch.no_grad():
        linear.parametrizations["weight"][0].b.normal_()
        changed = linear.weight
        model.train()
        draws = torch.stack([linear.weight for _ in range(400)])
    assert math.isclose(float((draws - changed).std()), 0.3 * float(changed.std()), rel_tol=0.02)
    published = select_published_tensors(model.state_dict(), has_lora=True, bits=0)
    assert {name.rsplit(".", 1)[1] for name in published} == {"a", "b"}


BOTH = ["--quantized-bits", 8, "--weight-noise", 0.1]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "optimizer"), [
    (["--weight-noise", 0.1], "adamw"), (["--quantized-bits", 4], "muon"), (BOTH, "adamw"),
])  # fmt: skip
def test_runs(dataset, tmp_path, monkeypatch, settings, optimizer):
    """Only named weights are published, rounded and without noise; a training state is read as the same weights."""
    arguments = [*SMALL, *FINE, "--dataset-path", dataset, "--optimizer", optimizer, "--gradient-checkpointing"]
    train(monkeypatch, *arguments, *settings, "--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt", "--export", "best")
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "plain", "--out", tmp_path / "plain.ckpt")
    published, plain = weights(tmp_path / "x.ckpt"), weights(tmp_path / "plain.ckpt")
    assert published.keys() == plain.keys()
    assert not equal(published, plain)
    finished = next((tmp_path / "run" / "checkpoints").glob("broad_epoch=1-step=*.ckpt"))
    assert equal(weights(finished), weights(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    bits = read_checkpoint(finished).record["training"]["quantized_bits"]
    for name, value in published.items():
        if in_blocks(name, value):
            most = max(len(row.unique()) for row in value)
            assert most <= 2**bits if bits else most == value.shape[1]
    load_model(tmp_path / "run")


def test_an_adapter_on_rounded_weights(dataset, dataset_n10, tmp_path, monkeypatch):
    train(
        monkeypatch, *SMALL, *FINE, "--dataset-path", dataset, "--run-dir", tmp_path / "base", "--out", tmp_path / "base.ckpt"
    )
    adapter = ["--dataset-path", dataset_n10, "--adapter", "--checkpoint", tmp_path / "base.ckpt", "--last-n", 1]
    out = ["--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt"]
    train(monkeypatch, *SMALL, *FINE, *adapter, "--quantized-bits", 4, *out)
    before, after = weights(tmp_path / "base.ckpt"), weights(tmp_path / "x.ckpt")
    frozen = "backbone.blocks.0.mlp.up.weight"
    assert torch.equal(after[frozen], round_matrix(before[frozen], bits=4))
    assert isinstance(load_model(tmp_path / "x.ckpt").adapter.config, AdapterConfig)


def test_records_with_other_bits(dataset, tmp_path, monkeypatch):
    arguments = [*SMALL, "--dataset-path", dataset, "--max-steps", 1]
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt")
    about = read_checkpoint(tmp_path / "x.ckpt")
    for bits in (1, 9, 2.5, True, "4"):
        record = about.record | {"training": about.record["training"] | {"quantized_bits": bits}}
        write_checkpoint(tmp_path / "x.ckpt", about.state_dict, record)
        with pytest.raises(BadRequest, match="its training.quantized_bits must be 0 or from 2 to 8"):
            read_checkpoint(tmp_path / "x.ckpt")
