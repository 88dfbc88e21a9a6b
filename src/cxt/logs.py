"""The training logs of many runs as one table, and what two runs have in common.

>>> import cxt.logs
>>> logs = cxt.logs.read_runs("results/runs")
>>> logs.summary()
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import TIMING, read_log
from cxt.config.repeats import REPEAT
from cxt.errors import BadRequest, suggest_nearest
from cxt.io import atomic_write

COLUMNS = ("run", "model", "repeat", "step", "metric", "value")
"""Columns of the table: directory of the run, name of its checkpoint, number of its repeat (empty if it is none), optimizer
step, column of the training log, and its value there."""


@dataclass(frozen=True)
class RunLogs:
    """The training logs of some runs, as a tidy table: one row for each run, step and metric.

    Parameters
    ----------
    rows : list of dict
        With the keys `COLUMNS`; *repeat* is None for a run that is no repeat. `pandas.DataFrame(logs.rows)` is the same table.
    """

    rows: list[dict[str, Any]]

    @property
    def runs(self) -> list[str]:
        """Names of the runs, in order."""
        return list(dict.fromkeys(row["run"] for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that any run has."""
        return list(dict.fromkeys(row["metric"] for row in self.rows))

    def select(self, *, metrics: Iterable[str] | None = None, runs: Iterable[str] | None = None) -> "RunLogs":
        """The rows of some metrics and runs; all by default.

        Raises
        ------
        BadRequest
            For a metric or run that there is none of, with the nearest one.
        """
        chosen = {}
        for what, wanted, known in (("metric", metrics, self.metrics), ("run", runs, self.runs)):
            chosen[what] = known if wanted is None else list(wanted)
            for name in chosen[what]:
                if name not in known:
                    raise BadRequest(f"no run has the {what} '{name}'{suggest_nearest(name, known)}")
        return RunLogs([row for row in self.rows if row["metric"] in chosen["metric"] and row["run"] in chosen["run"]])

    def summary(self) -> list[dict[str, Any]]:
        """One row for each run and metric: its last value, its smallest and largest, and the steps of all three."""
        values: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in self.rows:
            values.setdefault((row["run"], row["metric"]), []).append((row["step"], row["value"]))
        table = []
        for (run, metric), points in values.items():
            low, high = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
            last = max(points)
            table.append(
                {"run": run, "metric": metric, "last": last[1], "last_step": last[0], "min": low[1], "min_step": low[0],
                 "max": high[1], "max_step": high[0]}
            )  # fmt: skip
        return table

    def to_csv(self, path, *, per_run: bool = False) -> list[Path]:
        """Write the table as CSV.

        Parameters
        ----------
        path : path-like
            The file; with *per_run*, a directory, which gets `<run>.csv` for each run.
        per_run : bool
            One file for each run.

        Returns
        -------
        list of Path
            The files that were written.
        """
        if Path(path).is_dir() != per_run and Path(path).exists():
            kind, other = ("a file", "a directory") if per_run else ("a directory", "a file, or add --per-run")
            raise BadRequest(f"--out {path} is {kind}; give {other}")
        if not per_run:
            atomic_write(path, _format(self.rows).encode())
            return [Path(path)]
        written = []
        Path(path).mkdir(parents=True, exist_ok=True)
        for run in self.runs:
            written.append(Path(path) / f"{run.replace('/', '_')}.csv")
            atomic_write(written[-1], _format([row for row in self.rows if row["run"] == run]).encode())
        return written


def _format(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def find_runs(directory) -> list[Path]:
    """Run directories: *directory* itself, or all below it; BadRequest if there are none."""
    directory = Path(directory)
    if (directory / "run.json").is_file():
        return [directory]
    found = sorted(path.parent for path in directory.rglob("run.json")) if directory.is_dir() else []
    if not found:
        raise BadRequest(
            f"there are no runs in {directory}; give a run directory, or one with runs below it, such as results/runs"
        )
    return found


def read_runs(directory) -> RunLogs:
    """Read the training logs of a run, or of all runs below a directory.

    Parameters
    ----------
    directory : path-like
        A run directory, or one that contains some, such as `results/runs` or `lightning_logs`.

    Returns
    -------
    RunLogs

    Raises
    ------
    BadRequest
        If there are no runs.
    """
    rows = []
    for path in find_runs(directory):
        settings = _read_settings(path)
        model = str(settings.get("name") or settings.get("model") or path.name)
        repeat = REPEAT.fullmatch(model)
        name = path.name if path == Path(directory) else str(path.relative_to(directory))
        about = {
            "run": name,
            "model": repeat["model"] if repeat else model,
            "repeat": int(repeat["repeat"]) if repeat and "-superseded-" not in path.name else None,
        }
        for row in read_log(RunDirectory(path).log):
            rows += [
                about | {"step": row["step"], "metric": metric, "value": value}
                for metric, value in row.items()
                if metric != "step" and value is not None
            ]
    return RunLogs(rows)


def _read_settings(path: Path) -> dict:
    file = path / "config.yaml"
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


@dataclass(frozen=True)
class Comparison:
    """How two runs differ.

    Attributes
    ----------
    settings, inputs, results : dict
        {name: (of the first run, of the second)}: settings that differ, None where one has none; digests of dataset, parent and
        soft targets that differ, lineages and devices; last and smallest values of each metric but those of time.
    """

    settings: dict[str, tuple[Any, Any]]
    inputs: dict[str, tuple[Any, Any]]
    results: dict[str, tuple[Any, Any]]


def compare_runs(first, second) -> Comparison:
    """Compare two run directories: their settings, data and results.

    Raises
    ------
    BadRequest
        If one of them is no run directory.
    """
    settings, inputs, results = [], [], []
    for path in (Path(first), Path(second)):
        record = RunDirectory(path).read_record()
        if record is None:
            raise BadRequest(f"{path} is not a run directory (it has no run.json); `cxt runs` lists some")
        settings.append(_read_settings(path))
        inputs.append({key: value for key, value in record["identity"].items() if key != "settings"})
        summary = RunLogs([row for row in read_runs(path).rows if row["metric"] not in (*TIMING, "epoch")]).summary()
        found = {f"last {row['metric']}": row["last"] for row in summary}
        found |= {f"smallest {row['metric']}": row["min"] for row in summary if row["metric"].startswith("val_loss")}
        results.append({"steps": max((row["last_step"] for row in summary), default=0)} | found)
    return Comparison(_differences(settings), _differences(inputs), _differences(results, equal=True))


def _differences(pair: Sequence[dict], *, equal: bool = False) -> dict[str, tuple[Any, Any]]:
    """{key: both values}, of keys with different values, or of all if *equal*."""
    names = dict.fromkeys([*pair[0], *pair[1]])
    values = {name: (pair[0].get(name), pair[1].get(name)) for name in names}
    return {name: both for name, both in values.items() if equal or both[0] != both[1]}
