"""The network: a prefix language model over windows.

The source embedding turns the counts of each window into one vector. These are the prefix, and see each other freely.
After them come the start token and the bins predicted so far; each sees the whole prefix and what stands before it.

Shapes: B items, W windows, P = W sources, T = 2W positions, H heads, D width, S scales, n samples, V vocabulary,
R replicates.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from cxt.config import ModelConfig
from cxt.targets import SPECIAL_TOKENS, START_TOKEN

CHANNEL_WEIGHTS = (0.7, 0.3)
"""Fixed weights of the XOR and XNOR channels in the source embedding."""


def rotary_table(positions: int, head_width: int) -> torch.Tensor:
    """cos and sin of the rotary embedding: (2, positions, head_width / 2) float32, base 10 000."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of the last axis of x (..., L, hd) by *table* (2, L, hd / 2); in float32, cast back."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (..., L, hd / 2)
    cos, sin = table
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class SourceEmbedding(nn.Module):
    """Counts of one window to one vector; the same two-layer perceptron for every channel and scale."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.width // config.scales
        self.mask_bin0 = config.mask_singletons
        self.inner = nn.Linear(config.samples, hidden)
        self.outer = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("channel_weights", torch.tensor(CHANNEL_WEIGHTS).view(2, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 2, S, W, n) -> (B, W, D)
        if self.mask_bin0:
            x = torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:]], dim=-1)
        x = self.dropout(self.outer(F.gelu(self.inner(x))))  # (B, 2, S, W, D / S)
        x = (x * self.channel_weights).sum(dim=1)  # (B, S, W, D / S)
        return x.transpose(1, 2).flatten(2)  # scale-major within a window


class LayerNorm(nn.LayerNorm):
    """Weight only, eps 1e-5."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5, bias=False)


class Attention(nn.Module):
    """Prefix attention as two fused calls: sources among themselves, and targets over everything before them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def split(self, x: torch.Tensor) -> torch.Tensor:  # (B, L, k·D) -> (B, k·H, L, hd)
        return x.unflatten(-1, (-1, self.out.in_features // self.heads)).transpose(1, 2)

    def project(self, x: torch.Tensor, table: torch.Tensor):
        """Rotated queries and keys, and values, each (B, H, L, hd)."""
        q, k, v = self.split(self.qkv(x)).chunk(3, dim=1)
        return rotate(q, table), rotate(k, table), v

    def merge(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, L, hd) -> (B, L, D)
        return self.dropout(self.out(x.transpose(1, 2).flatten(2)))

    def forward(self, x: torch.Tensor, table: torch.Tensor, prefix: int, *, last: bool = False) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or the L - prefix last positions only where nothing reads the others (*last*)."""
        q, k, v = self.project(x, table)
        targets = x.shape[1] - prefix
        out = []
        if not last:
            out.append(F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix]))
        if targets:
            mask = causal_lower_right(targets, x.shape[1])
            out.append(F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=mask))
        return self.merge(torch.cat(out, dim=2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, L, D) -> (B, L, D)
        return self.dropout(self.down(F.gelu(self.up(x))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_attention = LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_mlp = LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, table: torch.Tensor, prefix: int, *, last: bool = False) -> torch.Tensor:
        attended = self.attention(self.norm_attention(x), table, prefix, last=last)
        x = (x[:, prefix:] if last else x) + attended
        return x + self.mlp(self.norm_mlp(x))


class Backbone(nn.Module):
    """The network without an adapter."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source_embedding = SourceEmbedding(config)
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.register_buffer("rotary", rotary_table(2 * config.windows + 1, config.width // config.heads), persistent=False)
        self.apply(self._initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Logits (B, W, V) for windows 1..W given log1p counts (B, 2, S, W, n) and tokens (B, W + 1).

        The last token is not read: nothing is predicted after it.
        """
        source = self.source_embedding(x)  # (B, W, D)
        target = self.token_embedding(y[:, :-1])  # (B, W, D)
        h = self.dropout(torch.cat([source, target], dim=1))  # (B, 2W, D)
        table = self.rotary[:, : h.shape[1]]
        windows = source.shape[1]
        prefix = windows + int(self.config.start_token_in_prefix)
        for block in self.blocks[:-1]:
            h = block(h, table, prefix)
        if prefix == windows:
            h = self.blocks[-1](h, table, prefix, last=True)  # the sources' last states are read by nothing
        else:
            h = self.blocks[-1](h, table, prefix)[:, windows:]
        return self.head(self.norm(h))


class CoalescenceModel(nn.Module):
    """A backbone, with or without a sample-size adapter in front of it.

    ``forward(X, y)`` takes log1p counts (B, 2, scales, windows, samples) and tokens (B, windows + 1), and returns logits
    (B, windows, vocabulary); ``logits[:, k]`` predicts ``y[:, k + 1]``. ``generate(X)`` decodes.
    """

    def __init__(self, config: ModelConfig, adapter: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.adapter = adapter
        self.backbone = Backbone(config)

    @property
    def samples(self) -> int:
        """Haplotypes of its input."""
        return self.config.samples if self.adapter is None else self.adapter.config.samples

    def train(self, mode: bool = True) -> "CoalescenceModel":
        """As usual, but an adapter's backbone stays in eval mode: it is trained without dropout."""
        super().train(mode)
        if self.adapter is not None:
            self.backbone.eval()
        return self

    def source(self, x: torch.Tensor) -> torch.Tensor:
        """Check the shape of X, and pass it through the adapter if there is one."""
        expected = (2, self.config.scales, self.config.windows, self.samples)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"X has shape {tuple(x.shape)}, expected (B, 2, scales, windows, samples) = (B, {expected})")
        x = x.to(self.backbone.head.weight.dtype)  # counts come as float32; the network may be in bfloat16
        return x if self.adapter is None else self.adapter(x)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.backbone(self.source(x), y)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over all windows of all items."""
        logits = self(x, y)
        return F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten())

    @torch.no_grad()
    def generate(
        self,
        x: torch.Tensor,
        *,
        replicates: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode with a key-value cache; special tokens are never sampled.

        The prefix is computed once for all replicates of an item.

        Parameters
        ----------
        x : log1p counts (B, 2, S, W, n)
        replicates : decoded sequences R per item
        temperature : divides the logits before sampling
        top_k : sample among this many most probable bins; all by default
        generator : of random numbers; torch's default one if None
        tokens : (B, R, W + 1); if given, nothing is sampled and these are fed instead (for tests and scoring)

        Returns
        -------
        tokens : (B, R, W) int64, bin + 2
        probabilities : (B, R, W, bins) float32, the predictive distribution of each window before *top_k*
        """
        if temperature <= 0:
            raise ValueError(f"temperature {temperature}: expected above 0")
        was_training = self.training
        self.eval()
        try:
            return self._generate(self.source(x), replicates, temperature, top_k, generator, tokens)
        finally:
            self.train(was_training)

    def _generate(self, x, replicates, temperature, top_k, generator, tokens):
        backbone, windows = self.backbone, x.shape[3]
        h = backbone.source_embedding(x)  # (B, W, D)
        table = backbone.rotary[:, :windows]
        caches = []
        for block in backbone.blocks:
            q, k, v = block.attention.project(block.norm_attention(h), table)
            caches.append(Cache(k, v, replicates, windows))
            h = h + block.attention.merge(F.scaled_dot_product_attention(q, k, v))
            h = h + block.mlp(block.norm_mlp(h))
        batch = x.shape[0]
        current = torch.full((batch, replicates), START_TOKEN, device=x.device)
        chosen = torch.empty((batch, replicates, windows), dtype=torch.int64, device=x.device)
        probabilities = torch.empty((batch, replicates, windows, self.config.bins), device=x.device)
        for step in range(windows):
            h = backbone.token_embedding(current)  # (B, R, D)
            position = backbone.rotary[:, windows + step : windows + step + 1]
            for block, cache in zip(backbone.blocks, caches, strict=True):
                q, k, v = block.attention.project(block.norm_attention(h), position)  # (B, H, R, hd), same position
                h = h + block.attention.merge(cache.attend(q, k, v))
                h = h + block.mlp(block.norm_mlp(h))
            logits = backbone.head(backbone.norm(h)).float()[..., SPECIAL_TOKENS:] / temperature  # (B, R, bins)
            probabilities[:, :, step] = logits.softmax(-1)
            if tokens is not None:
                current = tokens[:, :, step + 1]
            else:
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
                    logits = logits.masked_fill(logits < least, -torch.inf)
                drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
                current = drawn.view(batch, replicates) + SPECIAL_TOKENS
            chosen[:, :, step] = current
        return chosen, probabilities


class Cache:
    """Keys and values of one block: of the prefix once per item, of decoded tokens per replicate."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, replicates: int, steps: int):
        self.prefix_k, self.prefix_v = k, v  # (B, H, P, hd)
        batch, heads, _, width = k.shape
        self.k = k.new_empty((batch, heads, replicates, steps, width))
        self.v = v.new_empty((batch, heads, replicates, steps, width))
        self.length = 0

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Add one token per replicate, and attend from it to the prefix and to its own past: all (B, H, R, hd)."""
        self.k[:, :, :, self.length] = k
        self.v[:, :, :, self.length] = v
        self.length += 1
        past_k, past_v = self.k[:, :, :, : self.length], self.v[:, :, :, : self.length]  # (B, H, R, t, hd)
        scale = 1 / math.sqrt(q.shape[-1])
        to_prefix = q @ self.prefix_k.transpose(-1, -2)  # (B, H, R, P)
        to_past = (past_k @ q.unsqueeze(-1)).squeeze(-1)  # (B, H, R, t)
        weights = (torch.cat([to_prefix, to_past], dim=-1) * scale).float().softmax(-1).type_as(v)
        prefix = to_prefix.shape[-1]
        return weights[..., :prefix] @ self.prefix_v + (weights[..., None, prefix:] @ past_v).squeeze(-2)
