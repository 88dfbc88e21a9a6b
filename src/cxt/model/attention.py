"""Attention of a prefix language model, without a dense mask.

The sources (the prefix) attend to each other; a target attends to the whole prefix, to itself, and to the targets before it.
This takes two calls of fused kernels or, on a GPU, one call of FlexAttention, which gets the rule instead of a mask.

Shapes: B examples, P positions of the prefix, L positions in total, H heads, D width, hd = D / H.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cxt.config.network import ModelConfig


def build_rotary_table(positions: int, head_width: int, *, device=None) -> torch.Tensor:
    """Cosine and sine of the rotary embedding with base 10 000.

    Parameters
    ----------
    positions : int
        Number of positions L.
    head_width : int
        Width hd of a head, even.
    device : torch device, optional

    Returns
    -------
    float32 tensor (2, positions, head_width / 2)
    """
    frequency = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
    angle = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of the last axis of *x*, in float32.

    Parameters
    ----------
    x : tensor (..., L, hd)
    table : float32 tensor (2, L, hd / 2)
        From `build_rotary_table`.

    Returns
    -------
    tensor (..., L, hd) of the type of *x*
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (..., L, hd / 2, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass over memory instead of several; a compiler would fuse them by itself.
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(*table))
    else:
        even, odd = pairs.unbind(-1)  # (..., L, hd / 2)
        cos, sin = table
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).type_as(x)


def split_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int, *, targets_only: bool) -> torch.Tensor:
    """Prefix attention by torch's fused kernels.

    One causal call over all positions gives the targets, and another call the sources. Torch's flash kernels support heads of
    any width up to 256; if it is not a multiple of 8, such as the published 100, torch pads it inside the call. (Torch's
    lower-right causal bias would save a quarter of the work of the causal call, but `torch.compile` cannot trace it and would
    break the graph twice in every block.)

    Parameters
    ----------
    q, k, v : tensors (B, H, L, hd)
        Queries, keys and values.
    prefix : int
        Number P of source positions, at the beginning.
    targets_only : bool
        Compute only the last L - P positions.

    Returns
    -------
    tensor (B, H, L, hd), or (B, H, L - P, hd) with *targets_only*
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and has_cpu_flash_kernels():
        return MergedAttention.apply(q, k, v, prefix, targets_only)
    targets = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, prefix:]
    if targets_only:
        return targets
    sources = F.scaled_dot_product_attention(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix])
    return torch.cat([sources, targets], dim=2)


@functools.cache
def has_cpu_flash_kernels() -> bool:
    """Whether this torch has the CPU kernels that `MergedAttention` calls, with the same arguments.

    They are private to torch, and a release may change or drop them; `split_attention` then works without them.
    """
    probe = torch.ones((1, 1, 2, 8), dtype=torch.float32, device="cpu")
    try:
        out, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(probe, probe, probe, is_causal=True)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            probe, probe, probe, probe, out, normalizer, 0.0, True
        )
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return out.shape == probe.shape and normalizer.shape == probe.shape[:3] and len(gradients) == 3


class MergedAttention(torch.autograd.Function):
    """Prefix attention on a CPU without duplicate work: all queries over the prefix, and targets causally over targets.

    The two parts of a target are merged by their normalizers (Milakov and Gimelshein 2018), which the flash kernel returns.
    The kernel's backward pass is exact for each part if it gets the merged output and normalizer.
    """

    @staticmethod
    def forward(ctx, q, k, v, prefix: int, targets_only: bool):
        """Compute what `split_attention` does, on a CPU.

        Parameters
        ----------
        ctx : autograd context
            Stores the tensors for `backward`.
        q, k, v : tensors (B, H, L, hd)
            Queries, keys and values.
        prefix : int
            Number P of source positions, at the beginning.
        targets_only : bool
            Compute only the last L - P positions.

        Returns
        -------
        tensor (B, H, L', hd)
            L' is L, or L - P with *targets_only*.
        """
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        queries = q[:, :, prefix:] if targets_only else q
        out, normalizer = flash(queries, k[:, :, :prefix], v[:, :, :prefix])  # (B, H, L', hd), (B, H, L')
        targets = q.shape[2] - prefix
        if targets:
            causal, causal_normalizer = flash(q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:], is_causal=True)
            merged, merged_normalizer = out[:, :, -targets:], normalizer[:, :, -targets:]  # over the prefix, so far
            weight = torch.sigmoid(causal_normalizer - merged_normalizer).unsqueeze(-1).type_as(out)
            merged.lerp_(causal, weight)
            merged_normalizer.copy_(torch.logaddexp(causal_normalizer, merged_normalizer))
        ctx.save_for_backward(q, k, v, out, normalizer)
        ctx.prefix, ctx.targets_only = prefix, targets_only
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        """Gradients of *q*, *k* and *v*, each (B, H, L, hd), given that of the output (B, H, L', hd)."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        q, k, v, out, normalizer = ctx.saved_tensors
        prefix, targets = ctx.prefix, q.shape[2] - ctx.prefix
        queries = q[:, :, prefix:] if ctx.targets_only else q
        dq, dk, dv = flash(gradient, queries, k[:, :, :prefix], v[:, :, :prefix], out, normalizer, 0.0, False)
        if targets:
            last = slice(-targets, None)
            causal_gradients = flash(
                gradient[:, :, last], q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:],
                out[:, :, last], normalizer[:, :, last], 0.0, True,
            )  # fmt: skip
            dq[:, :, last] += causal_gradients[0]
            dk, dv = torch.cat([dk, causal_gradients[1]], dim=2), torch.cat([dv, causal_gradients[2]], dim=2)
        if ctx.targets_only:
            dq = F.pad(dq, (0, 0, prefix, 0))
        return dq, dk, dv, None, None


@functools.cache
def build_block_mask(length: int, prefix: int, first: int, device: str):
    """FlexAttention's block mask of the queries *first*, …, *length* - 1 over all keys; cached by shape and device."""

    def visible(b, h, query, key):
        return (key < prefix) | (key <= query + first)

    return create_block_mask(visible, None, None, length - first, length, device=device)


@functools.cache
def compile_flex_attention():
    """Compile FlexAttention, which is not fused otherwise."""
    return torch.compile(flex_attention, dynamic=False)


def flexible_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefix: int, *, targets_only: bool) -> torch.Tensor:
    """The same as `split_attention`, but in one call of FlexAttention, which has gradients on GPUs only."""
    length = q.shape[2]
    first = prefix if targets_only else 0
    mask = build_block_mask(length, prefix, first, str(q.device))
    # If the whole step is compiled, this is part of it; compiling it separately would break the graph of the step.
    attend = flex_attention if torch.compiler.is_compiling() else compile_flex_attention()
    return attend(q[:, :, first:], k, v, block_mask=mask)


class Attention(nn.Module):
    """Projections, rotary embedding and prefix attention of one block; the attribute *flexible* selects FlexAttention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.flexible = False
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Split the last axis into heads: (B, L, m·D) -> (B, m·H, L, hd)."""
        return x.unflatten(-1, (-1, self.out.in_features // self.heads)).transpose(1, 2)

    def project(self, x: torch.Tensor, table: torch.Tensor):
        """Rotated queries, rotated keys, and values of *x* (B, L, D): each (B, H, L, hd)."""
        q, k, v = self.split(self.qkv(x)).chunk(3, dim=1)
        return rotate(q, table), rotate(k, table), v

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """Join the heads and project: (B, H, L, hd) -> (B, L, D)."""
        return self.dropout(self.out(x.transpose(1, 2).flatten(2)))

    def forward(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        prefix: int,
        *,
        targets_only: bool = False,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within *x* (B, L, D): (B, L, D), or with *targets_only* (B, L - prefix, D).

        Packed rows need a mask, *visible* (B, 1, L, L): True where a position attends to another one (last axis).
        """
        q, k, v = self.project(x, table)
        if visible is not None:
            first = prefix if targets_only else 0
            return self.merge(F.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=visible[:, :, first:]))
        if prefix == x.shape[1]:  # sources only, which all see each other
            return self.merge(F.scaled_dot_product_attention(q, k, v))
        attend = flexible_attention if self.flexible else split_attention
        return self.merge(attend(q, k, v, prefix, targets_only=targets_only))
