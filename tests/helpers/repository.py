"""Paths of the repository, and running its commands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

GOLDEN = REPOSITORY / "tests" / "golden"

TINY = REPOSITORY / "tests" / "tiny.yaml"
PYTHON_PATH = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY / "tests")])


def run_python(*arguments, cwd=None, env=None, check=True) -> subprocess.CompletedProcess:
    """`python …` with the package on its path; fails the test on a non-zero status unless *check* is False."""
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH, "COLUMNS": "200"} | (env or {})
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return done


def locking_process(run) -> subprocess.Popen:
    """Another process that holds the lock of the run directory *run* until it reads a line."""
    code = (
        "from cxt.checkpoints.run_directory import RunDirectory\n"
        f"run = RunDirectory({str(run)!r}); run.lock(); print('locked', flush=True); input()"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "locked\n"
    return process


def snakemake(*arguments, cwd, configfile=TINY, repository=REPOSITORY, check=True) -> subprocess.CompletedProcess:
    """Snakemake on the tiny configuration, with *cwd* as its working directory."""
    return run_python(
        "-m", "snakemake", "--snakefile", repository / "Snakefile", "--directory", cwd, "--cores", "2",
        "--rerun-incomplete", *arguments, "--configfile", configfile, cwd=cwd, check=check,
        env={"PYTHONPATH": str(repository / "src")},
    )  # fmt: skip


def copy_with_raised_version(stage: str, directory: Path) -> Path:
    """A copy of the checkout, in a new directory, in which the version of *stage* is another one."""
    directory.mkdir()
    for part in ("Snakefile", "pyproject.toml", "checkpoints", "rules", "src", "config", "envs", "workflow"):
        source = REPOSITORY / part
        shutil.copytree(source, directory / part) if source.is_dir() else shutil.copy(source, directory / part)
    lineage = directory / "src" / "cxt" / "lineage.py"
    lineage.write_text(re.sub(rf'"{stage}": \d+', f'"{stage}": 99', lineage.read_text()))
    return directory
