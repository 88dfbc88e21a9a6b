"""The LightningModule, and reproducible dropout.

The loss is that of an objective, see `cxt.trainer.objectives`; `build_loss_function` computes it from a batch.
"""

import os
import tempfile
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cxt.config.training import TrainingConfig
from cxt.data.examples import Batch, compute_model_input
from cxt.data.regions import RegionSchedule
from cxt.data.soft_targets import UNIT
from cxt.errors import BadRequest
from cxt.model.adapter import freeze_backbone
from cxt.model.rates import find_shift, scale_tokens
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import torch_seed
from cxt.trainer.objectives import AnyObjective, build_objective
from cxt.trainer.optimizers import build_optimizer
from cxt.trainer.schedules import AdaptiveRate, learning_rate_factor


def compile_backend(training: TrainingConfig, device: str) -> str | None:
    """Backend of `torch.compile` for the training step on a *device* ("cuda" or "cpu"); None for no compilation."""
    compiles = device == "cuda" and not training.regions.varies  # otherwise it would compile for every number of windows
    chosen = {"auto": "inductor" if compiles else "none"}.get(training.compile, training.compile)
    return None if chosen == "none" else chosen


def check_compiler_cache() -> None:
    """BadRequest if the directory in `TORCHINDUCTOR_CACHE_DIR` cannot be created or written to."""
    path = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if path is None:
        return
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BadRequest(
            f"TORCHINDUCTOR_CACHE_DIR={path} cannot be created or written to ({error.strerror}), and compiling needs it; set "
            "it to another directory, unset it, or train without compiling (compile: none)"
        ) from None


def build_loss_parts(model: CoalescenceModel, training: TrainingConfig, objective: AnyObjective):
    """A function of the parts of a `Batch` that gives the values of the objective's loss terms, (terms,).

    It starts from the small integers of a batch, so that logarithm and cast are computed, and compiled, on the device. If the
    network reads rates, it also converts tokens to the network's scale. Attention and gradient checkpointing are those of
    *training*.
    """
    model.backbone.gradient_checkpointing = training.gradient_checkpointing
    if training.attention == "flex":
        model.use_flex_attention()

    def parts(
        counts: torch.Tensor,
        missing: torch.Tensor | None,
        tokens: torch.Tensor,
        rates: torch.Tensor | None = None,
        soft_targets: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scaled = rates is not None and model.config.reads_rates
        if scaled:
            tokens = scale_tokens(tokens, rates, model.config)
        if soft_targets is None:
            packed = {} if regions is None else {"regions": regions}  # which not all objectives support
            return objective(model, compute_model_input(counts, missing), tokens, rates, **packed)
        quantiles = soft_targets.float() * UNIT  # (B, W, levels)
        if scaled:
            quantiles = quantiles + find_shift(rates).view(-1, 1, 1)
        return objective(model, compute_model_input(counts, missing), tokens, rates, quantiles)

    return parts


def build_loss_function(model: CoalescenceModel, training: TrainingConfig, *, scales: Sequence[int] | None = None):
    """A function of the parts of a batch that gives the loss of the first step; *scales* as for `build_objective`."""
    objective = build_objective(model, training, scales=scales)
    parts, weights = build_loss_parts(model, training, objective), objective.weights(0.0)

    def loss(
        counts: torch.Tensor,
        missing: torch.Tensor | None,
        tokens: torch.Tensor,
        rates: torch.Tensor | None = None,
        soft_targets: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return add_weighted(parts(counts, missing, tokens, rates, soft_targets, regions), weights)

    return loss


def add_weighted(values: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """The weighted sum of loss terms (terms,)."""
    return sum(weight * value for weight, value in zip(weights, values.unbind(), strict=True))


def hide_rates(batch: Batch, probability: float) -> Batch:
    """Make each rate of a batch unknown, NaN, with a *probability*, by torch's global generator."""
    drawn = torch.rand_like(batch.rates)
    if batch.regions is not None:  # the same number for all windows of a region
        drawn = drawn.gather(1, batch.regions.unsqueeze(-1).expand_as(drawn))
    return batch._replace(rates=batch.rates.masked_fill(drawn < probability, torch.nan))


class TrainingModule(pl.LightningModule):
    """Trains a CoalescenceModel, plain or with an adapter, on features of some *scales*.

    *record* goes into every training state. If the objective has parameters of its own, so do they. *regions* is needed for
    `weight_by_windows` only.
    """

    def __init__(
        self,
        model: CoalescenceModel,
        training: TrainingConfig,
        *,
        record: dict,
        total_steps: int,
        scales: Sequence[int],
        regions: RegionSchedule | None = None,
    ):
        super().__init__()
        self._regions = regions if training.weight_by_windows else None
        self.adaptive_rate = AdaptiveRate(training)
        self.model, self.training_config, self.record, self.total_steps = model, training, record, total_steps
        if model.adapter is not None:
            freeze_backbone(model)
        self.objective = build_objective(model, training, scales=scales)
        self._parts = self._step_parts = build_loss_parts(model, training, self.objective)

    def setup(self, stage: str) -> None:
        """Compile the training step if the settings ask for it; BadRequest if the compiler's cache cannot be written."""
        device = self.trainer.strategy.root_device
        if self.objective.criterion is not None:
            self.objective.criterion.to(device)
        backend = compile_backend(self.training_config, device.type)
        if backend is not None:
            check_compiler_cache()
            # All training batches have the same shape; the last validation batch does not, and is not worth a compilation.
            self._step_parts = torch.compile(self._parts, backend=backend, dynamic=False)

    def _add(self, values: torch.Tensor, step: int) -> torch.Tensor:
        return add_weighted(values, self.objective.weights(step / max(1, self.total_steps - 1)))

    def training_step(self, batch: Batch, _) -> dict[str, torch.Tensor]:
        """Return the loss of one minibatch, and the values of its terms; called by Lightning.

        With `weight_by_windows`, *plain* is the loss before it is weighted, divided by the number of accumulated batches, as
        Lightning divides the other.
        """
        if self.model.config.reads_rates:
            batch = hide_rates(batch, self.training_config.rates_dropout)
        values = self._step_parts(*batch)
        loss = self._add(values, self.trainer.global_step)
        if self._regions is None:
            return {"loss": loss, "parts": values.detach()}
        epoch, number = divmod(self.trainer.fit_loop.epoch_loop.total_batch_idx, self._regions.batches_per_epoch)
        plain = loss.detach() / self.trainer.accumulate_grad_batches
        return {"loss": loss * self._regions.weigh(epoch, number), "parts": values.detach(), "plain": plain}

    def validation_step(self, batch: Batch, _) -> None:
        """Log the loss of one minibatch; Lightning averages it over all examples and ranks as `val_loss`.

        It has the weights of the last step, so that the losses of different steps can be compared.
        """
        values = self._parts(*batch)
        about = {"batch_size": len(batch.tokens), "sync_dist": True, "logger": False}
        self.log("val_loss", self._add(values, max(1, self.total_steps - 1)), **about)
        if len(values) > 1:
            for name, value in zip(self.objective.names, values.unbind(), strict=True):
                self.log(f"val_loss/{name}", value, **about)

    def configure_optimizers(self):
        """Return the optimizer and the learning-rate schedule, which advances with every step; called by Lightning."""
        training = self.training_config
        # With a gradient scaler, a fused optimizer unscales by itself, too late for clipping and for the logged norm.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        own = list(self.objective.parameters()) if isinstance(self.objective, torch.nn.Module) else []
        optimizer = build_optimizer(self.model, training, fused=fused, others=own)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: self.adaptive_rate.factor * learning_rate_factor(step, training, total_steps=self.total_steps),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip the norm of all gradients to *gradient_clip_val*, if given; called by Lightning."""
        # Lightning's own clipping refuses fused optimizers in mixed precision, even in bfloat16, which needs no unscaling.
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Store the record in the training state, under `cxt`; called by Lightning."""
        checkpoint["cxt"] = self.record


class Reseed(Callback):
    """Seeds dropout, masks and views by (seed, batch number, rank), so that a resumed run draws the same numbers.

    All validations draw the same masks and views, so that their losses can be compared.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        """Seed torch's global generator for the dropout of this batch."""
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(torch_seed(self.seed, "dropout", trainer.global_rank, number=number))

    def on_validation_batch_start(self, trainer, module, batch, batch_index, dataloader_index=0) -> None:
        """Seed it for the masks or views of a validation batch; other objectives draw nothing there."""
        if module.training_config.objective in ("masked", "contrastive"):
            torch.manual_seed(torch_seed(self.seed, "validation", trainer.global_rank, number=batch_index))
