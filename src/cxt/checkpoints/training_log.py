"""training_log.csv, the table that a run writes as it trains."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from cxt.io import atomic_write

COLUMNS = (
    "step", "epoch", "train_loss", "val_loss", "val_mse", "val_r", "lr", "grad_norm", "items_per_s", "data_wait", "seconds",
)  # fmt: skip
"""Columns of training_log.csv. A row describes one optimizer step: its loss (mean over its examples), learning rate and
gradient norm before clipping; the validation after it, if there was one; and since the previous row, examples per second and
the fraction of time spent waiting for data. `seconds` is the time spent training, including earlier attempts."""

TERM_PREFIXES = ("train_loss/", "val_loss/")
"""Beginnings of more columns, one for each term of a loss that has several."""

METRIC_PREFIX = "val_"
"""Beginning of more columns, one for each of the `metrics` of the settings."""

TIMING = ("items_per_s", "data_wait", "seconds")
"""Columns that differ between identical runs."""


def list_columns(*, terms: Sequence[str] = (), metrics: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of the log of a run: `COLUMNS`, and those of the *terms* of a loss that has several and of *metrics*."""
    of_terms = (prefix + term for prefix in TERM_PREFIXES for term in terms)
    return (*COLUMNS, *of_terms, *(METRIC_PREFIX + metric for metric in metrics))


def format_rows(rows: list[dict], *, header: bool, columns: Sequence[str] = COLUMNS) -> str:
    """*rows* as text of a training_log.csv, after the line with the names of the columns if *header*."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_log(path) -> list[dict]:
    """Rows of a training_log.csv: step and epoch as int, the rest as float or None; an incomplete last row is dropped."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text(encoding="utf-8")
    rows = []
    for row in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        rows.append({key: int(row[key]) if key in ("step", "epoch") else float(row[key] or math.nan) for key in row})
    return [{key: None if value != value else value for key, value in row.items()} for row in rows]


def keep_rows(path, *, up_to: int, columns: Sequence[str] = COLUMNS) -> None:
    """Drop the rows of a training_log.csv after step *up_to*, which a resumed run will repeat.

    The kept rows get *columns*, which differ from those before if the run is continued with other `metrics`; new columns are
    empty.
    """
    if not Path(path).exists():
        return
    text = Path(path).read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    names = next(csv.reader(io.StringIO(complete)), [])
    kept = []
    if "step" in names:  # otherwise a full disk has cut the header
        kept = [row for row in csv.DictReader(io.StringIO(complete)) if int(row["step"]) <= up_to]
    rows = [{name: row.get(name) or "" for name in columns} for row in kept]
    atomic_write(path, format_rows(rows, header=True, columns=columns).encode())
