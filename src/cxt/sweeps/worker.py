"""The process of a sweep: it takes one trial after another until all are finished."""

import dataclasses
import time
from pathlib import Path

from cxt.console import counted, get_logger
from cxt.errors import BadRequest, Failed
from cxt.signals import OUT_OF_TIME, listen
from cxt.sweeps.report import complete_trials, describe_sweep, draw_figures, format_best, write_results
from cxt.sweeps.settings import Fixed, check_trial, identify, settings_of_trial
from cxt.sweeps.space import Sweep
from cxt.sweeps.study import Claim, Study, draw
from cxt.sweeps.trials import Interruption, Outcome, TrialRun, describe_values
from cxt.trainer.request import RunRequest

logger = get_logger(__name__)

MAX_DRAWS = 50
"""Combinations that are drawn to find one that can be trained, before a sweep is refused."""

MAX_NEVER_BEGAN = 3
"""Trials that may end one after another before they train: then it is for the data or the machine, not for their values."""


def find_trainable(sweep: Sweep, fixed: Fixed, *, seed: int) -> RunRequest:
    """The request of a combination that can be trained; BadRequest, with the first reason, if none of many can be."""
    first = None
    for number in range(MAX_DRAWS):
        raw = draw_any(sweep, seed=seed, number=number)
        if raw is None:
            break
        try:
            return check_trial(settings_of_trial(fixed, sweep.decode(raw)))
        except BadRequest as error:
            first = first or f"{error} (with {describe_values(sweep.decode(raw))})"
    raise BadRequest(f"none of {number + (raw is not None)} combinations of the sweep can be trained; the first: {first}")


def draw_any(sweep: Sweep, *, seed: int, number: int) -> dict | None:
    """Optuna's values of any combination; None if a grid has no more."""
    if sweep.method == "grid":
        size = sweep.grid_size
        stride = max(1, size // MAX_DRAWS)
        place = number * stride
        return next((point for index, point in enumerate(sweep.grid()) if index == place), None) if place < size else None
    return draw(dataclasses.replace(sweep, method="random"), seed + number, [])


def run_sweep(directory: Path, sweep: Sweep, fixed: Fixed, *, count: int, seed: int, began: float) -> None:
    """Train trials of a sweep until *count* of them are finished, together with other processes that do the same.

    Parameters
    ----------
    directory : Path
        Directory of the sweep, new or that of a sweep to continue.
    sweep, fixed : Sweep, Fixed
        What is searched, and what all trials have in common.
    count : int
        Number of trials, those included that are pruned or fail.
    seed : int
        Seed of the trials' values.
    began : float
        Time of `time.monotonic` from which `max_minutes` is counted.

    Raises
    ------
    BadRequest
        If no trial can be trained, or the directory holds another sweep.
    Failed
        If the sweep was interrupted, or trials fail one after another for the same reason.
    """
    interruption = Interruption()
    listen(interruption)
    deadline = None if fixed.max_minutes is None else began + 60 * fixed.max_minutes
    request = find_trainable(sweep, fixed, seed=seed)
    if sweep.metric.startswith("val_") and not request.manifest["splits"]["test"]["items"]:
        raise BadRequest(f"the metric {sweep.metric} needs validation, but the dataset has no test examples; use train_loss")
    study = Study(directory, sweep, seed=seed, identity=identify(sweep, fixed, request))
    if sweep.method == "grid" and sweep.grid_size < count:
        logger.info(f"the grid has {counted(sweep.grid_size, 'combination')}, fewer than --count {count}")
    logger.info(f"{directory}: {describe_sweep(sweep)}, {counted(count, 'trial')}")
    never_began = 0
    while True:
        interruption.check()
        if deadline is not None and time.monotonic() >= deadline:
            raise Failed("--max-minutes is spent; run the same command again to continue", status=OUT_OF_TIME)
        claim = study.take(count)
        if claim is None:
            break
        outcome = _train(study, claim, fixed, interruption, deadline=deadline, seed=seed)
        about = {"steps": outcome.steps, "seconds": outcome.seconds, "reason": outcome.reason}
        study.finish(claim, outcome.state, value=outcome.value, about=about)
        write_results(study, fixed)
        _say(study, claim, outcome, count)
        never_began = never_began + 1 if outcome.never_began else 0
        if never_began == MAX_NEVER_BEGAN:
            raise Failed(
                f"{never_began} trials one after another ended before they began to train, the last because: {outcome.reason}. "
                f"Their output is in {study.trials_directory}; run the same command again to go on with other trials"
            )
    _finish(study, fixed)


def _train(
    study: Study, claim: Claim, fixed: Fixed, interruption: Interruption, *, deadline: float | None, seed: int
) -> Outcome:
    """Train a trial; BadRequest if its values are refused because no trial can be trained any more."""
    verb = "continues" if claim.continues else "begins"
    logger.info(f"trial {claim.number} {verb}: {describe_values(claim.values)}")
    try:
        run = TrialRun(study, claim, settings_of_trial(fixed, claim.values), interruption, deadline=deadline)
        outcome = run.train()
        if outcome.is_refused:  # for its own values, or because a file has disappeared?
            find_trainable(study.sweep, fixed, seed=seed)
        return outcome
    except BaseException:
        claim.lock.close()
        raise


def _say(study: Study, claim: Claim, outcome: Outcome, count: int) -> None:
    """Log how a trial has ended, and the best one so far."""
    with study.locked():
        finished = sum(trial.state.is_finished() for trial in study.trials())
        best = next(iter(complete_trials(study)), None)
    metric = study.sweep.metric
    if outcome.state == "COMPLETE":
        text = f"{metric} {outcome.value:.6g} after {counted(outcome.steps, 'step')}, {_time(outcome.seconds)}"
    elif outcome.is_refused:
        text = outcome.reason
    else:
        text = f"{'pruned' if outcome.state == 'PRUNED' else 'failed'} after {counted(outcome.steps, 'step')}: {outcome.reason}"
    so_far = "" if best is None else f"; best: {best.value:.6g} (trial {best.number})"
    logger.info(f"trial {claim.number}: {text}; {finished} of {count} finished{so_far}")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _finish(study: Study, fixed: Fixed) -> None:
    """Write all results, and print the best trials."""
    write_results(study, fixed)
    lost = draw_figures(study)
    if lost:
        logger.warning(f"not all figures could be drawn ({lost})")
    with study.locked():
        others = study.running_elsewhere()
        table = format_best(study)
    if others:
        logger.info(f"nothing is left to begin; other processes are still training {others} trial{'s' if others > 1 else ''}")
    logger.info(table)
    logger.info(f"written: {study.directory / 'sweep.csv'}")
    if (study.directory / "best.yaml").exists():
        logger.info(f"to train the best trial again: python -m cxt.train --config {study.directory / 'best.yaml'}")
