"""LoRA: training, the file and its base, merging, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.network import inputs, model_of
from helpers.training import FINE, SMALL, equal, train, weights

import cxt
from cxt import load_model
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.quantized import quantize_checkpoint
from cxt.commands.checkpoint import main as checkpoint_command
from cxt.config.network import LoraConfig
from cxt.config.training import TrainingConfig
from cxt.errors import BadRequest, Failed
from cxt.io import file_sha256
from cxt.model.parametrizations import attach, list_lora_tensors, merge
from cxt.trainer.optimizers import build_optimizer

LORA = ["--lora-rank", 2, "--lora-alpha", 4]


@pytest.fixture(scope="module")
def results(dataset, tmp_path_factory):
    """A directory with base.ckpt and its LoRA lora.ckpt, both trained for an epoch; their models have these names."""
    directory = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        common = [*SMALL, *FINE, "--dataset-path", dataset, "--epochs", 1]
        train(patch, *common, "--name", "base", "--run-dir", directory / "base", "--out", directory / "base.ckpt")
        train(
            patch, *common, "--name", "lora", "--lora-of", directory / "base.ckpt", *LORA, "--lr", 1e-2,
            "--run-dir", directory / "lora", "--out", directory / "lora.ckpt",
        )  # fmt: skip
    return directory


def changed(weight, a, b, factor):
    """W + factor · B A, by sums over the rank."""
    result = weight.clone()
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            result[i, j] += factor * sum(b[i, k] * a[k, j] for k in range(a.shape[0]))
    return result


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_changes_by_their_definition(targets):
    model, (x, y) = model_of(), inputs()
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, model(x, y)
    attach(model, lora=LoraConfig(rank=3, alpha=6.0, targets=targets))
    assert torch.equal(model(x, y), plain)  # B is 0
    tensors = list_lora_tensors(model.state_dict())
    kinds = {"attention": ("attention.qkv", "attention.out"), "mlp": ("mlp.up", "mlp.down")}
    matrices = [f"backbone.blocks.{i}.{k}" for i in range(3) for part in kinds for k in kinds[part] if targets in (part, "all")]
    assert set(tensors) == {f"{name}.parametrizations.weight.0.{part}" for name in matrices for part in "ab"}
    with torch.no_grad():
        for name in tensors:
            model.get_parameter(name).normal_(std=0.1)
    changed_logits = model(x, y)
    assert not torch.allclose(changed_logits, plain, atol=1e-3)
    merge(model)
    assert model.state_dict().keys() == before.keys()
    torch.testing.assert_close(model(x, y), changed_logits, rtol=0, atol=1e-6)
    for name, value in model.state_dict().items():
        a, b = (tensors.get(f"{name.removesuffix('.weight')}.parametrizations.weight.0.{part}") for part in "ab")
        if a is None:
            assert torch.equal(value, before[name])
        elif name.startswith("backbone.blocks.1."):  # the slow definition, for one block
            torch.testing.assert_close(value, changed(before[name], a, b, 6.0 / 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_only_a_and_b_are_trained(optimizer):
    model, (x, y) = model_of().train(), inputs()
    attach(model, lora=LoraConfig(rank=3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training = TrainingConfig(optimizer=optimizer, lr=1e-2, min_lr=0)
    steps = build_optimizer(model, training, fused=False)
    for _ in range(3):
        steps.zero_grad()
        model.loss(x, y).backward()
        steps.step()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(list_lora_tensors(before))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == with_gradient


def test_the_file(results):
    base, lora = read_checkpoint(results / "base.ckpt"), read_checkpoint(results / "lora.ckpt")
    assert lora.lora == LoraConfig(rank=2, alpha=4.0)
    assert lora.record["parent"] | {"lineage": None} == {
        "name": "base", "lineage": None, "sha256": file_sha256(results / "base.ckpt"),
    }  # fmt: skip
    numbers = sum(value.numel() for value in lora.state_dict.values())
    assert numbers == 3 * 2 * ((48 + 16) + (16 + 16) + (64 + 16) + (16 + 64))
    assert (results / "lora.ckpt").stat().st_size < (results / "base.ckpt").stat().st_size / 2
    assert "lora" not in base.record
    saved = torch.load(results / "lora" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in base.state_dict.items():  # the base has not moved
        kept = saved.get(f"model.{name}", saved.get(f"model.{name.removesuffix('.weight')}.parametrizations.weight.original"))
        assert torch.equal(kept, value), name


def test_kilobytes_at_the_published_size(tmp_path):
    """The smallest LoRA of the network of 10 blocks of width 400, which has 19 million parameters."""
    from cxt.config.network import ModelConfig
    from cxt.model.adapter import build_model

    model = build_model(ModelConfig())
    whole = sum(value.numel() for value in model.state_dict().values())
    attach(model, lora=LoraConfig(rank=1, targets="attention"))
    assert sum(value.numel() for value in list_lora_tensors(model.state_dict()).values()) == 10 * ((1200 + 400) + (400 + 400))
    assert whole > 19_000_000
    write_checkpoint(tmp_path / "x.ckpt", model.state_dict(), {"lora": {}, "training": None})
    assert (tmp_path / "x.ckpt").stat().st_size < 150_000


def test_a_run_starts_from_the_base(results, dataset, tmp_path, monkeypatch):
    arguments = [*SMALL, "--dataset-path", dataset, "--lora-of", results / "base.ckpt", *LORA, "--lr", 1e-30, "--min-lr", 0]
    train(monkeypatch, *arguments, "--run-dir", results / "still", "--out", results / "still.ckpt")
    assert equal(cxt_weights(results / "still.ckpt"), weights(results / "base.ckpt"))
    (results / "still.ckpt").unlink()


def cxt_weights(path):
    return load_model(path).state_dict()


def test_loaded_merged_and_exported(results, tmp_path, monkeypatch, capsys):
    """All ways to use it give the outputs of the network that was trained."""
    from cxt.model.adapter import build_model

    lora, base = read_checkpoint(results / "lora.ckpt"), read_checkpoint(results / "base.ckpt")
    model = build_model(lora.model)
    model.load_state_dict(base.state_dict)
    attach(model.eval(), lora=lora.lora)
    model.load_state_dict(lora.state_dict, strict=False)
    x, y = inputs(lora.model)
    expected = model(x, y)
    assert (expected - load_model(results / "base.ckpt")(x, y)).abs().max() > 1e-4
    checkpoint_command(["merge", str(results / "lora.ckpt"), str(tmp_path / "merged.ckpt")])
    checkpoint_command(["export", str(results / "lora.ckpt"), "--out", str(tmp_path / "exported")])
    for path in (results / "lora.ckpt", tmp_path / "merged.ckpt", tmp_path / "exported"):
        torch.testing.assert_close(load_model(path)(x, y), expected, rtol=0, atol=1e-6)
    monkeypatch.setenv("CXT_CHECKPOINT_CACHE", str(results))  # the base is not beside what a run leaves
    for path in (results / "lora", results / "lora" / "checkpoints" / "last.ckpt"):
        torch.testing.assert_close(load_model(path)(x, y), expected, rtol=0, atol=1e-6)
    merged = read_checkpoint(tmp_path / "merged.ckpt")
    assert merged.state_dict.keys() == base.state_dict.keys()
    assert merged.lora is None
    checkpoint_command(["show", str(results / "lora.ckpt")])
    checkpoint_command(["diff", str(results / "lora.ckpt"), str(tmp_path / "merged.ckpt")])
    said = capsys.readouterr().out
    assert "rank 2, alpha 4.0, targets all" in said
    assert "weights are equal" in said
    with pytest.raises(Failed):
        checkpoint_command(["diff", str(results / "lora.ckpt"), str(results / "base.ckpt")])


def test_the_base_is_found_by_name_or_digest(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(results / "lora.ckpt", tmp_path / "lora.ckpt")
    with pytest.raises(BadRequest, match=r"is a LoRA of 'base' with sha256 .* as .*/base.ckpt \(not there\), results"):
        load_model(tmp_path / "lora.ckpt")
    shutil.copy(results / "lora.ckpt", tmp_path / "base.ckpt")  # another one
    with pytest.raises(BadRequest, match=r"/base.ckpt \(another checkpoint\), results/base.ckpt \(not there\)"):
        load_model(tmp_path / "lora.ckpt")
    expected = cxt_weights(results / "lora.ckpt")
    monkeypatch.setenv("CXT_CHECKPOINT_CACHE", str(results))
    assert equal(cxt_weights(tmp_path / "lora.ckpt"), expected)
    monkeypatch.delenv("CXT_CHECKPOINT_CACHE")
    shutil.copy(results / "base.ckpt", tmp_path / "renamed.ckpt")
    assert equal(cxt_weights(tmp_path / "lora.ckpt"), expected)


def test_refused_merges(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("base.ckpt", "lora.ckpt"):
        with pytest.raises(BadRequest, match="would be overwritten"):
            checkpoint_command(["merge", str(results / "lora.ckpt"), str(results / out)])
    with pytest.raises(BadRequest, match="is not a LoRA: there is nothing to merge"):
        checkpoint_command(["merge", str(results / "base.ckpt"), str(tmp_path / "out.ckpt")])
    assert not Path("out.ckpt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"rank": 3, "alpha": 4.0, "targets": "all"}}, r"parametrizations.weight.0.a must have shape \(3, 16\), got"),
        ({"lora": {"rank": 2, "alpha": 4.0, "targets": "mlp"}}, "qkv.parametrizations.weight.0.a is not in this model"),
        ({"lora": {"rank": 2, "alpha": 4.0, "targets": "heads"}}, "unknown targets 'heads'"),
        ({"lora": {"rank": 2, "alpha": 4.0}}, "its lora lacks targets"),
        ({"lora": {"rank": 10**9, "alpha": 4.0, "targets": "all"}}, "rank must be"),
        ({"parent": None}, "its lora needs a parent with a name and a sha256"),
        ({"parent": {"name": "../base", "sha256": "x"}}, "must be a name without directories"),
    ],
)
def test_files_that_do_not_fit(results, change, message):
    lora = read_checkpoint(results / "lora.ckpt")
    write_checkpoint(results / "other.ckpt", lora.state_dict, lora.record | change)
    with pytest.raises(BadRequest, match=message):
        load_model(results / "other.ckpt")
    (results / "other.ckpt").unlink()


def test_a_quantised_lora(results, tmp_path):
    """It holds the merged weights, and does not replace the base, which the LoRA needs."""
    before = (results / "base.ckpt").read_bytes()
    with pytest.raises(BadRequest, match=r"base.ckpt is the checkpoint that .*lora.ckpt was trained from"):
        quantize_checkpoint(results / "lora.ckpt", results / "base.ckpt")
    assert (results / "base.ckpt").read_bytes() == before
    quantize_checkpoint(results / "lora.ckpt", tmp_path / "small.ckpt")
    merged, small = load_model(results / "lora.ckpt").state_dict(), load_model(tmp_path / "small.ckpt").state_dict()
    for name, value in merged.items():
        largest = value.abs().amax(-1, keepdim=True) if value.ndim == 2 else torch.zeros(())
        assert ((value - small[name]).abs() <= largest / 127 / 2 + 1e-7).all()


def test_a_child_of_a_lora(results, dataset, tmp_path, monkeypatch):
    """It starts from the merged weights, with all of them to train."""
    arguments = [*SMALL, "--dataset-path", dataset, "--checkpoint", results / "lora.ckpt", "--lr", 1e-30, "--min-lr", 0]
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "run", "--out", tmp_path / "child.ckpt")
    assert equal(weights(tmp_path / "child.ckpt"), cxt_weights(results / "lora.ckpt"))


def test_from_python(results, dataset, tmp_path):
    cxt.train_model(
        dataset_path=dataset, lora_of=results / "base.ckpt", lora_rank=1, lora_alpha=2, lora_targets="mlp", batch_size=8,
        grad_accum=1, epochs=1, max_steps=2, threads=1, devices=0, run_dir=tmp_path / "run", out=tmp_path / "x.ckpt",
    )  # fmt: skip
    assert read_checkpoint(tmp_path / "x.ckpt").lora == LoraConfig(rank=1, alpha=2.0, targets="mlp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-rank", 2], "--lora-rank cannot be used without --lora-of"),
        (["--lora-targets", "mlp", "--lora-alpha", 1], "--lora-alpha, --lora-targets cannot be used without --lora-of"),
        (["--lora-of", "{base}", "--lora-rank", 16], "the rank of LoRA must be below the width of the network, 16, got 16"),
        (["--lora-of", "{base}", "--lora-rank", 0], "--lora-rank must be an integer from 1"),
        (["--lora-of", "{base}", "--lora-alpha", 0], "--lora-alpha must be a positive number, got 0"),
        (["--lora-of", "{base}", "--lora-targets", "head"], "unknown --lora-targets 'head'; choose from all, attention, mlp"),
        (["--lora-of", "{base}", "--checkpoint", "{base}"], "--checkpoint and --lora-of cannot be used together"),
        (["--lora-of", "{base}", "--adapter"], "--adapter and --lora-of cannot be used together"),
        (["--lora-of", "{lora}"], "is itself a LoRA of 'base'; merge it"),
        (["--lora-of", "{base}", "--reads-rates", "true"], "reads_rates is True, but the base .* has False"),
        (["--resume-adapter", "{lora}"], "has no adapter weights"),
        (["--lora-of", "{base}", "--quantized-bits", 8], "quantized_bits cannot be used with LoRA"),
        (["--quantized-bits", 1], "quantized_bits must be 0 .off. or from 2 to 8"),
    ],
)
def test_refused(results, dataset, tmp_path, monkeypatch, arguments, message):
    paths = {"base": results / "base.ckpt", "lora": results / "lora.ckpt"}
    arguments = [a.format(**paths) if isinstance(a, str) else a for a in arguments]
    with pytest.raises(BadRequest, match=message):
        train(monkeypatch, *SMALL, "--dataset-path", dataset, "--run-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "run.json").exists()
