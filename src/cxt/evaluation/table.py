"""The accuracy table of evaluations, and reading their JSON files."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cxt.config.repeats import REPEAT
from cxt.errors import BadRequest
from cxt.io import format_columns
from cxt.lineage import stage_lineage

READING_TITLES = {"sampled": "sampled", "rates_inferred": "rates inferred"}
"""Other ways in which an evaluation read a checkpoint: titles in the table, by key in its result."""


def format_or_dash(value: float | None, form: str) -> str:
    """Format a metric, or "-" if it is not defined."""
    return "-" if value is None else format(value, form)


COLUMNS = {
    "MSE": ".3f",
    "±": ".3f",
    "r": ".3f",
    "r per site": ".3f",
    "CRPS": ".3f",
    "bias": "+.3f",
    "cover 95%": ".1%",
    "best window MSE": ".3f",
    "its r": ".3f",
    "HMM MSE": ".3f",
    "constant MSE": ".3f",
}
"""Titles of the metrics, and how they are written."""

EMPTY = ""
"""A metric that a row of the table does not have; one that is not defined is None."""


class Row(NamedTuple):
    """A row of the table: whose it is, on what, and the metrics of `COLUMNS`."""

    name: str
    scenario: str
    metrics: list


def format_accuracy_table(results: list[dict]) -> str:
    """Format evaluations as a Markdown table, with one row for each checkpoint and scenario.

    Repeats of a model, called `m.r0`, `m.r1` and so on, are followed by their mean and standard deviation.
    """
    rows = [("checkpoint", "scenario", *COLUMNS)]
    repeats = group_repeats(results)
    for result in results:
        rows += [(row.name, row.scenario, *map(_format_metric, row.metrics, COLUMNS.values())) for row in _list_all(result)]
        for model, group in repeats.items():
            if result is group[-1]:
                rows += _summarise_repeats(f"{model} ({len(group)} repeats)", group)
    header, *lines = [f"| {line} |" for line in format_columns(rows, left=2, separator=" | ")]
    rule = "".join(char if char == "|" else "-" for char in header)
    return "\n".join([header, rule, *lines]) + "\n"


def group_repeats(results: list[dict]) -> dict[str, list[dict]]:
    """The evaluations of the repeats of each model that has several, in the order of *results*.

    Those that were evaluated with different settings or on different scenarios are left out, because they have no common mean.
    """
    groups: dict[str, list[dict]] = {}
    for result in results:
        if name := REPEAT.fullmatch(result["checkpoint"]):
            groups.setdefault(name["model"], []).append(result)

    def is_comparable(group: list[dict]) -> bool:
        settings = [(result.get("settings"), list(result["scenarios"])) for result in group]
        names = {result["checkpoint"] for result in group}
        return len(names) == len(group) > 1 and all(one == settings[0] for one in settings)

    return {model: group for model, group in groups.items() if is_comparable(group)}


def _list_all(result: dict) -> list[Row]:
    """All rows of an evaluation: of the main reading, and of the others."""
    name = result["checkpoint"]
    others = [
        row for key, title in READING_TITLES.items() if key in result for row in _list_rows(f"{name}, {title}", result[key])
    ]
    return [*_list_rows(name, result), *others]


def _summarise_repeats(name: str, repeats: list[dict]) -> list[tuple[str, ...]]:
    """The rows of the mean over *repeats* and their standard deviation, of each metric that all of them have."""
    rows = []
    for key in (None, *READING_TITLES):
        if key is not None and not all(key in result for result in repeats):
            continue
        title = name if key is None else f"{name}, {READING_TITLES[key]}"
        tables = [
            {row.scenario: row.metrics for row in _list_rows("", result if key is None else result[key])} for result in repeats
        ]
        for scenario in tables[0]:
            if all(scenario in table for table in tables):
                columns = zip(*(table[scenario] for table in tables), strict=True)
                rows.append((title, scenario, *map(_format_spread, columns, COLUMNS.values())))
    return rows


def _format_metric(value: float | str | None, form: str) -> str:
    return EMPTY if value == EMPTY else format_or_dash(value, form)


def _format_spread(values: Sequence, form: str) -> str:
    """Mean and sample standard deviation (divided by n - 1) of a metric; "-" if it is not defined for all repeats."""
    if EMPTY in values:
        return EMPTY
    if None in values:
        return format_or_dash(None, form)
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def _list_rows(name: str, result: dict) -> list[Row]:
    """The rows of a checkpoint *name*: its scenarios, their mean, and recent windows of all scenarios."""
    rows = []
    for scenario, metrics in result["scenarios"].items():
        window, constant = metrics["baseline"]["heterozygosity"], metrics["baseline"]["constant"]
        scores = [metrics["mse"], metrics["mse_se"], metrics["r"], *_get_site_and_crps(metrics), metrics["bias"]]
        baselines = [window["mse"], window["r"], metrics["baseline"].get("hmm", {}).get("mse"), constant["mse"]]
        rows.append(Row(name, scenario, [*scores, metrics["coverage95"], *baselines]))
    mean, recent = result["overall"], result["overall"].get("recent")
    scores = [mean["mse"], EMPTY, mean["r"], *_get_site_and_crps(mean), EMPTY]
    baselines = [mean["heterozygosity_mse"], EMPTY, mean.get("hmm_mse"), mean["constant_mse"]]
    rows.append(Row(name, "mean", [*scores, mean["coverage95"], *baselines]))
    if recent is None:  # evaluated by an earlier version
        return rows
    scores = [recent["mse"], *4 * [EMPTY], recent["bias"], recent["coverage95"]]
    return [*rows, Row(name, "below 1000 gen.", [*scores, *4 * [EMPTY]])]


def _get_site_and_crps(metrics: dict) -> tuple[float | None, float | None]:
    """The correlation per site and the continuous ranked probability score; None where an earlier version evaluated."""
    return metrics.get("site", {}).get("r"), metrics.get("distribution", {}).get("crps")


def combine_evaluation_lineages(evaluations: list[str | None]) -> str | None:
    """The lineage of a table from the lineages of its evaluations, in any order; None if one of them has none."""
    return None if None in evaluations else stage_lineage("evaluate", sorted(evaluations))


def read_result(path: Path) -> dict:
    """Read the JSON file of an evaluation; BadRequest if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise BadRequest(f"evaluation {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"evaluation {path} is damaged: {error}") from None
