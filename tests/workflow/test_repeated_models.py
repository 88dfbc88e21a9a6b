"""A repeated model in the workflow: its repeats, their table, their ensemble, and what more repeats plan."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from helpers.repository import TINY, run_python, snakemake
from helpers.training import equal, weights

from cxt.checkpoints.file import read_checkpoint
from cxt.logs import read_runs

OTHERS = ["broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]


def configuration(path, *, repeats=3):
    """tests/tiny.yaml with one model, which is repeated."""
    config = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    repeated = {"repeats": repeats, "ensemble": True}
    config["models"] = dict.fromkeys(OTHERS) | {"narrow": config["models"]["narrow"] | repeated}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def planned(directory, configfile) -> str:
    done = snakemake("-n", cwd=directory, configfile=configfile)
    return done.stdout + done.stderr


@pytest.mark.long
def test_three_repeats_and_their_ensemble(tmp_path):
    configfile = configuration(tmp_path / "r.yaml")
    snakemake("--show-failed-logs", cwd=tmp_path, configfile=configfile)
    results = tmp_path / "results"
    names = [f"narrow.r{number}" for number in range(3)]
    checkpoints = [read_checkpoint(results / f"{name}.ckpt") for name in names]
    assert [checkpoint.record["training"]["seed"] for checkpoint in checkpoints] == [1, 2, 3]
    assert not equal(checkpoints[0].state_dict, checkpoints[1].state_dict)
    assert not equal(checkpoints[1].state_dict, checkpoints[2].state_dict)
    assert "Nothing to be done" in planned(tmp_path, configfile)
    assert {(row["model"], row["repeat"]) for row in read_runs(results / "runs").rows} == {("narrow", n) for n in range(3)}
    done = run_python("-m", "cxt", "checkpoint", "verify", "narrow.r1", "--configfile", configfile, cwd=tmp_path)
    assert "the lineage of 'narrow.r1' in the configuration" in done.stdout

    # Accuracy.
    metrics = {name: json.loads((results / "evaluation" / f"{name}.json").read_text()) for name in [*names, "narrow.ensemble"]}
    for key in (None, "rates_inferred"):
        of = {name: (one if key is None else one[key])["overall"]["mse"] for name, one in metrics.items()}
        assert of["narrow.ensemble"] < np.mean([of[name] for name in names])
    table = (results / "evaluation" / "table.md").read_text(encoding="utf-8")
    of = [metrics[name]["overall"]["mse"] for name in names]
    row = next(line for line in table.splitlines() if re.match(r"\| narrow \(3 repeats\) +\| mean ", line))
    assert row.split("|")[3].strip() == f"{np.mean(of):.3f} ± {np.std(of, ddof=1):.3f}"
    assert metrics["narrow.ensemble"]["members"] == names
    assert "narrow (3 repeats)" in (results / "report" / "accuracy.html").read_text(encoding="utf-8")

    # Five of them: what there is stays.
    five = configuration(tmp_path / "five.yaml", repeats=5)
    made = re.findall(r"output: results/([^/,\s]+)\.ckpt", planned(tmp_path, five))
    assert sorted(made) == ["narrow.r3", "narrow.r4"]
    evaluated = re.findall(r"output: results/evaluation/(\S+?)\.json", planned(tmp_path, five))
    assert sorted(evaluated) == ["narrow.ensemble", "narrow.r3", "narrow.r4"]

    # One of them again.
    before = weights(results / "narrow.r1.ckpt")
    (results / "narrow.r1.ckpt").unlink()
    [run] = [path for path in (results / "runs").glob("narrow.r1-*") if path.is_dir()]
    shutil.rmtree(run)
    snakemake("results/narrow.r1.ckpt", cwd=tmp_path, configfile=configfile)
    assert equal(weights(results / "narrow.r1.ckpt"), before)
    done = run_python("-m", "cxt", "plan", "--configfile", five, cwd=tmp_path)
    assert all(f"\nnarrow.r{number} " in done.stdout for number in range(5))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("results/narrow.ckpt", "'narrow' is repeated; name one of its repeats, such as 'narrow.r0'"),
        ("results/evaluation/narrow.json", "'narrow' is repeated; name one of its repeats, such as 'narrow.r0'"),
        ("results/narrow.r3.ckpt", "unknown model 'narrow.r3'; did you mean 'narrow.r"),
        (
            "results/narrow.ensemble.ckpt",
            "'narrow.ensemble' is an ensemble, which has no checkpoint of its own; train its members",
        ),
    ],
)
def test_targets_that_do_not_exist(target, message, tmp_path):
    done = snakemake("-n", target, cwd=tmp_path, configfile=configuration(tmp_path / "r.yaml"), check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_an_evaluation_of_an_ensemble_asks_for_its_members(tmp_path):
    configfile = configuration(tmp_path / "r.yaml")
    text = (done := snakemake("-n", "results/evaluation/narrow.ensemble.json", cwd=tmp_path, configfile=configfile)).stdout
    made = re.findall(r"output: results/([^/,\s]+)\.ckpt", text + done.stderr)
    assert sorted(made) == ["narrow.r0", "narrow.r1", "narrow.r2"]
