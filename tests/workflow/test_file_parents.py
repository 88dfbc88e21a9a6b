"""Models that start from files in the workflow, and trainings that are prolonged: what is made, and what is made again."""

import re
import shutil

import pytest
import yaml
from helpers.published import write_published
from helpers.repository import TINY, run_python, snakemake

from cxt.checkpoints.file import import_published, read_checkpoint
from cxt.checkpoints.parents import read_parent_file
from cxt.config.file import load
from cxt.config.network import AdapterConfig, ModelConfig
from cxt.io import file_sha256
from cxt.workflow.lineages import model_lineage
from cxt.workflow.prolonging import find_run_to_prolong

NAMES = ["narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]
NETWORK = ModelConfig(layers=1, heads=2, width=16, windows=10)
MINE = {"preset": "broad", "dataset": "processed", "evaluation": ["constant"]}
STUDENT = {
    "preset": "broad", "dataset": "processed_n10", "evaluation": ["constant"], "training": {"objective": "distill"},
    "architecture": {"layers": 1, "heads": 2, "width": 16},
}  # fmt: skip
ADAPTER = {"preset": "broad", "dataset": "processed_n10", "evaluation": ["constant"]}


def configuration(path, models: dict):
    """tests/tiny.yaml with *models* only."""
    config = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(config | {"models": dict.fromkeys(NAMES) | models}), encoding="utf-8")
    return path


def planned(directory, configfile, *targets) -> set[str]:
    """Names of the rules that a dry run would run, without that which writes settings."""
    done = snakemake("-n", *targets, cwd=directory, configfile=configfile)
    text = done.stdout + done.stderr
    if "Nothing to be done" in text:
        return set()
    return set(re.findall(r"^(?:local)?rule (\w+):", text, flags=re.M)) - {"settings", "all"}


@pytest.mark.long
def test_from_files_to_evaluations(tmp_path):
    user, work = tmp_path / "user", tmp_path / "work"
    work.mkdir()
    write_published(user / "published" / "broad_epoch=1-step=5280.ckpt", NETWORK)
    write_published(user / "adapter.ckpt", NETWORK, AdapterConfig(samples=10, bottleneck=4))
    models = {
        "mine": MINE | {"checkpoint": "published/broad_epoch=1-step=5280.ckpt"},
        "child": MINE | {"checkpoint": "mine"},
        "mine_adapter": ADAPTER | {"resume_adapter": "adapter.ckpt"},
        "lora": MINE | {"lora_of": "published/broad_epoch=1-step=5280.ckpt", "lora": {"rank": 2}},
        "student": STUDENT | {"teacher": "published/broad_epoch=1-step=5280.ckpt"},
    }
    configfile = configuration(user / "x.yaml", models)
    done = snakemake("--show-failed-logs", cwd=work, configfile=configfile)
    assert "cxt: models.mine.checkpoint: " in done.stdout + done.stderr
    results, config = work / "results", load([configfile], read_parent=read_parent_file)
    digest = file_sha256(user / "published" / "broad_epoch=1-step=5280.ckpt")
    assert {path.stem for path in (results / "evaluation").glob("*.json")} == set(models)
    assert {path.name for path in (results / "parents").iterdir()} == {
        f"narrow-{digest[:12]}.ckpt", f"narrow_adapter-{file_sha256(user / 'adapter.ckpt')[:12]}.ckpt",
    }  # fmt: skip
    checkpoint = read_checkpoint(results / "mine.ckpt")
    assert checkpoint.record["lineage"] == model_lineage(config, "mine")
    assert checkpoint.record["parent"]["published"] == digest
    assert checkpoint.model.start_token_in_prefix
    assert read_checkpoint(results / "student.ckpt").record["teacher"]["published"] == digest
    assert list((results / "soft_targets" / "student").rglob("*.npz"))
    assert read_checkpoint(results / "mine_adapter.ckpt").adapter.overwrite_bin0
    shown = run_python("-m", "cxt", "checkpoint", "show", "mine", cwd=work).stdout
    assert f"imported from the published file {digest}" in shown
    verified = run_python("-m", "cxt", "checkpoint", "verify", "--dir", "results", "--configfile", configfile, cwd=work).stdout
    assert len(verified.splitlines()) == 5
    assert "; its parent is " in verified
    assert planned(work, configfile) == set()
    # The same bytes in another place, by another name.
    shutil.move(user / "published" / "broad_epoch=1-step=5280.ckpt", user / "moved.ckpt")
    for name, key in (("mine", "checkpoint"), ("lora", "lora_of"), ("student", "teacher")):
        models[name] |= {key: "moved.ckpt"}
    assert planned(work, configuration(user / "x.yaml", models)) == set()
    # Other bytes in the same place.
    write_published(user / "moved.ckpt", NETWORK, seed=2)
    assert planned(work, configfile, "results/child.ckpt") == {"import_parent", "train"}
    assert planned(work, configfile, "results/student.ckpt") == {"import_parent", "teach", "train"}
    snakemake("--show-failed-logs", "results/mine.ckpt", cwd=work, configfile=configfile)
    again = read_checkpoint(results / "mine.ckpt").record["parent"]
    assert again["published"] == file_sha256(user / "moved.ckpt") != digest
    # A checkpoint of cxt, whose copy is byte for byte.
    import_published(user / "moved.ckpt", user / "own.ckpt", name="own")
    models = {"mine": MINE | {"checkpoint": "own.ckpt"}}
    own = configuration(user / "own.yaml", models)
    snakemake("--show-failed-logs", "results/mine.ckpt", cwd=work, configfile=own)
    assert read_checkpoint(results / "mine.ckpt").record["parent"]["sha256"] == file_sha256(user / "own.ckpt")
    # What is wrong ends the plan.
    configuration(user / "own.yaml", {"mine": MINE | {"checkpoint": "gone.ckpt"}})
    done = snakemake("-n", cwd=work, configfile=own, check=False)
    assert done.returncode == 2
    assert f"cxt: models.mine.checkpoint: there is no checkpoint {user / 'gone.ckpt'}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_more_epochs_continue_a_finished_training(tmp_path):
    """The checkpoint is that of a workflow that was configured so from the start, byte for byte."""

    def write(name, *, epochs, **more):
        training = {"epochs": epochs, "schedule": "constant", "warmup_steps": 3} | more
        architecture = {"layers": 1, "heads": 2, "width": 16}
        return configuration(tmp_path / name, {"broad": MINE | {"architecture": architecture, "training": training}})

    one, two, other = write("1.yaml", epochs=1), write("2.yaml", epochs=2), write("other.yaml", epochs=3, lr=0.001)
    target = "results/broad.ckpt"
    prolonged, fresh = tmp_path / "prolonged", tmp_path / "fresh"
    prolonged.mkdir()
    snakemake("--show-failed-logs", target, cwd=prolonged, configfile=one)
    shutil.copytree(prolonged, fresh, symlinks=True)
    shutil.rmtree(fresh / "results" / "runs")
    for directory in (prolonged, fresh):
        snakemake("--show-failed-logs", target, cwd=directory, configfile=two)
    log = (prolonged / "results" / "logs" / "train" / "broad.log").read_text(encoding="utf-8")
    assert "from step 27 of it to step 54" in log
    assert "prolonging" not in (fresh / "results" / "logs" / "train" / "broad.log").read_text(encoding="utf-8")
    assert file_sha256(prolonged / target) == file_sha256(fresh / target)
    assert read_checkpoint(prolonged / target).record["lineage"] == model_lineage(load([two]), "broad")
    assert planned(prolonged, two, target) == set()
    # The run of one epoch is there still, so that switching back only publishes it.
    snakemake("--show-failed-logs", target, cwd=prolonged, configfile=one)
    assert read_checkpoint(prolonged / target).record["lineage"] == model_lineage(load([one]), "broad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prolonged)
        assert find_run_to_prolong(load([write("3.yaml", epochs=3)]), "broad").endswith(model_lineage(load([two]), "broad"))
        assert find_run_to_prolong(load([two]), "broad") is None  # begun
        assert find_run_to_prolong(load([other]), "broad") is None
        (prolonged / "results" / "runs" / f"broad-{model_lineage(load([two]), 'broad')}" / "run.json").write_text("{")
        assert find_run_to_prolong(load([tmp_path / "3.yaml"]), "broad").endswith(model_lineage(load([one]), "broad"))
