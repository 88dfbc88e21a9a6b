"""Write the tables of the workflow's report as HTML: accuracy, datasets, and what each stage took.

python -m cxt.commands.report --accuracy results/evaluation/table.md --datasets results/datasets/*/dataset.json \
    --benchmarks results/benchmarks --out results/report
"""

import argparse
import csv
import html
from pathlib import Path

from cxt.console import exit_on_bad_request
from cxt.data.manifest import read_manifest
from cxt.errors import BadRequest
from cxt.io import atomic_write

STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
    "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}"
)


def render_table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A page of HTML with one table."""
    cells = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
    cells += ["".join(f"<td>{html.escape(value)}</td>" for value in row) for row in rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in cells)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n<table>\n{body}\n</table></body></html>\n"
    )


def read_markdown_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a Markdown table; BadRequest if there is none."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    if len(lines) < 2:
        raise BadRequest(f"{path} has no table; it is written by `cxt evaluate --table`")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return header, rows


DATASET_COLUMNS = [
    "dataset", "window (bp)", "length (bp)", "haplotypes", "simulations", "held out", "examples", "held-out examples", "MB",
    "diversity (per kb)", "missing",
]  # fmt: skip


def describe_dataset(path: Path) -> list[str]:
    """A row of the table of datasets, from a manifest."""
    manifest = read_manifest(path.parent)
    train, test = (manifest["splits"][split] for split in ("train", "test"))
    diversity, missing = manifest["ranges"]["diversity"], manifest["ranges"]["missingness"]
    return [
        path.parent.name, f"{manifest['window_size']:,}", f"{manifest['sequence_length']:,}", str(manifest["samples"]),
        f"{train['simulations']:,}", f"{test['simulations']:,}", f"{train['items']:,}", f"{test['items']:,}",
        f"{(train['bytes'] + test['bytes']) / 1e6:,.1f}",
        "–" if diversity is None else f"{1000 * diversity[0]:.2g} to {1000 * diversity[1]:.2g}",
        f"{missing[0]:.0%} to {missing[1]:.0%}" if manifest["missing"] and missing else "none",
    ]  # fmt: skip


STAGES = ("simulate", "preprocess", "teach", "train", "evaluate", "translate")
COST_COLUMNS = ["stage", "jobs", "hours in all", "longest (min)", "CPU hours", "most memory (GB)"]


def summarise_stage(stage: str, directory: Path) -> list[str] | None:
    """A row of the table of costs, from Snakemake's benchmark files of a stage; None if there are none."""
    rows = []
    for path in sorted((directory / stage).rglob("*.tsv")):
        with path.open(encoding="utf-8") as file:
            rows += list(csv.DictReader(file, delimiter="\t"))
    if not rows:
        return None

    def read(key: str) -> list[float]:
        return [float(row[key]) for row in rows if row[key] not in ("NA", "-", "")] or [0.0]  # too short to be measured

    seconds = read("s")
    return [
        stage, str(len(rows)), f"{sum(seconds) / 3600:.2f}", f"{max(seconds) / 60:.1f}", f"{sum(read('cpu_time')) / 3600:.2f}",
        f"{max(read('max_rss')) / 1000:.2f}",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run `cxt report`: write the tables of the workflow's report.

    Parameters
    ----------
    argv : list of str, optional
        Arguments after the command's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="cxt report", description="Write the tables of the workflow's report as HTML.")
    parser.add_argument("--accuracy", type=Path, required=True, help="Markdown table of `cxt evaluate --table`")
    parser.add_argument("--datasets", type=Path, nargs="*", default=[], help="manifests, dataset.json")
    parser.add_argument("--benchmarks", type=Path, required=True, help="directory of Snakemake's benchmark files, by stage")
    parser.add_argument("--out", type=Path, required=True, help="directory for accuracy.html, datasets.html and cost.html")
    args = parser.parse_args(argv)
    costs = [row for stage in STAGES if (row := summarise_stage(stage, args.benchmarks)) is not None]
    tables = {
        "accuracy": ("Accuracy on held-out simulations, ln generations", *read_markdown_table(args.accuracy)),
        "datasets": ("Datasets", DATASET_COLUMNS, [describe_dataset(path) for path in args.datasets]),
        "cost": ("What each stage took", COST_COLUMNS, costs),
    }
    for name, (title, header, rows) in tables.items():
        atomic_write(args.out / f"{name}.html", render_table(title, header, rows).encode())


if __name__ == "__main__":
    exit_on_bad_request(main)
