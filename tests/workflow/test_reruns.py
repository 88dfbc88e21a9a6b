"""The table of partial reruns in docs/lineage.md: what `snakemake -n` lists after each change of a finished tiny workflow."""

import os
import re
import shutil

import numpy as np
import pytest
import yaml
from helpers.repository import REPOSITORY, TINY, copy_with_raised_version, snakemake

from cxt.config.file import merge

RULES = ("simulate", "preprocess", "train", "evaluate")
TABLE = (REPOSITORY / "docs" / "lineage.md").read_text()


def documented(change: str) -> tuple[int, ...]:
    """The jobs of each of RULES that the table gives for a change."""
    row = re.search(rf"^\| {re.escape(change)} \|(.*)\|$", TABLE, flags=re.M)
    assert row, f"docs/lineage.md has no row '{change}'"
    return tuple(int(cell) for cell in row[1].split("|"))


def planned(directory, configfile=TINY, **kwargs) -> tuple[int, ...]:
    done = snakemake("-n", cwd=directory, configfile=configfile, **kwargs)
    text = done.stdout + done.stderr
    if "Nothing to be done" in text:
        return (0, 0, 0, 0)
    table = text.split("Job stats:")[1].split("total")[0]
    jobs = dict(re.findall(r"^(\S+)\s+(\d+)$", table, flags=re.M))
    return tuple(int(jobs.get(rule, 0)) for rule in RULES)


def reverse(value):
    return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


CONFIGURATIONS = {
    "nothing": {},
    "`population_size` of `constant`": {"scenarios": {"constant": {"population_size": 9999}}},
    "`simulations` of `constant`, from 20 to 30": {"scenarios": {"constant": {"simulations": 30}}},
    "`lr` of `broad_w200`": {"models": {"broad_w200": {"training": {"lr": 2e-4, "min_lr": 1e-5}}}},
    "the parent of `broad_adapter`, to `narrow`": {"models": {"broad_adapter": {"checkpoint": "narrow"}}},
    "the dataset of `narrow`, to `processed`": {"models": {"narrow": {"dataset": "processed"}}},
    "the mask of `processed_small_window_missing_data`": {
        "datasets": {"processed_small_window_missing_data": {"mask": {"length": 60000}}}
    },
    "`log_every`, `save_every`, `workers` or `cluster`": {
        "training": {"log_every": 3, "save_every": 7, "workers": 1}, "cluster": {"runtime": 99},
    },
    "`replicates` of the evaluation": {"evaluation": {"replicates": 3}},
    "`seed`": {"seed": 2},
}  # fmt: skip
"""{change: overlay on tests/tiny.yaml}."""


def write_changed(path, overlay: dict):
    path.write_text(yaml.safe_dump(merge(yaml.safe_load(TINY.read_text()), overlay)))
    return path


@pytest.mark.parametrize("change", CONFIGURATIONS)
def test_a_changed_configuration(workflow, tmp_path, change):
    path = write_changed(tmp_path / "changed.yaml", CONFIGURATIONS[change])
    assert planned(workflow, path) == documented(change)


def test_keys_in_another_order(workflow, tmp_path):
    path = tmp_path / "reordered.yaml"
    path.write_text(yaml.safe_dump(reverse(yaml.safe_load(TINY.read_text())), sort_keys=False))
    assert planned(workflow, path) == documented("the order of keys")


@pytest.fixture
def copy(workflow, tmp_path):
    return shutil.copytree(workflow, tmp_path / "copy", symlinks=True)


@pytest.mark.long
def test_touched_files(copy):
    for path in (copy / "results").rglob("*"):
        if path.is_file() and "settings" not in path.parts and path.suffix in (".batch", ".zip", ".json", ".npz"):
            path.touch()
    assert planned(copy) == documented("time stamps only (`touch`)")


def test_a_deleted_shard(copy):
    (copy / "results" / "datasets" / "processed_narrow" / "train" / "constant-0.zarr.zip").unlink()
    assert planned(copy) == documented("a shard of `processed_narrow` is deleted")
    (copy / "results" / "narrow.ckpt").unlink()
    assert planned(copy) == documented("that shard and `narrow.ckpt` are deleted")


def test_a_deleted_checkpoint(copy):
    (copy / "results" / "broad_adapter.ckpt").unlink()
    assert planned(copy) == documented("`broad_adapter.ckpt` is deleted")
    before = {path.name: path.read_bytes() for path in (copy / "results" / "evaluation").iterdir() if path.is_file()}
    snakemake("results/broad_adapter.ckpt", "results/evaluation/broad_adapter.json", cwd=copy)
    assert "is finished" in (copy / "results" / "logs" / "train" / "broad_adapter.log").read_text()
    assert "published again" in (copy / "results" / "logs" / "evaluate" / "broad_adapter.log").read_text()
    for end in (".json", "-tracks.png", "-scatter.png", "-calibration.png"):
        name = f"broad_adapter{end}"
        assert (copy / "results" / "evaluation" / name).read_bytes() == before[name]


@pytest.mark.long
def test_a_mask_file_with_other_content_and_an_older_time_stamp(copy, tmp_path):
    mask = tmp_path / "mask.npz"
    masked = {"processed_small_window_missing_data_n10": {"mask": {"path": "mask.npz", "length": None}}}
    config = write_changed(tmp_path / "masked.yaml", {"datasets": masked})
    accessible = np.arange(30_000) % 1000 < 800
    np.savez(mask, accessible=accessible)
    target = "results/datasets/processed_small_window_missing_data_n10/dataset.json"
    snakemake(target, cwd=copy, configfile=config)
    again = snakemake("-n", target, cwd=copy, configfile=config)
    assert "Nothing to be done" in again.stdout + again.stderr
    np.savez(mask, accessible=~accessible)
    os.utime(mask, (1, 1))
    assert planned(copy, config) == documented("a mask file, also with an older time stamp")


def test_a_stage_version(workflow, tmp_path):
    changed = copy_with_raised_version("train", tmp_path / "repository")
    assert planned(workflow, repository=changed) == documented("the code of `train`, so that its stage version is raised")


@pytest.mark.long
def test_a_failed_upstream_job(copy, tmp_path):
    """Snakemake's own record calls the checkpoint current after its simulation has failed once."""
    path = tmp_path / "changed.yaml"
    path.write_text(
        yaml.safe_dump(merge(yaml.safe_load(TINY.read_text()), {"scenarios": {"constant": {"population_size": 99}}}))
    )
    blocked = copy / "results" / "simulations" / "constant"
    shutil.rmtree(blocked)
    blocked.write_text("not a directory")
    failed = snakemake("results/narrow.ckpt", "--keep-going", cwd=copy, configfile=path, check=False)
    assert failed.returncode == 1
    blocked.unlink()
    assert planned(copy, path) == documented("a simulation has failed after `population_size` of `constant` was changed")
