"""The grid of ln TMRCA, which maps values to bins and tokens, the classes that the network predicts."""

from dataclasses import dataclass

import numpy as np

from cxt.config.network import SPECIAL_TOKENS, START_TOKEN
from cxt.data.kernels import compiled


@compiled
def _find_bins(values, grid, out):
    """Find the last bin whose lower edge is not above each value, like numpy's searchsorted but without a search."""
    if len(grid) == 1:
        out[:] = 0
        return
    step = (grid[-1] - grid[0]) / (len(grid) - 1)
    for i in range(len(values)):
        value = np.float64(values[i])
        if not value < grid[-1]:  # also NaN
            out[i] = len(grid) - 1
            continue
        guess = min(max(int((max(value, grid[0]) - grid[0]) / step), 0), len(grid) - 2)
        while guess > 0 and value < grid[guess]:
            guess -= 1
        while value >= grid[guess + 1]:
            guess += 1
        out[i] = guess


@dataclass(frozen=True)
class Grid:
    """The grid of ln TMRCA: evenly spaced values, each the lower edge of its bin.

    Parameters
    ----------
    low, high : float
        Lower edges of the first and of the last bin, in ln generations.
    bins : int
        Number of bins.
    """

    low: float = 3.0
    high: float = 17.0
    bins: int = 324

    @property
    def step(self) -> float:
        """Width of a bin, in ln generations."""
        return (self.high - self.low) / (self.bins - 1)

    @property
    def centres(self):
        """The middle of each bin, in ln generations: (bins,) float64."""
        return np.linspace(self.low, self.high, self.bins) + self.step / 2

    @property
    def edges(self):
        """The edges of the bins, in ln generations: (bins + 1,) float64."""
        return np.append(np.linspace(self.low, self.high, self.bins), self.high + self.step)

    def find_bins(self, log_tmrca):
        """Bins of the values *log_tmrca*, int64 of the same shape; values outside the grid are in its first or last bin."""
        values = np.ascontiguousarray(log_tmrca)
        if values.dtype != np.float32:
            values = values.astype(np.float64)
        bins = np.empty(values.shape, dtype=np.int64)
        _find_bins(values.reshape(-1), np.linspace(self.low, self.high, self.bins), bins.reshape(-1))
        return bins

    def tokens(self, log_tmrca):
        """Tokens (..., windows + 1), int64, of the values *log_tmrca* (..., windows): the start token, then bins + 2."""
        bins = self.find_bins(log_tmrca)
        tokens = np.empty((*bins.shape[:-1], bins.shape[-1] + 1), dtype=np.int64)
        tokens[..., 0] = START_TOKEN
        tokens[..., 1:] = bins + SPECIAL_TOKENS
        return tokens
