"""The training logs of many runs as one table, and comparisons of two."""

import csv

import pytest

from cxt.checkpoints.training_log import read_log
from cxt.commands.runs import main
from cxt.console import counted
from cxt.errors import BadRequest
from cxt.logs import COLUMNS, compare_runs, read_runs
from cxt.trainer.train_model import train_model

SMALL = {
    "layers": 1, "heads": 2, "width": 16, "devices": 0, "batch_size": 4, "grad_accum": 2, "epochs": 1, "max_steps": 4,
    "objective": "marginal", "decode_items": 0, "validate_every": 2, "log_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    directory = tmp_path_factory.mktemp("logs") / "runs"
    for name, seed in (("mine.r0", 1), ("mine.r1", 2)):
        train_model(**SMALL, dataset_path=dataset, run_dir=directory / name, name=name, seed=seed)
    return directory


def test_table_against_the_files(runs):
    logs = read_runs(runs)
    assert logs.runs == ["mine.r0", "mine.r1"]
    expected = [
        ("mine", repeat, row["step"], metric, value)
        for repeat in (0, 1)
        for row in read_log(runs / f"mine.r{repeat}" / "training_log.csv")
        for metric, value in row.items()
        if metric != "step" and value is not None
    ]
    assert [tuple(row[key] for key in COLUMNS[1:]) for row in logs.rows] == expected
    losses = logs.select(metrics=["val_loss"])
    assert {row["step"] for row in losses.rows} == {2, 4}
    for row in losses.summary():
        values = {one["step"]: one["value"] for one in losses.rows if one["run"] == row["run"]}
        assert (row["last"], row["last_step"]) == (values[4], 4)
        assert row["min"] == min(values.values()) == values[row["min_step"]]
        assert row["max"] == max(values.values()) == values[row["max_step"]]
    assert read_runs(runs / "mine.r1").runs == ["mine.r1"]


def test_csv(runs, tmp_path, capsys):
    main(["table", str(runs), "--out", str(tmp_path / "all.csv"), "--metrics", "train_loss", "lr"])
    with open(tmp_path / "all.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 4 * 2
    logs = read_runs(runs).select(metrics=["train_loss", "lr"])
    assert [float(row["value"]) for row in rows] == [row["value"] for row in logs.rows]
    assert "16 values of 2 runs" in capsys.readouterr().out
    files = read_runs(runs).to_csv(tmp_path / "each", per_run=True)
    assert [file.name for file in files] == ["mine.r0.csv", "mine.r1.csv"]


def test_comparison(runs, tmp_path, capsys):
    found = compare_runs(runs / "mine.r0", runs / "mine.r1")
    assert found.settings == {"name": ("mine.r0", "mine.r1"), "seed": (1, 2)}
    assert found.inputs == {}
    assert found.results["steps"] == (4, 4)
    first, second = (read_log(runs / name / "training_log.csv")[-1]["val_loss"] for name in ("mine.r0", "mine.r1"))
    assert found.results["last val_loss"] == (first, second)
    with pytest.raises(BadRequest, match="takes two run directories, got 1"):
        main(["compare", str(runs / "mine.r0"), str(runs / "mine.r0.lock")])
    three = [str(runs / name) for name in ("mine.r0", "mine.r0.lock", "mine.r1")]
    main(["compare", *three, "--out", str(tmp_path / "both.png")])
    said = capsys.readouterr().out
    assert "data and parents that differ: none" in said
    assert "seed" in said
    assert (tmp_path / "both.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("ending", "begins"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG"), (".PNG", b"\x89PNG")]
)
def test_formats_of_figures(runs, tmp_path, ending, begins):
    both, one = [str(runs / "mine.r0"), str(runs / "mine.r1")], tmp_path / f"one{ending}"
    for name in ("a", "b"):
        main(["compare", *both, "--out", str(tmp_path / f"{name}{ending}")])
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    main(["--curves", both[0], "--out", str(one)])
    assert one.read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.jpeg"])
def test_unknown_formats_of_figures_are_refused(runs, tmp_path, name, capsys):
    out = str(tmp_path / name)
    for words in (["compare", str(runs / "mine.r0"), str(runs / "mine.r1")], ["--curves", str(runs / "mine.r0")]):
        with pytest.raises(BadRequest, match="a figure must end in .png, .pdf, .svg, got "):
            main([*words, "--out", out])
    assert not capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(runs, tmp_path):
    with pytest.raises(BadRequest, match="there are no runs in"):
        read_runs(tmp_path)
    with pytest.raises(BadRequest, match="did you mean 'val_loss'"):
        read_runs(runs).select(metrics=["val_los"])
    with pytest.raises(BadRequest, match="is not a run directory"):
        compare_runs(runs / "mine.r0", runs)
    with pytest.raises(BadRequest, match="unknown command 'cxt runs tabel'; did you mean 'table'"):
        main(["tabel", str(runs)])


def test_one_of_a_kind(runs, tmp_path, capsys):
    main(["table", str(runs / "mine.r0"), "--out", str(tmp_path / "one.csv"), "--metrics", "val_loss"])
    assert "2 values of 1 run: " in capsys.readouterr().out
    assert [counted(number, "run") for number in (0, 1, 2, 1200)] == ["0 runs", "1 run", "2 runs", "1,200 runs"]
