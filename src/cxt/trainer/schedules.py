"""The learning rate of each optimizer step, relative to its peak."""

import math

from pytorch_lightning.callbacks import Callback

from cxt.config.training import TrainingConfig

WSD_PLATEAU_FRACTION = 0.4
"""Fraction of the steps from the end of the warm-up to the end of the decay during which `wsd` stays at its peak."""


def learning_rate_factor(step: int, training: TrainingConfig, *, total_steps: int) -> float:
    """Learning rate of optimizer step *step* relative to the peak.

    It rises linearly from 0 over `warmup_steps`, then decays to `min_lr` at `decay_steps` (0 = the run's last step) and stays
    there. The shapes of the decay are described at `cxt.config.training.TrainingFields.schedule`.
    """
    if step < training.warmup_steps:
        return step / training.warmup_steps
    if training.schedule in ("constant", "adaptive"):
        return 1.0
    floor = training.min_lr / training.lr
    end = training.decay_steps or total_steps
    if step >= end:
        return floor
    progress = (step - training.warmup_steps) / max(1, end - training.warmup_steps)
    return floor + (1 - floor) * _decay(progress, training, floor=floor)


def _decay(progress: float, training: TrainingConfig, *, floor: float) -> float:
    """What is left of the way from the peak to the floor, from 1 to 0, after a fraction *progress* of the decay."""
    match training.schedule:
        case "linear":
            return 1 - progress
        case "log_linear":  # a straight line in the logarithm of the learning rate
            return (floor**progress - floor) / (1 - floor) if floor < 1 else 0.0
        case "rex":  # Chen et al. 2022
            return (1 - progress) / (0.5 + 0.5 * (1 - progress))
        case "cosine_restarts":
            cycle = min(int(progress * training.cycles), training.cycles - 1)
            within = progress * training.cycles - cycle
            return training.cycle_decay**cycle * 0.5 * (1 + math.cos(math.pi * within))
        case "wsd":
            progress = max(0.0, (progress - WSD_PLATEAU_FRACTION) / (1 - WSD_PLATEAU_FRACTION))
    return 0.5 * (1 + math.cos(math.pi * progress))


class AdaptiveRate(Callback):
    """The factor of the schedule `adaptive`, which validation losses raise and lower; 1 for other schedules.

    It is part of the training state.
    """

    def __init__(self, training: TrainingConfig):
        self.settings, self.is_used = training.adaptive, training.schedule == "adaptive"
        self.lowest = training.min_lr / training.lr
        self._state = {"factor": 1.0, "best": math.inf, "better": 0, "worse": 0, "cooldown": 0}

    @property
    def factor(self) -> float:
        """Learning rate relative to that of the other schedules."""
        return self._state["factor"]

    def state_dict(self) -> dict:
        """Return the factor, the lowest loss, and the counters."""
        return dict(self._state)

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self._state = dict(state)

    def on_validation_end(self, trainer, module) -> None:
        """Take a validation loss into account; called by Lightning."""
        if self.is_used:
            self.update(float(trainer.callback_metrics["val_loss"]))

    def update(self, loss: float) -> None:
        """Take a validation loss into account: the next optimizer step has the new learning rate."""
        state, settings = self._state, self.settings
        improves = loss < state["best"] * (1 - settings.threshold) or math.isinf(state["best"])
        state["best"] = min(state["best"], loss)
        if state["cooldown"]:
            state["cooldown"] -= 1
            return
        state["better"] = state["better"] + 1 if improves else 0
        state["worse"] = 0 if improves else state["worse"] + 1
        if state["better"] >= settings.patience_up:
            change = settings.up
        elif state["worse"] >= settings.patience_down:
            change = settings.down
        else:
            return
        factor = min(max(state["factor"] * change, self.lowest), settings.highest)
        state.update(factor=factor, better=0, worse=0, cooldown=settings.cooldown)
