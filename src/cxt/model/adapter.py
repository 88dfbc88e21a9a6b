"""The sample-size adapter, which maps counts of few haplotypes to the input of a backbone trained on many."""

import torch
import torch.nn.functional as F
from torch import nn

from cxt.config.network import AdapterConfig, ModelConfig
from cxt.errors import BadRequest
from cxt.model.packing import average_regions
from cxt.model.transformer import CoalescenceModel


class IEAdapter(nn.Module):
    """Input-expanding adapter along the frequency axis: squeeze-excite, a linear residual, and a gated branch.

    Where the backbone masks frequency bin 0, that bin is set to 0 first. Where the bin carries missingness it reaches the
    adapter unchanged, unless `overwrite_bin0` asks for the published behaviour.

    Parameters
    ----------
    config : AdapterConfig
    backbone : ModelConfig
        The network behind the adapter, which must have more samples.
    """

    def __init__(self, config: AdapterConfig, backbone: ModelConfig):
        super().__init__()
        if not 1 < config.samples < backbone.samples:
            raise BadRequest(f"an adapter must have fewer samples than the backbone's {backbone.samples}, got {config.samples}")
        self.config = config
        hidden = max(config.samples // 4, 1)
        self.excite = nn.Sequential(
            nn.Linear(config.samples, hidden), nn.ReLU(), nn.Linear(hidden, config.samples), nn.Sigmoid()
        )
        self.residual = nn.Linear(config.samples, backbone.samples)
        self.norm = nn.LayerNorm(config.samples)
        self.gated = nn.Linear(config.samples, 2 * config.bottleneck, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.bottleneck, backbone.samples)
        self.alpha = nn.Parameter(torch.tensor(1e-3))
        # The published `mask_token` is never trained, so that it is always 0 in published weights.
        self.register_buffer("mask_token", torch.tensor(0.0))
        self.overwrites_bin0 = backbone.mask_singletons or config.overwrite_bin0

    def forward(self, x: torch.Tensor, *, regions: torch.Tensor | None = None) -> torch.Tensor:
        """Expand log1p counts of n samples to the backbone's N samples: (B, 2, S, W, n) -> (B, 2, S, W, N).

        *regions* (B, W) are those of packed rows, see `cxt.model.packing`.
        """
        if self.overwrites_bin0:
            x = torch.cat([self.mask_token.expand_as(x[..., :1]).type_as(x), x[..., 1:]], dim=-1)
        if regions is None:
            x = x * self.excite(x.mean(dim=(1, 2, 3)))[:, None, None, None]
        else:
            x = x * self.excite(average_regions(x.mean(dim=(1, 2)), regions))[:, None, None]  # (B, 1, 1, W, n)
        value, gate = self.gated(self.norm(x)).chunk(2, dim=-1)
        return self.residual(x) + self.alpha * self.out(self.dropout(F.silu(gate) * value))


def build_model(config: ModelConfig, adapter: AdapterConfig | None = None) -> CoalescenceModel:
    """Build a model with new random weights, with an adapter in front of it if *adapter* is given."""
    return CoalescenceModel(config, None if adapter is None else IEAdapter(adapter, config))


def is_trainable(name: str, config: AdapterConfig, layers: int) -> bool:
    """Whether the backbone parameter *name* is trained along with the adapter, according to the adapter's strategy.

    The embedding of rates always is: a parent may not have had one.
    """
    norms = config.unfreeze_strategy in ("ln", "ln_lastN") and "norm" in name
    last = config.unfreeze_strategy in ("lastN", "ln_lastN") and any(
        name.startswith(f"blocks.{i}.") for i in range(max(0, layers - config.last_n), layers)
    )
    return norms or last or config.unfreeze_strategy == "all" or name.startswith("rate_embedding.")


def freeze_backbone(model: CoalescenceModel) -> None:
    """Freeze the backbone of a model with an adapter, except for the parameters that the adapter's strategy names."""
    for name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(is_trainable(name, model.adapter.config, model.config.layers))
