"""Objectives: what a network learns to predict, from which positions.

An objective takes a batch and returns the values of its loss terms. The loss is their sum, each times its weight. Where rows
hold several regions, `regions` (B, W) tells which window belongs to which, see `cxt.model.packing`.
Those for research, which have parameters of their own, are in `cxt.trainer.masked` and `cxt.trainer.contrastive`.
"""

from collections.abc import Sequence

import torch

from cxt.config.training import TrainingConfig
from cxt.data.grid import Grid
from cxt.model.inputs import check_tokens
from cxt.model.transformer import CoalescenceModel
from cxt.trainer.contrastive import Contrastive
from cxt.trainer.losses import Criterion, compute_distillation_loss, spread_over_bins
from cxt.trainer.masked import Masked


class Autoregressive:
    """Predict each window from the sources and the windows before it; *loss_path* as in `CoalescenceModel.loss`."""

    def __init__(self, criterion: Criterion, training: TrainingConfig):
        self.criterion, self.loss_path = criterion, training.loss_path
        self.names = criterion.names

    def weights(self, progress: float) -> list[float]:
        """Weight of each value that the objective returns, when a fraction *progress* of the steps is done."""
        return self.criterion.weights(progress)

    def __call__(
        self,
        model: CoalescenceModel,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values of the loss terms, (terms,), given log1p counts (B, 2, S, W, n), tokens (B, W + 1) and ln rates."""
        return model.loss(x, y, rates, regions=regions, path=self.loss_path, criterion=self.criterion)


class Marginal:
    """Predict each window from the sources alone, all in one pass."""

    def __init__(self, criterion: Criterion, training: TrainingConfig):
        self.criterion = criterion
        self.names = criterion.names

    def weights(self, progress: float) -> list[float]:
        """Weight of each value that the objective returns, when a fraction *progress* of the steps is done."""
        return self.criterion.weights(progress)

    def __call__(
        self,
        model: CoalescenceModel,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values of the loss terms, (terms,), given log1p counts (B, 2, S, W, n), tokens (B, W + 1) and ln rates."""
        logits = model.marginal_logits(x, rates, regions=regions)  # (B, W, V)
        check_tokens(y, examples=len(logits), windows=x.shape[3])
        return self.criterion(logits.flatten(0, 1).float(), y[:, 1:].flatten())


class Joint:
    """Both: the autoregressive losses, and `joint_weight` times the marginal ones."""

    def __init__(self, criterion: Criterion, training: TrainingConfig):
        self.criterion, self.joint_weight = criterion, training.joint_weight
        self.names = [*criterion.names, *(f"marginal_{name}" for name in criterion.names)]

    def weights(self, progress: float) -> list[float]:
        """Weight of each value that the objective returns, when a fraction *progress* of the steps is done."""
        weights = self.criterion.weights(progress)
        return [*weights, *(self.joint_weight * weight for weight in weights)]

    def __call__(
        self,
        model: CoalescenceModel,
        x: torch.Tensor,
        y: torch.Tensor,
        rates: torch.Tensor | None = None,
        *,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values of the loss terms, (2 · terms,), given log1p counts (B, 2, S, W, n), tokens (B, W + 1) and ln rates."""
        marginal, autoregressive = model.joint_logits(x, y, rates, regions=regions)  # (B, W, V) each
        labels = y[:, 1:].flatten()
        values = [self.criterion(logits.flatten(0, 1).float(), labels) for logits in (autoregressive, marginal)]
        return torch.cat(values)


class Distill:
    """Predict each window from the sources alone, as a teacher does: its distribution, besides the true bin."""

    def __init__(self, criterion: Criterion, training: TrainingConfig):
        self.criterion, self.settings = criterion, training.distill
        self.names = ["distillation", *criterion.names]

    def weights(self, progress: float) -> list[float]:
        """Weight of each value that the objective returns, when a fraction *progress* of the steps is done."""
        return [self.settings.weight, *self.criterion.weights(progress)]

    def __call__(
        self, model: CoalescenceModel, x: torch.Tensor, y: torch.Tensor, rates: torch.Tensor | None, quantiles: torch.Tensor
    ) -> torch.Tensor:
        """Values of the loss terms, (1 + terms,), given also the teacher's quantiles (B, W, levels) on the network's scale."""
        logits = model.marginal_logits(x, rates).flatten(0, 1).float()  # (B·W, V)
        check_tokens(y, examples=len(x), windows=x.shape[3])
        target = spread_over_bins(quantiles.flatten(0, 1), self.criterion.grid)  # (B·W, bins)
        divergence = compute_distillation_loss(logits, target, temperature=self.settings.temperature)
        return torch.cat([divergence[None], self.criterion(logits, y[:, 1:].flatten())])


AnyObjective = Autoregressive | Marginal | Joint | Distill | Masked | Contrastive
OBJECTIVES = {"autoregressive": Autoregressive, "marginal": Marginal, "joint": Joint, "distill": Distill}


def build_objective(model: CoalescenceModel, training: TrainingConfig, *, scales: Sequence[int] | None = None) -> AnyObjective:
    """The objective of a training, on the model's device.

    Parameters
    ----------
    model : CoalescenceModel
    training : TrainingConfig
        Its `objective`, and the settings of that.
    scales : sequence of int, optional
        Widths of the feature windows, in base windows; required by `masked` and `contrastive` only.
    """
    if training.objective == "masked":
        return Masked(model, training, scales=_require_scales(scales, training))
    config = model.config
    criterion = Criterion(training.losses, Grid(config.grid_low, config.grid_high, config.bins))
    criterion.to(model.backbone.head.weight.device)
    if training.objective == "contrastive":
        return Contrastive(model, training, criterion=criterion, scales=_require_scales(scales, training))
    return OBJECTIVES[training.objective](criterion, training)


def _require_scales(scales: Sequence[int] | None, training: TrainingConfig) -> Sequence[int]:
    if scales is None:
        raise TypeError(f"the objective {training.objective} needs the scales of the input")
    return scales
