"""Suggesting a learning rate from Python: `cxt.find_lr`."""

import math
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from cxt.config.bounds import MAX_COUNT
from cxt.errors import BadRequest, Failed, try_drawing
from cxt.trainer.learning_rate_search import find_lr as search_rates
from cxt.trainer.options import merge_options
from cxt.trainer.request import RunRequest, build_request


class LearningRates(NamedTuple):
    """The result of a search: the suggested learning rate; learning rate and running average of the loss of each step."""

    suggestion: float
    rates: np.ndarray
    losses: np.ndarray


def check_search(*, lowest: float, highest: float, num_steps: int, plot) -> None:
    """BadRequest if the settings of a search are out of range, or the file of its figure cannot be written."""
    if not 0 < lowest < highest < math.inf:
        raise BadRequest(
            "--lowest and --highest must be finite, positive and in rising order, "
            f"got --lowest {lowest:g} --highest {highest:g}"
        )
    if not 20 <= num_steps <= MAX_COUNT:
        raise BadRequest(f"--num-steps must be a whole number from 20 to {MAX_COUNT}, got {num_steps}")
    if plot is not None:
        from cxt.drawing import check_figure_file

        check_figure_file(plot, flag="--plot")


def suggest_rate(request: RunRequest, *, lowest: float, highest: float, num_steps: int) -> LearningRates:
    """Search, see `cxt.trainer.learning_rate_search.find_lr`; Failed if there are too few steps for a suggestion."""
    search = search_rates(request, lowest=lowest, highest=highest, num_steps=num_steps)
    suggestion = search.suggestion()
    if suggestion is None:
        raise Failed(
            f"the loss diverged after {len(search.losses)} of {num_steps} steps, too few to suggest a learning rate; "
            "raise --num-steps, or lower --highest"
        )
    return LearningRates(suggestion, np.array(search.rates), np.array(search.losses))


def draw_search(request: RunRequest, found: LearningRates, path) -> None:
    """Draw loss against learning rate; Failed if that is not possible."""

    def draw() -> None:
        from cxt.evaluation.figures import draw_learning_rates

        title = f"{request.name}: suggested learning rate {found.suggestion:.2g}"
        draw_learning_rates(found.rates, found.losses, found.suggestion, path, title=title)

    if lost := try_drawing(draw):
        raise Failed(f"{path} could not be drawn ({lost})")


def find_lr(
    config: str | PathLike[str] | None = None,
    *,
    lowest: float = 1e-6,
    highest: float = 1e-2,
    num_steps: int = 100,
    plot: str | PathLike[str] | None = None,
    **options: Any,
) -> LearningRates:
    """Suggest a learning rate, as `cxt find_lr` does: train briefly at a rising one, without saving anything.

    The suggestion is the rate at which the loss falls most steeply.

    Parameters
    ----------
    config : path-like, optional
        YAML file of settings, as for `cxt.train_model`.
    lowest, highest : float
        Learning rates of the first and the last step.
    num_steps : int
        Optimizer steps to train for, at least 20.
    plot : path-like, optional
        File to draw loss against learning rate to.
    **options
        Settings of the run, as for `cxt.train_model`: *dataset_path*, *model*, *checkpoint* and so on.

    Returns
    -------
    LearningRates
        *suggestion*, *rates* (steps,) and *losses* (steps,).

    Raises
    ------
    BadRequest
        If a setting is not valid.
    Failed
        If the loss diverged too early, or the figure could not be drawn.
    """
    check_search(lowest=lowest, highest=highest, num_steps=num_steps, plot=plot)
    request = build_request(merge_options(config, options))
    found = suggest_rate(request, lowest=lowest, highest=highest, num_steps=num_steps)
    if plot is not None:
        draw_search(request, found, plot)
    return found
