"""The accuracy table of evaluations, and reading their JSON files."""

import json
from pathlib import Path

from cxt.errors import BadRequest
from cxt.io import format_columns
from cxt.lineage import stage_lineage

READING_TITLES = {"sampled": "sampled", "rates_inferred": "rates inferred"}
"""Other ways in which an evaluation read a checkpoint: titles in the table, by key in its result."""


def format_or_dash(value: float | None, form: str) -> str:
    """Format a metric, or "-" if it is not defined."""
    return "-" if value is None else format(value, form)


def format_accuracy_table(results: list[dict]) -> str:
    """Format evaluations as a Markdown table, with one row for each checkpoint and scenario."""
    rows = [
        (
            "checkpoint",
            "scenario",
            "MSE",
            "±",
            "r",
            "r per site",
            "CRPS",
            "bias",
            "cover 95%",
            "best window MSE",
            "its r",
            "HMM MSE",
            "constant MSE",
        )
    ]
    for result in results:
        rows += _list_rows(result["checkpoint"], result)
        for key, title in READING_TITLES.items():
            if key in result:
                rows += _list_rows(f"{result['checkpoint']}, {title}", result[key])
    header, *lines = [f"| {line} |" for line in format_columns(rows, left=2, separator=" | ")]
    rule = "".join(char if char == "|" else "-" for char in header)
    return "\n".join([header, rule, *lines]) + "\n"


def _list_rows(name: str, result: dict) -> list[tuple[str, ...]]:
    """The rows of a checkpoint *name*: its scenarios, their mean, and recent windows of all scenarios."""
    rows = []
    for scenario, metrics in result["scenarios"].items():
        window, constant = metrics["baseline"]["heterozygosity"], metrics["baseline"]["constant"]
        rows.append(
            (
                name,
                scenario,
                f"{metrics['mse']:.3f}",
                format_or_dash(metrics["mse_se"], ".3f"),
                format_or_dash(metrics["r"], ".3f"),
                *_format_site_and_crps(metrics),
                f"{metrics['bias']:+.3f}",
                f"{metrics['coverage95']:.1%}",
                f"{window['mse']:.3f}",
                format_or_dash(window["r"], ".3f"),
                format_or_dash(metrics["baseline"].get("hmm", {}).get("mse"), ".3f"),
                f"{constant['mse']:.3f}",
            )
        )
    mean, recent = result["overall"], result["overall"].get("recent")
    rows.append(
        (
            name,
            "mean",
            f"{mean['mse']:.3f}",
            "",
            format_or_dash(mean["r"], ".3f"),
            *_format_site_and_crps(mean),
            "",
            f"{mean['coverage95']:.1%}",
            f"{mean['heterozygosity_mse']:.3f}",
            "",
            format_or_dash(mean.get("hmm_mse"), ".3f"),
            f"{mean['constant_mse']:.3f}",
        )
    )
    if recent is None:  # evaluated by an earlier version
        return rows
    scores = [format_or_dash(recent[key], form) for key, form in (("mse", ".3f"), ("bias", "+.3f"), ("coverage95", ".1%"))]
    return [*rows, (name, "below 1000 gen.", scores[0], "", "", "", "", scores[1], scores[2], "", "", "", "")]


def _format_site_and_crps(metrics: dict) -> tuple[str, str]:
    """The correlation per site and the continuous ranked probability score; "-" where an earlier version evaluated."""
    site, distribution = metrics.get("site", {}), metrics.get("distribution", {})
    return format_or_dash(site.get("r"), ".3f"), format_or_dash(distribution.get("crps"), ".3f")


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
