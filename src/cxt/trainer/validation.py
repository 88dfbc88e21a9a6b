"""Validation during training: the loss, decoding of a few test examples, the best weights, and early stopping.

The loss is teacher-forced: each window is predicted from the true past. Because the model will be used for decoding, a small
set of examples, the same at every validation, is decoded as well, on the first device and without changing the random numbers
of training.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from pytorch_lightning.callbacks import Callback
from torch.nn.utils import parametrize

from cxt.checkpoints.file import write_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import METRIC_PREFIX
from cxt.config.learning import Metric
from cxt.config.network import SPECIAL_TOKENS
from cxt.console import get_logger
from cxt.data.grid import Grid
from cxt.decoding.decode import Summaries, decode, has_doubles
from cxt.decoding.scores import score_distributions
from cxt.errors import Failed
from cxt.evaluation.metrics import pearson_per_pair
from cxt.io import file_sha256
from cxt.trainer.log import TrainingLog
from cxt.trainer.trackers import Trackers

logger = get_logger(__name__)

REPLICATES = 4
"""Decoded sequences per example, whose distributions are averaged: enough for a trend, a quarter of an evaluation's cost."""


class DecodedExamples:
    """A few test examples, evenly spaced.

    *truth* (examples, windows) is ln TMRCA at the centres of its bins, *names* are the titles of figures. *metrics* are scores
    of their distributions beside MSE and correlation. *batch_size* of them are decoded together.
    """

    def __init__(self, dataset, *, examples: int, grid: Grid, metrics: Sequence[Metric] = (), batch_size: int = 8):
        self.metrics, self.batch_size = metrics, batch_size
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(examples, len(dataset))).astype(int))
        batch = dataset.batch([int(example) for example in chosen])
        self.counts, self.missing, self.rates, self.grid = batch.counts, batch.missing, batch.rates, grid
        self.truth = grid.centres[batch.tokens[:, 1:].numpy() - SPECIAL_TOKENS]
        self.names = []
        for example in chosen:
            about = dataset.describe(int(example))
            self.names.append(f"{about.scenario} {about.index}, pair {about.pair[0]}-{about.pair[1]}")

    def decode(self, model, *, seed: int, device) -> Summaries:
        """Decode the posterior of each window of each example; the same for the same weights."""
        if not has_doubles(device):
            model, device = copy.deepcopy(model).to("cpu"), "cpu"
        with torch.no_grad(), parametrize.cached():  # otherwise parametrised weights are computed for each window
            return decode(
                model, self.counts, self.missing,
                rates=self.rates, grid=self.grid, replicates=REPLICATES, batch_size=self.batch_size, seed=seed, device=device,
                truth=self.truth if self.metrics else None,
            )  # fmt: skip

    def scores(self, summaries: Summaries) -> dict[str, float]:
        """`val_mse` and `val_r` of the posterior mean of ln TMRCA, defined as `mse` and `r` of an evaluation, and *metrics*.

        `val_r` is omitted if no example varies along its windows.
        """
        values = {"val_mse": float(np.mean((summaries.mean - self.truth) ** 2))}
        if summaries.scores is not None:
            scores = score_distributions(summaries.scores)
            values |= {METRIC_PREFIX + metric: scores[metric] for metric in self.metrics}
        r = pearson_per_pair(self.truth, summaries.mean)
        return values if math.isnan(r) else values | {"val_r": r}

    def arrange_tracks(self, summaries: Summaries) -> dict:
        """The input of `cxt.evaluation.figures.draw_tracks`: two examples per row, each (truth, mean, low, high)."""
        arrays = (self.truth, summaries.mean, summaries.low, summaries.high)
        return {
            tuple(self.names[first : first + 2]): tuple(array[None, first : first + 2] for array in arrays)
            for first in range(0, len(self.names), 2)
        }


class Validation(Callback):
    """Completes the log's row after each validation, keeps the weights of the lowest loss, and stops a run without progress.

    Parameters
    ----------
    examples : examples to decode; None for none
    trackers : gets the figure of the decoded examples
    patience, min_delta : stop after *patience* consecutive validations without an improvement of more than *min_delta*;
        0 = never. The best weights are those of the lowest loss, independent of *min_delta*.
    """

    def __init__(
        self,
        run: RunDirectory,
        name,
        log: TrainingLog,
        *,
        record,
        examples: DecodedExamples | None,
        trackers: Trackers,
        seed,
        steps_per_epoch,
        patience,
        min_delta,
    ):
        self.trackers = trackers
        self.run, self.name, self.training_log, self.record, self.examples, self.seed = run, name, log, record, examples, seed
        self.steps_per_epoch, self.patience, self.min_delta = steps_per_epoch, patience, min_delta
        self.best = {"loss": math.inf, "step": 0, "sha256": "", "reference": math.inf, "rounds": 0}
        self.stopped = False

    def state_dict(self) -> dict:
        """Return the lowest loss, its step and file digest, and the number of validations since the last improvement."""
        return dict(self.best)

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.best = dict(state)

    def on_validation_end(self, trainer, module) -> None:
        """Log the loss and decoding accuracy, keep the weights of the lowest loss, and stop when *patience* is exhausted."""
        loss = float(trainer.callback_metrics["val_loss"])
        step = trainer.global_step
        values = {"val_loss": loss}
        values |= {f"val_loss/{term}": float(trainer.callback_metrics[f"val_loss/{term}"]) for term in self.training_log.terms}
        tracks = None
        if self.examples is not None and trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                summaries = self.examples.decode(module.model, seed=self.seed, device=module.device)
            values |= self.examples.scores(summaries)
            tracks = self.examples.arrange_tracks(summaries)
        self.training_log.validated(trainer, values)
        if trainer.is_global_zero:
            self.trackers.validated(trainer, module, tracks)
            decoded = f", decoded: MSE {values['val_mse']:.3f}" if "val_mse" in values else ""
            decoded += f", r {values['val_r']:.3f}" if "val_r" in values else ""
            if self.examples is not None:
                decoded += "".join(f", {metric} {values[METRIC_PREFIX + metric]:.3f}" for metric in self.examples.metrics)
            logger.info(f"{self.name}: step {step}, validation loss {loss:.4f}{decoded}")
        if loss < self.best["loss"]:
            self.best |= {"loss": loss, "step": step}
            if trainer.is_global_zero:
                about = {"epoch": (step - 1) // self.steps_per_epoch, "step": step, "val_loss": loss}
                write_checkpoint(self.run.best, module.model.state_dict(), self.record | about)
                self.best["sha256"] = file_sha256(self.run.best)
        if loss < self.best["reference"] - self.min_delta:
            self.best |= {"reference": loss, "rounds": 0}
        else:
            self.best["rounds"] += 1
        if self.patience and self.best["rounds"] >= self.patience:
            self.stopped = trainer.should_stop = True
            if trainer.is_global_zero:
                logger.info(
                    f"{self.name}: stops early at step {step}: no validation loss more than {self.min_delta:g} below "
                    f"{self.best['reference']:.4f} in {self.patience} consecutive validations"
                )

    def best_checkpoint(self):
        """The file of the best weights; Failed if it is missing or was changed."""
        if not self.run.best.is_file() or file_sha256(self.run.best) != self.best["sha256"]:
            raise Failed(
                f"{self.name}: {self.run.best}, of step {self.best['step']}, is missing or was changed, and cannot be "
                "published (export: best); to train again, use --restart or, under Snakemake, delete the run directory"
            )
        return self.run.best
