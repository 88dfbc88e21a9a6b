"""Tree sequences of one's own through the whole workflow: from files to evaluations, and what is made again after a change."""

import json
import re

import msprime
import pytest
import yaml
from helpers.repository import TINY, snakemake
from helpers.tree_files import as_tsdate, recapitate, simulate_forwards

from cxt.data.manifest import read_manifest
from cxt.io import file_sha256

NAMES = ["narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]
SHARED = {
    "kind": "trees",
    "mutations": "overlay",
    "mutation_rate": 1e-7,
    "individuals": 5,
    "sequence_length": 10_000,
    "batch": 10,
}


def ancestry(*, length: int, seed: int):
    return msprime.sim_ancestry(8, population_size=1e3, sequence_length=length, recombination_rate=1e-7, random_seed=seed)


def rules(directory, configfile) -> list[str]:
    """Names of the rules of the jobs that a dry run would run, without those of local files and figures."""
    done = snakemake("-n", "results/evaluation/mine.json", cwd=directory, configfile=configfile)
    named = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, flags=re.M)
    return sorted(name for name in named if name not in ("settings", "all"))


@pytest.mark.long
def test_from_files_to_an_evaluation(tmp_path):
    """SLiM's trees after recapitation, tsinfer's after dating, and msprime's."""
    user, work = tmp_path / "user", tmp_path / "work"
    (user / "msprime").mkdir(parents=True)
    work.mkdir()
    recapitate(simulate_forwards()).dump(user / "slim.trees")
    as_tsdate(msprime.sim_mutations(ancestry(length=65_000, seed=1), rate=1e-6, random_seed=1)).dump(user / "dated.trees")
    ancestry(length=155_000, seed=2).dump(user / "msprime" / "a.trees")
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    scenarios = {
        "slim": SHARED | {"files": "slim.trees", "generation_time": 1},
        "dated": SHARED | {"files": "dated.trees", "mutations": "keep"},
        "plain": SHARED | {"files": "msprime/*.trees"},
    }
    dataset = {"scenarios": list(scenarios), "window_size": 1000, "sequence_length": 10_000, "samples": 10, "pairs": 4}
    model = {"preset": "broad", "dataset": "mine", "architecture": {"layers": 1, "heads": 2, "width": 16}}
    content["scenarios"] = content.get("scenarios", {}) | scenarios
    content["datasets"] = content.get("datasets", {}) | {"mine": dataset}
    configfile = user / "x.yaml"
    configfile.write_text(yaml.safe_dump(content | {"models": dict.fromkeys(NAMES) | {"mine": model}}), encoding="utf-8")
    snakemake("--show-failed-logs", "results/evaluation/mine.json", cwd=work, configfile=configfile)
    results = work / "results"
    manifest = read_manifest(results / "datasets" / "mine")
    assert {name: manifest["splits"][name]["simulations"] for name in ("train", "test")} == {"train": 23, "test": 4}
    evaluated = json.loads((results / "evaluation" / "mine.json").read_text(encoding="utf-8"))["scenarios"]
    assert {name: scores["simulations"] for name, scores in evaluated.items()} == {"slim": 1, "dated": 1, "plain": 2}
    assert rules(work, configfile) == []
    # A further file: its pieces. All batches of the scenario are cut again, because its settings name the files; the shards of
    # the first one are the same bytes.
    shards = [results / "datasets" / "mine" / split / "plain-0.zarr.zip" for split in ("train", "test")]
    before = [file_sha256(path) for path in shards]
    ancestry(length=105_000, seed=3).dump(user / "msprime" / "b.trees")
    planned = rules(work, configfile)
    assert (planned.count("simulate"), planned.count("preprocess"), planned.count("train")) == (4, 3, 1)
    snakemake("--show-failed-logs", "results/evaluation/mine.json", cwd=work, configfile=configfile)
    assert read_manifest(results / "datasets" / "mine")["splits"]["train"]["simulations"] == 32
    assert [file_sha256(path) for path in shards] == before
    # Another file in the place of one: its pieces.
    msprime.sim_mutations(ancestry(length=65_000, seed=4), rate=1e-6, random_seed=4).dump(user / "dated.trees")
    planned = rules(work, configfile)
    assert planned.count("simulate") == 2  # of the dataset, and for the evaluation
    assert planned.count("train") == 1
