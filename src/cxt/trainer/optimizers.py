"""Optimizers, and the groups of parameters that they treat alike."""

import abc
from collections.abc import Callable, Sequence

import torch
from torch import nn

from cxt.config.learning import Optimizer as OptimizerSettings
from cxt.config.training import TrainingConfig
from cxt.model.adapter import freeze_backbone
from cxt.model.transformer import CoalescenceModel

OTHER_LR_FACTOR = 0.15
"""Muon's default learning rate of all other parameters, relative to that of the matrices in the blocks."""


def parameter_groups(model: CoalescenceModel, training: TrainingConfig, others: Sequence[nn.Parameter] = ()) -> list[dict]:
    """Parameter groups for AdamW, with weight decay on tensors of two or more dimensions only.

    With an adapter, there is first a group of all adapter parameters (with weight decay, at the full learning rate); those of
    the unfrozen backbone are at `backbone_lr_factor` of it. The last ones are of *others*, the parameters of an objective.
    """
    factor = 1.0
    groups = []
    if model.adapter is not None:
        factor = training.backbone_lr_factor
        groups.append({"params": list(model.adapter.parameters()), "weight_decay": training.weight_decay, "lr": training.lr})
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    for parameters, lr in ((backbone, factor * training.lr), (others, training.lr)):
        for decayed in (True, False):
            groups.append(
                {
                    "params": [p for p in parameters if (p.ndim >= 2) == decayed],
                    "weight_decay": training.weight_decay if decayed else 0.0,
                    "lr": lr,
                }
            )
    return [group for group in groups if group["params"]]


def split_groups(groups: list[dict], matrices: set[nn.Parameter], *, other_lr: float) -> tuple[list[dict], list[dict]]:
    """Split each group into its parameters in *matrices* and the others, whose learning rates are multiplied by *other_lr*."""
    first, second = [], []
    for group in groups:
        chosen = [p for p in group["params"] if p in matrices]
        others = [p for p in group["params"] if p not in matrices]
        first.append(group | {"params": chosen})
        second.append(group | {"params": others, "lr": group["lr"] * other_lr})
    return [group for group in first if group["params"]], [group for group in second if group["params"]]


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration in `orthogonalise` (Jordan et al. 2024); singular values get to 0.7 to 1.2."""

NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of a matrix by numbers near 1, by a Newton-Schulz iteration.

    It computes in bfloat16 on a GPU, and in float32 on a CPU, most of which are slow in bfloat16.

    Parameters
    ----------
    matrix : tensor (A, B)

    Returns
    -------
    tensor (A, B) of the same type
    """
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = x.T if x.shape[0] > x.shape[1] else x  # the smaller Gram matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.T if x.shape[0] > x.shape[1] else wide).type_as(matrix)


class _Optimizer(torch.optim.Optimizer, abc.ABC):
    """An optimizer whose `_update` changes the parameters, given their gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None):
        """Update all parameters, after computing the gradients with *closure* if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @abc.abstractmethod
    def _update(self) -> None:
        """Change the parameters; called without gradients being recorded."""


class Muon(_Optimizer):
    """Muon (Jordan et al. 2024): the orthogonalised momentum of each matrix, with decoupled weight decay.

    It is `torch.optim.Muon`, which computes in bfloat16 everywhere, and is ten times slower on a CPU.

    Parameters
    ----------
    groups : list of parameter groups
        Matrices only; with `params`, `lr` and `weight_decay`.
    momentum : float
    nesterov : bool
    """

    def __init__(self, groups: list[dict], *, momentum: float, nesterov: bool):
        super().__init__(groups, {"momentum": momentum, "nesterov": nesterov})

    def _update(self) -> None:
        for group in self.param_groups:
            beta = group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - beta)
                update = orthogonalise(parameter.grad.lerp(momentum, beta) if group["nesterov"] else momentum)
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


class MuonWithAdamW(_Optimizer):
    """Muon for some matrices and AdamW for all other parameters, as one optimizer.

    Parameters
    ----------
    matrices, others : lists of parameter groups
        For Muon, which takes matrices only, and for AdamW. Groups have `params`, `lr` and `weight_decay`.
    momentum, nesterov : float, bool
        Muon's momentum.
    betas : tuple of float
        AdamW's coefficients.
    fused : bool
        Whether AdamW uses one fused kernel.
    """

    def __init__(
        self,
        matrices: list[dict],
        others: list[dict],
        *,
        momentum: float,
        nesterov: bool,
        betas: tuple[float, float],
        fused: bool,
    ):
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(Muon(matrices, momentum=momentum, nesterov=nesterov))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas, fused=fused))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Let this optimizer and its parts hold the same groups, so that a changed learning rate holds for both."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def _update(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        """Return the state of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


class Lion(_Optimizer):
    """Lion (Chen et al. 2023): the sign of an interpolation between momentum and gradient, with decoupled weight decay.

    Parameters
    ----------
    groups : list of parameter groups
        With `params`, `lr` and `weight_decay`.
    betas : tuple of float
        Weight of the momentum in the update, and its decay.
    """

    def __init__(self, groups: list[dict], *, betas: tuple[float, float]):
        super().__init__(groups, {"betas": betas})

    def _update(self) -> None:
        for group in self.param_groups:
            update_beta, decay_beta = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(momentum.lerp(parameter.grad, 1 - update_beta).sign_(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - decay_beta)


def build_optimizer(
    model: CoalescenceModel, training: TrainingConfig, *, fused: bool, others: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters; with an adapter, the backbone is first frozen by the adapter's strategy.

    Parameters
    ----------
    model : CoalescenceModel
    training : TrainingConfig
        Its `optimizer`, learning rate, weight decay, and AdamW's coefficients.
    fused : bool
        Whether Adam, AdamW and SGD update all parameters in one kernel.
    others : sequence of parameters
        Parameters that are not the model's: those of an objective.
    """
    if model.adapter is not None:
        freeze_backbone(model)
    groups, settings = parameter_groups(model, training, others), training.optimizer
    betas = (training.beta1, training.beta2)
    match settings.name:
        case "adamw":
            return torch.optim.AdamW(groups, betas=betas, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, betas=betas, fused=fused)
        case "sgd":
            momentum = 0.9 if settings.momentum is None else settings.momentum
            return torch.optim.SGD(groups, momentum=momentum, nesterov=settings.nesterov or False, fused=fused)
        case "adafactor":
            return torch.optim.Adafactor(groups)
        case "lion":
            return Lion(groups, betas=betas)
        case "muon":
            return _build_muon(model, groups, settings, training, fused=fused)


def _build_muon(
    model: CoalescenceModel, groups: list[dict], settings: OptimizerSettings, training: TrainingConfig, *, fused: bool
) -> MuonWithAdamW:
    in_blocks = {p for p in model.backbone.blocks.parameters() if p.ndim == 2}
    factor = OTHER_LR_FACTOR if settings.other_lr is None else settings.other_lr / training.lr
    matrices, others = split_groups(groups, in_blocks, other_lr=factor)
    return MuonWithAdamW(
        matrices, others,
        momentum=0.95 if settings.momentum is None else settings.momentum,
        nesterov=True if settings.nesterov is None else settings.nesterov,
        betas=(training.beta1, training.beta2), fused=fused,
    )  # fmt: skip
