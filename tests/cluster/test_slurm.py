"""The workflow on a real Slurm, by the shipped profile: `make test-cluster`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers.repository import REPOSITORY, TINY
from helpers.slurm import missing_programs, running_slurm, wait_for

from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.run_directory import RunDirectory

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"needs {', '.join(missing_programs())} (Debian: slurmctld slurmd munge)"
    ),
]
MINUTES = [int(word) for word in os.environ.get("CXT_SLURM_MINUTES", "2").split(",")]
"""Time limits of the allocations in which a training is to save and end by itself."""

MODELS = ["narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]


@pytest.fixture(scope="module")
def slurm():
    directory = Path(tempfile.mkdtemp(prefix="cxt-slurm-", dir="/tmp"))  # a short path
    directory.chmod(0o755)
    with running_slurm(directory, nodes=2) as running:
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


def sbatch_calls(slurm, start_at: int) -> list[str]:
    return slurm.calls.read_text().splitlines()[start_at:] if slurm.calls.exists() else []


def train_alone(place, *flags) -> subprocess.Popen:
    """The planned training of `narrow` without Slurm and undisturbed, to one.ckpt."""
    command = [
        sys.executable, "-m", "cxt.train", "--config", place / "results/settings/models/narrow.yaml",
        "--dataset-path", place / "results/datasets/processed_narrow", "--run-dir", place / "one", "--out", place / "one.ckpt",
        *flags,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command)], env=environment, cwd=place, stdout=subprocess.PIPE, text=True)


def test_two_machines_train_as_one_with_two_devices(slurm, place):
    """The job's processes come by srun, one on each machine; the weights are those of one machine with two."""
    (place / "results/narrow.ckpt").unlink()
    before = len(sbatch_calls(slurm, 0))
    finish(start(slurm, place, "results/narrow.ckpt", models={"narrow": {"training": {"nodes": 2}}}))
    assert any(" --nodes=2 " in call and " --ntasks=2 " in call and " -p cpu " in call for call in sbatch_calls(slurm, before))
    trained = read_checkpoint(place / "results/narrow.ckpt")
    assert trained.record["devices"] == 2
    lineage = trained.record["lineage"]
    train_alone(place, "--nodes", 1, "--accelerator", "cpu", "--devices", 2, "--lineage", lineage).communicate()
    alone = read_checkpoint(place / "one.ckpt").state_dict
    assert all(torch.equal(alone[name], tensor) for name, tensor in trained.state_dict.items())


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        ({}, ["--gpus=1", "--nodes=1"]),
        ({"cluster": {"gpu_model": "fake"}}, ["--gpus=fake:1", "--nodes=1"]),
        ({"cluster": {"gpu_request": "gres", "gpu_model": "fake"}}, ["--gres=gpu:fake:1", "--nodes=1"]),
        ({"models": {"narrow": {"training": {"devices": 1, "nodes": 2}}}}, ["--gres=gpu:1", "--nodes=2", "--ntasks=2"]),
    ],
)
def test_requests_of_gpus(slurm, place, overlay, words):
    """What sbatch is asked for. The GPUs here are none, so that the trainer then refuses, and says what to do."""
    (place / "results/narrow.ckpt").unlink()
    before = len(sbatch_calls(slurm, 0))
    given = {"models": {"narrow": {"training": {"devices": 1}}}} | overlay
    given["cluster"] = {"runtime": 30} | overlay.get("cluster", {})
    process = start(slurm, place, "results/narrow.ckpt", **given)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output[-3000:]
    (call,) = sbatch_calls(slurm, before)
    assert all(f" {word} " in f"{call} " for word in [*words, "-p gpu", "-t 30"]), call
    log = (place / "results/logs/train/narrow-tries.log").read_text()
    assert "torch sees 0 GPUs; use --devices 0" in log
    assert not (place / "results/narrow.ckpt").exists()


def test_more_gpus_than_any_partition_gives(slurm, place):
    (place / "results/narrow.ckpt").unlink()
    before = len(sbatch_calls(slurm, 0))
    process = start(slurm, place, "results/narrow.ckpt", models={"narrow": {"training": {"devices": 3}}})
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output[-3000:]
    assert "training.devices is 3, but no partition" in output
    assert "devices: 1, grad_accum: " in output
    assert sbatch_calls(slurm, before) == []


def narrow_of(epochs: int) -> dict:
    """Configuration of a `narrow` that trains for *epochs* of 18 steps."""
    training = {"epochs": epochs, "save_every": 200, "validate_every": 10**6, "decode_items": 0}
    return {"models": {"narrow": {"training": training}}}


def start_narrow(slurm, place, *, epochs, minutes=30, **settings) -> subprocess.Popen:
    (place / "results/narrow.ckpt").unlink(missing_ok=True)
    cluster = {"cluster": {"runtime": minutes}}
    return start(slurm, place, "results/narrow.ckpt", **narrow_of(epochs), **cluster, **settings)


def find_long_run(place) -> RunDirectory | None:
    """The run directory of a `narrow` that has saved its state more than once, and trains."""
    for path in (place / "results/runs").glob("narrow-*"):
        if path.is_dir() and len(list((path / "checkpoints").glob("step=*.ckpt"))) > 1:
            return RunDirectory(path)
    return None


def assert_undisturbed(slurm, place, reference: subprocess.Popen) -> str:
    """The checkpoint is byte for byte that of the undisturbed training; Slurm ended no job. Returns the log of all tries."""
    assert reference.wait(timeout=60 * 60) == 0
    assert (place / "results/narrow.ckpt").read_bytes() == (place / "one.ckpt").read_bytes()
    assert "JobState=TIMEOUT" not in slurm.call("scontrol", "show", "jobs", "-o")
    return (place / "results/logs/train/narrow-tries.log").read_text()


def start_reference(place) -> subprocess.Popen:
    """The same training undisturbed, as soon as its settings are planned."""
    settings = place / "results/settings/models/narrow.yaml"
    planned = settings.stat().st_mtime_ns
    wait_for("the settings", lambda: settings.stat().st_mtime_ns != planned, seconds=120)
    lineage = yaml.safe_load(settings.read_text())["settings_lineage"]
    validation = ["--validation-items", 8, "--validate-every", 10**6, "--decode-items", 0]  # no settings of the weights
    return train_alone(place, *validation, "--lineage", lineage)


@pytest.mark.parametrize("minutes", MINUTES)
def test_time_limits(slurm, place, minutes):
    """Each try saves and ends before Slurm would end it; the weights are those of an undisturbed training."""
    process = start_narrow(slurm, place, epochs=400 * minutes, minutes=minutes, retries=9)
    reference = start_reference(place)
    finish(process, seconds=50 * 60)
    tries = assert_undisturbed(slurm, place, reference)
    assert tries.count("out of time") == tries.count("Slurm job ") - 1 >= 1


def test_cancelled_training_is_tried_again(slurm, place):
    process = start_narrow(slurm, place, epochs=300, retries=1)
    reference = start_reference(place)
    wait_for("the training", lambda: find_long_run(place), seconds=120)
    (job,) = slurm.list_jobs("RUNNING")
    slurm.call("scancel", job)
    finish(process)
    tries = assert_undisturbed(slurm, place, reference)
    assert tries.count("Slurm job ") == 2


def test_killed_snakemake(slurm, place):
    """The same command again waits for the trainer that still runs, and publishes its result."""
    process = start_narrow(slurm, place, epochs=300)
    reference = start_reference(place)
    wait_for("the training", lambda: find_long_run(place), seconds=120)
    process.kill()
    process.communicate()
    (job,) = slurm.list_jobs("RUNNING")
    unlock = [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", place, "--unlock"]
    subprocess.run([*unlock, "--configfile", TINY, place / "overlay.yaml"], check=True, capture_output=True)
    again = start_narrow(slurm, place, epochs=300)
    tries = place / "results/logs/train/narrow-tries.log"
    wait_for("the second trainer", lambda: "waiting for it" in tries.read_text(), seconds=120)
    assert job in slurm.list_jobs("RUNNING")
    finish(again)
    assert_undisturbed(slurm, place, reference)
