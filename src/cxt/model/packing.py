"""Rows that hold several regions side by side, each of which is read as if it were alone.

A window sees the windows and the tokens of its own region only, and positions are counted from the beginning of the region, so
that a packed row gives the same logits as its regions one by one.

Shapes: B rows, W windows of a row, T = 2W positions: those of the sources, then those of the targets.
"""

from typing import NamedTuple

import torch


class Packing(NamedTuple):
    """What a network needs to know of packed rows; from `describe_packing`."""

    regions: torch.Tensor  # (B, W) int64, number of each window's region in its row
    begins: torch.Tensor  # (B, W) bool, whether a region begins with the window
    positions: torch.Tensor  # (B, T) int64, in the sequence of the region alone
    visible: torch.Tensor  # (B, 1, T, T) bool, the positions (last axis) that each position attends to


def describe_packing(regions: torch.Tensor, *, start_token_in_prefix: bool = False) -> Packing:
    """Derive positions and the attention mask from the regions of rows.

    Parameters
    ----------
    regions : int64 tensor (B, W)
        The number, 0 to W - 1, of the region to which each window belongs. Windows of a region are adjacent, and no two
        regions of a row have the same number.
    start_token_in_prefix : bool
        Whether sources attend to their region's start token, see `cxt.config.network.Architecture`.

    Returns
    -------
    Packing
    """
    window = torch.arange(regions.shape[1], device=regions.device)
    begins = torch.ones_like(regions, dtype=torch.bool)
    begins[:, 1:] = regions[:, 1:] != regions[:, :-1]
    offset = window - torch.where(begins, window, 0).cummax(1).values  # (B, W), from the region's first window
    same = regions.unsqueeze(2) == regions.unsqueeze(1)  # (B, W, W)
    length = same.sum(2)  # (B, W), of the window's region
    starts = same & begins.unsqueeze(1) if start_token_in_prefix else torch.zeros_like(same)
    visible = torch.cat(
        [
            torch.cat([same, starts], dim=2),  # of sources
            torch.cat([same, same & (window <= window.unsqueeze(1))], dim=2),  # of targets
        ],
        dim=1,
    )
    return Packing(regions, begins, torch.cat([offset, length + offset], dim=1), visible.unsqueeze(1))


def average_regions(x: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Replace the values of each window by their mean over its region: (B, W, n), (B, W) -> (B, W, n)."""
    index = regions.unsqueeze(-1).expand_as(x)
    return torch.zeros_like(x).scatter_reduce(1, index, x, "mean", include_self=False).gather(1, index)
