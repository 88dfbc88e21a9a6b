"""Parametrisations of weights: matrices of the blocks that are functions of other tensors.

Torch computes a parametrised weight whenever it is read (`torch.nn.utils.parametrize`), so that the blocks need not know of it.
`attach` registers parametrisations, `merge` replaces each by its value, and `select_published_tensors` gives what a checkpoint
holds of a parametrised network.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from cxt.config.network import LoraConfig
from cxt.model.transformer import CoalescenceModel

ORIGINAL = ".parametrizations.weight.original"
"""End of the name of the tensor that a parametrised weight is computed from; its other tensors are numbered."""


class LoRA(nn.Module):
    """A low-rank change of a frozen matrix: W + (alpha / rank) · B A (Hu et al. 2021).

    B is zero at first, so that training starts from W; A is normal with the variance of a layer that keeps variances.

    Parameters
    ----------
    weight : tensor (out, in)
        The matrix W.
    config : LoraConfig
    """

    def __init__(self, weight: torch.Tensor, config: LoraConfig):
        super().__init__()
        out, width = weight.shape
        like = {"dtype": weight.dtype, "device": weight.device}
        self.a = nn.Parameter(torch.randn(config.rank, width, **like) / width**0.5)  # (rank, in)
        self.b = nn.Parameter(torch.zeros(out, config.rank, **like))  # (out, rank)
        self.factor = config.alpha / config.rank

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed matrix (out, in)."""
        # In the type of the weights also where other products are rounded, so that it equals the merged matrix.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.b, self.a, alpha=self.factor)


def list_matrices(model: CoalescenceModel, targets: str = "all") -> Iterator[nn.Linear]:
    """The linear maps of the blocks: those of `attention`, of the `mlp`, or `all`."""
    for block in model.backbone.blocks:
        if targets in ("attention", "all"):
            yield from (block.attention.qkv, block.attention.out)
        if targets in ("mlp", "all"):
            yield from (block.mlp.up, block.mlp.down)


def attach(model: CoalescenceModel, *, lora: LoraConfig | None = None) -> None:
    """Parametrise the matrices of the blocks, in place.

    Parameters
    ----------
    model : CoalescenceModel
        With the weights that are parametrised.
    lora : LoraConfig, optional
        Change chosen matrices by LoRA, with new random A, and freeze all other parameters.
    """
    if lora is not None:
        model.requires_grad_(False)
        for linear in list_matrices(model, lora.targets):
            # Unsafe only skips computing the weight once to check its shape, which the meta device cannot.
            parametrize.register_parametrization(linear, "weight", LoRA(linear.weight, lora), unsafe=True)


def merge(model: CoalescenceModel) -> None:
    """Replace each parametrised matrix by its value, in place; the tensors have the names that they had before `attach`."""
    for linear in list_matrices(model):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def list_lora_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices A and B among the *tensors* of a state dict, by name."""
    return {name: value for name, value in tensors.items() if ".parametrizations." in name and not name.endswith(ORIGINAL)}


def select_published_tensors(tensors: dict[str, torch.Tensor], *, has_lora: bool) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a state dict: all tensors, or with LoRA the matrices A and B only."""
    return list_lora_tensors(tensors) if has_lora else tensors
