"""The one LightningModule, its learning-rate schedule, and the callbacks of a run."""

import math
import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cxt.adapter import freeze_backbone
from cxt.config import TrainingConfig
from cxt.dataset import Batch, model_input
from cxt.model import CoalescenceModel


def learning_rate_factor(step: int, training: TrainingConfig, *, total_steps: int) -> float:
    """Learning rate of optimizer step *step* relative to the peak.

    Linear from 0 over `warmup_steps`, then a cosine to `min_lr` at `decay_steps` (0 = the run's last step), flat after.
    """
    if step < training.warmup_steps:
        return step / training.warmup_steps
    floor = training.min_lr / training.lr
    end = training.decay_steps or total_steps
    if step >= end:
        return floor
    progress = (step - training.warmup_steps) / max(1, end - training.warmup_steps)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: CoalescenceModel, training: TrainingConfig) -> list[dict]:
    """AdamW's groups: decay on tensors of two or more dimensions only.

    With an adapter: all adapter parameters (decayed, full rate), then the unfrozen backbone at `backbone_lr_factor` of it.
    """
    factor = 1.0
    groups = []
    if model.adapter is not None:
        factor = training.backbone_lr_factor
        groups.append({"params": list(model.adapter.parameters()), "weight_decay": training.weight_decay, "lr": training.lr})
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    for decayed in (True, False):
        groups.append(
            {
                "params": [p for p in backbone if (p.ndim >= 2) == decayed],
                "weight_decay": training.weight_decay if decayed else 0.0,
                "lr": factor * training.lr,
            }
        )
    return [group for group in groups if group["params"]]


class TrainingModule(pl.LightningModule):
    """Trains a CoalescenceModel, plain or with an adapter; *record* goes into every save."""

    def __init__(self, model: CoalescenceModel, training: TrainingConfig, *, record: dict, total_steps: int):
        super().__init__()
        self.model, self.training_config, self.record, self.total_steps = model, training, record, total_steps
        if model.adapter is not None:
            freeze_backbone(model)

    def _loss(self, batch: Batch) -> torch.Tensor:
        return self.model.loss(model_input(batch.counts, batch.missing), batch.tokens)

    def training_step(self, batch: Batch, _) -> torch.Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, batch_size=len(batch.tokens))
        return loss

    def validation_step(self, batch: Batch, _) -> None:
        self.log("val_loss", self._loss(batch), batch_size=len(batch.tokens), sync_dist=True)

    def configure_optimizers(self):
        training = self.training_config
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, training),
            betas=(training.beta1, training.beta2),
            fused=self.device.type == "cuda" and self.model.adapter is None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, training, total_steps=self.total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["cxt"] = self.record


class Reseed(Callback):
    """Dropout is a function of (seed, batch number, rank), so that a resumed run draws what the first would have."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + number) * 1009 + trainer.global_rank)


class Progress(Callback):
    """A line every *every* seconds: step, loss, items per second, time left; and one for each validation.

    Also stops the run when the loss is not finite, which would otherwise train on, be saved, and be published: at every
    batch on a CPU; on a GPU, where looking costs time, at every line and before every save (each *save_every* steps).
    """

    def __init__(self, name: str, *, total_steps: int, items_per_batch: int, save_every: int, every: float = 15.0):
        self.name, self.total_steps, self.items_per_batch, self.every = name, total_steps, items_per_batch, every
        self.save_every = save_every
        self.said = self.began = None
        self.batches = self.first_step = 0

    def on_train_start(self, trainer, module) -> None:
        self.began = self.said = time.monotonic()
        self.first_step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        self.batches += 1
        now = time.monotonic()
        says = now - self.said >= self.every or trainer.global_step >= self.total_steps
        on_cpu = module.device.type == "cpu"
        if not (says or on_cpu or trainer.global_step % self.save_every == 0):
            return
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning divides it
        if not math.isfinite(loss):
            raise RuntimeError(
                f"{self.name}: the loss is {loss} at step {trainer.global_step}; lower the learning rate, or clip the gradient "
                "(grad_clip: 1.0)"
            )
        if not says:
            return
        self.said = now
        done = trainer.global_step - self.first_step
        rate = self.batches * self.items_per_batch / (now - self.began)
        left = (self.total_steps - trainer.global_step) * (now - self.began) / max(1, done)
        if trainer.is_global_zero:
            print(
                f"{self.name}: step {trainer.global_step}/{self.total_steps}, loss {loss:.3f}, {rate:.0f} items/s, "
                f"{left / 60:.1f} min left",
                flush=True,
            )

    def on_validation_end(self, trainer, module) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and trainer.is_global_zero:
            print(f"{self.name}: step {trainer.global_step}, validation loss {float(loss):.4f}", flush=True)
