"""Weights as integers: symmetric uniform quantisation of a matrix, with one scale for each row.

A weight w of row i is stored as the integer q = round(w / s_i), and read as q · s_i, with the scale
s_i = max_j |w_ij| / (2^(bits − 1) − 1) (Jacob et al. 2018, *Quantization and training of neural networks for efficient
integer-arithmetic-only inference*, here without a zero point). A weight changes by at most s_i / 2.
"""

import torch

MAX_BITS = 8
"""Integers are stored as int8."""


def round_to_integers(weight: torch.Tensor, *, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a matrix to multiples of its scale.

    Parameters
    ----------
    weight : tensor (out, in)
        Finite floats.
    bits : int
        Bits of an integer, from 2 to 8.

    Returns
    -------
    integers : int8 tensor (out, in)
        From -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
    scales : float32 tensor (out, 1)
        ``integers * scales`` is the rounded matrix. Rows of zeros have scale 1.

    Raises
    ------
    ValueError
        If *weight* is not a matrix of finite floats, or *bits* is out of its range.
    """
    if not 2 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from 2 to {MAX_BITS}, got {bits}")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a matrix of floats, got {weight.dtype} of shape {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight has values that are not finite")
    integers, scales = _round_rows(weight, bits=bits)
    return integers.to(torch.int8), scales


def _round_rows(weight: torch.Tensor, *, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of `round_to_integers`, as float32, and the scales."""
    weight = weight.detach().float()
    largest = 2 ** (bits - 1) - 1
    scales = weight.abs().amax(dim=1, keepdim=True) / largest  # (out, 1)
    scales = torch.where(scales > 0, scales, 1.0)  # also where the largest weight is too small to be divided
    # A subnormal scale is rounded itself, so that a quotient may exceed the largest integer.
    return (weight / scales).round().clamp(-largest, largest), scales


def round_matrix(weight: torch.Tensor, *, bits: int) -> torch.Tensor:
    """The rounded matrix: the product of what `round_to_integers` returns, in the type of *weight*, (out, in).

    It checks nothing, because the answer of a GPU would have to be awaited. Numbers that are not finite remain so.
    """
    integers, scales = _round_rows(weight, bits=bits)
    return (integers * scales).to(weight.dtype)
