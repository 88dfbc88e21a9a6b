"""Trackers of experiments beside the training log: TensorBoard always, MLflow and Weights & Biases on request.

All get the rows of the training log under the same names, the settings as hyper-parameters, the figure of decoded examples at
validations, and at the end the checkpoint and the figures. What identifies a run at a tracker is kept in `trackers.json` of the
run directory, so that a run that is continued goes on there, too.
"""

import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import matplotlib.image
import numpy as np
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from cxt.checkpoints.run_directory import RunDirectory
from cxt.config.training import TrainingConfig
from cxt.console import get_logger
from cxt.errors import BadRequest, first_line, try_drawing
from cxt.io import atomic_write, json_text

logger = get_logger(__name__)

SECONDS_BETWEEN_FIGURES = 60
"""Figures of validations that follow faster are left out, because drawing one takes up to a second."""

SCHEMES = ("file", "sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
"""Addresses that MLflow stores runs at."""

OFFLINE = ("offline", "dryrun", "disabled")


def check_trackers(training: TrainingConfig) -> None:
    """Refuse MLflow or Weights & Biases, if they are asked for and cannot be used, before any work.

    Raises
    ------
    BadRequest
        If MLflow's address is not one or contains a password, or if Weights & Biases would ask for a login.
    ModuleNotFoundError
        If a tracker's package is not installed.
    """
    if training.mlflow is not None:
        import mlflow  # noqa: F401

        parts = urlsplit(training.mlflow)
        if parts.scheme.partition("+")[0] not in SCHEMES:
            raise BadRequest(
                "mlflow must be an address such as sqlite:///mlflow.db, file:./mlruns or https://server, got "
                f"'{training.mlflow}'"
            )
        if parts.password is not None:
            raise BadRequest(
                "mlflow must not contain a password, because settings are stored in every checkpoint; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server"
            )
    if training.wandb is not None:
        import wandb

        if os.environ.get("WANDB_MODE") not in OFFLINE and wandb.api.api_key is None:
            raise BadRequest(
                "wandb: not logged in; set WANDB_API_KEY or run `wandb login`, or set WANDB_MODE=offline, and upload the run "
                "later with `wandb sync`"
            )


def build_loggers(training: TrainingConfig, run: RunDirectory, *, name: str, first: bool) -> list[Logger]:
    """Lightning's loggers of a run, TensorBoard's first.

    Parameters
    ----------
    training : TrainingConfig
    run : RunDirectory
    name : str
        Name of the run at the trackers; that of the checkpoint.
    first : bool
        Whether this is the first process of the run, which alone talks to MLflow and Weights & Biases.

    Raises
    ------
    BadRequest
        If MLflow cannot be reached, and the run is not known there; otherwise it gets nothing more, with a warning.
    """
    loggers: list[Logger] = [TensorBoardLogger(save_dir=run.path, name="", version="", default_hp_metric=False)]
    if not first:
        return loggers
    path = run.path / "trackers.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if training.mlflow is not None:
        if training.mlflow.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow discourages files, but they work
        earlier = known.get("mlflow", {})
        run_id = earlier.get("run") if earlier.get("address") == training.mlflow else None
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default, a server that is gone costs minutes
        try:
            tracker = MLFlowLogger(experiment_name="cxt", run_name=name, tracking_uri=training.mlflow, run_id=run_id)
            known["mlflow"] = {"address": training.mlflow, "run": tracker.run_id}
            loggers.append(tracker)
        except Exception as error:
            if run_id is None:
                raise BadRequest(
                    f"mlflow {training.mlflow} cannot be used: {first_line(error)}; start its server or correct the address, "
                    "or train without mlflow"
                ) from None
            logger.warning(f"mlflow {training.mlflow} cannot be used, and gets nothing more of this run: {first_line(error)}")
    if training.wandb is not None:
        earlier = known.get("wandb", {})
        run_id = earlier["run"] if earlier.get("project") == training.wandb else secrets.token_hex(4)
        known["wandb"] = {"project": training.wandb, "run": run_id}
        loggers.append(WandbLogger(project=training.wandb, name=name, id=run_id, save_dir=run.path))
    if known:
        atomic_write(path, json_text(known).encode())
    return loggers


def send(trainer, action: Callable[[Logger], object]) -> None:
    """Do something with every tracker. MLflow or Weights & Biases is given up, with a warning, if it fails.

    A server that is gone must not end a training of hours, of which the training log has everything.
    """
    for tracker in list(trainer.loggers):
        try:
            action(tracker)
        except Exception as error:
            if isinstance(tracker, TensorBoardLogger):
                raise
            logger.warning(f"{type(tracker).__name__} fails and gets nothing more of this run: {first_line(error)}")
            trainer.loggers = [other for other in trainer.loggers if other is not tracker]


def describe_hyperparameters(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Settings as hyper-parameters: numbers and text as they are, everything else as JSON text."""
    plain = bool | int | float | str
    return {key: value if isinstance(value, plain) else json.dumps(value) for key, value in settings.items()}


class Trackers(Callback):
    """Sends to the trackers what is not in the training log; the log itself sends its rows.

    Parameters
    ----------
    run : RunDirectory
    settings : mapping
        All settings of the run, its hyper-parameters.
    histograms : bool
        Whether to send histograms of weights and gradients at each validation, to TensorBoard.
    validates : callable
        Whether there is a validation after a step.
    name, window_size : str, int
        Title of the figures, and base pairs of a window.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: Mapping[str, Any],
        *,
        histograms: bool,
        validates: Callable[[int], bool],
        name: str,
        window_size: int,
    ):
        self.run, self.histograms, self.validates, self.name, self.window_size = run, histograms, validates, name, window_size
        self.hyperparameters = describe_hyperparameters(settings)
        self._drawn = -float("inf")

    def on_fit_start(self, trainer, module) -> None:
        """Send the settings."""
        if trainer.is_global_zero:
            send(trainer, self._send_settings)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        """Send histograms of the gradients, before clipping, if there is a validation after this step, which drops them."""
        if self.histograms and trainer.is_global_zero and self.validates(trainer.global_step + 1):
            gradients = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
            send(trainer, lambda tracker: _send_histograms(tracker, "gradients", gradients, trainer.global_step + 1))

    def _send_settings(self, tracker: Logger) -> None:
        if isinstance(tracker, TensorBoardLogger):
            tracker.hparams.update(self.hyperparameters)  # for hparams.yaml
            # Lightning's own method would add a value of each metric to its curve.
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(self.hyperparameters, {"val_loss": 0.0, "val_mse": 0.0}):
                tracker.experiment._get_file_writer().add_summary(summary)
        else:
            tracker.log_hyperparams(self.hyperparameters)

    def validated(self, trainer, module, tracks: dict | None) -> None:
        """Send the figure and the histograms of a validation.

        Parameters
        ----------
        trainer, module : Lightning's
        tracks : dict or None
            The decoded examples, as for `cxt.evaluation.figures.draw_tracks`; None if there are none.
        """
        step = trainer.global_step
        if self.histograms:
            weights = {name: p.detach() for name, p in module.model.named_parameters() if p.requires_grad}
            send(trainer, lambda tracker: _send_histograms(tracker, "weights", weights, step))
        if tracks is None or time.monotonic() - self._drawn < SECONDS_BETWEEN_FIGURES:
            return
        from cxt.evaluation.figures import draw_tracks

        path, pictures = self.run.path / "tracks.png", []

        def draw() -> None:
            draw_tracks(tracks, path, title=f"{self.name}, step {step}", window_size=self.window_size)
            pictures.append(matplotlib.image.imread(path)[..., :3])  # without transparency

        if lost := try_drawing(draw):
            logger.warning(f"{self.name}: the decoded examples of step {step} could not be drawn ({lost})")
        else:
            send(trainer, lambda tracker: _send_figure(tracker, path, pictures[0], step))
        self._drawn = time.monotonic()

    def finished(self, trainer, checkpoint: Path) -> None:
        """Send the finished checkpoint, the settings file and the figures."""
        figures = [path for path in (self.run.path / "losses.png", self.run.path / "tracks.png") if path.is_file()]
        files = [checkpoint, self.run.path / "config.yaml", *figures]
        send(trainer, lambda tracker: self._send_files(tracker, files))

    def _send_files(self, tracker: Logger, files: list[Path]) -> None:
        if isinstance(tracker, MLFlowLogger):
            for path in files:
                tracker.experiment.log_artifact(tracker.run_id, str(path))
        elif isinstance(tracker, WandbLogger):
            import wandb

            run = tracker.experiment
            artifact = wandb.Artifact(f"{self.name}-{run.id}", type="model")
            for path in files:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
            run.finish()


def _send_figure(tracker: Logger, path: Path, picture: np.ndarray, step: int) -> None:
    if isinstance(tracker, TensorBoardLogger):
        tracker.experiment.add_image("tracks", picture, step, dataformats="HWC")
    elif isinstance(tracker, MLFlowLogger):
        with tempfile.TemporaryDirectory() as directory:
            named = Path(directory) / f"tracks-{step:06d}.png"
            shutil.copyfile(path, named)
            tracker.experiment.log_artifact(tracker.run_id, str(named), "tracks")
    elif isinstance(tracker, WandbLogger):
        tracker.log_image("tracks", [str(path)], step=step)


def _send_histograms(tracker: Logger, what: str, values: Mapping[str, torch.Tensor], step: int) -> None:
    if isinstance(tracker, TensorBoardLogger):
        for name, value in values.items():
            tracker.experiment.add_histogram(f"{what}/{name}", value.float(), step)
