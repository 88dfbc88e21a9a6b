"""The published formulation of the network, as a reference for speed and memory; never used for training or decoding.

It has one sequence of sources and tokens with a dense boolean mask, and applies every layer and the head to all positions.
"""

import torch
import torch.nn.functional as F

from cxt.model.transformer import CoalescenceModel


def build_dense_mask(windows: int, prefix: int, device) -> torch.Tensor:
    """True where a position may attend: (2W + 1, 2W + 1), causal except that the first *prefix* positions see each other."""
    length = 2 * windows + 1
    mask = torch.ones((length, length), dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (B, H, L, hd) by cos and sin (2, L, hd / 2), without fusing operations."""
    cos, sin = table
    even, odd = x.float()[..., ::2], x.float()[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


def compute_dense_loss(model: CoalescenceModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute `model.loss(x, y)` by the published formulation."""
    backbone = model.backbone
    windows = x.shape[3]
    source = backbone.embed_sources(model.adapt_input(x), None)  # (B, W, D)
    h = backbone.dropout(torch.cat([source, backbone.token_embedding(y)], dim=1))  # (B, 2W + 1, D)
    mask = build_dense_mask(windows, windows + int(model.config.start_token_in_prefix), x.device)
    mask = mask.expand(len(x), 1, -1, -1).contiguous()  # (B, 1, 2W + 1, 2W + 1)
    for block in backbone.blocks:
        attention = block.attention
        q, k, v = attention.split(attention.qkv(block.norm_attention(h))).chunk(3, dim=1)  # (B, H, 2W + 1, hd)
        q, k = rotate(q, backbone.rotary), rotate(k, backbone.rotary)
        h = h + attention.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        h = h + block.mlp(block.norm_mlp(h))
    logits = backbone.head(backbone.norm(h))[:, windows:-1]  # (B, W, V)
    return F.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten())
