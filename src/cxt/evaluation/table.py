"""The accuracy table of one or several evaluations, and reading their JSON files."""

import json
from pathlib import Path

from cxt.errors import BadRequest
from cxt.lineage import stage_lineage


def format_or_dash(value: float | None, form: str) -> str:
    """A figure in a table or a line; "-" if it is not known."""
    return "-" if value is None else format(value, form)


def format_accuracy_table(results: list[dict]) -> str:
    """The accuracy of several checkpoints as a Markdown table, one row per checkpoint and scenario."""
    rows = [("checkpoint", "scenario", "MSE", "±", "r", "bias", "cover 95%", "best window MSE", "its r", "constant MSE")]
    for result in results:
        for name, figures in result["scenarios"].items():
            window, constant = figures["baseline"]["heterozygosity"], figures["baseline"]["constant"]
            rows.append(
                (
                    result["checkpoint"],
                    name,
                    f"{figures['mse']:.3f}",
                    format_or_dash(figures["mse_se"], ".3f"),
                    format_or_dash(figures["r"], ".3f"),
                    f"{figures['bias']:+.3f}",
                    f"{figures['coverage95']:.1%}",
                    f"{window['mse']:.3f}",
                    format_or_dash(window["r"], ".3f"),
                    f"{constant['mse']:.3f}",
                )
            )
        mean = result["overall"]
        rows.append(
            (
                result["checkpoint"],
                "mean",
                f"{mean['mse']:.3f}",
                "",
                format_or_dash(mean["r"], ".3f"),
                "",
                f"{mean['coverage95']:.1%}",
                f"{mean['heterozygosity_mse']:.3f}",
                "",
                f"{mean['constant_mse']:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        cells = [text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])]) + "\n"


def combine_evaluation_lineages(evaluations: list[str | None]) -> str | None:
    """The lineage of a table of results with the lineages *evaluations*, in no particular order; None if one has none."""
    return None if None in evaluations else stage_lineage("evaluate", sorted(evaluations))


def read_result(path: Path) -> dict:
    """One evaluation's JSON; BadRequest if it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise BadRequest(f"evaluation {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"evaluation {path} is damaged: {error}") from None
