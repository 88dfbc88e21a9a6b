"""envs/*.yaml: the versions of constraints.txt, and every package that a stage's jobs import."""

import json
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
import yaml
from helpers.repository import REPOSITORY, TINY, run_python
from helpers.simulations import simulate
from packaging.requirements import Requirement

ENVS = sorted((REPOSITORY / "envs").glob("*.yaml"))
CONDA_NAMES = {"pytorch": "torch"}
"""{name in conda-forge: name of the distribution}, where they differ."""


def read_env(path) -> dict[str, str]:
    """{distribution: version} of an environment, but for Python."""
    pairs = [entry.split(" =") for entry in yaml.safe_load(path.read_text())["dependencies"]]
    return {CONDA_NAMES.get(name, name): version for name, version in pairs if name != "python"}


@pytest.mark.parametrize("path", ENVS, ids=[path.stem for path in ENVS])
def test_versions_are_those_of_the_constraints(path):
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text().lower(), flags=re.M))
    for name, version in read_env(path).items():
        assert (constraints[name.lower()] + ".").startswith(version + "."), name


def with_dependencies(names) -> set[str]:
    """Distributions, and all that they require."""
    found: set[str] = set()
    left = [name.lower().replace("_", "-") for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            wanted = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # of another platform
            continue
        needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        left += [one.name.lower().replace("_", "-") for one in needed]
    return found


@pytest.mark.slow
def test_stages_import_what_their_environment_has(workflow, tmp_path):
    """Every process of a job says at its end what it has imported."""
    directory = shutil.copytree(workflow, tmp_path / "w", symlinks=True)
    (tmp_path / "imported").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import atexit, json, os, sys\n"
        "def tell():\n"
        "    names = sorted({name.partition('.')[0] for name in list(sys.modules)})\n"
        f"    with open({str(tmp_path / 'imported')!r} + f'/{{os.getpid()}}.json', 'w') as file:\n"
        "        json.dump([sys.orig_argv, names], file)\n"
        "atexit.register(tell)\n"
    )
    shutil.rmtree(directory / "results/runs")
    files = [
        "results/simulations/stdpopsim_papanu/0.trees.batch", "results/datasets/processed/train/stdpopsim_papanu-0.zarr.zip",
        "results/datasets/processed/dataset.json", "results/broad.ckpt", "results/evaluation/broad.json",
        "results/report/broad-training.png", "results/translate/mine/tracks.png",
    ]  # fmt: skip
    for name in files[:-1]:
        (directory / name).unlink()
    with (tmp_path / "my.vcf").open("w") as file:
        ts = simulate(seed=3, individuals=25, length=20_000, rate=2e-8)
        ts.write_vcf(file, position_transform=lambda x: [1 + int(p) for p in x])
    entry = {"input": "my.vcf", "model": "narrow", "pairs": 1, "mutation_rate": 2e-8, "bigwig": True}
    configfile = tmp_path / "translated.yaml"
    configfile.write_text(yaml.safe_dump(yaml.safe_load(TINY.read_text()) | {"translate": {"mine": entry}}))
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{REPOSITORY / 'src'}"}
    run_python(
        "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--cores", "2", *files, "--configfile", configfile,
        cwd=directory, env=environment,
    )  # fmt: skip
    envs = {path.stem: with_dependencies(read_env(path)) for path in ENVS}
    envs |= {"commands.runs": envs["evaluate"], "commands.translate": envs["translate"], "commands.plot": envs["translate"]}
    owners = packages_distributions()
    # What others import if it happens to be there does not count.
    source = "".join(path.read_text() for path in (REPOSITORY / "src/cxt").rglob("*.py"))
    ours = set(re.findall(r"^ *(?:import|from) (\w+)", source, flags=re.M)) & owners.keys() - {"cxt"}
    assert {"torch", "tskit", "msprime", "pytorch_lightning"} <= ours
    seen = set()
    for path in (tmp_path / "imported").iterdir():
        argv, names = json.loads(path.read_text())
        stage = next((word.removeprefix("cxt.") for word in argv if re.fullmatch(r"cxt\.\w+(\.\w+)?", word)), None)
        if stage is None:
            continue
        seen.add(stage)
        lacking = {
            name
            for name in ours.intersection(names)
            if not {owner.lower().replace("_", "-") for owner in owners[name]} & envs[stage]
        }
        assert not lacking, stage
    assert seen == {"simulate", "preprocess", "train", "evaluate", "commands.runs", "commands.translate", "commands.plot"}
