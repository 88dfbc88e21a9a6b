"""`cxt checkpoint import --dir` and `verify --dir`: a line for each file, and what happens if one fails."""

import shutil

import pytest
from helpers.published import write_published

from cxt.checkpoints.file import import_published, read_checkpoint
from cxt.commands import checkpoint as checkpoint_stage
from cxt.config.network import AdapterConfig, ModelConfig
from cxt.errors import BadRequest, Failed

NETWORK = ModelConfig(layers=1, heads=2, width=16, windows=6, samples=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    write_published(directory / "narrow_epoch=5-step=4692.ckpt", NETWORK)
    write_published(directory / "deeper" / "broad_adapter.ckpt", NETWORK, AdapterConfig(samples=4, bottleneck=4))
    import_published(directory / "narrow_epoch=5-step=4692.ckpt", directory / "mine.ckpt")
    (directory / "notes.txt").write_text("no checkpoint", encoding="utf-8")
    return directory


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "folder")


def test_import(folder, tmp_path, capsys):
    checkpoint_stage.main(["import", "--dir", str(folder), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "passed over, it is a checkpoint of cxt already", f"imported as {tmp_path / 'out' / 'narrow.ckpt'}",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["narrow.ckpt"]
    assert read_checkpoint(tmp_path / "out" / "narrow.ckpt").record["name"] == "narrow"
    checkpoint_stage.main(["import", "--dir", str(folder), "-r", "--out", str(tmp_path / "deep")])
    assert read_checkpoint(tmp_path / "deep" / "deeper" / "broad_adapter.ckpt").adapter.samples == 4


def test_one_fails(folder, tmp_path, capsys):
    (folder / "bad.ckpt").write_bytes((folder / "mine.ckpt").read_bytes()[:-9])
    with pytest.raises(Failed, match="1 of 3 files failed"):
        checkpoint_stage.main(["import", "--dir", str(folder), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"FAILED  checkpoint {folder / 'bad.ckpt'} cannot be read")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["narrow.ckpt"]  # the others are imported
    with pytest.raises(Failed, match="1 of 3 files failed"):
        checkpoint_stage.main(["verify", "--dir", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert sum(": intact and finite; imported from" in line for line in lines) == 2
    (folder / "bad.ckpt").unlink()
    checkpoint_stage.main(["verify", "-r", "--dir", str(folder)])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify"], "needs one file, or a folder .*got neither"),
        (["verify", "x.ckpt", "--dir", "y"], "got both x.ckpt and --dir y"),
        (["verify", "x.ckpt", "-r"], "-r is for folders"),
        (["verify", "--dir", "gone"], "--dir gone: there is no such folder"),
        (["verify", "--dir", "."], "there is no .ckpt file in it; name another folder, or add -r"),
        (["import", "--out", "x"], "needs one file, or a folder .*got neither"),
        (["import", "folder", "--out", "x"], "folder is a directory; to import every .ckpt file in it, use --dir folder"),
        (["import", "--dir", "folder", "--out", "y", "--name", "z"], "--name is for one file"),
        (["import", "--dir", "folder", "--out", "folder"], "is the folder to import"),
        (["import", "--dir", "folder", "--out", "folder/mine.ckpt"], "is a file; with --dir"),
        (["import", "--dir", "twice", "--out", "y"], "would both be imported as y/narrow.ckpt"),
    ],
)
def test_refused(folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice").mkdir()
    for step in (1, 2):
        shutil.copy(folder / "narrow_epoch=5-step=4692.ckpt", tmp_path / "twice" / f"narrow_epoch=5-step={step}.ckpt")
    with pytest.raises(BadRequest, match=message):
        checkpoint_stage.main(words)
    assert not (tmp_path / "y").exists()
