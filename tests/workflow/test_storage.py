"""Results in a storage provider instead of the working directory, and machines that share nothing but it."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tskit
import yaml
from helpers.repository import REPOSITORY, TINY, run_python, snakemake


def is_missing(*modules) -> bool:
    return any(importlib.util.find_spec(module) is None for module in modules)


needs_fs = pytest.mark.skipif(
    is_missing("snakemake_storage_plugin_fs") or shutil.which("rsync") is None,
    reason="needs rsync and snakemake-storage-plugin-fs, of the extra `storage`",
)
needs_s3 = pytest.mark.skipif(
    is_missing("snakemake_storage_plugin_s3", "moto", "flask_cors"),
    reason="needs snakemake-storage-plugin-s3, moto and flask-cors, of the extra `dev`",
)


def stored_in(prefix) -> list[str]:
    return ["--default-storage-provider", "fs", "--default-storage-prefix", str(prefix)]


def with_runs_in(directory, path) -> Path:
    """tests/tiny.yaml with run directories in *directory*, written to *path*."""
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY.read_text()) | {"cluster": {"runs": str(directory)}}))
    return path


def is_up_to_date(done) -> bool:
    return "Nothing to be done" in done.stdout + done.stderr


def read_trees(path) -> list[tskit.TableCollection]:
    """The tables of each simulation of a batch; the files have random identifiers, and when they were made."""
    trees = []
    with open(path, "rb") as file, contextlib.suppress(EOFError):
        while True:
            trees.append(tskit.load(file).dump_tables())
    return trees


def check_same_results(results: Path, expected: Path) -> None:
    """Check all checkpoints, shards, manifests, settings, evaluations and figures of accuracy to the byte, and all batches."""
    kinds = ["*.ckpt", "datasets/**/*.zarr.zip", "datasets/*/dataset.json", "settings/**/*.yaml", "masks/*", "evaluation/*.*"]
    for kind in kinds:
        names = sorted(str(path.relative_to(expected)) for path in expected.glob(kind))
        assert names, kind
        assert names == sorted(str(path.relative_to(results)) for path in results.glob(kind))
        for name in names:
            assert (results / name).read_bytes() == (expected / name).read_bytes(), name
    batches = sorted(path.relative_to(expected) for path in expected.glob("simulations/**/*.trees.batch"))
    assert batches
    for batch in batches:
        pairs = zip(read_trees(results / batch), read_trees(expected / batch), strict=True)
        assert all(one.equals(other, ignore_provenance=True) for one, other in pairs), batch
    assert {path.name for path in (results / "report").iterdir()} == {path.name for path in (expected / "report").iterdir()}
    assert "evaluate" in (results / "report/cost.html").read_text()


@needs_fs
@pytest.mark.long
def test_results_move_to_a_storage_and_state_survives_a_lost_machine(workflow, tmp_path):
    bucket, runs = tmp_path / "bucket", tmp_path / "runs"
    machines = [tmp_path / "machine", tmp_path / "other machine"]
    for directory in (*machines, runs):
        directory.mkdir()
    shutil.copytree(workflow / "results", bucket / "results", ignore=shutil.ignore_patterns("runs"))
    checkpoint = bucket / "results/broad_w200.ckpt"  # has a parent
    expected = checkpoint.read_bytes()
    checkpoint.unlink()
    configfile = with_runs_in(runs, tmp_path / "config.yaml")
    targets = ["results/broad_w200.ckpt", *stored_in(bucket)]

    snakemake(*targets, cwd=machines[0], configfile=configfile)
    assert checkpoint.read_bytes() == expected
    assert not (machines[0] / "results").exists()
    log = (bucket / "results/logs/train/broad_w200.log").read_text()
    assert "is lost" not in log
    (tries,) = runs.glob("broad_w200-*-tries.log")
    assert "published: " in tries.read_text()
    assert is_up_to_date(snakemake("-n", *targets, cwd=machines[0], configfile=configfile))
    assert is_up_to_date(snakemake("-n", *targets, cwd=machines[0]))  # without `cluster.runs`

    checkpoint.unlink()
    snakemake(*targets, cwd=machines[1], configfile=configfile)
    assert checkpoint.read_bytes() == expected
    assert "is finished: publishing its checkpoint again" in (bucket / "results/logs/train/broad_w200.log").read_text()

    checkpoint.unlink()
    shutil.rmtree(runs)
    done = snakemake(*targets, cwd=machines[1], configfile=configfile, check=False)
    assert done.returncode
    log = (bucket / "results/logs/train/broad_w200.log").read_text()
    assert f"cxt: cluster.runs: there is no directory {runs} on {socket.gethostname()}; mount it" in log

    snakemake(*targets, cwd=machines[1])
    assert checkpoint.read_bytes() == expected
    log = (bucket / "results/logs/train/broad_w200.log").read_text()
    assert f"The state of this training is in {machines[1]}/results/runs/broad_w200-" in log
    assert "If that directory is lost with this machine, the next try starts from the beginning" in log


def test_other_run_directories_start_no_job(workflow, tmp_path):
    copy = shutil.copytree(workflow, tmp_path / "copy", symlinks=True)
    configfile = with_runs_in(tmp_path, tmp_path / "config.yaml")
    assert is_up_to_date(snakemake("-n", cwd=copy, configfile=configfile))


@pytest.mark.parametrize(
    ("runs", "problem"),
    [("runs", "cluster.runs: the path must be absolute"), ("$NO_SUCH_VARIABLE/runs", "cluster.runs: $NO_SUCH_VARIABLE in ")],
)
def test_run_directories_that_cannot_be(tmp_path, runs, problem):
    done = snakemake("-n", cwd=tmp_path, configfile=with_runs_in(runs, tmp_path / "config.yaml"), check=False)
    assert done.returncode == 2
    assert f"cxt: {problem}" in done.stderr


@needs_fs
@needs_s3
@pytest.mark.long
def test_commands_of_the_page(tmp_path, s3):
    page = (REPOSITORY / "docs/howto/storage.md").read_text()
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, flags=re.S)[1].replace("/efs/", f"{tmp_path}/"))
    lines = [shlex.split(line) for line in page.splitlines() if line.startswith("snakemake ")]
    assert len(lines) == 2
    for _, *words in lines:
        words = [word.replace("my-bucket", "cxt").replace("/archive/", f"{tmp_path}/") for word in words]
        words = [word.replace("/scratch/", f"{tmp_path}/scratch/") for word in words]
        done = run_python("-m", "snakemake", "-n", "-s", REPOSITORY / "Snakefile", "-d", tmp_path, *words, cwd=tmp_path)
        assert "/cxt/results/broad_w200.ckpt" in done.stdout + done.stderr


@needs_fs
@pytest.mark.long
def test_whole_chain_in_a_file_system(workflow, tmp_path):
    machine, bucket = tmp_path / "machine", tmp_path / "bucket"
    machine.mkdir()
    scratch = ["--local-storage-prefix", str(tmp_path / "scratch")]
    snakemake(*stored_in(bucket), *scratch, "--show-failed-logs", cwd=machine)
    check_same_results(bucket / "results", workflow / "results")
    assert not list((tmp_path / "scratch").rglob("*.zarr.zip"))
    assert is_up_to_date(snakemake("-n", *stored_in(bucket), *scratch, cwd=machine))


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """An S3 on loopback with an empty bucket, `cxt`."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("SNAKEMAKE_STORAGE_S3_ENDPOINT_URL", url := f"http://127.0.0.1:{port}")
    with open(tmp_path / "moto.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url)
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="cxt")
        yield client
    finally:
        server.kill()
        server.wait()


def download(s3, directory: Path) -> None:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="cxt"):
        for item in page["Contents"]:
            path = directory / item["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file("cxt", item["Key"], str(path))


@needs_s3
@pytest.mark.long
def test_whole_chain_in_s3(workflow, tmp_path, s3):
    machine, bucket = tmp_path / "machine", tmp_path / "bucket"
    machine.mkdir()
    stored = ["--default-storage-provider", "s3", "--default-storage-prefix", "s3://cxt"]
    snakemake(*stored, "--show-failed-logs", cwd=machine)
    download(s3, bucket)
    check_same_results(bucket / "results", workflow / "results")
    assert {os.path.basename(name) for name in os.listdir(machine / "results")} == {"runs", "logs", "evaluation"}
    assert os.listdir(machine / "results" / "evaluation") == ["finished"]
    assert is_up_to_date(snakemake("-n", *stored, cwd=machine))
