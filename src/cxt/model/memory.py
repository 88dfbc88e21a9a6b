"""Memory of a training step: weights, gradients, optimizer and activations, counted from the shapes.

Activations are what the forward pass keeps for the backward pass. For L blocks, width D, W windows, S scales and n samples, an
example has T = 2W tokens (W for objectives without tokens), and each token keeps in each block

    2 vectors of the residual stream                 before each layer norm
    17 vectors of matrix inputs and outputs          2 normalized; query, key, value and their rotated copies (5); attention,
                                                     in two layouts (2); the hidden layer before and after the GELU (8)
    2 masks of dropout

In mixed precision, the stream has 4 bytes and the 17 vectors have 2. Where a matrix is frozen, its input is not kept. The last
block computes the targets only. The counts are those without `torch.compile`, which keeps less by computing cheap operations
again, and leave out the workspace of single operations; benchmarks/memory.py compares them with what was measured.
"""

from cxt.config.learning import READINGS
from cxt.config.network import AdapterConfig, LoraConfig, ModelConfig
from cxt.config.training import TrainingConfig

MOMENTS = {"sgd": 1, "lion": 1, "muon": 1, "adafactor": 0}
"""Numbers that an optimizer keeps for each trained parameter; others, like AdamW, keep two."""

HALF = 2
FULL = 4


def count_parameters(network: ModelConfig) -> dict[str, int]:
    """Parameters of a network without an adapter, by part: matrices and norms of the blocks, embedding, and head."""
    width, hidden = network.width, network.width // network.scales
    perceptrons = 2 * network.scales if network.separate_embeddings else 1
    embedding = perceptrons * hidden * (network.samples + 1) + perceptrons * hidden * (hidden + 1)
    return {
        "matrices": network.layers * 12 * width**2,
        "norms": (2 * network.layers + 1) * width,
        "embedding": embedding + network.vocabulary * width + (4 * width if network.reads_rates else 0),
        "head": network.vocabulary * width,
    }


def count_trained_parameters(network: ModelConfig, adapter: AdapterConfig | None, lora: LoraConfig | None) -> int:
    """Trained parameters; those of an adapter itself and of LoRA, which are few, are left out."""
    parts = count_parameters(network)
    if lora is not None:
        return 0
    if adapter is None or adapter.unfreeze_strategy == "all":
        return sum(parts.values())
    last = min(adapter.last_n, network.layers) / network.layers if "lastN" in adapter.unfreeze_strategy else 0.0
    has_norms = "ln" in adapter.unfreeze_strategy.split("_")
    norms = parts["norms"] if has_norms else round(last * 2 * network.layers * network.width)
    rates = 4 * network.width if network.reads_rates else 0  # always trained
    return round(last * parts["matrices"]) + norms + rates


def activation_bytes(
    network: ModelConfig, training: TrainingConfig, adapter: AdapterConfig | None = None, *, precision: str, on_gpu: bool
) -> int:
    """Bytes of the activations of one batch of training, at their peak, on each device.

    Parameters
    ----------
    network, adapter : ModelConfig, AdapterConfig or None
    training : TrainingConfig
        batch_size, objective, loss_path and gradient_checkpointing are used.
    precision : str
        In which the devices compute.
    on_gpu : bool
        Masks of dropout take one byte for each number on a GPU, and four on a CPU.
    """
    windows, width = network.windows, network.width
    stream = HALF if precision == "bf16-true" else FULL
    narrow = FULL if precision == "32-true" else HALF
    drops = network.dropout > 0 and adapter is None  # the backbone of an adapter trains without dropout
    mask = (1 if on_gpu else FULL) if drops else 0
    sources_only = READINGS[training.objective] == ("marginal",) or training.objective == "masked"
    tokens = windows if sources_only else 2 * windows
    inputs = 17.0
    if adapter is not None and adapter.unfreeze_strategy != "all":
        frozen = 1.0 - (min(adapter.last_n, network.layers) / network.layers if "lastN" in adapter.unfreeze_strategy else 0.0)
        inputs -= 7 * frozen  # the two normalized vectors, the merged attention, and the hidden layer after the GELU
    block = tokens * width * (2 * stream + inputs * narrow + 2 * mask)
    blocks = network.layers * block
    if training.objective == "autoregressive" and training.loss_path != "full":  # the last block computes the targets only
        blocks -= windows * width * (stream + 11 * narrow + 2 * mask)
    predictions = {"joint": 2 * windows}.get(training.objective, windows)
    if training.loss_path == "full":
        predictions = tokens
    outputs = 2 * (network.samples - 1) if training.objective == "masked" else network.vocabulary
    # Log-probabilities and two gradients in 32 bits. A chunked loss has an eighth of them at a time.
    logits = 3 * FULL * predictions * outputs / (8 if training.loss_path == "chunked" else 1)
    counted = 2 * network.scales * windows * network.samples
    embedding = (FULL + (narrow if narrow != FULL else 0)) * counted + 2 * windows * width * (2 * narrow + mask)
    head = predictions * width * (stream + narrow) + tokens * width * mask
    passes = 3 if training.objective == "contrastive" else 1
    if training.gradient_checkpointing:  # a block is computed again when the logits are gone
        kept = network.layers * tokens * width * stream
        return round(training.batch_size * (passes * (kept + embedding) + max(block, head + logits)))
    return round(training.batch_size * (passes * (blocks + embedding) + head + logits))


def training_memory(
    network: ModelConfig,
    training: TrainingConfig,
    adapter: AdapterConfig | None = None,
    lora: LoraConfig | None = None,
    *,
    precision: str,
    on_gpu: bool,
    parameters: int | None = None,
    trained: int | None = None,
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer and activations of a training step on each device.

    *parameters* and *trained* are counted from the shapes if they are not given. bf16-true has everything in 16 bits.
    """
    size = HALF if precision == "bf16-true" else FULL
    parameters = sum(count_parameters(network).values()) if parameters is None else parameters
    trained = count_trained_parameters(network, adapter, lora) if trained is None else trained
    return {
        "weights": size * parameters,
        "gradients": size * trained,
        "optimizer": MOMENTS.get(training.optimizer.name, 2) * size * trained,
        "activations": activation_bytes(network, training, adapter, precision=precision, on_gpu=on_gpu),
    }
