"""The learning rate of each optimizer step, relative to its peak."""

import math

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
    if training.schedule == "constant":
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
