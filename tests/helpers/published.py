"""Small files of the original package's format, with random weights, in place of the published checkpoints."""

import torch

from cxt.checkpoints.published import published_name
from cxt.config.network import AdapterConfig, ModelConfig
from cxt.model.adapter import build_model
from cxt.model.layers import CHANNEL_WEIGHTS


def write_published(path, network: ModelConfig, adapter: AdapterConfig | None = None, *, seed: int = 1):
    """Write a file of the original package's format; returns *path*."""
    torch.manual_seed(seed)
    state = build_model(network, adapter).state_dict()
    prefix = "model." if adapter is None else "model.backbone."
    tensors = {published_name(key, adapter=adapter is not None): value for key, value in state.items()}
    tensors[f"{prefix}transformer.bt2ls.weights"] = torch.tensor(CHANNEL_WEIGHTS)
    configuration = {
        "n_layer": network.layers, "n_embd": network.width, "n_head": network.heads, "output_dim": network.bins + 2,
        "num_samples": network.samples, "combined_dim": 2 * network.windows + 1, "window_size": network.window_size,
        "mask_singletons": network.mask_singletons, "dropout": network.dropout, "bias": False, "sample_scale_embd": 2,
    }  # fmt: skip
    hyper = {"gpt_config": configuration}
    if adapter is not None:
        hyper |= {"ie_new": adapter.samples, "adapter_bottleneck": adapter.bottleneck, "adapter_dropout": adapter.dropout}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"pytorch-lightning_version": "2.0", "hyper_parameters": hyper, "state_dict": tensors, "global_step": 1, "epoch": 0},
        path,
    )
    return path
