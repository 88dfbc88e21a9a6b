"""The whole workflow on a tiny configuration, and what is made again after which change."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.repository import REPOSITORY, TINY, copy_with_raised_version, run_python, snakemake
from helpers.simulations import maps_taken_as_present

from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.config.file import load
from cxt.errors import BadRequest, Failed
from cxt.scenarios.batches import read_batch
from cxt.workflow.lineages import dataset_lineage, model_lineage
from cxt.workflow.settings import write_settings
from cxt.workflow.verification import verify

MODELS = ["narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]
BELOW_BROAD = ["broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]
PUBLISHED_GRAPH = {
    ("processed_narrow", "narrow"), ("processed", "broad"), ("processed_small_window", "broad_w200"),
    ("processed_n10", "broad_adapter"), ("processed_small_window_missing_data", "w200_wmissing"),
    ("processed_small_window_missing_data_n10", "w200_wmissing_adapter"),
    ("broad", "broad_w200"), ("broad", "broad_adapter"), ("broad_w200", "w200_wmissing"),
    ("broad_adapter", "w200_wmissing_adapter"),
}  # fmt: skip


def planned(directory, *arguments, **kwargs) -> dict[str, int]:
    """{rule: jobs} that `snakemake -n` would run, of the rule `train` by model; settings files are left out."""
    done = snakemake("-n", *arguments, cwd=directory, **kwargs)
    if "Nothing to be done" in done.stdout + done.stderr:
        return {}
    text = done.stdout + done.stderr
    table = text.split("Job stats:")[1].split("total")[0]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\S+)\s+(\d+)$", table, flags=re.M)}
    models = re.findall(r"^    output: results/(\w+)\.ckpt$", text, flags=re.M)
    assert len(set(models)) == len(models) == jobs.pop("train", 0)
    return {rule: count for rule, count in jobs.items() if rule not in ("all", "settings")} | dict.fromkeys(
        [f"train_{model}" for model in models], 1
    )


def trained(jobs: dict) -> set[str]:
    return {rule.removeprefix("train_") for rule in jobs if rule.startswith("train_")}


def overlay(path, **changes):
    """tests/tiny.yaml with changes, in a file."""
    config = yaml.safe_load(TINY.read_text())
    for section, entries in changes.items():
        for name, entry in entries.items():
            if isinstance(entry, dict):
                config[section].setdefault(name, {}).update(entry)
            else:
                config[section][name] = entry
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def copy(workflow, tmp_path):
    """A finished workflow to change."""
    return shutil.copytree(workflow, tmp_path / "copy", symlinks=True)


def test_everything_is_there(workflow):
    results = workflow / "results"
    for model in MODELS:
        content = torch.load(results / f"{model}.ckpt", weights_only=True)
        assert content["cxt"]["lineage"] == model_lineage(load([TINY]), model)
        scores = json.loads((results / "evaluation" / f"{model}.json").read_text())
        for figures in scores["scenarios"].values():
            assert {"mse", "mse_se", "r", "bias", "coverage95", "baseline"} <= figures.keys()
            assert {"heterozygosity", "hmm", "constant"} == figures["baseline"].keys()
        assert scores["settings"]["rates"] == "those of the simulations"  # its models read them
        for figure in ("tracks", "scatter"):
            assert (results / "evaluation" / f"{model}-{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert "published" in (results / "logs" / "train" / f"{model}.log").read_text()
        assert "MSE" in (results / "logs" / "evaluate" / f"{model}.log").read_text()
        assert len(list((results / "runs").glob(f"{model}-*/checkpoints/{model}_epoch=0-step=*.ckpt"))) == 1
    table = (results / "evaluation" / "table.md").read_text()
    assert all(f"| {model} " in table for model in MODELS)
    assert {path.name for path in (results / "datasets").iterdir()} == {a for a, _ in PUBLISHED_GRAPH if a not in MODELS}


def test_windows_and_samples_come_from_the_datasets(workflow):
    record = read_checkpoint(workflow / "results" / "w200_wmissing_adapter.ckpt").record
    assert (record["model"]["windows"], record["model"]["samples"], record["adapter"]["samples"]) == (10, 50, 10)
    assert record["dataset"]["missing"]
    assert record["parent"]["name"] == "broad_adapter"


def test_evaluation_simulations_are_in_no_dataset(workflow):
    starts = {int(path.name.split(".")[0]) for path in (workflow / "results" / "simulations").glob("*/*.trees.batch")}
    assert starts == {0, 10, 1_000_000_000}
    manifest = (workflow / "results" / "datasets" / "processed" / "dataset.json").read_text()
    assert "1000000000" not in manifest


def test_the_published_graph(workflow):
    dot = snakemake("--dag", "dot", "--forceall", cwd=workflow).stdout
    model = dict(re.findall(r'(\d+)\[label = "train\\nmodel: ([^"]+)"', dot))
    assert len(model) == 6
    parents = {(model[a], model[b]) for a, b in re.findall(r"(\d+) -> (\d+)", dot) if {a, b} <= model.keys()}
    assert parents == {edge for edge in PUBLISHED_GRAPH if edge[0] in MODELS}
    config = load([TINY])
    datasets = {(config["models"][m]["dataset"], m) for m in MODELS}
    assert datasets == PUBLISHED_GRAPH - parents


def test_a_checkpoint_asks_for_its_ancestors_only(tmp_path):
    jobs = planned(tmp_path, "results/broad_w200.ckpt")
    assert trained(jobs) == {"broad", "broad_w200"}
    assert jobs["manifest"] == 2
    assert "evaluate" not in jobs
    assert trained(planned(tmp_path)) == set(MODELS)


@pytest.mark.parametrize("option", ["--dag", "--rulegraph", "--summary"])
def test_nothing_needs_to_be_there_for_a_graph(tmp_path, option):
    done = snakemake("results/narrow.ckpt", option, cwd=tmp_path)
    assert "simulate" in done.stdout


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"devices": 3, "grad_accum": 2}, "training.devices is 3, but this run may use 1 GPU"),
        ({"devices": 3, "grad_accum": 2}, "training: {nodes: 1, devices: 1, grad_accum: 6}"),
        ({"nodes": 2, "grad_accum": 2}, "training.nodes is 2, but this run uses one machine"),
    ],
)
def test_machines_and_gpus_that_are_not_there(tmp_path, training, message):
    config = overlay(tmp_path / "x.yaml", models={"narrow": {"training": training}})
    profile = ["--profile", REPOSITORY / "workflow" / "profiles" / "local"]
    done = snakemake("results/narrow.ckpt", *profile, cwd=tmp_path, configfile=config, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.long
def test_deleted_checkpoint(copy):
    (copy / "results" / "broad.ckpt").unlink()
    jobs = planned(copy)
    assert trained(jobs) == {"broad", *BELOW_BROAD}
    assert not {"simulate", "preprocess", "manifest", "synthetic_mask"} & jobs.keys()
    before = {model: (copy / "results" / f"{model}.ckpt").read_bytes() for model in BELOW_BROAD}
    # Their runs are finished: published again, nothing retrained.
    snakemake("results/broad.ckpt", "results/w200_wmissing.ckpt", cwd=copy)
    assert "is finished" in (copy / "results" / "logs" / "train" / "broad.log").read_text()
    for model in ("broad_w200", "w200_wmissing"):
        assert (copy / "results" / f"{model}.ckpt").read_bytes() == before[model]
    assert not list((copy / "results" / "runs").glob("*superseded*"))


def test_replaced_checkpoint(copy):
    path = copy / "results" / "broad.ckpt"
    about = read_checkpoint(path)
    write_checkpoint(path, {key: value * 1.5 for key, value in about.state_dict.items()}, about.record)
    assert trained(planned(copy)) == set(BELOW_BROAD)
    before = read_checkpoint(copy / "results" / "broad_w200.ckpt").state_dict
    snakemake("results/broad_w200.ckpt", cwd=copy)
    after = read_checkpoint(copy / "results" / "broad_w200.ckpt").state_dict
    assert not torch.equal(before["backbone.head.weight"], after["backbone.head.weight"])
    assert re.search(r"parent \w{12} instead of \w{12}", (copy / "results" / "logs" / "train" / "broad_w200.log").read_text())


@pytest.mark.long
def test_a_student_learns_from_its_teacher(copy, tmp_path):
    """Soft targets of ten haplotypes by a teacher that reads fifty; what is made again after a change of either."""
    student = {"teacher": "broad", "training": {"objective": "distill"}}
    more = overlay(tmp_path / "x.yaml", models={"broad_adapter": student})
    again = {"teach": 3, "train_broad_adapter": 1, "train_w200_wmissing_adapter": 1}
    jobs = planned(copy, "results/w200_wmissing_adapter.ckpt", configfile=more)
    assert jobs == again
    snakemake("results/broad_adapter.ckpt", cwd=copy, configfile=more)
    record = read_checkpoint(copy / "results" / "broad_adapter.ckpt").record
    assert record["teacher"]["sha256"] == hashlib.sha256((copy / "results" / "broad.ckpt").read_bytes()).hexdigest()
    assert planned(copy, "results/broad_adapter.ckpt", configfile=more) == {}
    assert "intact" in verify(copy / "results" / "broad_adapter.ckpt", configfiles=[more])
    gentler = {"teacher": "broad", "training": {"objective": "distill", "distill": {"weight": 0.5}}}
    gentler = overlay(tmp_path / "y.yaml", models={"broad_adapter": gentler})
    assert planned(copy, "results/broad_adapter.ckpt", configfile=gentler) == {"train_broad_adapter": 1}


def test_deleted_shard_is_rebuilt_when_training_needs_it(copy):
    (copy / "results" / "narrow.ckpt").unlink()
    (copy / "results" / "datasets" / "processed_narrow" / "train" / "constant-0.zarr.zip").unlink()
    jobs = planned(copy, "results/narrow.ckpt")
    assert jobs["preprocess"] == 1
    assert "simulate" not in jobs


def test_growth_by_a_tenth(workflow, tmp_path):
    """The last batch, which takes in the one more, the five datasets that use it, their checkpoints and those below."""
    more = overlay(tmp_path / "x.yaml", scenarios={"stdpopsim_papanu": {"simulations": 11}})
    jobs = planned(workflow, configfile=more)
    assert (jobs["simulate"], jobs["preprocess"], jobs["manifest"]) == (1, 5, 5)
    assert trained(jobs) == {"broad", *BELOW_BROAD}


def test_a_partial_batch_grows(workflow, tmp_path):
    more = overlay(tmp_path / "x.yaml", scenarios={"stdpopsim_papanu": {"simulations": 13}})
    jobs = planned(workflow, configfile=more)
    assert jobs["simulate"] == 1
    fewer = overlay(tmp_path / "y.yaml", scenarios={"stdpopsim_papanu": {"simulations": 8}})
    assert planned(workflow, configfile=fewer)["simulate"] == 1


def test_changed_scenario_rebuilds_what_uses_it(workflow, tmp_path):
    jobs = planned(workflow, configfile=overlay(tmp_path / "x.yaml", scenarios={"constant": {"population_size": 9999}}))
    assert jobs["simulate"] == 3  # two batches of training data, one of evaluation
    assert jobs["manifest"] == 3
    assert trained(jobs) == set(MODELS)  # all have `broad` or constant data above them
    only = overlay(tmp_path / "y.yaml", datasets={"processed": {"scenarios": ["stdpopsim_papanu"], "pairs": 8}})
    config = load([only])
    assert dataset_lineage(config, "processed_narrow") == dataset_lineage(load([TINY]), "processed_narrow")
    jobs = planned(workflow, configfile=only)
    assert trained(jobs) == {"broad", *BELOW_BROAD}
    assert jobs["manifest"] == 1
    assert "simulate" not in jobs


def test_settings_that_change_no_result_start_no_job(workflow, tmp_path):
    neutral = {"workers": 1, "save_every": 7, "validation_items": 4, "log_every": 3, "storage": "disk", "scratch": "$TMPDIR/x"}
    config = overlay(tmp_path / "x.yaml", training=neutral)
    config.write_text(config.read_text() + "cluster: {runtime: 99}\n")
    assert planned(workflow, configfile=config) == {}
    # A job that runs for another reason is given them.
    done = snakemake("-n", "-p", "--forcerun", "results/narrow.ckpt", cwd=workflow, configfile=config)
    assert "--save-every=7 " in done.stdout + done.stderr
    assert "'--scratch=$TMPDIR/x'" in done.stdout + done.stderr
    assert "runtime=99" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("stage", "first", "not_run"),
    [
        ("simulate", "simulate", set()),
        ("preprocess", "preprocess", {"simulate"}),
        ("evaluate", "evaluate", {"simulate", "preprocess", "manifest", "train_narrow"}),
    ],
)
def test_bumped_stage_version(workflow, tmp_path, stage, first, not_run):
    jobs = planned(workflow, repository=copy_with_raised_version(stage, tmp_path / "repository"))
    assert first in jobs
    assert not not_run & jobs.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {broad: {checkpoint: w200_wmissing}}", "a cycle of parents"),
        ("models: {broad_w200: {checkpoint: brod}}", "unknown parent 'brod'; did you mean 'broad'"),
        ("datasets: {processed: {scenarios: [constnat]}}", "unknown scenario 'constnat'; did you mean 'constant'"),
        ("scenarios: {stdpopsim_papanu: {species: PapAni}}", "unknown species 'PapAni'; did you mean 'PapAnu'"),
        ("training: {batch_size: 1000}", "fewer than one batch of 1000"),
        ("scenarios: {stdpopsim_papanu: {simulations: 1}}", "has no training simulation"),
        ("trainning: {}", "unknown key; did you mean 'training'"),
        (
            "datasets: {processed_small_window_missing_data: {mask: {path: m.bed}}}",
            "covers 1500 bp, fewer than sequence_length 2000",
        ),
    ],
)
def test_bad_requests_end_before_anything_runs(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    (tmp_path / "m.bed").write_text("chr1\t100\t1500\n")
    done = run_python(
        "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", tmp_path, "--cores", "2",
        "--configfile", TINY, path, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("results/braod.ckpt", "unknown model 'braod'; did you mean 'broad'"),
        ("results/evaluation/narow.json", "unknown model 'narow'; did you mean 'narrow'"),
        ("results/datasets/procesed/dataset.json", "unknown dataset 'procesed'; did you mean 'processed'"),
    ],
)
def test_unknown_target_on_the_command_line(tmp_path, target, message):
    done = snakemake(target, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_model_that_cannot_be_read_is_not_evaluated(tmp_path):
    """The default target trains it and evaluates the others; where there are none, there is no table."""
    child = {"preset": "narrow", "dataset": "processed_narrow", "checkpoint": "narrow", "training": {"objective": "marginal"}}
    masked = {"narrow": {"training": {"objective": "masked"}}} | dict.fromkeys(MODELS[1:])
    path = overlay(tmp_path / "x.yaml", models=masked | {"child": child})
    jobs = planned(tmp_path, configfile=path)
    assert trained(jobs) == {"narrow", "child"}
    assert [jobs[rule] for rule in ("evaluate", "accuracy_table", "training_curves")] == [1, 1, 2]
    for target in ("narrow.json", "narrow-tracks.png"):
        done = snakemake("-n", f"results/evaluation/{target}", cwd=tmp_path, configfile=path, check=False)
        assert done.returncode == 2
        assert "model 'narrow' cannot be evaluated, because its objective predicts no times" in done.stderr
    path = overlay(tmp_path / "y.yaml", models=masked)
    jobs = planned(tmp_path, configfile=path)
    assert trained(jobs) == {"narrow"}
    assert not {"evaluate", "accuracy_table", "report_tables"} & jobs.keys()
    plan = run_python("-m", "cxt.plan", "--configfile", path, env={"PYTHONPATH": str(REPOSITORY / "src")}).stdout
    assert "0 simulations of 0 variants for evaluation, 0 pairs decoded" in plan


def test_truncated_batch_is_named(copy):
    batch = copy / "results" / "simulations" / "constant" / "10.trees.batch"
    batch.write_bytes(batch.read_bytes()[:-5000])
    done = snakemake("--show-failed-logs", "results/narrow.ckpt", cwd=copy, check=False)
    assert done.returncode == 1
    assert "constant/10.trees.batch is damaged or truncated at tree sequence 9 of 10" in done.stdout + done.stderr


def test_no_two_jobs_share_a_file(tmp_path):
    """Whatever a model or a dataset is called: `table` once shared a log with the accuracy table."""
    path = overlay(
        tmp_path / "x.yaml",
        models={"table": {"preset": "w200_wmissing", "dataset": "map", "architecture": {"layers": 1, "heads": 2, "width": 16}}},
        datasets={"map": {"scenarios": ["mask"], "sequence_length": 20000, "pairs": 4, "mask": {"length": 50000}}},
        scenarios={"mask": {"kind": "constant", "simulations": 20, "batch": 10, "sequence_length": 20000}},
    )
    done = snakemake("-n", cwd=tmp_path, configfile=path)
    written = []
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.fullmatch(r"    (?:output|log): (.+?)(?: \(check .*\))?", line):
            written += match[1].split(", ")
    assert "results/table.ckpt" in written
    assert "results/evaluation/table.md" in written
    assert len(written) == len(set(written))


def test_the_trainer_is_given_the_configured_devices(tmp_path):
    """Its settings file says them, written beforehand; the command line has nothing that a limit could clip."""
    path = overlay(tmp_path / "x.yaml", training={"devices": 3}, datasets={"processed_narrow": {"pairs": 16}})
    done = snakemake("-n", "-p", "results/narrow.ckpt", "--resources", "gpu=4", cwd=tmp_path, configfile=path)
    job = (done.stdout + done.stderr).split("rule train:")[1].split("rule ")[0]
    assert "gpu=3" in job
    assert "--devices" not in job
    assert "devices: 3\n" in write_settings(load([path]), "models", "narrow")


def advised(text: str) -> list[str]:
    """The arguments of the snakemake command that a message says to run."""
    command = re.search(r"`(snakemake [^`]+)`", text)[1]
    return command.split()[1:]


def follow(text: str, *more, cwd, configfile=TINY):
    """Run the advised command in *cwd*, with the Snakefile and the configuration that a person would add."""
    return run_python(
        "-m", "snakemake", *advised(text), "--snakefile", REPOSITORY / "Snakefile", *more, "--configfile", TINY, configfile,
        cwd=cwd, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("absolute", [False, True])
def test_advice_about_damaged_files(copy, tmp_path, absolute):
    """Followed to the letter, though all checkpoints are there, which Snakemake takes as up to date."""
    dataset = Path("results/datasets/processed_narrow")
    shard, batch = dataset / "train/constant-0.zarr.zip", Path("results/simulations/constant/0.trees.batch")
    before = (copy / shard).read_bytes()
    (copy / shard).write_bytes(before[:-100])
    place, given = (tmp_path, copy / dataset) if absolute else (copy, dataset)
    done = run_python("-m", "cxt.commands.dataset", "verify", given, cwd=place, check=False)
    assert "delete it and the dataset's dataset.json, then run" in done.stderr
    (copy / shard).unlink()
    (copy / dataset / "dataset.json").unlink()
    assert follow(done.stderr, cwd=place).returncode == 0
    assert (copy / shard).read_bytes() == before
    if absolute:  # as for a shard
        return
    before = (copy / batch).read_bytes()
    (copy / batch).write_bytes(before[:-100])
    with pytest.raises(BadRequest) as error, contextlib.chdir(copy):
        list(read_batch(batch, start=0, count=10))
    assert f"delete {batch}, then run" in str(error.value)
    (copy / batch).unlink()
    assert follow(str(error.value), cwd=copy).returncode == 0
    assert (copy / batch).stat().st_size == len(before)


@pytest.mark.long
def test_times_only_and_touch(copy, tmp_path, monkeypatch):
    """A result of another configuration is refused where Snakemake was told to take it as it is; the advice makes it again."""
    monkeypatch.chdir(copy)
    changed = overlay(tmp_path / "x.yaml", datasets={"processed_narrow": {"pairs": 5}})
    files = [TINY, changed]
    snakemake("results/narrow.ckpt", "--touch", cwd=copy, configfile=changed)
    assert planned(copy, "results/narrow.ckpt", configfile=changed) == {}
    with pytest.raises(Failed, match="does not match the configuration: .*` makes it again$") as error:
        verify("results/narrow.ckpt", configfiles=files)
    done = follow(str(error.value), cwd=copy, configfile=changed)
    assert done.returncode == 1
    log = (copy / "results/logs/train/narrow.log").read_text()
    assert (
        "the inputs of training are not the planned ones: dataset results/datasets/processed_narrow: its lineage must be" in log
    )
    assert follow(log, "--forceall", cwd=copy, configfile=changed).returncode == 0
    assert "lineage of 'narrow'" in verify("results/narrow.ckpt", configfiles=files)
    # Settings alone: what `verify` says is enough, after --touch, too.
    slower = overlay(tmp_path / "y.yaml", datasets={"processed_narrow": {"pairs": 5}}, training={"lr": 1e-3})
    snakemake("results/narrow.ckpt", "--touch", cwd=copy, configfile=slower)
    with pytest.raises(Failed) as error:
        verify("results/narrow.ckpt", configfiles=[TINY, slower])
    assert follow(str(error.value), cwd=copy, configfile=slower).returncode == 0
    assert "lineage of 'narrow'" in verify("results/narrow.ckpt", configfiles=[TINY, slower])
    # Times only: the checkpoint is gone, its dataset and settings are those of before.
    (copy / "results/narrow.ckpt").unlink()
    done = snakemake("results/narrow.ckpt", "--rerun-triggers", "mtime", cwd=copy, configfile=TINY, check=False)
    assert done.returncode == 1
    assert "must be" in (copy / "results/logs/train/narrow.log").read_text()


@pytest.mark.parametrize("profile", ["local", "slurm"])
def test_profiles_plan_the_chain(tmp_path, profile):
    done = run_python(
        "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", tmp_path, "--cores", "2", "-n",
        "--profile", REPOSITORY / "workflow" / "profiles" / profile, "--configfile", REPOSITORY / "config" / "paper.yaml",
        *(["--resources", "gpu=3"] if profile == "local" else []),
        env={"STDPOPSIM_CACHE": str(maps_taken_as_present(tmp_path / "cache"))},
    )  # fmt: skip
    text = done.stdout + done.stderr
    for model in MODELS:
        job = next(job for job in text.split("\n\n") if f"wildcards: model={model}\n" in job and "rule train:" in job)
        assert "gpu=3" in job


def test_the_catalogs_snakefile(tmp_path):
    done = run_python(
        "-m", "snakemake", "--snakefile", REPOSITORY / "workflow" / "Snakefile", "--directory", tmp_path, "--cores", "1",
        "-n", "results/narrow.ckpt", "--configfile", TINY,
    )  # fmt: skip
    assert "results/narrow.ckpt" in done.stdout + done.stderr


@pytest.mark.skipif(not Path("/proc").exists(), reason="kills a process group and all below it")
@pytest.mark.parametrize("moment", range(int(os.environ.get("CXT_KILLS", "2"))))
@pytest.mark.long
def test_killed_preprocessing_ends_the_same(workflow, tmp_path, moment):
    """`kill -9` of Snakemake and all its jobs; the next run finishes, and the dataset is the same to the byte."""
    directory = tmp_path / "killed"
    shutil.copytree(workflow, directory, symlinks=True)
    shutil.rmtree(directory / "results/datasets")
    shutil.rmtree(directory / "results/logs/preprocess")
    names = ["processed", "processed_n10", "processed_small_window_missing_data"]
    targets = [f"results/datasets/{name}/dataset.json" for name in names]
    command = [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--directory", directory]
    command += ["--cores", "2", "--configfile", TINY, "--", *targets]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    process = subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while process.poll() is None and not any((directory / "results/logs/preprocess").rglob("*.log")):
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    time.sleep(np.random.default_rng([7, moment]).uniform(0, 6))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = [path for name in names for path in (directory / "results/datasets" / name).rglob("*.zarr.zip")]
    for path in made:  # whatever has its final name is whole
        assert path.read_bytes() == (workflow / path.relative_to(directory)).read_bytes()
    snakemake("--unlock", cwd=directory)
    snakemake(*targets, cwd=directory)
    for name in names:
        files = [path for path in (workflow / "results/datasets" / name).rglob("*") if path.is_file()]
        assert len(files) >= 3
        for path in files:
            assert (directory / path.relative_to(workflow)).read_bytes() == path.read_bytes()
