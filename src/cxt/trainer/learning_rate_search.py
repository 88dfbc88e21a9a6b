"""Learning-rate search: raise the learning rate step by step and observe the loss.

    cxt find_lr --model broad --dataset-path results/datasets/processed --num-steps 100 --plot lr.png

It accepts the flags of `cxt.train`, trains briefly without saving anything, and suggests the rate at which the loss falls most
steeply.
"""

import dataclasses
import math
import tempfile

import numpy as np

from cxt.trainer.request import RunRequest

SMOOTHING = 0.98
"""Weight of the past in the running average of losses."""

DIVERGED = 4.0
"""The search ends when the average loss exceeds this many times its minimum."""

SKIPPED_STEPS = (10, 1)
"""Steps at the beginning and at the end at which no learning rate is suggested, because the average is not reliable there."""


@dataclasses.dataclass
class Search:
    """The curve of a search: learning rate and running average of the loss at each optimizer step."""

    rates: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    _average: float = 0.0

    def add(self, rate: float, loss: float) -> bool:
        """Add the *loss* of a step at *rate*; return whether to continue."""
        best = min(self.losses, default=math.inf)
        self._average = SMOOTHING * self._average + (1 - SMOOTHING) * loss
        self.rates.append(rate)
        self.losses.append(self._average / (1 - SMOOTHING ** (len(self.losses) + 1)))
        return math.isfinite(self.losses[-1]) and self.losses[-1] <= DIVERGED * best

    def suggestion(self) -> float | None:
        """The learning rate at which the loss falls most steeply; None after too few steps."""
        first, last = SKIPPED_STEPS
        rates, losses = np.array(self.rates[first:-last]), np.array(self.losses[first:-last])
        known = np.isfinite(losses)
        if known.sum() < 2:
            return None
        return float(rates[known][np.gradient(losses[known], rates[known]).argmin()])


def find_lr(request: RunRequest, *, lowest: float, highest: float, num_steps: int) -> Search:
    """Train for *num_steps* optimizer steps, each at a higher learning rate, or until the loss grows.

    Parameters
    ----------
    request : RunRequest
        Request of the run; only one of its devices is used.
    lowest, highest : float
        Learning rates of the first and the last step; they grow by a constant factor.
    num_steps : int
        Optimizer steps, each of grad_accum batches as in the run; the last step of an epoch may have fewer.

    Returns
    -------
    Search
        Learning rate and loss of each step.
    """
    import pytorch_lightning as pl

    from cxt.trainer.fit import build_data, build_region_schedule, build_starting_model, quieten, set_up_torch
    from cxt.trainer.module import Reseed, TrainingModule

    search, peak = Search(), request.training.lr

    def compute_rate(step: int) -> float:
        return lowest * (highest / lowest) ** (step / (num_steps - 1))

    class LearningRateRamp(pl.Callback):
        """Sets the learning rate of each step and records its loss, the mean over its batches."""

        def __init__(self):
            self.batches: list[float] = []

        def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
            for group in trainer.optimizers[0].param_groups:  # keeps the ratio between adapter and backbone
                group["lr"] = group["initial_lr"] * compute_rate(trainer.global_step) / peak

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            loss = float(outputs.get("plain", outputs["loss"]))
            self.batches.append(loss * request.training.grad_accum)  # Lightning divides the loss by it
            if trainer.global_step == len(search.losses):  # the step has more batches
                return
            trainer.should_stop = not search.add(compute_rate(len(search.losses)), sum(self.batches) / len(self.batches))
            self.batches.clear()

    quieten()
    set_up_torch(request)
    module = TrainingModule(
        build_starting_model(request), request.training, record={}, total_steps=request.total_steps,
        scales=request.manifest["scales"], regions=build_region_schedule(request),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            accelerator=request.accelerator,
            devices=request.devices[:1] if isinstance(request.devices, list) else 1,
            accumulate_grad_batches=request.training.grad_accum,
            precision=request.precision,
            max_epochs=-1,  # one epoch of a small dataset would be too short
            max_steps=num_steps,
            limit_val_batches=0,
            gradient_clip_val=request.training.grad_clip or None,
            use_distributed_sampler=False,
            logger=False,
            callbacks=[Reseed(request.training.seed), LearningRateRamp()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        )
        trainer.fit(module, build_data(request))
    return search
