"""Training runs: what they publish, what they continue, what they refuse."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.repository import REPOSITORY, run_python
from helpers.simulations import build_dataset
from helpers.training import FINE, SMALL, equal, train, weights

from cxt import load_model
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.load import find_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import TIMING, read_log
from cxt.config.flags import note_more_than_cores
from cxt.config.training import TrainingConfig
from cxt.data.loaders import EpochBatchSampler
from cxt.errors import BadRequest
from cxt.trainer.parents import ADAPTER_FLAGS
from cxt.trainer.schedules import learning_rate_factor


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parent(dataset, tmp_path_factory):
    """A plain checkpoint of 3 blocks, trained from scratch on `dataset`."""
    directory = tmp_path_factory.mktemp("parent")
    out = directory / "broad.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        train(patch, *SMALL, *FINE, "--dataset-path", dataset, "--run-dir", directory / "run", "--out", out, "--lineage", "abc")
    return out


@pytest.fixture(scope="module")
def adapter_parent(parent, dataset_n10, tmp_path_factory):
    """An adapter checkpoint on `parent`."""
    directory = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        train(
            patch, *SMALL, *FINE, "--adapter", "--adapter-samples", 10, "--adapter-bottleneck", 4, "--checkpoint", parent,
            "--dataset-path", dataset_n10, "--run-dir", directory / "run", "--out", directory / "adapter.ckpt", "--last-n", 1,
        )  # fmt: skip
    return directory / "adapter.ckpt"


def test_published_checkpoint(parent, dataset):
    content = torch.load(parent, weights_only=True)
    assert set(content) == {"cxt", "state_dict"}
    record = content["cxt"]
    manifest = json.loads((dataset / "dataset.json").read_text())
    steps = 2 * math.ceil(manifest["splits"]["train"]["items"] // 8 / 2)
    assert (record["step"], record["epoch"], record["lineage"], record["parent"]) == (steps, 1, "abc", None)
    assert record["model"]["windows"] == 20
    assert record["model"]["samples"] == 20
    assert record["dataset"]["scales"] == [2, 4]
    assert record["versions"]["torch"]
    run = parent.parent / "run"
    assert (run / "checkpoints" / f"broad_epoch=1-step={steps}.ckpt").read_bytes() == parent.read_bytes()
    assert list(run.glob("events.*"))
    assert "lr: 0.001" in (run / "config.yaml").read_text()
    model = load_model(parent)
    assert not model.training
    x, y = torch.rand(2, 2, 2, 20, 20), torch.ones(2, 21, dtype=torch.long)
    assert model(x, y).shape == (2, 20, 326)


@pytest.mark.slow
def test_loss_falls(dataset, tmp_path, monkeypatch):
    from cxt import PairDataset
    from cxt.model.adapter import build_model

    parent = tmp_path / "x.ckpt"
    more = ["--epochs", "15", "--grad-accum", "1", "--lr", "5e-3", "--min-lr", "1e-4", "--decay-steps", "0"]
    train(monkeypatch, *SMALL, *more, "--dataset-path", dataset, "--run-dir", tmp_path / "run", "--out", parent)
    items = PairDataset(dataset, "test")
    x, y = map(torch.stack, zip(*(items[i] for i in range(len(items))), strict=True))
    with torch.no_grad():
        trained = float(load_model(parent).loss(x, y))
        fresh = float(build_model(read_checkpoint(parent).model).eval().loss(x, y))
    assert trained < fresh - 1.0


def test_clipping_in_the_arithmetic_of_a_gpu(dataset, tmp_path, monkeypatch):
    """bf16-mixed with the fused optimizer, which Lightning would not clip for; a CPU has both when it is told to."""
    import cxt.trainer.module

    fused = []

    def on_a_gpu(model, training, **_):
        fused.append(torch.optim.AdamW(cxt.trainer.optimizers.parameter_groups(model, training), fused=True))
        return fused[-1]

    norms = []

    def clipped(parameters, norm):
        parameters = list(parameters)
        clip(parameters, norm)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr("cxt.trainer.module.build_optimizer", on_a_gpu)
    monkeypatch.setattr("cxt.trainer.request.choose_precision", lambda *words, **more: "bf16-mixed")
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clipped)
    out = tmp_path / "clipped.ckpt"
    train(monkeypatch, *SMALL, "--dataset-path", dataset, "--run-dir", tmp_path / "run", "--grad-clip", 0.01, "--out", out)
    assert fused[0].param_groups[0]["fused"]
    assert len(norms) == read_checkpoint(out).record["step"]
    assert norms == pytest.approx([0.01] * len(norms), rel=0.01)


def test_seeds(parent, dataset, tmp_path, monkeypatch):
    arguments = (*SMALL, *FINE, "--dataset-path", dataset)
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "a", "--out", tmp_path / "a.ckpt", "--lineage", "abc")
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "b", "--out", tmp_path / "b.ckpt", "--seed", 2)
    assert equal(weights(parent), weights(tmp_path / "a.ckpt"))
    assert not equal(weights(parent), weights(tmp_path / "b.ckpt"))


def test_a_finished_run_publishes_again(parent, dataset, tmp_path, monkeypatch, capsys):
    arguments = (*SMALL, *FINE, "--dataset-path", dataset, "--run-dir", parent.parent / "run", "--lineage", "abc")
    train(monkeypatch, *arguments, "--out", tmp_path / "again.ckpt")
    assert "is finished: publishing its checkpoint again" in capsys.readouterr().out
    assert (tmp_path / "again.ckpt").read_bytes() == parent.read_bytes()


@pytest.mark.slow
def test_other_settings_or_data_supersede(dataset, masked_dataset, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "x.ckpt"
    arguments = (*SMALL, "--dataset-path", dataset, "--run-dir", run, "--out", out, "--epochs", 1)
    train(monkeypatch, *arguments)
    with pytest.raises(BadRequest, match=r"was started with seed 1 instead of 5; omit --resume"):
        train(monkeypatch, *arguments, "--resume", "--seed", 5)
    train(monkeypatch, *arguments, "--seed", 5)
    assert f"(the old run has seed 1 instead of 5); the old run is kept as {run}-superseded-1" in capsys.readouterr().out
    train(monkeypatch, *arguments, "--seed", 5, "--restart")
    assert f"(--restart); the old run is kept as {run}-superseded-2" in capsys.readouterr().out
    assert (tmp_path / "run-superseded-2" / "checkpoints").exists()
    other = build_dataset(tmp_path / "other", seed=9)
    train(monkeypatch, *arguments, "--seed", 5, "--dataset-path", other)
    assert re.search(r"\(the old run has dataset \w{12} instead of \w{12}\)", capsys.readouterr().out)


def test_another_parent_supersedes(parent, dataset, tmp_path, monkeypatch, capsys):
    run, source = tmp_path / "run", tmp_path / "parent.ckpt"
    source.write_bytes(parent.read_bytes())
    arguments = (*SMALL, "--dataset-path", dataset, "--run-dir", run, "--epochs", 1, "--checkpoint", source)
    train(monkeypatch, *arguments, "--out", tmp_path / "a.ckpt")
    about = read_checkpoint(parent)
    write_checkpoint(source, {key: value * 1.1 for key, value in about.state_dict.items()}, about.record)
    train(monkeypatch, *arguments, "--out", tmp_path / "b.ckpt")
    assert re.search(r"\(the old run has parent \w{12} instead of \w{12}\)", capsys.readouterr().out)
    assert not equal(weights(tmp_path / "a.ckpt"), weights(tmp_path / "b.ckpt"))


@pytest.mark.slow
def test_log_dir(dataset, tmp_path, monkeypatch, capsys):
    arguments = (*SMALL, "--dataset-path", dataset, "--log-dir", tmp_path, "--epochs", 1)
    train(monkeypatch, *arguments)
    train(monkeypatch, *arguments, "--seed", 2)
    versions = tmp_path / "lightning_logs"
    assert sorted(p.name for p in versions.iterdir() if p.is_dir()) == ["version_0", "version_1"]
    assert list((versions / "version_0" / "checkpoints").glob("broad_epoch=0-step=*.ckpt"))
    capsys.readouterr()
    train(monkeypatch, *arguments, "--seed", 2, "--resume")
    assert "version_1 is finished" in capsys.readouterr().out
    with pytest.raises(BadRequest, match="nothing to resume: there is no run below"):
        train(monkeypatch, *arguments, "--log-dir", tmp_path / "nowhere", "--resume")


@pytest.mark.slow
def test_scratch_changes_no_weights(dataset, tmp_path, monkeypatch, capsys):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("SCRATCH", str(scratch))
    arguments = [*SMALL, "--dataset-path", dataset, "--log-dir", tmp_path, "--storage", "disk"]
    outputs = ["--log-out", tmp_path / "log.csv", "--out", tmp_path / "out.ckpt"]
    train(monkeypatch, *arguments, "--scratch", "$SCRATCH", *outputs)
    assert f"in a temporary file in {scratch}" in capsys.readouterr().out
    assert not list(scratch.iterdir())
    (log,) = tmp_path.glob("lightning_logs/*/training_log.csv")
    assert (tmp_path / "log.csv").read_bytes() == log.read_bytes()
    train(monkeypatch, *arguments, "--out", tmp_path / "without.ckpt")
    assert (tmp_path / "out.ckpt").read_bytes() == (tmp_path / "without.ckpt").read_bytes()
    train(monkeypatch, *arguments, "--storage", "memory", "--out", tmp_path / "in_memory.ckpt")
    assert equal(weights(tmp_path / "out.ckpt"), weights(tmp_path / "in_memory.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulation", "settings"),
    [
        (1, []),
        pytest.param(3, [], marks=pytest.mark.long),
        (
            1,
            [
                "--objective",
                "joint",
                "--optimizer",
                "muon",
                "--losses",
                "[{name: label_smoothing}, {name: emd, final_weight: 0}]",
            ],
        ),
        *(pytest.param(1, ["--optimizer", name], marks=pytest.mark.long) for name in ("adafactor", "lion", "sgd")),
        pytest.param(
            1,
            [
                "--schedule",
                "adaptive",
                "--adaptive",
                "{patience_up: 1, patience_down: 1, cooldown: 0}",
                "--validate-every",
                "7",
            ],
            marks=pytest.mark.long,
        ),
        pytest.param(3, ["--weight-noise", "0.1", "--quantized-bits", "4"], marks=pytest.mark.slow),
    ],
)
def test_killed_run_continues_bit_for_bit(dataset, tmp_path, monkeypatch, accumulation, settings):
    arguments = [
        *SMALL, *FINE, "--dataset-path", dataset, "--batch-size", 4, "--grad-accum", accumulation, "--save-every", 5,
        "--epochs", 12, "--dropout", 0.1, *settings,
    ]  # fmt: skip
    train(monkeypatch, *arguments, "--run-dir", tmp_path / "whole", "--out", tmp_path / "whole.ckpt")
    cut = [*arguments, "--run-dir", tmp_path / "cut", "--out", tmp_path / "cut.ckpt"]
    last = RunDirectory(tmp_path / "cut").last
    process = subprocess.Popen(
        [sys.executable, "-m", "cxt.train", *map(str, cut)],
        env={"PYTHONPATH": str(REPOSITORY / "src"), "PATH": ""},
        stdout=subprocess.DEVNULL,
    )
    while not last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    assert not (tmp_path / "cut.ckpt").exists()  # else nothing was interrupted
    assert torch.load(last, weights_only=True)["global_step"] < 12 * 27 // accumulation
    train(monkeypatch, *cut)
    assert equal(weights(tmp_path / "whole.ckpt"), weights(tmp_path / "cut.ckpt"))
    logs = [read_log(tmp_path / run / "training_log.csv") for run in ("whole", "cut")]
    whole, again = ([{key: row[key] for key in row if key not in TIMING} for row in log] for log in logs)
    assert whole == again


def test_warm_start(parent, dataset, tmp_path, monkeypatch, capsys):
    frozen = ["--lr", "1e-12", "--min-lr", "0", "--weight-decay", "0"]
    train(
        monkeypatch, *SMALL, *frozen, "--dataset-path", dataset, "--checkpoint", parent, "--run-dir", tmp_path / "run",
        "--out", tmp_path / "child.ckpt",
    )  # fmt: skip
    child, before = weights(tmp_path / "child.ckpt"), weights(parent)
    assert all(torch.allclose(child[key], before[key], atol=1e-8) for key in before)
    assert read_checkpoint(tmp_path / "child.ckpt").record["parent"]["name"] == "broad"
    # What the child begins with is as good as what the parent ended with.
    first = next(row["val_loss"] for row in read_log(tmp_path / "run/training_log.csv") if row["val_loss"])
    assert first == pytest.approx(read_log(parent.parent / "run/training_log.csv")[-1]["val_loss"], abs=1e-5)


def test_adapter(parent, adapter_parent):
    """Only the adapter, the layer norms and the last block have moved."""
    before, after = weights(parent), weights(adapter_parent)
    for key, value in before.items():
        free = "norm" in key or key.startswith("backbone.blocks.2.")
        assert torch.equal(value, after[key]) == (not free), key
    about = read_checkpoint(adapter_parent)
    assert (about.adapter.samples, about.adapter.bottleneck, about.adapter.last_n) == (10, 4, 1)
    model = load_model(adapter_parent)
    assert model(torch.rand(2, 2, 2, 20, 10), torch.ones(2, 21, dtype=torch.long)).shape == (2, 20, 326)


def test_resume_adapter(adapter_parent, dataset_n10, tmp_path, monkeypatch):
    arguments = (
        *SMALL, "--lr", 1e-12, "--min-lr", 0, "--weight-decay", 0, "--dataset-path", dataset_n10, "--adapter",
        "--adapter-bottleneck", 4, "--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt",
    )  # fmt: skip
    train(monkeypatch, *arguments, "--resume-adapter", adapter_parent)
    before, after = weights(adapter_parent), weights(tmp_path / "x.ckpt")
    assert all(torch.allclose(before[key], after[key], atol=1e-8) for key in before)


def test_missingness_is_learned_from(masked_dataset, tmp_path, monkeypatch):
    arguments = ["w200_wmissing" if word == "broad" else word for word in SMALL]
    train(monkeypatch, *arguments, "--dataset-path", masked_dataset, "--run-dir", tmp_path / "r", "--out", tmp_path / "m.ckpt")
    model = load_model(tmp_path / "m.ckpt")
    x, y = torch.rand(2, 2, 2, 20, 20), torch.ones(2, 21, dtype=torch.long)
    other = x.clone()
    other[..., 0] = 1.0
    assert not torch.equal(model(x, y), model(other, y))


@pytest.mark.slow
def test_terminated(dataset, tmp_path):
    run = tmp_path / "run"
    arguments = [*SMALL, "--dataset-path", dataset, "--run-dir", run, "--out", tmp_path / "x.ckpt", "--epochs", 500]
    process = subprocess.Popen(
        [sys.executable, "-m", "cxt.train", *map(str, arguments), "--save-every", "5"],
        env={"PYTHONPATH": str(REPOSITORY / "src"), "PATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not RunDirectory(run).last.exists() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == 143
    assert "stopped by SIGTERM at step" in output
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.slow
def test_two_processes(dataset, tmp_path):
    arguments = [*SMALL, "--dataset-path", dataset, "--accelerator", "cpu", "--devices", 2, "--epochs", 1]
    script = Path(sys.executable).with_name("cxt")
    for name, start in (("a", ["-m", "cxt.train"]), ("b", [script, "train"])):
        run_python(*start, *arguments, "--run-dir", tmp_path / name, "--out", tmp_path / f"{name}.ckpt")
    record = read_checkpoint(tmp_path / "a.ckpt").record
    assert (record["devices"], record["step"]) == (2, math.ceil(108 // 2 // 8 / 2))
    assert equal(weights(tmp_path / "a.ckpt"), weights(tmp_path / "b.ckpt"))


def test_lock(dataset, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.lock()
    done = run_python(
        "-m", "cxt.train", *SMALL, "--dataset-path", dataset, "--run-dir", tmp_path / "run", check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert "run is in use by process" in done.stderr


@pytest.mark.slow
def test_not_finite_is_a_failure(dataset, tmp_path):
    done = run_python(
        "-m", "cxt.train", *SMALL, "--lr", 1e30, "--warmup-steps", 0, "--dataset-path", dataset,
        "--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Try half the learning rate" in done.stderr
    assert not (tmp_path / "x.ckpt").exists()


ON_N10 = ["--adapter", "--checkpoint", "{parent}", "--dataset-path", "{n10}"]
REFUSED = [
    (["--model", "brood"], "unknown model 'brood'; did you mean 'broad'"),
    (["--epoch", 3], "unknown flag --epoch; did you mean '--epochs'"),
    (["--gpus", 0, "--devices", 1], "cannot be used together"),
    (["--checkpoint", "{parent}", "--resume-adapter", "{parent}"], "--checkpoint and --resume-adapter cannot be used together"),
    (["--checkpoint", "{adapter}"], "is an adapter model; use --resume-adapter"),
    (["--resume-adapter", "{parent}"], "has no adapter weights; use --checkpoint .* --adapter"),
    (["--adapter"], "--adapter needs a trained backbone"),
    (["--checkpoint", "{parent}", "--layers", 2], "--layers 2, but checkpoint .* has 3; omit the flag"),
    (["--checkpoint", "nosuch"], "no checkpoint 'nosuch' in .*results"),
    (["--checkpoint", "/no/such.ckpt"], "there is no checkpoint /no/such.ckpt"),
    (["--dataset-path", "/no/such"], "there is no dataset directory /no/such"),
    (["--dataset-path", "{n10}", "--checkpoint", "{parent}"], "has 10 samples, but its parent .* takes 20; use an adapter"),
    (["--adapter", "--checkpoint", "{parent}"], "an adapter needs fewer samples than its backbone's 20"),
    (["--lr", 0, "--min-lr", 0], "--lr must be a positive number, got 0"),
    (["--heads", 0], "--heads must be an integer from 1 to 1024, got 0"),
    (["--devices", -1], "--devices must be an integer from 0 to 1024, or `all`, got -1"),
    (["--precision", "banana"], "unknown --precision 'banana'"),
    (["--compile", "banana"], "unknown --compile 'banana'; choose from aot_eager, auto"),
    (["--attention", "flex"], "attention flex trains on GPUs only"),
    (["--loss-path", "targt"], "unknown --loss-path 'targt'; did you mean 'target'"),
    (["--dataset-path", "{masked}"], "carries missingness in bin 0"),
    (["--model", "w200_wmissing"], "reads missingness from bin 0, but dataset"),
    (["--batch-size", 200], "108 training examples, fewer than one batch of 200 on 1 device"),
    (["--lr", 1e-6], "lr 1e-06 is below min_lr 3e-05"),
    (["--width", 15], "not a multiple of the number of scales"),
    (["--resume", "--restart"], "cannot be used together"),
    (["--adapter", "--adapter-samples", 9, "--checkpoint", "{parent}", "--dataset-path", "{n10}"], "--adapter-samples 9, but"),
    (["--lr", ".nan"], "--lr must be a finite positive number, got nan"),
    (["--lr", ".inf"], "--lr must be a finite positive number, got inf"),
    (["--lr", "1e400"], "--lr must be a finite positive number, got inf"),
    (["--beta1", 1.5], r"--beta1 must be a number in \[0, 1\), got 1.5"),
    (["--beta2", -1], r"--beta2 must be a number in \[0, 1\), got -1"),
    (["--threads", 100_000], "--threads must be an integer from 1 to 1024, got 100000"),
    (["--workers", 257], "--workers must be an integer from 0 to 256, got 257"),
    (["--epochs", 10**30], "--epochs must be an integer from 1 to 1000000000, got 1000000000000000000000000000000"),
    (["--min-delta", ".nan"], "--min-delta must be a finite non-negative number"),
    (["--max-minutes", ".inf"], "--max-minutes must be a finite positive number, got inf"),
    (["--max-steps", 0], "--max-steps must be a positive integer, got 0"),
    (["--devices", 1025], "--devices must be an integer from 0 to 1024, or `all`, got 1025"),
    (["--name", ""], "--name must have 1 to 100 printable characters.*, got ''"),
    (["--name", "a/b"], "--name must have .* because it is part of file names, got 'a/b'"),
    (["--name", "x" * 300], "part of file names"),
    (["--learning-rate", 1], "unknown flag --learning-rate; here it is called '--lr'"),
    (["--backbone-lr-factor", 0.5], "--backbone-lr-factor cannot be used without --adapter or --resume-adapter"),
    (["--last-n", 4, "--adapter-bottleneck", 8], "--adapter-bottleneck, --last-n cannot be used without --adapter"),
    (["--adapter-samples", 10], "--adapter-samples cannot be used without --adapter"),
    (["--adapter-dropout", 0.5], "--adapter-dropout cannot be used without"),
    (["--unfreeze-strategy", "ln"], "--unfreeze-strategy cannot be used without"),
    (["--overwrite-bin0", "true"], "--overwrite-bin0 cannot be used without"),
    ([*ON_N10, "--backbone-lr-factor", -1], "--backbone-lr-factor must be a non-negative number, got -1"),
    ([*ON_N10, "--adapter-bottleneck", 0], "--adapter-bottleneck must be an integer from 1 to 65536, got 0"),
    ([*ON_N10, "--adapter-dropout", 2], r"--adapter-dropout must be a number in \[0, 1\), got 2"),
    ([*ON_N10, "--last-n", -5], "--last-n must be an integer from 0 to 1000, got -5"),
    ([*ON_N10, "--last-n", 1, "--unfreeze-strategy", "ln"], "--last-n 1 cannot be used with --unfreeze-strategy ln"),
    ([*ON_N10, "--unfreeze-strategy", "lastn"], "unknown --unfreeze-strategy 'lastn'; did you mean 'lastN'"),
    (["--run-dir", "{n10}", "--resume", "latest"], "nothing to resume: there is no run in"),
    (["--resume-adapter", "{adapter}", "--adapter-bottleneck", 32, "--dataset-path", "{n10}"], "bottleneck 32, but .*4"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(map(str, a)) for a, _ in REFUSED])
def test_refused(arguments, message, monkeypatch, tmp_path, dataset, dataset_n10, masked_dataset, parent, adapter_parent):
    paths = {"parent": parent, "adapter": adapter_parent, "n10": dataset_n10, "masked": masked_dataset}
    arguments = [a.format(**paths) if isinstance(a, str) else a for a in arguments]
    with pytest.raises(BadRequest, match=message):
        train(monkeypatch, *SMALL, "--dataset-path", dataset, "--run-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "run.json").exists()


def test_words_of_resume(dataset, tmp_path, monkeypatch, capsys):
    """`auto` starts a run where there is none, and `latest` does not; both go on with the newest."""
    arguments = [*SMALL, "--dataset-path", dataset, "--epochs", 1, "--log-dir", tmp_path]
    with pytest.raises(BadRequest, match="nothing to resume: there is no run below"):
        train(monkeypatch, *arguments, "--resume", "latest")
    train(monkeypatch, *arguments, "--resume", "auto")
    for word in ("auto", "latest"):
        train(monkeypatch, *arguments, "--resume", word)
        assert "version_0 is finished: publishing its checkpoint again" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "lightning_logs").glob("version_*") if path.is_dir()] == ["version_0"]


def test_a_child_takes_the_sizes_of_its_parent(parent, adapter_parent, dataset, dataset_n10, monkeypatch, capsys):
    parent_config = read_checkpoint(parent).model
    plain = ["--model", "broad", "--print-config"]
    train(monkeypatch, *plain, "--checkpoint", parent)
    captured = capsys.readouterr()
    printed = yaml.safe_load(captured.out)
    assert [printed[key] for key in ("layers", "heads", "width", "dropout")] == [
        parent_config.layers, parent_config.heads, parent_config.width, parent_config.dropout,
    ]  # fmt: skip
    assert f": layers {parent_config.layers}, heads {parent_config.heads}, width {parent_config.width}" in captured.err
    assert not ADAPTER_FLAGS.keys() & printed.keys()
    train(monkeypatch, *plain, "--resume-adapter", adapter_parent)
    printed = yaml.safe_load(capsys.readouterr().out)
    parent_config = read_checkpoint(adapter_parent).adapter
    assert printed["adapter_bottleneck"] == parent_config.bottleneck == 4
    assert (printed["unfreeze_strategy"], printed["last_n"]) == (parent_config.unfreeze_strategy, parent_config.last_n)


def test_a_plain_run_knows_nothing_of_adapters(dataset, tmp_path, monkeypatch, capsys):
    """Neither its identity nor its settings; those of runs that still had the defaults there can be used again."""
    arguments = [*SMALL, "--dataset-path", dataset, "--epochs", 1, "--max-steps", 9, "--validation-items", 5000]
    train(monkeypatch, *arguments, "--workers", 1, "--min-delta", 0.1, "--run-dir", tmp_path / "run")
    notes = capsys.readouterr().err
    assert "--max-steps" not in notes  # it takes the place of the epochs
    assert "validation_items is 5000, but the dataset has only 12 test examples: using all" in notes
    assert "min_delta 0.1 has no effect without patience" in notes
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert not ADAPTER_FLAGS.keys() & (settings.keys() | identity["settings"].keys())
    assert "min_delta" not in identity["settings"]
    old = settings | {name: default for name, default in ADAPTER_FLAGS.items() if default is not None} | {"patience": None}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    train(monkeypatch, "--config", tmp_path / "old.yaml", "--run-dir", tmp_path / "run")
    assert "is finished: publishing its checkpoint again" in capsys.readouterr().out


def test_the_command_line_wins_over_files(tmp_path, monkeypatch, capsys):
    """Wherever `--config` stands; null is as if a key were not there, text that is a number is one."""
    (tmp_path / "a.yaml").write_text("lr: 1e-3\npatience: null\nepochs: 7\nprecision: no\ngpus: []\nname: no thing\n")
    (tmp_path / "b.yaml").write_text("# nothing but words\n")
    files = ["--config", tmp_path / "a.yaml", f"--config={tmp_path / 'b.yaml'}"]
    for words in (["--epochs", 9, *files], [*files, "--epochs", 9]):
        train(monkeypatch, *words, "--print-config")
        printed = yaml.safe_load(capsys.readouterr().out)
        assert (printed["lr"], printed["patience"], printed["epochs"], printed["precision"]) == (1e-3, 0, 9, "32-true")
        assert printed["name"] == "no thing"
    (tmp_path / "c.yaml").write_text("lr: {a: 1}\n")
    with pytest.raises(BadRequest, match="c.yaml: lr must be a value that its flag accepts, not a mapping or a list of lists"):
        train(monkeypatch, "--config", tmp_path / "c.yaml")
    with pytest.raises(BadRequest, match="unknown flag --print_config; did you mean '--print-config'"):
        train(monkeypatch, "--print_config")


def test_more_threads_than_cores_are_said(capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    note_more_than_cores(threads=2, workers=0)
    assert not capsys.readouterr().err
    note_more_than_cores(threads=2, workers=64)
    assert "note: 64 workers, but this process may use only 2 cores: using 2 workers" in capsys.readouterr().err
    note_more_than_cores(threads=1, processes=3)
    assert "1 thread in each of 3 processes" in capsys.readouterr().err


def test_gpus_that_are_not_there(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    without_devices = SMALL[: SMALL.index("--devices")]
    for flags in (["--gpus", 0, 1], ["--devices", 1], ["--accelerator", "gpu"]):
        with pytest.raises(BadRequest, match=r"torch sees (0|no) GPU"):
            train(monkeypatch, *without_devices, *flags, "--dataset-path", dataset, "--log-dir", tmp_path)


def test_config_file(dataset, tmp_path, monkeypatch):
    settings = tmp_path / "settings.yaml"
    settings.write_text("model: broad\nlayers: 1\nheads: 2\nwidth: 16\nepochs: 3\nbatch_size: 16\ngrad_accum: 1\ndevices: 0\n")
    train(
        monkeypatch, "--config", settings, "--epochs", 1, "--dataset-path", dataset, "--run-dir", tmp_path / "run",
        "--out", tmp_path / "x.ckpt",
    )  # fmt: skip
    record = read_checkpoint(tmp_path / "x.ckpt").record
    assert (record["training"]["epochs"], record["training"]["batch_size"], record["model"]["layers"]) == (1, 16, 1)
    # The run's own record of its settings runs it again.
    train(
        monkeypatch, "--config", tmp_path / "run" / "config.yaml", "--run-dir", tmp_path / "again",
        "--out", tmp_path / "y.ckpt",
    )  # fmt: skip
    assert equal(weights(tmp_path / "x.ckpt"), weights(tmp_path / "y.ckpt"))
    settings.write_text("epoch: 3\n")
    with pytest.raises(BadRequest, match="unknown key 'epoch'; did you mean 'epochs'"):
        train(monkeypatch, "--config", settings, "--dataset-path", dataset)


def test_help_lists_the_published_flags():
    text = run_python("-m", "cxt.train", "--help").stdout
    for flag in (
        "--model", "--dataset-path", "--gpus", "--epochs", "--lr", "--batch-size", "--grad-accum", "--checkpoint", "--adapter",
        "--adapter-samples", "--adapter-bottleneck", "--adapter-dropout", "--resume-adapter", "--log-dir", "--devices",
    ):  # fmt: skip
        assert flag in text


def test_schedule():
    published = TrainingConfig()
    factor = [learning_rate_factor(t, published, total_steps=5280) for t in (0, 5, 10, 4692, 5280, 150_000, 200_000)]
    assert factor == pytest.approx([0, 0.5, 1, 0.9978, 0.9973, 0.1, 0.1], abs=1e-4)
    flat = TrainingConfig(lr=3e-5)
    assert {learning_rate_factor(t, flat, total_steps=1) for t in (10, 1000, 200_000)} == {1.0}
    whole = TrainingConfig(decay_steps=0)
    assert learning_rate_factor(100, whole, total_steps=100) == pytest.approx(0.1)
    assert learning_rate_factor(55, whole, total_steps=100) == pytest.approx(0.55)


def test_order_is_a_function_of_seed_and_epoch():
    def batches(**changes):
        arguments = {"examples": 103, "batch_size": 10, "seed": 1} | changes
        sampler = EpochBatchSampler(**{k: v for k, v in arguments.items() if k not in ("epoch", "skip")})
        sampler.set_epoch(arguments.get("epoch", 0))
        sampler.skip = arguments.get("skip", 0)
        assert len(sampler) == arguments["examples"] // arguments.get("world", 1) // 10
        return list(sampler)

    assert batches() == batches()
    assert batches() != batches(seed=2)
    assert batches() != batches(epoch=1)
    assert batches(skip=4) == batches()[4:]
    flat = [item for batch in batches() for item in batch]
    assert len(set(flat)) == 100
    shares = [{i for batch in batches(rank=rank, world=2) for i in batch} for rank in (0, 1)]
    assert not shares[0] & shares[1]
    assert len(shares[0]) == len(shares[1]) == 50


def test_load_model_by_name(parent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CXT_CHECKPOINT_CACHE", raising=False)
    with pytest.raises(BadRequest, match="no checkpoint 'broad' in results"):
        load_model("broad")
    places = [tmp_path / "home" / ".cache" / "cxt" / "checkpoints", tmp_path / "results", tmp_path / "cache"]
    for place in places:  # each goes before the one before
        if place.name == "cache":
            monkeypatch.setenv("CXT_CHECKPOINT_CACHE", str(place))
        place.mkdir(parents=True)
        (place / "broad.ckpt").write_bytes(parent.read_bytes())
        assert find_checkpoint("broad").resolve() == place / "broad.ckpt"
    assert equal(load_model("broad").state_dict(), weights(parent))
    with pytest.raises(BadRequest, match="no checkpoint 'brood' in .*did you mean 'broad'"):
        load_model("brood")


def test_damaged_checkpoints(parent, tmp_path):
    path = tmp_path / "x.ckpt"
    for content, message in (
        (parent.read_bytes()[:5000], "cannot be read, it is damaged"),
        (b"text", "cannot be read, it is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadRequest, match=message):
            load_model(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(BadRequest, match="it has no `cxt` entry"):
        load_model(path)
    about = read_checkpoint(parent)
    write_checkpoint(path, {k: v for k, v in about.state_dict.items() if "norm" not in k}, about.record)
    with pytest.raises(BadRequest, match=r"backbone.blocks.0.norm_attention.weight is missing"):
        load_model(path)
    write_checkpoint(path, about.state_dict, about.record | {"format": 99})
    with pytest.raises(BadRequest, match="format 99, but this cxt reads formats up to 1"):
        load_model(path)


def test_the_trainers_own_saves_load(dataset, tmp_path, monkeypatch):
    train(
        monkeypatch,
        *SMALL,
        "--save-every",
        7,
        "--dataset-path",
        dataset,
        "--run-dir",
        tmp_path / "run",
        "--out",
        tmp_path / "x.ckpt",
    )
    assert equal(weights(tmp_path / "run" / "checkpoints" / "last.ckpt"), weights(tmp_path / "x.ckpt"))


def test_using_a_model_needs_no_lightning(parent):
    code = f"import sys, cxt; cxt.load_model({str(parent)!r}); sys.exit('pytorch_lightning' in sys.modules)"
    run_python("-c", code)
