"""What training and decoding cost on this machine, as tables: python benchmarks/training.py --out docs/throughput-cpu.md

On a GPU: the published networks in bf16-mixed, batch 128, beside the published formulation (dense mask, eager) in turns, and
1225 pairs of 1 Mb with 15 replicates decoded. On a CPU: the published size with as many items as it can take, and the laptop's
size. Each row is a process of its own; the adapter's step is measured in turns with the full one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cxt.benchmark.speed import Loader, Steps, describe_device, detect_device, limit_batch, simulate_examples
from cxt.config.network import PRESETS, AdapterConfig
from cxt.config.training import TrainingConfig
from cxt.io import atomic_write
from cxt.model.adapter import build_model
from cxt.model.flops import training_flops
from cxt.trainer.module import build_loss_function, compile_backend
from cxt.trainer.optimizers import build_optimizer

LAPTOP = ["--layers", "4", "--heads", "4", "--width", "128", "--windows", "100", "--dropout", "0"]
DENSE = ["--compare", "dense"]
TRAINING = {
    "cuda": {
        "narrow": ["--model", "narrow", *DENSE],
        "broad": DENSE,
        "broad, not compiled": ["--compile", "none"],
        "broad, FlexAttention": ["--attention", "flex"],
        "broad, loss in chunks": ["--loss-path", "chunked"],
        "broad, gradient checkpointing": ["--gradient-checkpointing"],
        "broad, bf16-true": ["--precision", "bf16-true"],
        "broad with its adapter": ["--adapter", *DENSE],
    },
    "cpu": {
        "narrow": ["--model", "narrow", *DENSE],
        "broad": DENSE,
        "broad, compiled": ["--compile", "inductor", *DENSE],
        "broad, gradient checkpointing": ["--gradient-checkpointing", *DENSE],
        "laptop size": [*LAPTOP, "--batch-size", "16", *DENSE],
        "laptop size, compiled": [*LAPTOP, "--batch-size", "16", "--compile", "inductor", *DENSE],
    },
}
DECODING = {
    "cuda": {
        "narrow": ["--model", "narrow", "--pairs", "1225", "--batch-size", "175"],
        "broad": ["--pairs", "1225", "--batch-size", "175"],
    },
    "cpu": {
        "broad": ["--batch-size", "8", "--pairs", "8", "--compare", "uncached"],
        "laptop size": [*LAPTOP, "--batch-size", "40", "--replicates", "12", "--compare", "uncached"],
    },
}


def bench(what: str, flags: list[str], *, seconds: float) -> dict | None:
    """One row: `cxt bench` with these flags, and what it found; None if it failed, which it says itself."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "found.json"
        words = ["-m", "cxt.commands.bench", what, *flags, "--seconds", str(seconds), "--out", str(out)]
        print(" ".join(["python", *words]), file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, *words], check=False, stdout=sys.stderr)
        return json.loads(out.read_text(encoding="utf-8")) if done.returncode == 0 else None


def training_row(name: str, result: dict | None) -> list[str]:
    if result is None:
        return [name, "failed", *[""] * 10]
    dense = ["", ""]
    if "ratio" in result:
        low, high = min(result["ratios"]), max(result["ratios"])
        dense = [f"{result['ratio']:.2f} ({low:.2f}–{high:.2f})", f"{result['dense_memory_bytes'] / 1e9:.2f}"]
    return [
        name, str(result["batch"]), result["precision"], result["compile"], f"{result['items_per_second']:,.3g}",
        f"{result['windows_per_second']:,.0f}", f"{result['flops_per_second'] / 1e12:.3g}",
        f"{result['flops_per_second'] / result['peak_flops_per_second']:.0%}", f"{result['memory_bytes'] / 1e9:.2f}",
        f"{result['waiting']:.1%}", *dense,
    ]  # fmt: skip


def decoding_row(name: str, result: dict | None) -> list[str]:
    if result is None:
        return [name, "failed", *[""] * 7]
    return [
        name, str(result["pairs"]), str(result["replicates"]), str(result["batch"]), f"{result['seconds']:.1f}",
        f"{result['pairs_per_second']:.3g}", f"{result['windows_per_second']:,.0f}", f"{result['memory_bytes'] / 1e9:.2f}",
        f"{result['ratio']:.1f}" if "ratio" in result else "",
    ]  # fmt: skip


def adapter_in_turns(device: str, *, turns: int) -> list[float]:
    """The adapter's step over the full one's, turn by turn, for `broad` at the published size."""
    network = PRESETS["broad"]
    batch = limit_batch(128, training_flops(network), device)
    training = TrainingConfig(batch_size=batch)
    precision = training.precision if device == "cuda" else "32-true"
    both = []
    for adapter in (AdapterConfig(), None):
        torch.manual_seed(1)
        model = build_model(network, adapter).to(device).train()
        loss, optimizer = build_loss_function(model, training), build_optimizer(model, training, fused=device == "cuda")
        if (backend := compile_backend(training, device)) is not None:
            loss = torch.compile(loss, backend=backend, dynamic=False)
        with simulate_examples(network, adapter, batch_size=batch) as dataset:
            loader = Loader(dataset, batch_size=batch, workers=0, device=device)
        both.append(Steps(model, training, loss, optimizer, loader, precision=precision))
        both[-1](2)
    count = 20 if device == "cuda" else 1
    return [both[0].timed(count) / both[1].timed(count) for _ in range(turns)]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    line = "| " + " | ".join(head) + " |"
    return [line, "| --- |" + " ---: |" * (len(head) - 1), *("| " + " | ".join(row) + " |" for row in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement (default 20)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    device = detect_device()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium" if device == "cuda" else "highest")
    trained = [training_row(name, bench("train", flags, seconds=args.seconds)) for name, flags in TRAINING[device].items()]
    decoded = [decoding_row(name, bench("decode", flags, seconds=args.seconds)) for name, flags in DECODING[device].items()]
    ratios = adapter_in_turns(device, turns=8)
    lines = [
        f"# Training and decoding on {describe_device(device)}",
        "",
        f"Written by `python benchmarks/training.py --seconds {args.seconds:g}`. *dense*: how many times as many items a",
        "second as the published formulation trains in the same process, median and range of the turns. Memory in GB.",
        "",
        *table(
            ["training", "batch", "precision", "compiled", "items/s", "windows/s", "TFLOP/s", "of peak", "memory", "waiting",
             "dense", "its memory"], trained,
        ),
        "",
        f"The adapter's step takes {statistics.median(ratios):.2f} of the full step's time (`broad`, {len(ratios)} turns, "
        f"{min(ratios):.2f} to {max(ratios):.2f}).",
        "",
        *table(
            ["decoding", "pairs", "replicates", "batch", "seconds", "pairs/s", "windows/s", "memory", "× uncached"], decoded
        ),
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.out is not None:
        atomic_write(args.out, text.encode())


if __name__ == "__main__":
    main()
