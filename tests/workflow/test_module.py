"""The workflow as a module of another one: from a clone, and from a repository of which Snakemake fetches the rules alone."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from helpers.repository import REPOSITORY, TINY, run_python

CLONE = f'"{REPOSITORY}/workflow/Snakefile"'
REMOTE = 'github("owner/cxt", path="workflow/Snakefile", tag="v0.1.0")'
PAGE = REPOSITORY / "docs/howto/module.md"


def write_snakefile(directory: Path, snakefile: str, *, configuration=TINY, module="", rules="") -> Path:
    """A workflow like that of the documentation, with the tiny configuration as its section `cxt`."""
    (directory / "config").mkdir(parents=True)
    mine = {"other": 1, "cxt": yaml.safe_load(configuration.read_text())}
    (directory / "config/config.yaml").write_text(yaml.safe_dump(mine))
    text = re.search(r"```snakemake\n(.*?)```", PAGE.read_text(), flags=re.S)[1]
    assert REMOTE in text
    text = text.replace(REMOTE, snakefile).replace("\n\nuse rule", f"{module}\n\nuse rule", 1) + rules
    (directory / "Snakefile").write_text(text)
    return directory


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The python of an environment with the package as a wheel, and the dependencies of this environment."""
    directory = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", directory, REPOSITORY]
    subprocess.run(pip, check=True)
    venv.create(directory / "venv", with_pip=True)
    python = directory / "venv/bin/python"
    (wheel,) = directory.glob("cxt-*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    site = directory / f"venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    for path in sys.path:
        if path.endswith("site-packages"):
            # Not the links to this checkout that are there.
            for entry in Path(path).iterdir():
                if not re.search(r"cxt|\.pth$|^pip|^__pycache__", entry.name) and not (site / entry.name).exists():
                    (site / entry.name).symlink_to(entry)
    return python


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    """A directory for XDG_CACHE_HOME in which Snakemake has this repository as github.com/owner/cxt, with a tag."""
    directory = tmp_path_factory.mktemp("caches")
    copy = directory / "copy"
    copy.mkdir()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for name in ("Snakefile", "rules", "workflow", "envs"):
        path = REPOSITORY / name
        shutil.copytree(path, copy / name) if path.is_dir() else shutil.copy(path, copy / name)
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "rules"], ["tag", "v0.1.0"]):
        subprocess.run([*git, *words], cwd=copy, check=True)
    clone = directory / "snakemake/snakemake/source-cache/snakemake-git-cache/github.com/owner/cxt"
    clone.parent.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", copy, clone], check=True)
    return directory


def run(python, directory: Path, *words, caches=None, check=True) -> subprocess.CompletedProcess:
    """Snakemake in *directory*."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(caches)} if caches else {}
    done = subprocess.run(
        [python, "-m", "snakemake", "--cores", "2", *words], cwd=directory, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def jobs_of(done) -> dict[str, int]:
    """{rule: jobs} of a dry run."""
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, flags=re.M)}


def test_version_is_that_of_the_package():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f'VERSION = "{version}"' in (REPOSITORY / "rules/package.smk").read_text()
    assert f'tag="v{version}"' in PAGE.read_text()


def test_of_a_clone(tmp_path):
    override = """
use rule train from cxt as cxt_train with:
    resources:
        mem_mb=12345,
"""
    directory = write_snakefile(tmp_path / "w", CLONE, rules=override)
    done = run(sys.executable, directory, "-n")
    jobs = jobs_of(done)
    assert jobs["cxt_train"] == 1
    assert jobs["cxt_simulate"] == 3  # two batches of one scenario, one of the other
    assert jobs["all"] == 1
    assert "mem_mb=12345" in done.stdout + done.stderr
    assert "results/settings/models/broad.yaml" in done.stdout + done.stderr
    assert run(sys.executable, directory, "-n", "cxt_all").returncode == 0
    assert len(list(directory.iterdir())) <= 3  # nothing made by a dry run but .snakemake


@pytest.mark.long
def test_of_a_repository(tmp_path, installed, caches):
    directory = write_snakefile(tmp_path / "w", REMOTE)
    jobs = jobs_of(run(installed, directory, "-n", caches=caches))
    assert jobs == jobs_of(run(sys.executable, write_snakefile(tmp_path / "clone", CLONE), "-n"))
    # The environment's own python finds the package in another directory than the dependencies.
    done = run(installed, directory, "results/datasets/processed/dataset.json", caches=caches)
    assert (directory / "results/datasets/processed/dataset.json").exists(), done.stderr
    assert sorted(path.name for path in (directory / ".snakemake/cxt").iterdir()) == ["cxt"]
    assert "Nothing to be done" in run(installed, directory, "results/datasets/processed/dataset.json", caches=caches).stderr


@pytest.mark.long
def test_of_a_repository_with_another_package(tmp_path, caches, installed):
    """With the rules of a later version, and no package at all."""
    code = "import importlib.metadata as m; m.version = lambda name, v=m.version: '0.0.9' if name == 'cxt' else v(name)"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(code)
    directory = write_snakefile(tmp_path / "w", REMOTE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(caches)}
    done = subprocess.run(
        [installed, "-m", "snakemake", "-n"], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "these rules need version 0.1.0 of the package cxt in the environment of Snakemake, found 0.0.9" in done.stderr


def test_prefix_is_refused(tmp_path):
    directory = write_snakefile(tmp_path / "w", CLONE, module='\n    prefix: "mine"')
    done = run(sys.executable, directory, "-n", check=False)
    assert done.returncode == 2
    assert "cannot have `prefix:`" in done.stderr


def test_unknown_keys_are_refused(tmp_path):
    configuration = tmp_path / "wrong.yaml"
    configuration.write_text("trainning: {lr: 1}\n")
    done = run(sys.executable, write_snakefile(tmp_path / "w", CLONE, configuration=configuration), "-n", check=False)
    assert done.returncode == 2
    assert "training" in done.stderr


def test_rules_in_a_container(tmp_path):
    """What docs/howto/containers.md shows, with a program in place of Apptainer that runs the command outside of any image."""
    text = re.search(r"```snakemake\n(.*?)```", (REPOSITORY / "docs/howto/containers.md").read_text(), flags=re.S)[1]
    text = text.replace("/shared/cxt/workflow", f"{REPOSITORY}/workflow").replace("/shared/cxt.sif", f"{tmp_path}/cxt.sif")
    (tmp_path / "cxt.sif").touch()
    (tmp_path / "Snakefile").write_text(text)
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then echo apptainer version 1.3.0; exit; fi
echo "$@" >> {tmp_path}/said
while [ "$1" != -c ]; do shift; done
exec bash -c "$2"
"""
    )
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    run_python(
        "-m", "snakemake", "--cores", "2", "--software-deployment-method", "apptainer", "--configfile", TINY,
        "--", "results/simulations/constant/0.trees.batch", cwd=tmp_path, env=environment,
    )  # fmt: skip
    lines = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith(("exec", "--quiet"))]
    assert len(lines) == 1
    assert f"{tmp_path}/cxt.sif bash -c" in lines[0]
    assert "python -m cxt.simulate" in lines[0]
