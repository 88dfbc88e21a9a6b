"""The workflow on a real Slurm, by the shipped profile: `make test-cluster`."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from helpers.repository import REPOSITORY, TINY
from helpers.slurm import missing_programs, running_slurm, wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs {', '.join(missing_programs())} (Debian: slurmctld slurmd munge)"
    ),
]
MODELS = ["narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]


@pytest.fixture(scope="module")
def slurm():
    directory = Path(tempfile.mkdtemp(prefix="cxt-slurm-", dir="/tmp"))  # a short path
    directory.chmod(0o755)
    with running_slurm(directory) as running:
        yield running
    shutil.rmtree(directory)


@pytest.fixture
def place(workflow, tmp_path):
    """A finished workflow to take results from."""
    return shutil.copytree(workflow, tmp_path / "w", symlinks=True)


def start(slurm, directory, *targets, retries=0, **overlay) -> subprocess.Popen:
    """Snakemake with the shipped profile; *overlay*: more of the configuration, in overlay.yaml."""
    file = directory / "overlay.yaml"
    file.write_text(yaml.safe_dump({"cluster": {"runtime": 30}} | overlay))
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", directory,
         "--profile", REPOSITORY / "workflow/profiles/slurm", "--retries", str(retries), "--latency-wait", "5",
         "--slurm-init-seconds-before-status-checks", "2", "--set-resources", "evaluate:runtime=30",
         "--configfile", TINY, file, "--", *targets],
        env=slurm.environment | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process, *, seconds=900) -> str:
    """The output of a Snakemake that must succeed."""
    output = process.communicate(timeout=seconds)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def test_the_chain(slurm, workflow, tmp_path):
    """Six checkpoints, the same as without Slurm, by few calls of sbatch, each to the partition that fits."""
    finish(start(slurm, tmp_path))
    for model in MODELS:
        assert (tmp_path / f"results/{model}.ckpt").read_bytes() == (workflow / f"results/{model}.ckpt").read_bytes()
        scores = [json.loads((at / f"results/evaluation/{model}.json").read_text()) for at in (tmp_path, workflow)]
        assert scores[0] == scores[1]
    calls = slurm.calls.read_text().splitlines()
    assert len(calls) <= 30  # of some 45 jobs
    assert all(" -p cpu " in call for call in calls)
    assert any("--array" in call for call in calls)
    assert any("--nodes=1" in call and "-t 30 " in call for call in calls)


@pytest.mark.parametrize(
    ("stage", "gone", "target", "edit"),
    [
        ("simulate", ["results/simulations/constant/0.trees.batch"], "results/simulations/constant/0.trees.batch",
         {"scenarios": {"constant": {"population_size": 7777}}}),
        ("preprocess", ["results/datasets/processed_narrow"], "results/datasets/processed_narrow/train/constant-0.zarr.zip",
         {"datasets": {"processed_narrow": {"pairs": 5}}}),
        ("train", ["results/narrow.ckpt", "results/runs"], "results/narrow.ckpt",
         {"models": {"narrow": {"training": {"lr": 1.0e-3}}}}),
        ("evaluate", ["results/evaluation/narrow.json"], "results/evaluation/narrow.json", {"evaluation": {"replicates": 7}}),
    ],
)  # fmt: skip
def test_configuration_edited_while_a_job_waits(slurm, place, stage, gone, target, edit):
    for name in gone:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    slurm.call("scontrol", "update", "partitionname=cpu", "state=DOWN")
    try:
        process = start(slurm, place, target)
        wait_for("the job", lambda: slurm.list_jobs("PENDING"))
        (place / "overlay.yaml").write_text(yaml.safe_dump({"cluster": {"runtime": 30}} | edit))
    finally:
        slurm.call("scontrol", "update", "partitionname=cpu", "state=UP")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    logs = "".join(path.read_text() for path in (place / "results/logs").rglob("*.log")) + output
    assert "changed after this job was planned" in logs or "are not the planned ones: the settings" in logs
    assert not (place / target).exists()
