"""The LightningModule, its learning-rate schedule, and reproducible dropout.

The loss is `cxt.model.transformer.CoalescenceModel.loss`; `build_loss_function` takes it from a batch on.
"""

import math
import os
import tempfile

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from cxt.config.training import TrainingConfig
from cxt.data.pair_dataset import Batch, compute_model_input
from cxt.errors import BadRequest
from cxt.model.adapter import freeze_backbone
from cxt.model.transformer import CoalescenceModel
from cxt.random_seeds import torch_seed

WSD_PLATEAU_FRACTION = 0.4
"""Fraction of the steps from the end of the warm-up to the end of the decay during which `wsd` stays at its peak."""


def learning_rate_factor(step: int, training: TrainingConfig, *, total_steps: int) -> float:
    """Learning rate of optimizer step *step* relative to the peak.

    It rises linearly from 0 over `warmup_steps`, then decays to `min_lr` at `decay_steps` (0 = the run's last step) and stays
    there: as a cosine, linearly, not at all (`constant`), or as a cosine after 40% of the steps (`wsd`).
    """
    if step < training.warmup_steps:
        return step / training.warmup_steps
    if training.schedule == "constant":
        return 1.0
    floor = training.min_lr / training.lr
    end = training.decay_steps or total_steps
    if step >= end:
        return floor
    progress = (step - training.warmup_steps) / max(1, end - training.warmup_steps)
    if training.schedule == "linear":
        return floor + (1 - floor) * (1 - progress)
    if training.schedule == "wsd":
        progress = max(0.0, (progress - WSD_PLATEAU_FRACTION) / (1 - WSD_PLATEAU_FRACTION))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: CoalescenceModel, training: TrainingConfig) -> list[dict]:
    """Parameter groups for AdamW, with weight decay on tensors of two or more dimensions only.

    With an adapter, there is first a group of all adapter parameters (with weight decay, at the full learning rate); those of
    the unfrozen backbone are at `backbone_lr_factor` of it.
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


def build_optimizer(model: CoalescenceModel, training: TrainingConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; with an adapter, the backbone is first frozen by the adapter's strategy."""
    if model.adapter is not None:
        freeze_backbone(model)
    return torch.optim.AdamW(parameter_groups(model, training), betas=(training.beta1, training.beta2), fused=fused)


def compile_backend(training: TrainingConfig, device: str) -> str | None:
    """Backend of `torch.compile` for the training step on a *device* ("cuda" or "cpu"); None for no compilation."""
    chosen = {"auto": "inductor" if device == "cuda" else "none"}.get(training.compile, training.compile)
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


def build_loss_function(model: CoalescenceModel, training: TrainingConfig):
    """A function from (counts, missing, tokens) to the loss, with the loss path and attention of *training*.

    It starts from the small integers of a batch, so that logarithm and cast are computed, and compiled, on the device.
    """
    model.backbone.gradient_checkpointing = training.gradient_checkpointing
    if training.attention == "flex":
        model.use_flex_attention()

    def loss(counts: torch.Tensor, missing: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        return model.loss(compute_model_input(counts, missing), tokens, path=training.loss_path)

    return loss


class TrainingModule(pl.LightningModule):
    """Trains a CoalescenceModel, plain or with an adapter; *record* goes into every training state."""

    def __init__(self, model: CoalescenceModel, training: TrainingConfig, *, record: dict, total_steps: int):
        super().__init__()
        self.model, self.training_config, self.record, self.total_steps = model, training, record, total_steps
        if model.adapter is not None:
            freeze_backbone(model)
        self._loss = self._step_loss = build_loss_function(model, training)

    def setup(self, stage: str) -> None:
        """Compile the training step if the settings ask for it; BadRequest if the compiler's cache cannot be written."""
        backend = compile_backend(self.training_config, self.trainer.strategy.root_device.type)
        if backend is not None:
            check_compiler_cache()
            # All training batches have the same shape; the last validation batch does not, and is not worth a compilation.
            self._step_loss = torch.compile(self._loss, backend=backend, dynamic=False)

    def training_step(self, batch: Batch, _) -> torch.Tensor:
        """Return the loss of one minibatch, the mean cross-entropy in nats; called by Lightning."""
        return self._step_loss(*batch)

    def validation_step(self, batch: Batch, _) -> None:
        """Log the loss of one minibatch; Lightning averages it over all examples and ranks as `val_loss`."""
        self.log("val_loss", self._loss(*batch), batch_size=len(batch.tokens), sync_dist=True)

    def configure_optimizers(self):
        """Return AdamW and the learning-rate schedule, which advances with every optimizer step; called by Lightning."""
        training = self.training_config
        # With a gradient scaler, a fused optimizer unscales by itself, too late for clipping and for the logged norm.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = build_optimizer(self.model, training, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, training, total_steps=self.total_steps)
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
    """Seeds dropout by (seed, batch number, rank), so that a resumed run draws the same numbers."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        """Seed torch's global generator for the dropout of this batch."""
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(torch_seed(self.seed, "dropout", trainer.global_rank, number=number))
