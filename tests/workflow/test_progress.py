"""`snakemake --logger cxt`: a line per stage and checkpoint, and what went wrong."""

import os
import re
import shutil

from helpers.repository import snakemake


def test_progress_and_nothing_else(workflow, tmp_path):
    directory = shutil.copytree(workflow, tmp_path / "w", symlinks=True)
    shutil.rmtree(directory / "results/simulations/stdpopsim_papanu")
    shutil.rmtree(directory / "results/datasets/processed_n10")
    (directory / "results/evaluation/narrow.json").unlink()
    done = snakemake(
        "results/datasets/processed_n10/dataset.json", "results/evaluation/narrow.json", "--logger", "cxt", cwd=directory
    )
    first, *lines = [line for line in done.stderr.splitlines() if not line.startswith(("Assuming", "Config file"))]
    planned = dict(part.split(": ") for part in first.removeprefix("to make: ").split("; "))
    assert planned["simulation batches"] == "1"
    assert planned["evaluations"] == "1"
    made = {re.fullmatch(r"\[ *\d+:\d\d\] (\w+: .*?)( \(narrow\))?", line)[1] for line in lines}
    assert made == {
        f"{stage}: {what} {planned[key]} of {planned[key]}"
        for stage, what, key in (
            ("simulate", "simulation batches", "simulation batches"),
            ("preprocess", "preprocessed batches", "preprocessed batches"),
            ("preprocess", "datasets", "datasets"), ("train", "checkpoints", "checkpoints"),
            ("evaluate", "checkpoints", "evaluations"),
        )
        if key in planned
    }  # fmt: skip
    again = snakemake("results/evaluation/narrow.json", "--logger", "cxt", cwd=directory)
    assert "Nothing to be done" in again.stderr


def test_what_fails_is_shown(workflow, tmp_path):
    directory = shutil.copytree(workflow, tmp_path / "w", symlinks=True)
    (directory / "results/evaluation/narrow.json").unlink()
    checkpoint = directory / "results/narrow.ckpt"
    times = checkpoint.stat().st_atime_ns, checkpoint.stat().st_mtime_ns
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    checkpoint.write_bytes(damaged)
    os.utime(checkpoint, ns=times)  # or it would be made again
    done = snakemake(
        "results/evaluation/narrow.json", "--show-failed-logs", "--rerun-triggers", "mtime", "--logger", "cxt",
        cwd=directory, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Error in rule evaluate" in done.stderr
    assert "it is damaged" in done.stdout + done.stderr
