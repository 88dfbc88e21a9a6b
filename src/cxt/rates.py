"""How much arithmetic training and decoding take, and how fast a device does it.

    python -m cxt.rates --out rates.json        measure the published networks on this machine

FLOPs are counted from the shapes, two for each multiplication and addition, and only where the prefix-LM lets a position
attend. A forward pass over one item, for W windows, width D, L blocks, H scales and n samples:

    matrices    2·W tokens × 24·D² × L      (attention 3 + 1, MLP 4 + 4)
    attention   4·D × (W² + W² + W·(W + 1)/2) × L      (sources see sources; target i sees all sources and i targets)
    head        2·W·D·vocabulary
    embedding   2 channels × H·W × 2·(n·D/H + (D/H)²)

A backward pass costs as much again for the gradients of activations, and once more for those of trained matrices.
"""

import argparse
import json
import platform
import time
from pathlib import Path

from cxt.config import PRESETS, AdapterConfig, ModelConfig, TrainingConfig
from cxt.errors import exit_on_bad_request
from cxt.files import atomic_write


def forward_flops(network: ModelConfig) -> dict[str, float]:
    """FLOPs of one item forward, by part: blocks (matrices), attention, head, embedding."""
    windows, width, hidden = network.windows, network.width, network.width // network.scales
    live = 2 * windows**2 + windows * (windows + 1) / 2
    return {
        "blocks": 2 * windows * 24 * width**2 * network.layers,
        "attention": 4 * width * live * network.layers,
        "head": 2 * windows * width * network.vocabulary,
        "embedding": 2 * network.scales * windows * 2 * (network.samples * hidden + hidden**2),
    }


def training_flops(network: ModelConfig, adapter: AdapterConfig | None = None) -> float:
    """FLOPs of one training item, forward and backward; a frozen matrix needs no gradient of its own."""
    parts = forward_flops(network)
    if adapter is None:
        return 3 * sum(parts.values())
    trained = min(adapter.last_n, network.layers) / network.layers if "lastN" in adapter.unfreeze_strategy else 0.0
    frozen = parts["head"] + parts["embedding"] + (1 - trained) * parts["blocks"]
    # The adapter itself, 3 matrices of some tens of rows, is below a thousandth of this.
    return 3 * sum(parts.values()) - frozen


def decoding_flops(network: ModelConfig, *, replicates: int) -> float:
    """FLOPs of decoding one pair: the sources once, and each replicate's windows one after another."""
    windows, width = network.windows, network.width
    parts = forward_flops(network)
    sources = parts["blocks"] / 2 + 4 * width * windows**2 * network.layers + parts["embedding"]
    targets = parts["blocks"] / 2 + 4 * width * (windows**2 + windows * (windows + 1) / 2) * network.layers + parts["head"]
    return sources + replicates * targets


def _input(network: ModelConfig, samples: int, batch: int, device):
    import torch

    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 5, (batch, 2, network.scales, network.windows, samples), generator=generator)
    tokens = torch.randint(2, network.vocabulary, (batch, network.windows + 1), generator=generator)
    return torch.log1p(counts.float()).to(device), tokens.to(device)


def measure_training(network, adapter, training: TrainingConfig, *, device: str, batch: int, seconds: float) -> dict:
    """{items_per_second, flops_per_second} of optimizer steps of this network; no accumulation, no loading of data."""
    import torch

    from cxt.adapter import build_model, freeze_backbone
    from cxt.training import parameter_groups

    model = build_model(network, adapter).to(device).train()
    if adapter is not None:
        freeze_backbone(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, training), fused=device == "cuda" and adapter is None)
    x, y = _input(network, model.samples, batch, device)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(training.precision) if device == "cuda" else None

    def step() -> None:
        with torch.autocast(device, dtype=mixed, enabled=mixed is not None):
            loss = model.loss(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    rate = batch / _seconds_each(step, device, seconds)
    return {"items_per_second": rate, "flops_per_second": rate * training_flops(network, adapter)}


def measure_decoding(network, *, device: str, batch: int, replicates: int, seconds: float) -> dict:
    """{pairs_per_second, flops_per_second} of decoding *replicates* of each pair."""
    import torch

    from cxt.adapter import build_model

    model = build_model(network).to(device)
    x, _ = _input(network, network.samples, batch, device)
    with torch.no_grad():
        rate = batch / _seconds_each(lambda: model.generate(x, replicates=replicates), device, seconds)
    return {"pairs_per_second": rate, "flops_per_second": rate * decoding_flops(network, replicates=replicates)}


def _seconds_each(work, device: str, seconds: float) -> float:
    """Seconds of one call of *work*, after one that does not count, over at least *seconds*."""
    import torch

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    finish()
    began, calls = time.monotonic(), 0
    while calls == 0 or time.monotonic() - began < seconds:
        work()
        calls += 1
        if device == "cuda" and calls % 5 == 0:
            finish()  # so that the clock that ends the loop is the device's
    finish()
    return (time.monotonic() - began) / calls


def _fitting(batch: int, flops: float, device: str) -> int:
    """*batch*, or on a CPU as much of it as takes half a teraFLOP: some tens of seconds."""
    return batch if device == "cuda" else max(1, min(batch, int(5e11 / flops)))


def device_here() -> str:
    """`cuda` or `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_device(device: str) -> str:
    """The device in words, with its number of threads or its name."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}, torch {torch.__version__}"


def measure(networks: dict[str, tuple], *, seconds: float = 10.0, batch: int | None = None, progress=print) -> dict:
    """Rates of several networks {name: (ModelConfig, AdapterConfig | None, TrainingConfig)} on this machine's device."""
    import torch

    device = device_here()
    torch.set_float32_matmul_precision("medium" if device == "cuda" else "highest")
    result: dict = {"device": describe_device(device), "threads": torch.get_num_threads(), "training": {}, "decoding": {}}
    for name, (network, adapter, training) in networks.items():
        items = batch or _fitting(training.batch_size, training_flops(network, adapter), device)
        rate = measure_training(network, adapter, training, device=device, batch=items, seconds=seconds)
        precision = training.precision if device == "cuda" else "32-true"
        result["training"][name] = {"adapter": adapter is not None, "batch": items, "precision": precision, **rate}
        progress(f"{name}: training {rate['items_per_second']:.1f} items/s, {rate['flops_per_second'] / 1e12:.3g} TFLOP/s")
        if adapter is None:
            replicates = 15 if device == "cuda" else 12
            pairs = _fitting(64 if device == "cuda" else 40, decoding_flops(network, replicates=replicates), device)
            rate = measure_decoding(network, device=device, batch=pairs, replicates=replicates, seconds=seconds)
            result["decoding"][name] = {"adapter": False, "batch": pairs, "replicates": replicates, **rate}
            progress(f"{name}: decoding {rate['pairs_per_second']:.2f} pairs/s of {replicates} replicates")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cxt.rates", description="How fast this machine trains and decodes with the published networks."
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default 10)")
    parser.add_argument("--batch", type=int, help="items per step (default: 128, fewer on a CPU)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    networks = {
        "narrow": (PRESETS["narrow"], None, TrainingConfig()),
        "broad": (PRESETS["broad"], None, TrainingConfig()),
        "broad_adapter": (PRESETS["broad"], AdapterConfig(), TrainingConfig()),
    }
    rates = measure(networks, seconds=args.seconds, batch=args.batch)
    print(rates["device"])
    if args.out is not None:
        atomic_write(args.out, (json.dumps(rates, indent=1) + "\n").encode())


if __name__ == "__main__":
    exit_on_bad_request(main)
