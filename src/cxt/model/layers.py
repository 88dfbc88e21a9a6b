"""The layers of the network: the embedding of windows, and the transformer block.

Shapes: B examples, W windows, L positions, D width, S scales, n samples.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cxt.config.network import ModelConfig
from cxt.model.attention import Attention

CHANNEL_WEIGHTS = (0.7, 0.3)
"""Fixed weights of the XOR and XNOR channels in the source embedding."""


class SourceEmbedding(nn.Module):
    """Maps the counts of one window to one vector, by a two-layer perceptron.

    It is the same for every channel and scale, or one for each with `separate_embeddings`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.width // config.scales
        perceptrons = 2 * config.scales if config.separate_embeddings else 1
        self.inner = nn.Linear(config.samples, perceptrons * hidden)
        self.outer = nn.Linear(hidden, perceptrons * hidden)
        self.is_separate = config.separate_embeddings
        self.dropout = nn.Dropout(config.dropout)
        bins = torch.ones(config.samples)
        bins[0] = 0.0 if config.mask_singletons else 1.0
        self.register_buffer("bins", bins, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed the log1p counts of each window: (B, 2, S, W, n) -> (B, W, D)."""
        # Masking bin 0 in the weights is equivalent to masking it in x, and avoids a copy of x.
        inner = self.inner.weight * self.bins
        embedded = self._embed_separately(x, inner) if self.is_separate else self._embed_alike(x, inner)
        x = self.dropout(embedded)  # (B, 2, S, W, D / S)
        x = CHANNEL_WEIGHTS[0] * x[:, 0] + CHANNEL_WEIGHTS[1] * x[:, 1]  # (B, S, W, D / S)
        return x.transpose(1, 2).flatten(2)  # scale-major within a window

    def _embed_alike(self, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Embed all by the same perceptron: (B, 2, S, W, n) -> (B, 2, S, W, D / S)."""
        return self.outer(F.gelu(F.linear(x, inner, self.inner.bias)))

    def _embed_separately(self, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Embed by the perceptron of each channel and scale: (B, 2, S, W, n) -> (B, 2, S, W, D / S)."""
        batch, channels, scales, windows, samples = x.shape
        perceptrons = channels * scales
        x = x.permute(1, 2, 0, 3, 4).reshape(perceptrons, batch * windows, samples)

        def apply(x, weight, bias):
            weight = weight.reshape(perceptrons, -1, weight.shape[1]).transpose(1, 2)  # (2 S, in, D / S)
            return torch.baddbmm(bias.reshape(perceptrons, 1, -1), x, weight)

        x = apply(F.gelu(apply(x, inner, self.inner.bias)), self.outer.weight, self.outer.bias)
        return x.reshape(channels, scales, batch, windows, -1).permute(2, 0, 1, 3, 4)


class LayerNorm(nn.LayerNorm):
    """Layer norm without bias, with eps 1e-5."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5, bias=False)


class MLP(nn.Module):
    """The feed-forward part of a block: two linear maps, the hidden one four times as wide, with a GELU between."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position by itself: (B, L, D) -> (B, L, D)."""
        return self.dropout(self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_attention = LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_mlp = LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        prefix: int,
        *,
        targets_only: bool = False,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply attention and the feed-forward part, each with a residual connection.

        Parameters
        ----------
        x : tensor (B, L, D)
        table : float32 tensor (2, L, hd / 2)
            From `cxt.model.attention.build_rotary_table`; (2, B, 1, L, hd / 2) for packed rows, in which positions differ.
        prefix : int
            Number of positions at the beginning that all positions see.
        targets_only : bool
            Compute only the positions after the prefix.
        visible : bool tensor (B, 1, L, L), optional
            For packed rows: which positions each position attends to.

        Returns
        -------
        tensor (B, L, D), or (B, L - prefix, D) with *targets_only*
        """
        attended = self.attention(self.norm_attention(x), table, prefix, targets_only=targets_only, visible=visible)
        x = (x[:, prefix:] if targets_only else x) + attended
        return x + self.mlp(self.norm_mlp(x))
