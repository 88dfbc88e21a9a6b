"""The objective `contrastive`, for research: besides times, learn which two sets of mutations are of the same genealogy.

The two views of an example are its sites, divided at random. Given the genealogy, mutations are a Poisson process along its
branches, so that the two parts are independent processes of half the rate: two overlays of mutations that share the genealogy
and no mutation. Nothing has to be simulated or stored for them, and any genotypes can be divided so.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from cxt.config.training import TrainingConfig
from cxt.model.inputs import check_tokens
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import torch_seed
from cxt.trainer.losses import Criterion


def find_base_counts(counts: torch.Tensor, width: int) -> torch.Tensor:
    """Counts in base windows, given those in windows of *width* base windows that begin at each and end with the region.

    Parameters
    ----------
    counts : integer tensor (..., W, n)
    width : int

    Returns
    -------
    integer tensor (..., W, n)
    """
    windows = counts.shape[-2]
    # Two neighbours differ by the base window that one of them begins with, and by the one that follows it.
    difference = -F.pad(counts, (0, 0, 0, 1)).diff(dim=-2)  # that of base window w, minus that of w + width
    rows = F.pad(difference, (0, 0, 0, -windows % width)).unflatten(-2, (-1, width))
    return rows.flip(-3).cumsum(-3, dtype=counts.dtype).flip(-3).flatten(-3, -2)[..., :windows, :]


def count_in_windows(base: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    """Counts in windows that begin at each base window, given those in base windows: integers (..., W, n) -> (..., S, W, n)."""
    windows = base.shape[-2]
    sums = F.pad(base.cumsum(-2, dtype=base.dtype), (0, 0, 1, 0))  # (..., W + 1, n), of the base windows before each
    start = torch.arange(windows, device=base.device)
    end = torch.stack([(start + width).clamp(max=windows) for width in scales])  # (S, W)
    return sums[..., end, :] - sums[..., None, :-1, :]


def draw_views(x: torch.Tensor, scales: Sequence[int]) -> torch.Tensor:
    """Divide the sites of each example at random, by torch's global generator, each into either view with probability 1/2.

    The sites of a base window, channel and frequency bin are the same to a network, so that a binomial number of them is drawn.

    Parameters
    ----------
    x : float32 tensor (B, 2, S, W, n)
        log1p of counts, without missingness in bin 0.
    scales : sequence of int
        Widths of the feature windows, in base windows.

    Returns
    -------
    float32 tensor (2, B, 2, S, W, n)
        log1p of the counts of each view. The two views' counts add up to those of *x*.
    """
    counts = torch.expm1(x).round().int()
    narrowest = min(range(len(scales)), key=scales.__getitem__)
    base = find_base_counts(counts[:, :, narrowest], scales[narrowest]).float()  # (B, 2, W, n)
    first = count_in_windows(torch.binomial(base, torch.full_like(base, 0.5)).int(), scales)
    return torch.log1p(torch.stack([first, counts - first]).float())


def compute_info_nce(first: torch.Tensor, second: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """InfoNCE (van den Oord et al. 2018) of the cosines of two views' vectors, the mean of both directions.

    Parameters
    ----------
    first, second : float32 tensors (N, D)
        Rows i belong together. All other rows of the other view are negatives.
    temperature : float
        Divides the cosines.

    Returns
    -------
    tensor ()
        ln N for vectors that say nothing.
    """
    logits = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / temperature  # (N, N)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Contrastive(nn.Module):
    """Predict each window from all sites, as `marginal` does, and tell which views belong together.

    The last states of each view's sources are averaged over spans of windows and projected. A span of one view is to be told
    from all spans of all examples of the batch by the same span of the other view. Views are given no rates, which would say
    which belong together.

    The projection is trained along, and kept in the training state, but is not part of the network.

    Parameters
    ----------
    model : CoalescenceModel
    training : TrainingConfig
        Its `contrastive`, and the seed of the initial weights.
    criterion : Criterion
        The losses of the ordinary prediction.
    scales : sequence of int
        Widths of the feature windows, in base windows.
    """

    _pooling: torch.Tensor  # (spans, W), the weights of means over spans

    def __init__(self, model: CoalescenceModel, training: TrainingConfig, *, criterion: Criterion, scales: Sequence[int]):
        super().__init__()
        width, windows = model.config.width, model.config.windows
        self.settings, self.criterion, self.scales = training.contrastive, criterion, list(scales)
        self.names = ["info_nce", *criterion.names]
        self.projection = nn.Linear(width, width, bias=False)
        generator = torch.Generator().manual_seed(torch_seed(training.seed, "objective"))
        nn.init.normal_(self.projection.weight, std=width**-0.5, generator=generator)
        span = torch.arange(windows) // self.settings.span  # the number of each window's span
        members = (span == torch.arange(int(span[-1]) + 1)[:, None]).float()  # (spans, W)
        self.register_buffer("_pooling", members / members.sum(1, keepdim=True), persistent=False)
        self.to(model.backbone.head.weight.device)

    def weights(self, progress: float) -> list[float]:
        """Weight of each value that the objective returns, when a fraction *progress* of the steps is done."""
        return [self.settings.weight, *self.criterion.weights(progress)]

    def embed_views(self, model: CoalescenceModel, x: torch.Tensor) -> torch.Tensor:
        """Vectors of the spans of two random views of the log1p counts (B, 2, S, W, n): (2, B · spans, D), span by span."""
        views = draw_views(x, self.scales).flatten(0, 1)  # (2 · B, 2, S, W, n)
        states = model.backbone.source_states(model.adapt_input(views))  # (2 · B, W, D)
        return self.projection(self._pooling.to(states.dtype) @ states).float().unflatten(0, (2, -1)).flatten(1, 2)

    def forward(
        self, model: CoalescenceModel, x: torch.Tensor, y: torch.Tensor, rates: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Values of the loss terms, (1 + terms,), given log1p counts (B, 2, S, W, n), tokens (B, W + 1) and ln rates."""
        logits = model.marginal_logits(x, rates).flatten(0, 1).float()  # (B · W, V)
        check_tokens(y, examples=len(x), windows=x.shape[3])
        first, second = self.embed_views(model, x)
        with torch.autocast(x.device.type, enabled=False):
            contrast = compute_info_nce(first, second, temperature=self.settings.temperature)
        return torch.cat([contrast[None], self.criterion(logits, y[:, 1:].flatten())])
