"""The objective `masked`, for research: hide windows of the input, and predict their counts from the others.

It needs no times, so that it can train on anything that has genotypes. Its networks cannot be read; they are starting points
for other objectives.

Feature windows overlap: one that begins at a visible window may reach into hidden ones, and differences of neighbouring sums
give away single windows exactly. So a scale of a visible window is hidden, too, if its feature window shares base pairs with
what is to be predicted, and hidden windows come in spans, because scattered ones would leave no wide feature window visible.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from cxt.config.learning import Masking
from cxt.config.training import TrainingConfig
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import torch_seed

MASK_SHARE, REPLACE_SHARE = 0.8, 0.1
"""Fractions of the chosen spans that are replaced by the mask vector, and by other vectors (Devlin et al. 2019)."""


class Hidden(NamedTuple):
    """What is hidden of a batch, each a bool tensor (B, W)."""

    chosen: torch.Tensor  # windows whose counts are predicted
    masked: torch.Tensor  # those replaced by the mask vector
    replaced: torch.Tensor  # those replaced by the vectors of other windows; the rest of *chosen* is unchanged


def choose_windows(masking: Masking, *, examples: int, windows: int, device: torch.device) -> Hidden:
    """Choose the windows to hide, by torch's global generator.

    The sequence is cut into spans at a random offset. Each is chosen with the probability `share`, and so is the span with the
    smallest random number, so that no example is without any; whole spans are masked, replaced or unchanged (as in Joshi et al.
    2020).
    """
    length = min(masking.span, windows)
    offset = torch.randint(length, (examples, 1), device=device)
    span = (torch.arange(windows, device=device) + offset) // length  # (B, W), the number of each window's span
    spans = (windows + length - 2) // length + 1
    choice, kind = (torch.rand((examples, spans), device=device).gather(1, span) for _ in range(2))  # (B, W)
    chosen = (choice < masking.share) | (choice == choice.amin(1, keepdim=True))
    if masking.all:
        return Hidden(chosen, chosen, torch.zeros_like(chosen))
    replaced = chosen & (kind >= MASK_SHARE) & (kind < MASK_SHARE + REPLACE_SHARE)
    return Hidden(chosen, chosen & (kind < MASK_SHARE), replaced)


class Masked(nn.Module):
    """Predict the counts of hidden windows at the narrowest scale.

    The loss is the negative logarithm of a Poisson probability, without its constant: exp(η) − k · η for the count k and the
    output η of a linear layer on the window's state; its mean over hidden windows, both channels, and all frequency bins but
    bin 0, which is no count.

    Its mask vector and linear layer are trained along, and kept in the training state, but are not part of the network.

    Parameters
    ----------
    model : CoalescenceModel
    training : TrainingConfig
        Its `masked`, and the seed of the initial weights.
    scales : sequence of int
        Widths of the feature windows, in base windows.
    """

    names = ("poisson",)
    criterion = None

    def __init__(self, model: CoalescenceModel, training: TrainingConfig, *, scales: Sequence[int]):
        super().__init__()
        width, windows, samples = model.config.width, model.config.windows, model.config.samples
        self.masking = training.masked
        self.narrowest = min(range(len(scales)), key=scales.__getitem__)
        self.mask_vector = nn.Parameter(torch.empty(width))
        self.head = nn.Linear(width, 2 * (samples - 1))
        generator = torch.Generator().manual_seed(torch_seed(training.seed, "objective"))
        for parameter in (self.mask_vector, self.head.weight):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)
        # The feature window of scale s at window v shares base pairs with the narrowest at w if first <= w < end.
        start, widths = torch.arange(windows), torch.tensor(list(scales))[:, None]
        self.register_buffer("_first", (start - min(scales) + 1).clamp(min=0).repeat(len(scales), 1), persistent=False)
        self.register_buffer("_end", (start + widths).clamp(max=windows), persistent=False)
        self.to(model.backbone.head.weight.device)

    def weights(self, progress: float) -> list[float]:
        """Weight of each value that the objective returns, when a fraction *progress* of the steps is done."""
        return [1.0]

    def find_overlaps(self, windows: torch.Tensor) -> torch.Tensor:
        """Which feature windows share base pairs with the narrowest ones at *windows*: bool (B, W) -> bool (B, W, S)."""
        before = nn.functional.pad(windows.cumsum(1), (1, 0))  # (B, W + 1), the number of them before each window
        return (before[:, self._end] > before[:, self._first]).transpose(1, 2)

    def hide(self, source: torch.Tensor, hidden: Hidden) -> torch.Tensor:
        """Hide windows in the embedded sources (B, W, D); random vectors are drawn by torch's global generator."""
        examples, windows, width = source.shape
        overlaps = self.find_overlaps(hidden.masked | hidden.replaced)
        overlaps = overlaps.repeat_interleave(width // overlaps.shape[-1], dim=-1)  # (B, W, D), scale-major as the embedding
        source, original = torch.where(overlaps, self.mask_vector.to(source.dtype), source), source
        if self.masking.all:
            return source
        steps = torch.randint(max(1, windows - 1), (examples, windows), device=source.device) + 1
        other = (torch.arange(windows, device=source.device) + steps) % windows  # never the window itself
        other = original.gather(1, other.unsqueeze(-1).expand(-1, -1, width))
        return torch.where(hidden.replaced.unsqueeze(-1), other, source)

    def forward(
        self, model: CoalescenceModel, x: torch.Tensor, y: torch.Tensor, rates: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the loss, (1,), given log1p counts (B, 2, S, W, n) and ln rates; the tokens *y* are not read."""
        examples, _, _, windows, _ = x.shape
        hidden = choose_windows(self.masking, examples=examples, windows=windows, device=x.device)
        backbone = model.backbone
        states = backbone.encode(self.hide(backbone.embed_sources(model.adapt_input(x), rates), hidden))
        log_mean = self.head(states).float().unflatten(-1, (2, -1)).transpose(1, 2)  # (B, 2, W, n - 1)
        counts = torch.expm1(x[:, :, self.narrowest, :, 1:].float())
        each = (log_mean.exp() - counts * log_mean).mean(dim=(1, 3))  # (B, W)
        return ((each * hidden.chosen).sum() / hidden.chosen.sum()).unsqueeze(0)
