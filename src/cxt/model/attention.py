"""Attention of a prefix language model, without a dense mask.

The sources (the prefix) see each other; a target sees the whole prefix, itself, and the targets before it. That is
two calls of fused kernels, or on a GPU one call of FlexAttention, which is handed the rule instead of a mask.

Shapes: B items, P positions of the prefix, L positions in all, H heads, D width, hd = D / H.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cxt.config.settings import ModelConfig


def build_rotary_table(positions: int, head_width: int, *, device=None) -> torch.Tensor:
    """cos and sin of the rotary embedding: (2, positions, head_width / 2) float32, base 10 000."""
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of the last axis of x (..., L, hd) by *table* (2, L, hd / 2); in float32, cast back."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., L, hd / 2, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass over memory instead of several, which a compiler would make one of by itself.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(*table))
    else:
        even, odd = pairs.unbind(-1)  # (..., L, hd / 2)
        cos, sin = table
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).type_as(x)


def split_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int, *, last: bool) -> torch.Tensor:
    """(B, H, L, hd) each to (B, H, L, hd), or with *last* to the L - prefix last positions only.

    One causal call over everything, right for the targets, and one call of the sources among themselves. These are torch's
    flash kernels, for heads of any width up to 256: where it is no multiple of 8, as the published 100, torch pads it
    inside the call. (Torch's lower-right causal bias would save the causal call its upper quarter, but `torch.compile`
    cannot follow it and would cut the network into pieces, two for every block.)
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        return MergedAttention.apply(q, k, v, prefix, last)
    targets = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, prefix:]
    if last:
        return targets
    sources = F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix])
    return torch.cat([sources, targets], dim=2)


class MergedAttention(torch.autograd.Function):
    """The same on a CPU, without computing anything twice: everything over the prefix, and targets causally over targets.

    A target's two parts are merged by their normalizers (Milakov and Gimelshein 2018), which the flash kernel returns. Its
    backward pass is exact for each part when it is given the merged output and normalizer.
    """

    @staticmethod
    def forward(ctx, q, k, v, prefix: int, last: bool):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        asked = q[:, :, prefix:] if last else q
        out, normalizer = flash(asked, k[:, :, :prefix], v[:, :, :prefix])  # (B, H, L', hd), (B, H, L')
        targets = q.shape[2] - prefix
        if targets:
            own, own_normalizer = flash(q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:], is_causal=True)
            theirs, their_normalizer = out[:, :, -targets:], normalizer[:, :, -targets:]
            weight = torch.sigmoid(own_normalizer - their_normalizer).unsqueeze(-1).type_as(out)
            theirs.lerp_(own, weight)
            their_normalizer.copy_(torch.logaddexp(own_normalizer, their_normalizer))
        ctx.save_for_backward(q, k, v, out, normalizer)
        ctx.prefix, ctx.last = prefix, last
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, normalizer = ctx.saved_tensors
        prefix, targets = ctx.prefix, q.shape[2] - ctx.prefix
        asked = q[:, :, prefix:] if ctx.last else q
        dq, dk, dv = flash(gradient, asked, k[:, :, :prefix], v[:, :, :prefix], out, normalizer, 0.0, False)
        if targets:
            part = slice(-targets, None)
            own = flash(
                gradient[:, :, part], q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:],
                out[:, :, part], normalizer[:, :, part], 0.0, True,
            )  # fmt: skip
            dq[:, :, part] += own[0]
            dk, dv = torch.cat([dk, own[1]], dim=2), torch.cat([dv, own[2]], dim=2)
        if ctx.last:
            dq = F.pad(dq, (0, 0, prefix, 0))
        return dq, dk, dv, None, None


@functools.cache
def build_block_mask(length: int, prefix: int, first: int, device: str):
    """FlexAttention's block mask of queries *first* … length - 1 over all keys; made once for each shape and device."""

    def visible(b, h, query, key):
        return (key < prefix) | (key <= query + first)

    return create_block_mask(visible, None, None, length - first, length, device=device)


@functools.cache
def compile_flex_attention():
    """FlexAttention is only fused when it is compiled."""
    return torch.compile(flex_attention, dynamic=False)


def flexible_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int, *, last: bool) -> torch.Tensor:
    """The same as `split_attention` in one call of FlexAttention; with gradients only on a GPU."""
    length = q.shape[2]
    first = prefix if last else 0
    mask = build_block_mask(length, prefix, first, str(q.device))
    # Where the whole step is compiled, so is this; a compilation inside of it would cut the network into pieces.
    attend = flex_attention if torch.compiler.is_compiling() else compile_flex_attention()
    return attend(q[:, :, first:], k, v, block_mask=mask)


class Attention(nn.Module):
    """Projections, rotary embedding and prefix attention of one block; *flexible* chooses FlexAttention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.flexible = False
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
        attend = flexible_attention if self.flexible else split_attention
        return self.merge(attend(*self.project(x, table), prefix, last=last))
