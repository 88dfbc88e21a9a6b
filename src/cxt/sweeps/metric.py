"""The metric of a sweep: whether the training log of every trial will have it, and whether its values can be compared."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from cxt.checkpoints.training_log import METRIC_PREFIX, TERM_PREFIXES, list_columns
from cxt.config.learning import LossName, Metric, is_readable
from cxt.config.training import TrainingConfig, list_loss_terms
from cxt.errors import BadRequest, suggest_nearest
from cxt.sweeps.space import Parameter, Sweep

OF_DISTRIBUTIONS = tuple(METRIC_PREFIX + metric for metric in get_args(Metric))
"""Columns of training_log.csv that it has if the setting `metrics` names them."""

OF_DECODED = ("val_mse", "val_r", *OF_DISTRIBUTIONS)
"""Columns that are measured on decoded test examples."""

METRICS = ("val_loss", "train_loss", *OF_DECODED)
"""Columns of training_log.csv that a sweep may optimise, beside those of the terms of a loss."""

TERMS = ("info_nce", "distillation", "poisson", *get_args(LossName), *(f"marginal_{name}" for name in get_args(LossName)))

DECIDE = ("objective", "losses", "metrics", "decode_items")
"""Settings that decide which columns the training log has; the last two are the same in all trials."""

WEIGHTS = ("objective", "losses", "joint_weight", "distill", "masked", "contrastive")
"""Settings that decide what the loss is the sum of."""

EXAMPLES = ("regions", "noise")
"""Settings that decide what training examples look like, on which the training loss is measured."""

MAX_COMBINATIONS = 500
"""Combinations of the searched ones of `DECIDE` that are checked; the others are checked when their trials end."""


def check_metric(sweep: Sweep, settings: Mapping[str, Any], put: Callable[[dict, str, Any], None]) -> None:
    """Check that all trials will have the metric, and that its values say the same in all of them.

    Parameters
    ----------
    sweep : Sweep
    settings : mapping
        The settings that all trials have in common, in the format of `--config`.
    put : callable
        Makes settings of a trial: called with settings, the name of a parameter and its value.

    Raises
    ------
    BadRequest
        If a combination of the parameters gives a training log without the metric, or the loss of another sum.
    """
    name = sweep.metric
    prefix = next((prefix for prefix in TERM_PREFIXES if name.startswith(prefix)), None)
    if name not in METRICS and (prefix is None or name.removeprefix(prefix) not in TERMS):
        choices = [prefix + term for term in TERMS for prefix in TERM_PREFIXES] if prefix else METRICS
        raise BadRequest(f"the metric '{name}' is not in training_log.csv{suggest_nearest(name, choices)}")
    tops = {parameter.name.partition(".")[0] for parameter in sweep.parameters}
    if (other := sorted(tops.intersection(EXAMPLES))) and name.startswith("train_loss"):
        raise BadRequest(
            f"the metric {name} is measured on training examples, so that its values cannot be compared between trials with "
            f"different {' and '.join(other)}; choose val_loss, val_mse or val_r, which all trials measure on the same examples"
        )
    searched = sorted(tops.intersection(WEIGHTS))
    if searched and name in ("val_loss", "train_loss"):
        raise BadRequest(
            f"the metric {name} is the sum of the losses, each times its weight, so that its values cannot be compared between "
            f"trials with different {' and '.join(searched)}; choose val_mse, val_r, val_crps (with --metrics crps), or a term "
            "that all trials have, such as val_loss/cross_entropy"
        )
    for training, values in _list_combinations(sweep, settings, put):
        if (problem := _describe_lack(name, training)) is not None:
            where = ", ".join(f"{key}: {value}" for key, value in values.items())
            remedy = "choose val_mse, val_r or val_crps" if where else "choose val_loss or train_loss"
            advice = f"; {remedy}" if prefix is not None else ""
            raise BadRequest(problem + (f" (in trials with {where})" if where else "") + advice)


def _list_combinations(
    sweep: Sweep, settings: Mapping[str, Any], put: Callable[[dict, str, Any], None]
) -> Iterator[tuple[TrainingConfig, dict[str, Any]]]:
    """What decides about the columns in each combination of searched settings, and the values of these."""
    parameters = [parameter for parameter in sweep.parameters if parameter.name.partition(".")[0] in DECIDE]
    choices = [_list_ends(parameter) for parameter in parameters]
    for values in itertools.islice(itertools.product(*choices), MAX_COMBINATIONS):
        chosen = {parameter.name: value for parameter, value in zip(parameters, values, strict=True)}
        trial = {key: settings[key] for key in DECIDE if key in settings}
        try:
            for name, value in chosen.items():
                put(trial, name, value)
            training = TrainingConfig(**trial)
        except BadRequest:
            continue  # such a trial is refused for it, with the reason
        yield training, chosen


def _list_ends(parameter: Parameter) -> list:
    """The values of a parameter, or the two ends of its range."""
    if parameter.values is not None:
        return list(parameter.values)
    return [parameter.decode(end) for end in (parameter.low, parameter.high) if math.isfinite(end)]


def _describe_lack(name: str, training: TrainingConfig) -> str | None:
    """Why the training log will not have the column *name*; None if it will."""
    terms = list_loss_terms(training)
    if len(terms) == 1:
        terms = []
    if name in OF_DISTRIBUTIONS and name.removeprefix(METRIC_PREFIX) not in training.metrics:
        metric = name.removeprefix(METRIC_PREFIX)
        return f"the metric {name} is only in training_log.csv if it is asked for; add --metrics {metric}"
    if name in OF_DECODED:
        if not training.decode_items:
            return f"the metric {name} needs decoded test examples, but decode_items is 0"
        if not is_readable(training.objective):
            return f"the objective {training.objective} predicts no times, so that there is no {name}"
    elif name not in list_columns(terms=terms):
        there = f"its terms are {', '.join(terms)}" if terms else "its loss has one term only"
        return f"the metric {name} is not in training_log.csv with the objective {training.objective}: {there}"
    return None
