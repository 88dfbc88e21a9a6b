"""A model with `lora_of` in the workflow: trained, evaluated, verified, and the parent of another one."""

import shutil

import pytest
import yaml
from helpers.repository import TINY, run_python, snakemake

from cxt.checkpoints.file import read_checkpoint
from cxt.config.file import load
from cxt.config.network import LoraConfig
from cxt.io import file_sha256
from cxt.workflow.lineages import model_lineage

OTHERS = ["narrow", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]


def configuration(path, **lora):
    """tests/tiny.yaml with a base, a LoRA of it, and a child of that."""
    config = yaml.safe_load(TINY.read_text())
    model = {"preset": "broad", "dataset": "processed"}
    config["models"] = dict.fromkeys(OTHERS) | {
        "broad": config["models"]["broad"],
        "baboons": model | {"lora_of": "broad", "lora": {"rank": 2} | lora, "evaluation": ["stdpopsim_papanu"]},
        "child": model | {"checkpoint": "baboons"},
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.long
def test_from_simulations_to_evaluations(tmp_path):
    configfile = configuration(tmp_path / "lora.yaml")
    snakemake("--show-failed-logs", cwd=tmp_path, configfile=configfile)
    results, config = tmp_path / "results", load([configfile])
    lora = read_checkpoint(results / "baboons.ckpt")
    assert lora.lora == LoraConfig(rank=2)
    assert lora.record["lineage"] == model_lineage(config, "baboons")
    assert lora.record["parent"]["sha256"] == file_sha256(results / "broad.ckpt")
    assert (results / "baboons.ckpt").stat().st_size < (results / "broad.ckpt").stat().st_size / 2
    assert {path.stem for path in (results / "evaluation").glob("*.json")} == {"broad", "baboons", "child"}
    done = run_python("-m", "cxt", "checkpoint", "verify", "baboons", "--configfile", configfile, cwd=tmp_path)
    assert "the lineage of 'baboons' in the configuration; its parent is results/broad.ckpt" in done.stdout
    assert "Nothing to be done" in (again := snakemake("-n", cwd=tmp_path, configfile=configfile)).stdout + again.stderr
    # Both the training of a child and an evaluation need the base.
    moved = shutil.move(results / "broad.ckpt", tmp_path / "moved.ckpt")
    for target in ("results/child.ckpt", "results/evaluation/baboons.json"):
        (tmp_path / target).unlink()
        text = snakemake("-n", target, "--rerun-triggers", "mtime", cwd=tmp_path, configfile=configfile)
        assert "output: results/broad.ckpt" in text.stdout + text.stderr
    shutil.move(moved, results / "broad.ckpt")
    # Another rank makes it and what follows from it again, but not the base.
    other = configuration(tmp_path / "other.yaml", rank=3)
    text = (done := snakemake("-n", cwd=tmp_path, configfile=other)).stdout + done.stderr
    assert "output: results/baboons.ckpt" in text
    assert "output: results/child.ckpt" in text
    assert "output: results/broad.ckpt" not in text
