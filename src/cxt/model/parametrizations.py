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
from cxt.model.quantization import round_matrix
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


class WeightNoise(nn.Module):
    """Normal noise on a matrix, in training mode only, new each time it is read; the gradient is that of the matrix.

    *relative* is the standard deviation of the noise relative to that of the matrix.
    """

    def __init__(self, relative: float):
        super().__init__()
        self.relative = relative

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix with noise (out, in)."""
        if not self.training:
            return weight
        return weight + self.relative * weight.detach().std() * torch.randn_like(weight)


class Rounding(nn.Module):
    """Rounding of each row of a matrix to integers of *bits* bits times a scale (see `cxt.model.quantization`).

    The gradient passes as if nothing were rounded (the straight-through estimator, Bengio et al. 2013).
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The rounded matrix (out, in)."""
        return round_matrix(weight, bits=self.bits) + (weight - weight.detach())  # the difference is exactly 0


def list_matrices(model: CoalescenceModel, targets: str = "all") -> Iterator[nn.Linear]:
    """The linear maps of the blocks: those of `attention`, of the `mlp`, or `all`."""
    for block in model.backbone.blocks:
        if targets in ("attention", "all"):
            yield from (block.attention.qkv, block.attention.out)
        if targets in ("mlp", "all"):
            yield from (block.mlp.up, block.mlp.down)


def attach(model: CoalescenceModel, *, lora: LoraConfig | None = None, noise: float = 0.0, bits: int = 0) -> None:
    """Parametrise the matrices of the blocks, in place: changed by LoRA first, then noisy, then rounded.

    Parameters
    ----------
    model : CoalescenceModel
        With the weights that are parametrised.
    lora : LoraConfig, optional
        Change chosen matrices by LoRA, with new random A, and freeze all other parameters.
    noise : float
        Standard deviation of `WeightNoise`; 0 = none.
    bits : int
        Bits of `Rounding`; 0 = none.
    """
    if lora is not None:
        model.requires_grad_(False)
        for linear in list_matrices(model, lora.targets):
            _register(linear, LoRA(linear.weight, lora))
    for linear in list_matrices(model):
        if noise:
            _register(linear, WeightNoise(noise))
        if bits:
            _register(linear, Rounding(bits))


def _register(linear: nn.Linear, parametrization: nn.Module) -> None:
    # Unsafe only skips computing the weight once to check its shape, which is not possible on the meta device.
    parametrize.register_parametrization(linear, "weight", parametrization, unsafe=True)


def merge(model: CoalescenceModel) -> None:
    """Replace each parametrised matrix by its value, in place; the tensors have the names that they had before `attach`."""
    for linear in list_matrices(model):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def list_lora_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices A and B among the *tensors* of a state dict, by name."""
    return {name: value for name, value in tensors.items() if ".parametrizations." in name and not name.endswith(ORIGINAL)}


def select_published_tensors(tensors: dict[str, torch.Tensor], *, has_lora: bool, bits: int) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the state dict of a network that may be parametrised.

    With LoRA, these are the matrices A and B only. Without, they are all tensors by their own names, without noise, and
    matrices rounded to *bits* bits if these were in training; 0 = not rounded.
    """
    if has_lora:
        return list_lora_tensors(tensors)
    published = {}
    for name, value in tensors.items():
        if name.endswith(ORIGINAL):
            name = f"{name.removesuffix(ORIGINAL)}.weight"
            value = round_matrix(value, bits=bits) if bits and value.ndim == 2 else value
        published[name] = value
    return published
