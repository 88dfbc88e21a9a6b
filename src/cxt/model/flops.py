"""FLOPs of training and decoding.

FLOPs are counted from the shapes, two for each multiplication with addition, and only where a position of the prefix-LM may
attend. A forward pass over one example, for W windows, width D, L blocks, H scales and n samples:

    matrices    2·W tokens × 24·D² × L      (attention 3 + 1, MLP 4 + 4)
    attention   4·D × (W² + W² + W·(W + 1)/2) × L      (sources see sources; target i sees all sources and i targets)
    head        2·W·D·vocabulary
    embedding   2 channels × H·W × 2·(n·D/H + (D/H)²)

A marginal or masked pass has the W sources only; a joint one applies the head to sources and targets. A contrastive one is
a marginal pass, and two more without the head.

A backward pass takes as much again for the gradients of activations, and once more for those of trained matrices.
"""

from cxt.config.learning import READINGS
from cxt.config.network import AdapterConfig, LoraConfig, ModelConfig


def forward_flops(network: ModelConfig, *, objective: str = "autoregressive") -> dict[str, float]:
    """FLOPs of the forward pass of one example, by part: blocks (matrices), attention, head, embedding."""
    windows, width, hidden = network.windows, network.width, network.width // network.scales
    sources_only = READINGS[objective] == ("marginal",) or objective == "masked"
    live = windows**2 if sources_only else 2 * windows**2 + windows * (windows + 1) / 2
    tokens = windows if sources_only else 2 * windows
    predictions = 2 * windows if objective == "joint" else windows
    outputs = 2 * (network.samples - 1) if objective == "masked" else network.vocabulary
    passes = 3 if objective == "contrastive" else 1
    return {
        "blocks": passes * tokens * 24 * width**2 * network.layers,
        "attention": passes * 4 * width * live * network.layers,
        "head": 2 * predictions * width * outputs,
        "embedding": passes * 2 * network.scales * windows * 2 * (network.samples * hidden + hidden**2),
    }


SHARES = {"attention": 4 / 12, "mlp": 8 / 12, "all": 1.0}
"""Share of the FLOPs of the blocks' matrices, by targets of LoRA."""


def training_flops(
    network: ModelConfig,
    adapter: AdapterConfig | None = None,
    lora: LoraConfig | None = None,
    *,
    objective: str = "autoregressive",
) -> float:
    """FLOPs of one training example, forward and backward; a frozen matrix needs no gradient of its own.

    One that LoRA changes does: the gradients of A and B are computed from it.
    """
    parts = forward_flops(network, objective=objective)
    if lora is not None:
        return 3 * sum(parts.values()) - parts["head"] - parts["embedding"] - (1 - SHARES[lora.targets]) * parts["blocks"]
    if adapter is None:
        return 3 * sum(parts.values())
    if adapter.unfreeze_strategy == "all":
        return 3 * sum(parts.values())
    trained = min(adapter.last_n, network.layers) / network.layers if "lastN" in adapter.unfreeze_strategy else 0.0
    frozen = parts["head"] + parts["embedding"] + (1 - trained) * parts["blocks"]
    # The adapter itself, 3 matrices of some tens of rows, takes less than a thousandth of this.
    return 3 * sum(parts.values()) - frozen


def reading_flops(network: ModelConfig, *, reading: str, replicates: int) -> float:
    """FLOPs of reading one pair: one pass over its sources (`marginal`), or decoding."""
    if reading == "marginal":
        return sum(forward_flops(network, objective="marginal").values())
    return decoding_flops(network, replicates=replicates)


def decoding_flops(network: ModelConfig, *, replicates: int) -> float:
    """FLOPs of decoding one pair: the sources once, and the windows of each replicate."""
    windows, width = network.windows, network.width
    parts = forward_flops(network)
    sources = parts["blocks"] / 2 + 4 * width * windows**2 * network.layers + parts["embedding"]
    targets = parts["blocks"] / 2 + 4 * width * (windows**2 + windows * (windows + 1) / 2) * network.layers + parts["head"]
    return sources + replicates * targets
