"""Shared fixtures: real msprime simulations, a tiny dataset, and a finished tiny workflow."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers.repository import snakemake
from helpers.simulations import build_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """20 simulations of 20 windows, 20 samples, 6 pairs, 2 scales: 108 training and 12 test items."""
    return build_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def masked_dataset(tmp_path_factory) -> Path:
    """The same with an accessibility mask."""
    mask = np.random.default_rng(1).random(50_000) < 0.3
    return build_dataset(tmp_path_factory.mktemp("masked"), mask=mask)


@pytest.fixture(scope="session")
def dataset_n10(tmp_path_factory) -> Path:
    """The same simulations, their first ten haplotypes."""
    return build_dataset(tmp_path_factory.mktemp("n10"), samples=10)


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    """A dataset to damage."""
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture(scope="session")
def workflow(tmp_path_factory) -> Path:
    """A directory in which the whole tiny workflow has run: once for all processes that test, and a copy for each.

    `CXT_FINISHED_WORKFLOW` may name one that has just run, as `.ci/run` does.
    """
    directory = tmp_path_factory.mktemp("workflow")
    if finished := os.environ.get("CXT_FINISHED_WORKFLOW"):
        return shutil.copytree(finished, directory / "workflow", symlinks=True)
    if "PYTEST_XDIST_WORKER" not in os.environ:
        snakemake("--show-failed-logs", cwd=directory)
        return directory
    shared = tmp_path_factory.getbasetemp().parent / "workflow"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            making = shared.with_name("workflow-in-the-making")
            making.mkdir()
            snakemake("--show-failed-logs", cwd=making)
            making.rename(shared)
    return shutil.copytree(shared, directory / "workflow", symlinks=True)
