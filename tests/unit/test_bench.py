"""`cxt bench`: what it counts and compares. What it times decides nothing here."""

import json

import pytest
import torch
from helpers.repository import run_python

from cxt.benchmark.memory import measure_peak_memory
from cxt.benchmark.speed import bench_training
from cxt.commands.bench import main
from cxt.config.network import AdapterConfig, LoraConfig, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.errors import Failed
from cxt.model.flops import forward_flops

TINY = ["--layers", 2, "--heads", 2, "--width", 16, "--windows", 20, "--samples", 10, "--threads", 1, "--seconds", 0.1]


def bench(*arguments, check=True):
    return run_python("-m", "cxt.commands.bench", *arguments, env={"OMP_NUM_THREADS": "1"}, check=check)


@pytest.mark.slow
def test_training(tmp_path):
    out = tmp_path / "train.json"
    done = bench("train", *TINY, "--device", "cpu", "--batch-size", 6, "--dropout", 0, "--compare", "dense", "--out", out)
    result = json.loads(out.read_text())
    assert result["network"]["windows"] == 20
    assert result["batch"] == 6
    assert result["precision"] == "32-true"
    assert result["windows_per_second"] == pytest.approx(20 * result["items_per_second"])
    flops = 3 * sum(forward_flops(ModelConfig(layers=2, heads=2, width=16, windows=20, samples=10)).values())
    assert result["flops_per_second"] == pytest.approx(flops * result["items_per_second"])
    assert result["peak_flops_per_second"] > result["flops_per_second"]
    assert 0 <= result["waiting"] < 1
    assert 0 < result["memory_bytes"] < result["dense_memory_bytes"]
    assert result["loss_difference"] < 1e-5
    assert result["gradient_difference"] < 1e-4
    assert min(result["ratios"]) <= result["ratio"] <= max(result["ratios"])
    for word in ("examples/s", "windows/s", "of a matrix product here", "memory", "waiting for data", "times as fast"):
        assert word in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["marginal", "distill"])
def test_one_pass_counts_its_own_operations(objective):
    network = ModelConfig(layers=2, heads=2, width=16, windows=20, samples=10)
    training = TrainingConfig(objective=objective, batch_size=4)
    result = bench_training(network, None, training, device="cpu", seconds=0.1)
    flops = 3 * sum(forward_flops(network, objective="marginal").values())
    assert result["flops_per_second"] == pytest.approx(flops * result["items_per_second"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--adapter", "--samples", 12, "--compile", "aot_eager"], marks=pytest.mark.long),
        ["--model", "w200_wmissing", "--loss-path", "chunked", "--gradient-checkpointing", "--workers", 0],
    ],
)
def test_training_otherwise(tmp_path, flags):
    out = tmp_path / "train.json"
    bench("train", *TINY, "--device", "cpu", "--batch-size", 4, *flags, "--out", out)
    result = json.loads(out.read_text())
    assert result["adapter"] == ("--adapter" in flags)
    assert result["compile"] == ("aot_eager" if "--compile" in flags else "none")
    assert "ratio" not in result


@pytest.mark.slow
def test_decoding(tmp_path):
    out = tmp_path / "decode.json"
    done = bench("decode", *TINY, "--device", "cpu", "--pairs", 10, "--batch-size", 4, "--replicates", 3, "--compare",
                 "uncached", "--out", out)  # fmt: skip
    result = json.loads(out.read_text())
    assert result["pairs"] == 12  # whole batches
    assert result["windows_per_second"] == pytest.approx(result["pairs_per_second"] * 3 * 20)
    assert result["ratio"] == pytest.approx(result["pairs_per_second"] / result["uncached_pairs_per_second"])
    assert "12 pairs in" in done.stdout
    assert "without a cache" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "brod"], "unknown model 'brod'; did you mean 'broad'"),
        (["train", "--batch-size", "0"], "--batch-size must be a positive integer, got 0"),
        (["train", "--compile", "inducter"], "unknown compile 'inducter'; did you mean 'inductor'"),
        (["train", "--device", "cpu", "--attention", "flex"], "--attention flex trains on GPUs only"),
        (["train", "--precision", "bf61"], "unknown precision 'bf61'"),
        (["train", "--width", "30"], "width 30 is not a multiple"),
        (["decode", "--replicates", "-1"], "--replicates must be a positive integer, got -1"),
        (["train", *map(str, TINY), "--batch-size", "5000"], "--batch-size must be at most 810, the number of examples"),
    ],
)
def test_bad_requests(arguments, message):
    if arguments[-1] == "5000":
        arguments = [*arguments, "--device", "cpu"]
    done = bench(*arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_out_of_memory(monkeypatch):
    def all_of_it(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("cxt.benchmark.speed.bench_training", all_of_it)
    monkeypatch.setattr(
        "sys.argv", ["bench", "train", "--device", "cpu", "--threads", str(torch.get_num_threads()), "--compare", "dense"]
    )
    with pytest.raises(Failed, match=r"20.00 GiB.*smaller --batch-size, or omit --compare"):
        main()


def test_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = bench("decode", "--device", "cuda", check=False)
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr


def test_memory_at_the_peak():
    def work():
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1
        del first
        third = second * 2
        return float(third[0, 0])

    assert measure_peak_memory(work, "cpu") == pytest.approx(8e6, rel=0.01)


def test_flops_of_a_lora_are_fewer():
    """The embedding, the head and the matrices that are not changed need no gradients of their own."""
    from cxt.model.flops import training_flops

    network = ModelConfig()
    parts, whole = forward_flops(network), training_flops(network)
    saved = {t: whole - training_flops(network, lora=LoraConfig(targets=t)) for t in ("all", "mlp", "attention")}
    outside = parts["head"] + parts["embedding"]
    assert saved == pytest.approx(
        {"all": outside, "mlp": outside + parts["blocks"] / 3, "attention": outside + parts["blocks"] / 1.5}
    )


def test_flops_of_an_adapter_are_fewer():
    from cxt.model.flops import training_flops

    network = ModelConfig()
    assert 0.6 < training_flops(network, AdapterConfig()) / training_flops(network) < 0.8
