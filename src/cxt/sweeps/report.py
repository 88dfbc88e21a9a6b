"""What a sweep leaves: sweep.csv, best.yaml, figures, and the table of the best trials."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxt.console import counted
from cxt.errors import try_drawing
from cxt.io import atomic_write, format_columns
from cxt.sweeps.settings import Fixed, settings_of_trial, write_settings
from cxt.sweeps.space import Sweep
from cxt.sweeps.study import Study
from cxt.sweeps.trials import format_value

if TYPE_CHECKING:  # an optional package
    from optuna.trial import FrozenTrial

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
"""Words for the states of trials."""

TABLE_ROWS = 5


def complete_trials(study: Study) -> list["FrozenTrial"]:
    """Complete trials, the best first; of equal ones the earliest."""
    sign = 1 if study.sweep.goal == "minimize" else -1
    complete = [(trial.value, trial) for trial in study.trials() if trial.state.name == "COMPLETE" and trial.value is not None]
    return [trial for value, trial in sorted(complete, key=lambda pair: (sign * pair[0], pair[1].number))]


def write_csv(study: Study, path: Path) -> None:
    """Write sweep.csv, a row for each trial; lists and mappings among the values are JSON.

    The value of a pruned trial is the last one that it reported.
    """
    sweep = study.sweep
    names = [parameter.name for parameter in sweep.parameters]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["number", "state", sweep.metric, *names, "steps", "seconds", "reason"])
    for trial in study.trials():
        values = sweep.decode(trial.params)
        cells = [json.dumps(value) if isinstance(value, list | dict | bool) else value for value in values.values()]
        about = trial.user_attrs
        value = "" if trial.value is None else trial.value
        end = [about.get(key, "") for key in ("steps", "seconds", "reason")]
        writer.writerow([trial.number, STATES[trial.state.name], value, *cells, *end])
    atomic_write(path, out.getvalue().encode())


def write_best(study: Study, fixed: Fixed, path: Path) -> None:
    """Write best.yaml, the settings of the best trial, with which the trainer makes the same weights; nothing without one."""
    best = complete_trials(study)
    if best:
        trial = best[0]
        comment = (
            f"Trial {trial.number} of a sweep: {study.sweep.metric} {trial.value!r}. To train it again:\n"
            f"python -m cxt.train --config {path.name} --run-dir runs/best"
        )
        write_settings(path, settings_of_trial(fixed, study.sweep.decode(trial.params)), comment=comment)


def write_results(study: Study, fixed: Fixed) -> None:
    """Write sweep.csv and best.yaml of the present state of a study."""
    with study.locked():
        write_csv(study, study.directory / "sweep.csv")
        write_best(study, fixed, study.directory / "best.yaml")


def draw_figures(study: Study) -> str:
    """Draw history.png and importance.png; why one could not be drawn, or "".

    Importances need four complete trials with different values.
    """
    with study.locked():
        trials = list(study.trials())
        complete = complete_trials(study)
        enough = len(complete) >= 4 and complete[0].value != complete[-1].value
        importances = study.importances() if enough else {}
    return try_drawing(lambda: _draw(study, trials, importances))


def _draw(study: Study, trials: Sequence["FrozenTrial"], importances: Mapping[str, float]) -> None:
    from cxt.sweeps.figures import draw_history, draw_importances

    sweep = study.sweep
    history = [(trial.number, STATES[trial.state.name], trial.value) for trial in trials]
    draw_history(history, study.directory / "history.png", metric=sweep.metric, goal=sweep.goal)
    if importances:
        draw_importances(importances, study.directory / "importance.png", metric=sweep.metric)


def format_best(study: Study) -> str:
    """The table of the best five trials, and how many there are of each state."""
    sweep = study.sweep
    names = [parameter.name for parameter in sweep.parameters]
    trials = study.trials()
    rows = [["trial", *names, sweep.metric, "steps", "seconds"]]
    for trial in complete_trials(study)[:TABLE_ROWS]:
        values: Mapping[str, Any] = sweep.decode(trial.params)
        about = trial.user_attrs
        rows.append([
            str(trial.number), *(format_value(values[name]) for name in names), f"{trial.value:.6g}", str(about["steps"]),
            f"{about['seconds']:.0f}",
        ])  # fmt: skip
    counts = []
    for state, word in STATES.items():
        if number := sum(trial.state.name == state for trial in trials):
            counts.append(f"{number} {word}")
    lines = [f"{counted(len(trials), 'trial')}: {', '.join(counts)}"]
    return "\n".join(lines + ([line.rstrip() for line in format_columns(rows)] if len(rows) > 1 else []))


def describe_sweep(sweep: Sweep) -> str:
    """One line on what a sweep does."""
    names = ", ".join(parameter.name for parameter in sweep.parameters)
    return f"{sweep.method} search of {names} to {sweep.goal} {sweep.metric}"
