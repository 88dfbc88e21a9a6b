"""Mutation and recombination rates as input of a network, and the scale of its times.

Genotypes stay as likely if all times are multiplied by a factor and all rates divided by it. A network that reads rates has
this built in: given a mutation rate µ, its bins are those of ln(TMRCA · µ / 1e-8), and it sees the recombination rate relative
to µ. A factor on both rates then moves its estimates of ln TMRCA, and changes nothing else. Without a mutation rate its bins
are those of ln TMRCA, as in other networks.
"""

import math

import numpy as np
import torch
from torch import nn

from cxt.config.network import SPECIAL_TOKENS, ModelConfig

LOG_REFERENCE_RATE = math.log(1e-8)
"""A usual rate of mutation and recombination per base pair and generation."""

LARGEST_LOG_RATIO = 5.0
"""Recombination rates that are further from the mutation rate, in natural logarithms, are read as this far: also one of 0."""


def find_scale(rates: np.ndarray) -> np.ndarray:
    """What is added to ln TMRCA on the scale of a network that reads rates: (..., 2) ln rates -> (...), 0 for unknown rates."""
    return np.nan_to_num(rates[..., 0].astype(np.float64) - LOG_REFERENCE_RATE)


def find_shift(rates: torch.Tensor) -> torch.Tensor:
    """The same as a tensor: (..., 2) ln rates -> (...)."""
    return torch.nan_to_num(rates[..., 0] - LOG_REFERENCE_RATE)


def scale_tokens(tokens: torch.Tensor, rates: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Tokens of the scaled times of each example, to the nearest bin, and at most to the ends of the grid.

    Parameters
    ----------
    tokens : int64 tensor (B, W + 1)
        Start token, or the bin of the window before, and bins of ln TMRCA.
    rates : float32 tensor (B, 2), or (B, W, 2) for packed rows
        From `cxt.config.network.log_rates`.
    config : ModelConfig
        Its grid.
    """
    step = (config.grid_high - config.grid_low) / (config.bins - 1)
    shift = (find_shift(rates).view(len(rates), -1) / step).round().long()  # (B, 1) or (B, W)
    scaled = (tokens[:, 1:] + shift).clamp(SPECIAL_TOKENS, config.vocabulary - 1)
    first = tokens[:, :1]  # the start token, or the bin of the window before
    carried = (first + shift[:, :1]).clamp(SPECIAL_TOKENS, config.vocabulary - 1)
    return torch.cat([torch.where(first < SPECIAL_TOKENS, first, carried), scaled], dim=1)


class RateEmbedding(nn.Linear):
    """Maps the rates of an example to a vector that is added to those of all its windows; zero at first."""

    def __init__(self, width: int):
        super().__init__(4, width, bias=False)

    def forward(self, rates: torch.Tensor) -> torch.Tensor:
        """Embed ln rates, NaN where they are unknown: (B, 2) -> (B, 1, D), or (B, W, 2) -> (B, W, D) for packed rows."""
        if rates.ndim == 2:
            rates = rates.unsqueeze(1)
        known = ~rates.isnan()  # (B, 1, 2)
        mutation, recombination = torch.nan_to_num(rates - LOG_REFERENCE_RATE).unbind(-1)
        relative = torch.where(known[..., 1], recombination - mutation, 0.0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        features = [known[..., 0], known[..., 1], relative * known[..., 0], relative * ~known[..., 0]]
        return super().forward(torch.stack(features, dim=-1).to(self.weight.dtype))
