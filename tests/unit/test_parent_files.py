"""Models whose parent is a checkpoint file: what they inherit, what is part of their lineage, and what is refused."""

import re
import shutil

import pytest
import yaml
from helpers.published import write_published
from helpers.repository import TINY
from helpers.training import objective_record

from cxt import train as train_stage
from cxt.checkpoints.file import import_published, read_checkpoint, write_checkpoint
from cxt.checkpoints.inspection import describe_checkpoint
from cxt.checkpoints.lora import find_base
from cxt.checkpoints.parents import import_parent, read_parent_file
from cxt.checkpoints.quantized import quantize_checkpoint
from cxt.checkpoints.safetensors import write_export
from cxt.config.file import load
from cxt.config.models import (
    build_adapter_config,
    build_network_config,
    build_training_settings,
    count_teacher_samples,
    get_parent_file,
    list_needed,
    trace_parents,
)
from cxt.config.network import AdapterConfig, ModelConfig
from cxt.errors import BadRequest
from cxt.io import file_sha256
from cxt.workflow import paths
from cxt.workflow.costs import Costs
from cxt.workflow.estimates import estimate_costs, format_estimate
from cxt.workflow.lineages import model_lineage
from cxt.workflow.settings import write_settings

NETWORK = ModelConfig(layers=2, heads=2, width=16, windows=10, dropout=0.2)
NAMES = ["narrow", "broad", "broad_w200", "broad_adapter", "w200_wmissing", "w200_wmissing_adapter"]
MINE = {"preset": "broad", "dataset": "processed"}
N10 = {"preset": "broad", "dataset": "processed_n10"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Published files, plain and with an adapter, an import of the first, and what cannot be a parent."""
    directory = tmp_path_factory.mktemp("files")
    plain = write_published(directory / "broad_epoch=1-step=5280.ckpt", NETWORK)
    write_published(directory / "adapter.ckpt", NETWORK, AdapterConfig(samples=10, bottleneck=4, dropout=0.1))
    write_published(directory / "deep.ckpt", NETWORK.replace(layers=3))
    import_published(plain, directory / "imported.ckpt", name="mine")
    checkpoint = read_checkpoint(plain)
    write_export(directory / "exported", checkpoint.state_dict, checkpoint.record)
    write_published(directory / "wide.ckpt", NETWORK.replace(window_size=1000, windows=20))
    write_published(directory / "missing.ckpt", NETWORK.replace(mask_singletons=False))
    imported = read_checkpoint(directory / "imported.ckpt")
    write_checkpoint(directory / "masked.ckpt", imported.state_dict, imported.record | objective_record("masked"))
    quantize_checkpoint(directory / "imported.ckpt", directory / "int8.ckpt")
    (directory / "text.ckpt").write_text("no checkpoint")
    return directory


def read(directory, models: dict, **sections) -> dict:
    """The tiny configuration with *models* only, in a file of *directory*."""
    config = yaml.safe_load(TINY.read_text(encoding="utf-8")) | sections
    path = directory / "x.yaml"
    path.write_text(yaml.safe_dump(config | {"models": dict.fromkeys(NAMES) | models}), encoding="utf-8")
    return load([path], read_parent=read_parent_file)


def test_what_is_inherited(files):
    models = {
        "child": MINE | {"checkpoint": "broad_epoch=1-step=5280.ckpt"},
        "grandchild": MINE | {"checkpoint": "child"},
        "other": MINE | {"checkpoint": "imported.ckpt", "architecture": {"start_token_in_prefix": False, "dropout": 0.0}},
        "adapter": N10 | {"checkpoint": "broad_epoch=1-step=5280.ckpt", "adapter": {"bottleneck": 6}},
        "again": N10 | {"resume_adapter": "./adapter.ckpt"},
    }
    config = read(files, models)
    assert trace_parents(config, "grandchild") == ["grandchild", "child"]
    for name in models:
        network = build_network_config(config, name)
        assert (network.layers, network.width, network.samples, network.windows) == (2, 16, 50, 10)
        assert (network.start_token_in_prefix, network.dropout) == ((False, 0.0) if name == "other" else (True, 0.2))
    assert build_adapter_config(config, "child") is None
    assert build_adapter_config(config, "adapter") == AdapterConfig(samples=10, bottleneck=6)
    assert build_adapter_config(config, "again") == AdapterConfig(samples=10, bottleneck=4, dropout=0.1, overwrite_bin0=True)
    assert build_training_settings(config, "again")["overwrite_bin0"]
    digest = file_sha256(files / "broad_epoch=1-step=5280.ckpt")
    assert paths.parent_path(config, "child") == f"results/parents/narrow-{digest[:12]}.ckpt"
    assert paths.parent_path(config, "other").startswith("results/parents/mine-")
    assert paths.parent_path(config, "again").startswith("results/parents/narrow_adapter-")
    assert paths.parent_path(config, "grandchild") == "results/child.ckpt"
    assert yaml.safe_load(write_settings(config, "models", "child"))["parent_sha256"] == digest
    assert yaml.safe_load(write_settings(config, "models", "grandchild"))["parent_lineage"] == model_lineage(config, "child")
    planned = estimate_costs(config, Costs([]))
    assert planned["models"]["child"]["parent_file"]["sha256"] == digest
    assert "parent_file" not in planned["models"]["grandchild"]
    text = format_estimate(config, planned, Costs([]))
    assert "broad_epoch=1-step=5280.ckpt (published 'narrow': 2 blocks of width 16, 10 windows of 2000 bp" in text


def test_lineage_is_of_the_bytes(files, tmp_path):
    """Another place or another name is the same parent; other bytes are another one."""
    (tmp_path / "sub").mkdir()
    shutil.copy(files / "imported.ckpt", tmp_path / "a.ckpt")
    shutil.copy(files / "imported.ckpt", tmp_path / "sub" / "b.ckpt")
    first = read(tmp_path, {"x": MINE | {"checkpoint": "a.ckpt"}})
    second = read(tmp_path, {"x": MINE | {"checkpoint": "sub/b.ckpt"}})
    absolute = read(tmp_path, {"x": MINE | {"checkpoint": str(tmp_path / "a.ckpt")}})
    lora = read(tmp_path, {"x": MINE | {"lora_of": "a.ckpt", "lora": {}}})
    assert model_lineage(first, "x") == model_lineage(second, "x") == model_lineage(absolute, "x")
    assert paths.parent_sources(first).keys() == paths.parent_sources(second).keys()
    assert write_settings(first, "models", "x") == write_settings(second, "models", "x")
    write_checkpoint(tmp_path / "a.ckpt", *read_other(files))
    third = read(tmp_path, {"x": MINE | {"checkpoint": "a.ckpt"}})
    lineages = {model_lineage(config, "x") for config in (first, third, lora, read(tmp_path, {"x": MINE}))}
    assert len(lineages) == 4


def read_other(files):
    """Weights and record of the imported file with other weights."""
    checkpoint = read_checkpoint(files / "imported.ckpt")
    return {key: value + 1 for key, value in checkpoint.state_dict.items()}, checkpoint.record


DISTILL = {"training": {"objective": "distill"}}


def test_a_file_as_teacher(files, tmp_path):
    """Its bytes are in the lineages of soft targets and student, and its copy is what teaches."""
    shutil.copy(files / "imported.ckpt", tmp_path / "a.ckpt")
    student = N10 | {"teacher": "a.ckpt"} | DISTILL
    config = read(tmp_path, {"x": student, "y": MINE | {"checkpoint": "./a.ckpt"}})
    digest = file_sha256(tmp_path / "a.ckpt")
    assert list_needed(config["models"]["x"]) == []
    assert paths.teacher_path(config, "x") == paths.parent_path(config, "y") == f"results/parents/mine-{digest[:12]}.ckpt"
    assert paths.parent_path(config, "x") is None
    assert count_teacher_samples(config, "x") == 50
    assert yaml.safe_load(write_settings(config, "teachings", "x"))["checkpoint_sha256"] == digest
    planned = estimate_costs(config, Costs([]))
    text = format_estimate(config, planned, Costs([]))
    assert re.search(r"x learns from \S*a\.ckpt \('mine': 2 blocks of width 16", text)
    assert "y starts from " in text
    plain = estimate_costs(read(tmp_path, {"x": N10 | {"training": {"objective": "marginal"}}}), Costs([]))["models"]["x"]
    assert planned["models"]["x"]["core_hours"] > plain["core_hours"]
    shutil.move(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    moved = read(tmp_path, {"x": student | {"teacher": "b.ckpt"}})
    assert model_lineage(moved, "x") == model_lineage(config, "x")
    write_checkpoint(tmp_path / "b.ckpt", *read_other(files))
    other = read(tmp_path, {"x": student | {"teacher": "b.ckpt"}})
    assert model_lineage(other, "x") != model_lineage(config, "x")


def test_without_files_nothing_is_added():
    assert "parent_files" not in load([TINY])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MINE | {"checkpoint": "gone.ckpt"}, r"models\.x\.checkpoint: there is no checkpoint .*gone\.ckpt"),
        (MINE | {"checkpoint": "text.ckpt"}, r"models\.x\.checkpoint: checkpoint .*text\.ckpt cannot be read"),
        (MINE | {"checkpoint": "int8.ckpt"}, r"models\.x\.checkpoint: .*int8\.ckpt is quantised"),
        (MINE | {"checkpoint": "./exported"}, r"models\.x\.checkpoint: .*exported is an exported directory"),
        (N10 | {"checkpoint": "adapter.ckpt"}, r"models\.x\.checkpoint: .*is an adapter model; use `resume_adapter: "),
        (N10 | {"resume_adapter": "imported.ckpt"}, r"models\.x\.resume_adapter: .*has no adapter; use `checkpoint: "),
        (MINE | {"lora_of": "adapter.ckpt", "lora": {}}, r"models\.x\.lora_of: .*adapter model, which cannot be the base"),
        (MINE | {"lora_of": "imported.ckpt"}, r"models\.x\.lora_of: it needs `lora`"),
        (N10 | {"checkpoint": "imported.ckpt"}, r"models\.x\.checkpoint: .*10 samples, .*imported\.ckpt' takes 50"),
        (
            {"preset": "w200_wmissing", "dataset": "processed_small_window_missing_data", "checkpoint": "imported.ckpt"},
            r"",
        ),
        (
            MINE | {"checkpoint": "imported.ckpt", "architecture": {"layers": 3}},
            r"models\.x\.checkpoint: layers is 3, but its parent '.*imported\.ckpt' has 2",
        ),
        (N10 | {"resume_adapter": "adapter.ckpt", "adapter": {}}, r"models\.x\.adapter\.bottleneck: 32, but .*has 4; omit"),
        (MINE | {"checkpoint": "results/y.ckpt"}, r"models\.x\.checkpoint: results/y\.ckpt is made by this .*`checkpoint: y`"),
        (MINE | DISTILL | {"teacher": "gone.ckpt"}, r"models\.x\.teacher: there is no checkpoint .*gone\.ckpt"),
        (MINE | DISTILL | {"teacher": "int8.ckpt"}, r"models\.x\.teacher: .*int8\.ckpt is quantised"),
        (MINE | DISTILL | {"teacher": "results/y.ckpt"}, r"models\.x\.teacher: .* name the model: `teacher: y`"),
        (MINE | DISTILL | {"teacher": "adapter.ckpt"}, r"models\.x\.teacher: .* reads 10 haplotypes, fewer than the 50 of"),
        (MINE | DISTILL | {"teacher": "wide.ckpt"}, r"models\.x\.teacher: .*trained with window_size 1000, but .* has 2000"),
        (MINE | DISTILL | {"teacher": "missing.ckpt"}, r"models\.x\.teacher: .*was trained with missingness, unlike dataset"),
        (MINE | DISTILL | {"teacher": "masked.ckpt"}, r"models\.x\.teacher: .*its objective masked predicts no times"),
        (MINE | {"teacher": "imported.ckpt"}, r"a teacher is for the objective distill, not for marginal"),
        (MINE | {"checkpoint": "a.ckpt", "resume_adapter": "y"}, r"there is no checkpoint .*a\.ckpt"),
    ],
)
def test_mistakes(files, model, message):
    if not message:
        read(files, {"x": model})  # fits: a network that reads missingness can start from one that does not
        return
    with pytest.raises(BadRequest, match=message):
        read(files, {"x": model, "y": MINE})


def test_other_data_than_the_file(files):
    datasets = yaml.safe_load(TINY.read_text(encoding="utf-8"))["datasets"]
    other_scales = datasets | {"processed": datasets["processed"] | {"scales": [2, 4, 8, 16]}}
    message = r"models\.x\.checkpoint: .*scales \[2, 4, 8, 16\], .*has \[2, 8, 32, 64\]"
    with pytest.raises(BadRequest, match=message):
        read(files, {"x": MINE | {"checkpoint": "imported.ckpt"}}, datasets=other_scales)
    more_windows = datasets | {"processed": datasets["processed"] | {"window_size": 1000}}
    config = read(files, {"x": MINE | {"checkpoint": "imported.ckpt"}}, datasets=more_windows)
    assert (get_parent_file(config, "x").network.windows, build_network_config(config, "x").windows) == (10, 20)


def test_a_run_directory_of_a_lora_is_refused_with_advice(files, tmp_path):
    checkpoint = read_checkpoint(files / "imported.ckpt")
    record = checkpoint.record | {
        "lora": {"rank": 2, "alpha": 1.0, "targets": "all"}, "parent": {"name": "mine", "sha256": "0" * 64},
    }  # fmt: skip
    write_checkpoint(tmp_path / "lora.ckpt", {}, {key: value for key, value in record.items() if key != "published"})
    with pytest.raises(BadRequest, match=r"is a LoRA of 'mine', .*cxt checkpoint merge"):
        read_parent_file(str(tmp_path / "lora.ckpt"))


def test_the_copy_depends_on_the_bytes_only(files, tmp_path):
    source = files / "broad_epoch=1-step=5280.ckpt"
    shutil.copy(source, tmp_path / "renamed.ckpt")
    for name, path in (("one", source), ("two", tmp_path / "renamed.ckpt")):
        import_parent(path, tmp_path / "parents" / f"{name}.ckpt", sha256=file_sha256(source))
    assert file_sha256(tmp_path / "parents" / "one.ckpt") == file_sha256(tmp_path / "parents" / "two.ckpt")
    record = read_checkpoint(tmp_path / "parents" / "one.ckpt").record
    assert record["published"]["sha256"] == file_sha256(source)
    imported = files / "imported.ckpt"
    import_parent(imported, tmp_path / "copy.ckpt", sha256=file_sha256(imported))
    assert file_sha256(tmp_path / "copy.ckpt") == file_sha256(imported)
    with pytest.raises(BadRequest, match="was replaced since this job was planned"):
        import_parent(imported, tmp_path / "no.ckpt", sha256="0" * 64)
    assert not (tmp_path / "no.ckpt").exists()
    # A LoRA beside the directory of copies finds its base there.
    about = {"parent": {"name": "mine", "sha256": file_sha256(tmp_path / "parents" / "two.ckpt")}}
    assert find_base(tmp_path / "lora.ckpt", about, []).parent == tmp_path / "parents"


def test_names_in_a_file_are_no_paths(files, tmp_path):
    checkpoint = read_checkpoint(files / "imported.ckpt")
    write_checkpoint(tmp_path / "bad.ckpt", checkpoint.state_dict, checkpoint.record | {"name": "../../etc/x y"})
    record = read_checkpoint(tmp_path / "bad.ckpt").record
    assert record["name"] == "../../etc/x y"
    label = read_parent_file(str(tmp_path / "bad.ckpt")).label
    assert "/" not in label
    assert not label.startswith(".")


def test_the_trainer_checks_the_file(files, dataset, tmp_path, monkeypatch):
    """By the digest of the file itself, or of the one that it was imported from."""
    network = NETWORK.replace(windows=20, window_size=1000, samples=20)
    source = write_published(tmp_path / "p.ckpt", network)
    import_parent(source, tmp_path / "parent.ckpt", sha256=file_sha256(source))
    from helpers.simulations import build_dataset

    data = build_dataset(tmp_path / "data", scales=[2, 8, 32, 64])
    words = ["--model", "broad", "--dataset-path", data, "--checkpoint", tmp_path / "parent.ckpt", "--epochs", 1]
    words += ["--max-steps", 1, "--batch-size", 2, "--devices", 0, "--threads", 1, "--decode-items", 0, "--validation-items", 2]
    words += ["--run-dir", tmp_path / "run", "--out", tmp_path / "child.ckpt", "--parent-sha256"]

    def train(digest):
        monkeypatch.setattr("sys.argv", ["train", *map(str, words), digest])
        train_stage.main()

    with pytest.raises(BadRequest, match="parent .*parent.ckpt is not the planned one: its sha256 must be 0000"):
        train("0" * 64)
    train(file_sha256(source))
    parent = read_checkpoint(tmp_path / "child.ckpt").record["parent"]
    assert (parent["sha256"], parent["published"]) == (file_sha256(tmp_path / "parent.ckpt"), file_sha256(source))
    assert f"imported from the published file {file_sha256(source)}" in describe_checkpoint(tmp_path / "child.ckpt")
