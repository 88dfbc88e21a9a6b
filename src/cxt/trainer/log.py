"""training_log.csv, progress lines and the check for non-finite numbers."""

import os
import time
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

from cxt.checkpoints.training_log import format_rows, keep_rows, list_columns
from cxt.console import get_logger
from cxt.errors import Failed
from cxt.trainer.trackers import send

logger = get_logger(__name__)

MAX_LINE_SECONDS = 60
"""Longest time between two progress lines."""

MAX_WAIT_FRACTION = 0.2


class TrainingLog(Callback):
    """Writes training_log.csv, prints progress lines, and stops a run with non-finite numbers.

    On a CPU, every gradient is checked before the optimizer uses it. On a GPU, where reading the result costs time, this is
    done at every row and before a training state is saved: after the step, but before anything is kept.

    Parameters
    ----------
    path : path of training_log.csv
    total_steps, steps_per_epoch : optimizer steps of the run and of each epoch
    examples_per_batch : examples per micro-batch on all devices
    every : optimizer steps between rows
    validates : callable, whether there is a validation after a step
    terms : names of the terms of the loss, if there are several
    metrics : names of the metrics of decoded examples, beside their MSE and correlation
    checks_gradient : False with a gradient scaler, which itself skips steps with non-finite gradients
    line_every : seconds to the first progress line; the time between lines then doubles, up to `MAX_LINE_SECONDS`
    """

    def __init__(
        self,
        path,
        name,
        *,
        total_steps,
        steps_per_epoch,
        examples_per_batch,
        every,
        validates,
        terms=(),
        metrics=(),
        checks_gradient=True,
        line_every=15.0,
    ):
        self.path, self.name, self.validates, self.terms = Path(path), name, validates, list(terms)
        self.columns = list_columns(terms=self.terms, metrics=metrics)
        self.total_steps, self.steps_per_epoch, self.examples_per_batch = total_steps, steps_per_epoch, examples_per_batch
        self.every, self.checks_gradient, self._line_every = every, checks_gradient, line_every
        self._step, self._row, self._seconds = 0, None, 0.0
        self._loss, self._parts, self._batches, self._norm, self._first_bad = None, None, 0, None, None
        self._advised = False

    def state_dict(self) -> dict:
        """Return the row that is still waiting for its validation, if any, and the seconds spent training."""
        return {"row": self._row, "seconds": self._seconds_now()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._row, self._seconds = state["row"], state["seconds"]

    # Steps

    def on_train_start(self, trainer, module) -> None:
        """Start the counters and clocks, and drop the rows that a resumed run will repeat."""
        now = time.monotonic()
        self._began = self._line_at = self._row_began = now
        self._first_step = self._step = trainer.global_step
        self._batches_done = self._row_batches = 0
        self._waited = self._waited_all = 0.0
        self._first_bad = torch.tensor(-1, device=module.device)
        if trainer.is_global_zero:
            # The row of the saved step is already in the log, unless its validation is still pending.
            keep_rows(self.path, up_to=self._step if self._row is None else self._step - 1, columns=self.columns)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        """Note the learning rate and the gradient norm before clipping, and check that the norm is finite."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self._lr = optimizer.param_groups[0]["lr"]
        self._norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=module.device)
        if self.checks_gradient:
            self._look_at(self._norm, trainer, module, step=trainer.global_step + 1)

    def _look_at(self, value: torch.Tensor, trainer, module, *, step: int) -> None:
        """Note the first step at which *value*, the same on all ranks, is not finite."""
        self._first_bad = torch.where((self._first_bad < 0) & ~torch.isfinite(value), step, self._first_bad)
        if module.device.type == "cpu":
            self.stop_if_bad(trainer)

    def stop_if_bad(self, trainer) -> None:
        """Raise Failed if a loss or gradient was not finite; called before a training state is saved."""
        step = int(self._first_bad)
        if step < 0:
            return
        if not trainer.is_global_zero:
            raise Failed("", status=0, agreed=True)  # the value is the same on all ranks; only the first one reports it
        examples = self._describe_examples(trainer, step)
        raise Failed(
            f"{self.name}: loss or gradient is not finite at step {step}. {examples}. This step was "
            "not saved: the same command would continue from the last training state and stop here again. Try half the "
            "learning rate (lr), clipping (grad_clip: 1.0), or precision: 32-true; each of these starts a new run",
            agreed=True,
        )

    def _describe_examples(self, trainer, step: int) -> str:
        """Describe the examples of an optimizer step on rank 0."""
        epoch, window = divmod(step - 1, self.steps_per_epoch)
        sampler = trainer.train_dataloader.sampler
        accumulation = trainer.accumulate_grad_batches
        first = window * accumulation
        numbers = range(first, min(first + accumulation, len(sampler)))
        examples = [example for number in numbers for example in sampler.batch(epoch, number)]
        described = []
        for example in examples[:3]:
            about = trainer.datamodule.train_set.describe(example)
            described.append(f"{about.scenario} {about.index} pair {about.pair[0]}-{about.pair[1]}")
        more = f", … {len(examples)} in total" if len(examples) > 3 else ""
        where = " of the first device" if trainer.world_size > 1 else ""
        return f"Epoch {epoch}, batches {numbers.start} to {numbers.stop - 1}{where}: {'; '.join(described)}{more}"

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        """Add up the losses of an optimizer step; after it, make its row and print a progress line if they are due."""
        # Lightning divides by the accumulated batches, so that the sum is the mean.
        loss = outputs.get("plain", outputs["loss"]).detach()
        self._loss = loss if self._loss is None else self._loss + loss
        self._parts = outputs["parts"] if self._parts is None else self._parts + outputs["parts"]
        self._batches += 1
        self._batches_done += 1
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        # The last accumulation of an epoch may be shorter, but Lightning divides by the full number of batches.
        mean = self._loss * (trainer.accumulate_grad_batches / self._batches)
        if not self.checks_gradient:
            everywhere = trainer.strategy.reduce(mean.clone(), reduce_op="mean") if trainer.world_size > 1 else mean
            self._look_at(everywhere, trainer, module, step=step)
        parts = self._parts / self._batches
        self._loss, self._parts, self._batches = None, None, 0
        validates = self.validates(step)
        ends = step >= self.total_steps
        if step % self.every == 0 or validates or ends:
            self.stop_if_bad(trainer)
            self._make_row(trainer, step, mean, parts)
            if not validates:
                self._write_row(trainer)
        if trainer.is_global_zero and (ends or time.monotonic() - self._line_at >= self._line_every):
            self._say(trainer, step, float(mean))

    # Rows

    def _seconds_now(self) -> float:
        return self._seconds + (time.monotonic() - self._began if hasattr(self, "_began") else 0.0)

    def _make_row(self, trainer, step: int, loss: torch.Tensor, parts: torch.Tensor) -> None:
        if trainer.world_size > 1:
            loss, parts = (trainer.strategy.reduce(value, reduce_op="mean") for value in (loss, parts))
        now = time.monotonic()
        spent = max(1e-9, now - self._row_began)
        waited = trainer.train_dataloader.waited
        self._row = {
            "step": step,
            "epoch": (step - 1) // self.steps_per_epoch,
            "train_loss": float(loss),
            "lr": self._lr,
            "grad_norm": float(self._norm),
            "items_per_s": round((self._batches_done - self._row_batches) * self.examples_per_batch / spent, 2),
            "data_wait": round(min(1.0, (waited - self._waited) / spent), 4),
            "seconds": round(self._seconds_now(), 2),
        } | dict(zip([f"train_loss/{term}" for term in self.terms], parts.tolist(), strict=False))
        self._row_began, self._row_batches, self._waited = now, self._batches_done, waited

    def _write_row(self, trainer) -> None:
        row, self._row = self._row, None
        if not trainer.is_global_zero:
            return
        numbers = {key: value for key, value in row.items() if key not in ("step", "epoch")}
        send(trainer, lambda tracker: tracker.log_metrics(numbers, row["step"]))
        text = format_rows([row], header=not self.path.exists(), columns=self.columns)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def validated(self, trainer, values: dict) -> None:
        """Add the validation after a step to its row, and write the row."""
        self._row |= values
        self._write_row(trainer)
        now = time.monotonic()
        self._row_began += now - getattr(self, "_validation_began", now)  # validation does not count in the throughput

    def on_validation_start(self, trainer, module) -> None:
        """Note the time, so that validation does not count as time spent on training batches."""
        self._validation_began = time.monotonic()

    # Lines

    def _say(self, trainer, step: int, loss: float) -> None:
        now = time.monotonic()
        self._line_at, self._line_every = now, min(2 * self._line_every, max(MAX_LINE_SECONDS, self._line_every))
        spent = max(1e-9, now - self._began)
        rate = self._batches_done * self.examples_per_batch / spent
        left = (self.total_steps - step) * spent / max(1, step - self._first_step)
        waiting = trainer.train_dataloader.waited / spent
        logger.info(
            f"{self.name}: step {step}/{self.total_steps}, loss {loss:.3f}, {rate:.0f} examples/s, {waiting:.0%} of the time "
            f"waiting for data, {left / 60:.1f} min left"
        )
        if waiting > MAX_WAIT_FRACTION and step - self._first_step >= 50 and not self._advised:
            self._advised = True
            logger.warning(f"{self.name}: training waits for data; more threads to prepare batches may help (workers: 2)")
