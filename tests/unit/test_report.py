"""The tables of the report, and a run's training curves."""

import re

import pytest
from helpers.repository import run_python

from cxt.commands import report
from cxt.errors import BadRequest
from cxt.workflow.resources import request_gpus, training_memory_mb, training_minutes

BENCHMARK = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"


def cells(path) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", path.read_text())]


def test_tables(dataset, tmp_path):
    (tmp_path / "table.md").write_text("| checkpoint | MSE |\n|---|---|\n| a<b | 0.5 |\n")
    for stage, name, row in (
        ("simulate", "one-0", "36\t0:00:36\t1500.5\t1\t1\t1\t0\t0\t99\t18\n"),
        ("simulate", "one-10", "3600\t1:00:00\t500\t1\t1\t1\t0\t0\t99\t3582\n"),
        ("train", "broad", "0.01\t0:00:00\tNA\tNA\tNA\tNA\tNA\tNA\tNA\tNA\n"),
    ):
        (tmp_path / "benchmarks" / stage).mkdir(parents=True, exist_ok=True)
        (tmp_path / "benchmarks" / stage / f"{name}.tsv").write_text(BENCHMARK + row)
    report.main(
        ["--accuracy", str(tmp_path / "table.md"), "--datasets", str(dataset / "dataset.json"), "--out", str(tmp_path / "out"),
         "--benchmarks", str(tmp_path / "benchmarks")]
    )  # fmt: skip
    assert cells(tmp_path / "out/accuracy.html") == [["checkpoint", "MSE"], ["a&lt;b", "0.5"]]
    header, row = cells(tmp_path / "out/datasets.html")
    described = dict(zip(header, row, strict=True))
    assert (described["window (bp)"], described["haplotypes"], described["simulations"], described["held out"]) == (
        "1,000", "20", "18", "2",
    )  # fmt: skip
    assert described["examples"] == str(18 * 6)
    assert cells(tmp_path / "out/cost.html")[1:] == [
        ["simulate", "2", "1.01", "60.0", "1.00", "1.50"],
        ["train", "1", "0.00", "0.0", "0.00", "0.00"],
    ]


def test_no_table(tmp_path):
    (tmp_path / "table.md").write_text("nothing\n")
    with pytest.raises(BadRequest, match=r"table.md has no table"):
        report.read_markdown_table(tmp_path / "table.md")


def test_curves_of_no_run(tmp_path):
    done = run_python("-m", "cxt.commands.runs", "--curves", tmp_path, "--out", tmp_path / "x.png", check=False)
    assert done.returncode == 2
    assert "has no training_log.csv" in done.stderr
    done = run_python("-m", "cxt.commands.runs", "--curves", tmp_path, check=False)
    assert done.returncode == 2


def test_requested_gpus():
    def request(count, **cluster):
        return request_gpus({"cluster": {"gpu_request": "gpu", "runtime": 60} | cluster}, count)

    assert request(0) == {"gpu": 0}
    assert request(2) == {"gpu": 2}
    assert request(2, gpu_model="a100") == {"gpu": 2, "gpu_model": "a100"}
    assert request(0, gpu_model="a100", constraint="nvlink") == {"gpu": 0, "gpu_model": "", "constraint": ""}
    assert request(2, gpu_request="gres", gpu_model="a100") == {"gres": "gpu:a100:2"}
    assert request(1, gpu_request="gres", constraint="nvlink") == {"gres": "gpu:1", "constraint": "nvlink"}
    assert request(0, gpu_request="gres") == {"gres": ""}


def test_a_models_own_resources():
    config = {"cluster": {"runtime": 60}, "models": {"a": {}, "b": {"resources": {"runtime": 90, "mem_mb": 1234}}}}
    assert (training_minutes(config, "a"), training_minutes(config, "b")) == (60, 90)
    assert training_memory_mb(config, "b") == 1234
