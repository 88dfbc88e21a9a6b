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

TIMING = ("items_per_s", "data_wait", "seconds")
"""Columns that differ between identical runs."""


def format_rows(rows: list[dict], *, header: bool, terms: Sequence[str] = ()) -> str:
    """*rows* as text of a training_log.csv, after the line with the names of the columns if *header*.

    *terms* are the names of the terms of a loss that has several.
    """
    out = io.StringIO()
    columns = [*COLUMNS, *(prefix + term for prefix in TERM_PREFIXES for term in terms)]
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


def keep_rows(path, *, up_to: int, terms: Sequence[str] = ()) -> None:
    """Drop the rows of a training_log.csv after step *up_to*, which a resumed run will repeat; *terms* as in `format_rows`."""
    if not Path(path).exists():
        return
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= up_to]
    atomic_write(
        path, "".join([format_rows([], header=True, terms=terms), *kept]).encode()
    )  # a full disk may have cut the header
