"""Every stage's output says what it was made for, and every stage refuses inputs that are not the ones planned."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.repository import TINY, locking_process
from helpers.training import SMALL, train
from lightning_fabric.plugins.environments import SLURMEnvironment

from cxt import evaluate as evaluate_stage
from cxt import preprocess as preprocess_stage
from cxt import simulate as simulate_stage
from cxt import train as train_stage
from cxt.checkpoints.file import read_checkpoint, write_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.config.file import load
from cxt.data.manifest import plan_shards, read_manifest
from cxt.data.masks import read_mask, write_mask
from cxt.data.shards import read_shard
from cxt.errors import BadRequest, Failed
from cxt.evaluation.table import combine_evaluation_lineages
from cxt.io import canonical_json, file_sha256
from cxt.scenarios.batches import read_batch
from cxt.scenarios.indices import SPLITS
from cxt.trainer.fit import quieten
from cxt.workflow import jobs, lineages, paths
from cxt.workflow.settings import neutral_training_flags, write_settings
from cxt.workflow.verification import verify

OTHERS = ["broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]
FEW = {
    "scenarios": {
        "constant": {"simulations": 12, "sequence_length": 4000, "batch": 10, "individuals": 5},
        "stdpopsim_papanu": None,
    },
    "scenario_sets": {"all": None, "high_ne": None},
    "datasets": {
        "processed_narrow": {"sequence_length": 4000, "samples": 8, "pairs": 4, "mask": {"length": 20000}},
        "processed": None,
        "processed_n10": None,
        "processed_small_window": None,
        "processed_small_window_missing_data": None,
        "processed_small_window_missing_data_n10": None,
    },
    "models": {"narrow": {"preset": "w200_wmissing"}} | dict.fromkeys(OTHERS),
    "evaluation": {"simulations": 2, "simulations_of": {"constant": 2}},
}


def configuration(path, **scenario) -> dict:
    """The tiny configuration with one small masked dataset, and changes of its scenario."""
    scenarios = FEW["scenarios"] | {"constant": FEW["scenarios"]["constant"] | scenario}
    path.write_text(yaml.safe_dump(FEW | {"scenarios": scenarios}))
    return load([TINY, path])


def call(stage, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["it", *map(str, arguments)])
        stage.main()


def settings_file(config, kind, name):
    """What the rule `settings` writes."""
    path = Path(paths.settings_path(kind, name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_settings(config, kind, name))
    return path


def simulate_batch(config, start=0):
    """What the rule `simulate` runs."""
    variant = jobs.find_variant(config, "constant")
    count = jobs.batch_count(config, variant, start)
    call(
        simulate_stage, "--config", settings_file(config, "simulations", "constant"), "--start", start, "--count", count,
        "--lineage", lineages.batch_lineage(config, variant, start, count), "--out", paths.batch_path("constant", start),
    )  # fmt: skip


def preprocess_mask(config):
    """What the rule `synthetic_mask` runs."""
    call(
        preprocess_stage, "mask", "--config", settings_file(config, "masks", "processed_narrow"),
        "--lineage", lineages.mask_lineage(config, "processed_narrow"), "--out", paths.mask_path(config, "processed_narrow"),
    )  # fmt: skip


def preprocess(config, start=0, *, settings=None):
    """What the rule `preprocess` runs; *settings*: of another configuration."""
    variant = jobs.find_variant(config, "constant")
    count = jobs.batch_count(config, variant, start)
    shards = [f"--{split}=results/datasets/processed_narrow/{split}/constant-{start}.zarr.zip" for split in SPLITS]
    call(
        preprocess_stage, "shard", "--config", settings or settings_file(config, "datasets", "processed_narrow"),
        "--batch", paths.batch_path("constant", start), "--scenario", "constant", "--start", start, "--count", count,
        "--mask", paths.mask_path(config, "processed_narrow"),
        "--batch-lineage", lineages.batch_lineage(config, variant, start, count),
        "--lineage", lineages.shard_lineage(config, "processed_narrow", variant, start), *shards,
    )  # fmt: skip


def list_shards(config):
    """What the rule `manifest` runs."""
    call(
        preprocess_stage, "manifest", "--config", settings_file(config, "shards", "processed_narrow"),
        "--dataset", "results/datasets/processed_narrow", "--lineage", lineages.dataset_lineage(config, "processed_narrow"),
    )  # fmt: skip


def make_dataset(config):
    for start in (0, 10):
        simulate_batch(config, start)
    preprocess_mask(config)
    for start in (0, 10):
        preprocess(config, start)
    list_shards(config)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a dataset made as the rules make it."""
    directory = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        make_dataset(configuration(directory / "a.yaml"))
    return directory


@pytest.fixture
def workspace(made, tmp_path, monkeypatch):
    """A copy of it to work in."""
    directory = shutil.copytree(made, tmp_path / "there")
    monkeypatch.chdir(directory)
    return directory


def test_outputs_carry_their_lineage(workspace):
    config = configuration(workspace / "a.yaml")
    variant = jobs.find_variant(config, "constant")
    path = paths.batch_path("constant", 10)
    planned = lineages.batch_lineage(config, variant, 10, 2)
    stored = [ts.metadata["cxt"]["lineage"] for ts in read_batch(path, start=10, count=2, lineage=planned)]
    assert stored == [planned] * 2
    with np.load("results/masks/processed_narrow.npz") as arrays:
        assert str(arrays["lineage"]) == lineages.mask_lineage(config, "processed_narrow")
    for split, start in (("train", 0), ("test", 10)):
        _, attributes = read_shard(f"results/datasets/processed_narrow/{split}/constant-{start}.zarr.zip")
        assert attributes["lineage"] == lineages.shard_lineage(config, "processed_narrow", variant, start)
    manifest = read_manifest("results/datasets/processed_narrow")
    assert manifest["lineage"] == lineages.dataset_lineage(config, "processed_narrow")
    # By hand, of the shards that are there: the same.
    call(preprocess_stage, "manifest", "--dataset", "results/datasets/processed_narrow")
    assert read_manifest("results/datasets/processed_narrow") == manifest


def test_a_configuration_edited_while_jobs_are_queued(workspace):
    """Each job of the edited configuration refuses what a job of the one before has made, and leaves no output."""
    before = configuration(workspace / "a.yaml")
    edited = configuration(workspace / "b.yaml", population_size=5000)
    simulate_batch(edited, 10)
    shard = workspace / "results/datasets/processed_narrow/train/constant-0.zarr.zip"
    shard.unlink()
    with pytest.raises(
        BadRequest, match=r"batch results/simulations/constant/0.trees.batch is not the planned one.*its lineage must"
    ):
        preprocess(edited, 0)
    assert not shard.exists()
    preprocess(before, 0)
    # One shard of another configuration among the others: neither of the two makes a manifest of them.
    preprocess(edited, 10)
    for config in (before, edited):
        advice = "snakemake --cores 2 results/datasets/"
        with pytest.raises(BadRequest, match=f"a shard of 'constant' is not the planned one.*{advice}"):
            list_shards(config)


def test_growth_keeps_full_batches(workspace):
    """A batch and a shard do not depend on how many others there are."""
    more = configuration(workspace / "b.yaml", simulations=20)
    preprocess(more, 0)
    with pytest.raises(BadRequest, match="holds|truncated|is not the planned one"):
        preprocess(more, 10)


def test_made_by_hand(workspace):
    """Files without a lineage are refused where one is planned, and are good for whoever plans none."""
    config = configuration(workspace / "a.yaml")
    variant = jobs.find_variant(config, "constant")
    path = paths.batch_path("constant", 0)
    call(simulate_stage, "--spec", canonical_json(variant.spec), "--count", 10, "--seed", 1, "--out", path)
    with pytest.raises(BadRequest, match="its lineage must be .*, but it has none"):
        preprocess(config, 0)
    words = [
        "--batch",
        path,
        "--start",
        0,
        "--count",
        10,
        "--spec",
        canonical_json(jobs.dataset_spec(config, "processed_narrow")),
    ]
    shards = [f"--{split}=data/{split}/constant-0.zarr.zip" for split in SPLITS]
    call(preprocess_stage, "shard", *words, *shards)
    call(preprocess_stage, "manifest", "--dataset", "data")
    assert "lineage" not in read_manifest("data")


def test_masks(workspace):
    config = configuration(workspace / "a.yaml")
    path = "results/masks/processed_narrow.npz"
    mask = read_mask(path)
    write_mask(path, ~mask, lineage="0123456789ab")
    with pytest.raises(BadRequest, match="mask .* its lineage must be .*, got 0123456789ab"):
        preprocess(config, 0)
    # A file of the user's, in place of the synthetic one.
    write_mask("mine.npz", mask)
    overlay = yaml.safe_load((workspace / "a.yaml").read_text())
    overlay["datasets"]["processed_narrow"]["mask"] = {"path": "mine.npz"}
    (workspace / "c.yaml").write_text(yaml.safe_dump(overlay))
    config = load([TINY, workspace / "c.yaml"])
    assert file_sha256("mine.npz") in settings_file(config, "datasets", "processed_narrow").read_text()
    preprocess(config, 0)
    write_mask("mine.npz", ~mask)
    with pytest.raises(BadRequest, match="mask mine.npz was changed since this job was planned"):
        preprocess(config, 0)
    (workspace / "mine.npz").rename("other.npz")
    with pytest.raises(BadRequest, match="mask mine.npz cannot be read"):
        preprocess(config, 0)


def test_settings_of_another_configuration(workspace):
    """The configuration is edited while a job waits: Snakemake reads it anew, the settings file is the planned one."""
    planned = configuration(workspace / "a.yaml")
    files = {
        kind: settings_file(planned, kind, name)
        for kind, name in (
            ("simulations", "constant"),
            ("masks", "processed_narrow"),
            ("datasets", "processed_narrow"),
            ("shards", "processed_narrow"),
            ("evaluations", "narrow"),
        )
    }
    before = {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}
    edited = configuration(workspace / "b.yaml", population_size=5000)
    edited["datasets"]["processed_narrow"]["mask"] |= {"length": 9000}
    variant = jobs.find_variant(edited, "constant")
    refusal = "The configuration was changed after this job was planned"
    words = ["--start", 0, "--count", 10, "--lineage", lineages.batch_lineage(edited, variant, 0, 10)]
    with pytest.raises(BadRequest, match=refusal):
        call(simulate_stage, "--config", files["simulations"], *words, "--out", paths.batch_path("constant", 0))
    words = ["--lineage", lineages.mask_lineage(edited, "processed_narrow"), "--out", "results/masks/processed_narrow.npz"]
    with pytest.raises(BadRequest, match=refusal):
        call(preprocess_stage, "mask", "--config", files["masks"], *words)
    # Only the dataset was edited: the batch is the planned one.
    pairs = configuration(workspace / "a.yaml")
    pairs["datasets"]["processed_narrow"] |= {"pairs": 3}
    pairs["evaluation"] |= {"replicates": 7}
    with pytest.raises(BadRequest, match=refusal):
        preprocess(pairs, 0, settings=files["datasets"])
    words = ["--dataset", "results/datasets/processed_narrow", "--lineage", lineages.dataset_lineage(pairs, "processed_narrow")]
    with pytest.raises(BadRequest, match=refusal):
        call(preprocess_stage, "manifest", "--config", files["shards"], *words)
    words = ["--checkpoint", "none.ckpt", "--checkpoint-lineage", lineages.model_lineage(pairs, "narrow")]
    words += ["--lineage", lineages.evaluation_lineage(pairs, "narrow"), "--out", "e.json", "--figures", "e"]
    with pytest.raises(BadRequest, match=refusal):
        call(evaluate_stage, "--config", files["evaluations"], *words)
    assert {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()} == before


def test_a_settings_file_with_an_unknown_key(tmp_path):
    (tmp_path / "x.yaml").write_text("spce: {}\n")
    for words in (["--config", tmp_path / "x.yaml"], [f"--config={tmp_path / 'x.yaml'}"]):
        with pytest.raises(BadRequest, match="x.yaml: unknown key 'spce'; did you mean 'spec'"):
            call(simulate_stage, *words, "--count", 1, "--out", tmp_path / "x.trees.batch")
    with pytest.raises(BadRequest, match="--config needs a YAML file"):
        call(simulate_stage, "--count", 1, "--out", tmp_path / "x.trees.batch", "--config")


NARROW = [
    "--model", "w200_wmissing", "--layers", 1, "--heads", 2, "--width", 16, "--batch-size", 4, "--devices", 0, "--threads", 1,
    "--epochs", 1, "--dataset-path", "results/datasets/processed_narrow",
]  # fmt: skip


def test_the_trainer(workspace, monkeypatch):
    config = configuration(workspace / "a.yaml")
    planned = lineages.dataset_lineage(config, "processed_narrow")
    with pytest.raises(
        BadRequest, match=rf"the inputs of training are not the planned ones: dataset .* its lineage must be 1, got {planned}"
    ):
        train(monkeypatch, *NARROW, "--dataset-lineage", "1", "--run-dir", "run", "--out", "results/x.ckpt")
    (workspace / "settings.yaml").write_text("settings_lineage: '2'\n")
    settings = ["--config", "settings.yaml", "--lineage", "3", "--dataset-lineage", planned]
    with pytest.raises(
        BadRequest, match=r"the settings of .*: its lineage must be 3, got 2; run `snakemake --cores 2 results/x"
    ):
        train(monkeypatch, *settings, *NARROW, "--run-dir", "run", "--out", "results/x.ckpt")
    assert not (workspace / "run").exists()
    (workspace / "settings.yaml").write_text("settings_lineage: '3'\n")
    train(monkeypatch, *settings, *NARROW, "--run-dir", "run", "--out", "results/x.ckpt")
    record = read_checkpoint("results/x.ckpt").record
    assert (record["lineage"], record["dataset"]["lineage"], record["parent"]) == ("3", planned, None)
    child = [*NARROW, "--checkpoint", "results/x.ckpt", "--run-dir", "child", "--out", "results/y.ckpt"]
    with pytest.raises(BadRequest, match=r"parent results/x.ckpt: its lineage must be 4, got 3"):
        train(monkeypatch, *child, "--parent-lineage", "4")
    train(monkeypatch, *child, "--parent-lineage", "3")
    assert read_checkpoint("results/y.ckpt").record["parent"]["lineage"] == "3"
    # None of this is a setting of the run.
    written = yaml.safe_load((workspace / "child/config.yaml").read_text())
    assert not [key for key in written if "lineage" in key or "lock" in key]


def test_verify_and_evaluation(workspace, monkeypatch):
    """`verify` compares what a checkpoint was really trained on; evaluation and its table what they are given."""
    config = configuration(workspace / "a.yaml")
    lineage = lineages.model_lineage(config, "narrow")
    files = [TINY, workspace / "a.yaml"]
    train(
        monkeypatch, "--config", settings_file(config, "models", "narrow"), "--dataset-path",
        "results/datasets/processed_narrow", *neutral_training_flags(config, "narrow"),
        "--lineage", lineage, "--run-dir", "run", "--out", "results/narrow.ckpt",
    )  # fmt: skip
    assert "the lineage of 'narrow'" in verify("results/narrow.ckpt", configfiles=files)
    content = read_checkpoint("results/narrow.ckpt")
    for change, message in (
        ({"dataset": content.record["dataset"] | {"lineage": "5"}}, "dataset 5 instead of"),
        ({"dataset": {k: v for k, v in content.record["dataset"].items() if k != "lineage"}}, "dataset None instead of"),
        ({"parent": {"name": "x", "lineage": "6", "sha256": "7"}}, "parent 6 instead of None"),
        ({"devices": 3}, "devices 3 cpu, effective batch 12 instead of 1 cpu, effective batch 4"),
        ({"training": content.record["training"] | {"grad_accum": 2}}, "1 cpu, effective batch 8 instead of"),
        ({"lineage": "8"}, "its lineage is 8"),
    ):
        write_checkpoint("other.ckpt", content.state_dict, content.record | change)
        with pytest.raises(Failed, match=message) as error:
            verify("other.ckpt", configfiles=files)
        assert "results/narrow.ckpt --forcerun results/settings/models/narrow.yaml results/narrow.ckpt --configfile" in str(
            error.value
        )
    start = 1_000_000_000
    simulate_batch(config, start)
    batches = lineages.evaluation_batches(config, "narrow")
    words = [
        "--config", settings_file(config, "evaluations", "narrow"), "--out", "results/evaluation/narrow.json",
        "--figures", "results/evaluation/narrow", "--simulations", "results/simulations",
        "--mask", "results/masks/processed_narrow.npz",
        "--lineage", lineages.evaluation_lineage(config, "narrow"), "--checkpoint-lineage", lineage,
    ]  # fmt: skip
    with pytest.raises(BadRequest, match="checkpoint other.ckpt is not the planned one"):
        call(evaluate_stage, *words, "--checkpoint", "other.ckpt")
    stale = ["--batches", canonical_json([batch | {"lineage": "9"} for batch in batches])]
    with pytest.raises(BadRequest, match="but the present configuration plans"):
        call(evaluate_stage, *words, "--checkpoint", "results/narrow.ckpt", *stale)
    with pytest.raises(BadRequest, match=f"batch results/simulations/constant/{start}.* must be 9, got"):
        call(evaluate_stage, *words[:-4], "--checkpoint", "results/narrow.ckpt", *stale)
    call(evaluate_stage, *words, "--checkpoint", "results/narrow.ckpt")
    result = json.loads((workspace / "results/evaluation/narrow.json").read_text())
    assert (result["lineage"], result["checkpoint_lineage"]) == (lineages.evaluation_lineage(config, "narrow"), lineage)
    assert result["device"] == "cpu"
    table = ["--table", "results/evaluation/narrow.json", "--out", "results/evaluation/table.md"]
    call(evaluate_stage, *table, "--lineage", combine_evaluation_lineages([result["lineage"]]))
    with pytest.raises(BadRequest, match=r"an evaluation of this table .*snakemake --cores 2 results/evaluation/table.md"):
        call(evaluate_stage, *table, "--lineage", combine_evaluation_lineages(["5"]))


def test_a_finished_run_on_other_devices_is_another_run(dataset, tmp_path, monkeypatch, capsys):
    """It was published under the lineage of more devices than it was trained on."""
    arguments = [*SMALL, "--dataset-path", dataset, "--epochs", 1, "--run-dir", tmp_path / "run", "--out", tmp_path / "x.ckpt"]
    train(monkeypatch, *arguments)
    path = tmp_path / "run/run.json"
    state = json.loads(path.read_text())
    state["identity"]["devices"] = "3 gpu"
    path.write_text(json.dumps(state))
    capsys.readouterr()
    train(monkeypatch, *arguments)
    output = capsys.readouterr().out
    assert "starting afresh (the old run has devices 3 gpu instead of 1 cpu)" in output
    assert "is finished: publishing" not in output


def test_more_devices_than_there_are(monkeypatch, dataset):
    words = [*SMALL, "--dataset-path", dataset, "--grad-accum", 2, "--devices"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        BadRequest, match=r"--devices 3, but torch sees 1 GPU; use --devices 1 with --grad-accum 6, which keeps"
    ):
        train(monkeypatch, *words, 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(
        BadRequest, match=r"--devices 5, but torch sees 2 GPUs; use --devices 2 with --grad-accum 5, which keeps"
    ):
        train(monkeypatch, *words, 5)
    at = words.index("--devices")
    words = [*words[:at], *words[at + 2 : -1], "--gpus"]
    with pytest.raises(BadRequest, match=r"--gpus 2, but torch sees 2 GPUs; their indices are 0 to 1"):
        train(monkeypatch, *words, 2)


def test_waiting_for_a_lock(dataset, tmp_path, monkeypatch, capsys):
    """A next try begins while the one before is still saving."""
    run = RunDirectory(tmp_path / "run")
    held = locking_process(run.path)
    arguments = [*SMALL, "--dataset-path", dataset, "--epochs", 1, "--run-dir", run.path]
    with pytest.raises(BadRequest, match="is in use by process"):
        train(monkeypatch, *arguments)
    with pytest.raises(BadRequest, match="--wait-for-lock must be a non-negative number, got -1"):
        train(monkeypatch, *arguments, "--wait-for-lock", -1)
    monkeypatch.setattr(train_stage.time, "sleep", lambda _: held.communicate("\n"))
    train(monkeypatch, *arguments, "--wait-for-lock", 10)
    assert "waiting for it" in capsys.readouterr().out
    assert run.finished_checkpoint() is not None


def test_srun_is_not_spoken_of(tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SLURMEnvironment.detect()
        assert len(caught) == 1
        quieten()
        SLURMEnvironment.detect()
        assert len(caught) == 1


def test_planned_shards_take_lineages():
    assert plan_shards({"a": (10, 10, "x")}) == plan_shards({"a": (10, 10)})
