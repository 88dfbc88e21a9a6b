"""Activations of a training step, measured, beside what `cxt plan` and model_summary.json say, on a CPU or a GPU.

    python benchmarks/memory.py [--device cuda]

Measured is the peak of the tensors that one forward and backward pass allocates, without compiling: activations, and the
workspace of single operations. Gradients are there before, as in all but the first micro-batch of an optimizer step.
"""

import argparse

import torch

from cxt.benchmark.memory import measure_peak_memory
from cxt.config.network import AdapterConfig, ModelConfig
from cxt.config.training import TrainingConfig
from cxt.decoding.decode import use_precision
from cxt.io import format_columns
from cxt.model.adapter import build_model
from cxt.model.memory import activation_bytes
from cxt.trainer.module import TrainingModule, build_loss_function

SMALL = {"layers": 4, "width": 128, "windows": 100, "samples": 50, "scales": 4}
CASES = [
    ("small network", SMALL, {"batch_size": 8}),
    ("more windows", SMALL | {"windows": 500}, {"batch_size": 2}),
    ("no dropout", SMALL | {"dropout": 0.0}, {"batch_size": 8}),
    ("marginal", SMALL, {"batch_size": 8, "objective": "marginal"}),
    ("gradient checkpointing", SMALL, {"batch_size": 8, "gradient_checkpointing": True}),
    ("chunked loss", SMALL, {"batch_size": 8, "loss_path": "chunked"}),
    ("adapter", SMALL | {"dropout": 0.0}, {"batch_size": 8}),
    ("broad, 500 windows", {}, {"batch_size": 1}),
]


def measure(network: ModelConfig, training: TrainingConfig, adapter: AdapterConfig | None, device: str) -> tuple[int, int]:
    """Measured and counted bytes of activations in one forward and backward pass, with gradients from an earlier one."""
    torch.manual_seed(1)
    precision = training.precision if device == "cuda" else "32-true"
    model = build_model(network, adapter).train()
    module = TrainingModule(model, training, record={}, total_steps=1, scales=[2, 8, 32, 64][: network.scales])
    loss = build_loss_function(module.to(device).model, training, scales=[2, 8, 32, 64][: network.scales])
    samples = network.samples if adapter is None else adapter.samples
    shape = (training.batch_size, 2, network.scales, network.windows, samples)
    counts = torch.randint(0, 50, shape, dtype=torch.int16, device=device)
    tokens = torch.randint(2, network.vocabulary, (training.batch_size, network.windows + 1), device=device)

    def step() -> None:
        with use_precision(precision, device):
            value = loss(counts, None, tokens)
        value.backward()

    step()  # allocates the gradients
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    counted = activation_bytes(network, training, adapter, precision=precision, on_gpu=device == "cuda")
    return measure_peak_memory(step, device) - before, counted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Peak memory of training, measured and counted.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    rows = [["network and settings", "batch", "measured", "counted", "ratio"]]
    for title, sizes, settings in CASES:
        adapter = AdapterConfig(samples=10) if title == "adapter" else None
        training = TrainingConfig(**settings)
        measured, counted = measure(ModelConfig(**sizes), training, adapter, args.device)
        rows.append(
            [title, training.batch_size, f"{measured / 1e6:.1f} MB", f"{counted / 1e6:.1f} MB", f"{counted / measured:.2f}"]
        )
    print("\n".join(format_columns(rows)))


if __name__ == "__main__":
    main()
