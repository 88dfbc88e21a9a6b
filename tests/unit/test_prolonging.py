"""Prolonged runs end, to the bit, as runs that were planned that long from the start; what cannot be prolonged is refused."""

import errno
import json
import shutil

import pytest
import torch
from helpers.training import equal

import cxt
from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.checkpoints.training_log import TIMING, read_log
from cxt.config.training import TrainingConfig
from cxt.errors import BadRequest
from cxt.io import file_sha256
from cxt.trainer import prolonging
from cxt.trainer.prolonging import describe_length_dependence, differs_in_length_only
from cxt.trainer.training_state import get_step, list_training_states


@pytest.fixture
def settings(dataset) -> dict:
    """Six batches of the 108 examples an epoch, in three steps."""
    return {
        "model": "broad", "layers": 1, "heads": 2, "width": 16, "dropout": 0.1, "threads": 1, "devices": 0, "lr": 1e-3,
        "min_lr": 1e-4, "schedule": "constant", "warmup_steps": 3, "dataset_path": dataset, "batch_size": 18, "grad_accum": 2,
        "decode_items": 0, "log_every": 2, "save_every": 100, "save_minutes": 0, "epochs": 3,
    }  # fmt: skip


def is_same(one: RunDirectory, other: RunDirectory, *, validated: int | None = None) -> None:
    """Asserts that two runs ended with the same bytes, training state and log.

    *validated*: a step after which only the second was validated, because it was the last one of a shorter run.
    """
    assert file_sha256(one.finished_checkpoint()) == file_sha256(other.finished_checkpoint())
    states = [torch.load(run.last, weights_only=True) for run in (one, other)]
    assert equal(states[0]["state_dict"], states[1]["state_dict"])
    assert states[0]["loops"] == states[1]["loops"]
    assert states[0]["cxt"] == states[1]["cxt"]
    assert states[0]["lr_schedulers"] == states[1]["lr_schedulers"]
    logs = [[{key: row[key] for key in row if key not in TIMING} for row in read_log(run.log)] for run in (one, other)]
    for row in logs[1]:
        if row["step"] == validated:
            row["val_loss"] = None
    assert logs[0] == logs[1]
    assert one.read_record()["identity"] == other.read_record()["identity"]
    assert (one.path / "config.yaml").read_bytes() == (other.path / "config.yaml").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "more"),
    [
        ({"epochs": 1}, {}),
        ({"max_steps": 4}, {}),  # inside an epoch
        ({"max_steps": 2}, {"max_steps": 7}),
        ({"epochs": 2}, {"schedule": "cosine", "decay_steps": 20}),
        ({"epochs": 1}, {"export": "best"}),
        ({"epochs": 1}, {"schedule": "adaptive", "ema_decay": 0.9}),
    ],
)
@pytest.mark.parametrize("resume", [True, False])
def test_equals_a_run_of_that_length(settings, tmp_path, capsys, short, more, resume):
    if not resume and "epochs" not in short:
        pytest.skip("the same way")
    whole, cut = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "cut")
    cxt.train_model(**settings | more, run_dir=whole.path)
    cxt.train_model(**settings | more | short, run_dir=cut.path)
    done = get_step(list_training_states(cut)[0])
    capsys.readouterr()
    cxt.train_model(**settings | more, run_dir=cut.path, **({"resume": True} if resume else {}))
    assert f"from step {done} of it" in capsys.readouterr().out
    is_same(whole, cut, validated=None if done % 3 == 0 else done)
    old = RunDirectory(tmp_path / "cut-superseded-1")
    assert old.finished_checkpoint() is not None


@pytest.mark.slow
def test_the_best_weights_so_far(settings, tmp_path, capsys):
    """`export: best`, and the last step of the shorter run is its best one, where the longer one is not validated.

    The training state of step 5 counts on the best weights of step 4, in place of which there are those of step 6.
    """
    settings |= {
        "lr": 0.05,
        "seed": 8,
        "warmup_steps": 0,
        "export": "best",
        "validate_every": 4,
        "save_every": 5,
        "keep_saves": 9,
    }
    whole, cut = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "cut")
    cxt.train_model(**settings, run_dir=whole.path)
    assert read_checkpoint(whole.finished_checkpoint()).record["step"] == 4
    cxt.train_model(**settings | {"max_steps": 6}, run_dir=cut.path)
    assert read_checkpoint(cut.finished_checkpoint()).record["step"] == 6
    assert [get_step(path) for path in list_training_states(cut)] == [6, 5, 4]
    later = RunDirectory(shutil.copytree(cut.path, tmp_path / "later", symlinks=True))
    (later.checkpoints / "step=4.ckpt").unlink()
    capsys.readouterr()
    cxt.train_model(**settings, run_dir=cut.path, resume=True)
    assert "from step 4 of it" in capsys.readouterr().out
    is_same(whole, cut)
    with pytest.raises(
        BadRequest, match="cannot be prolonged: .* best weights .* choose validate_every so that 6 is a multiple"
    ):
        cxt.train_model(**settings, run_dir=later.path, resume=True)
    cxt.train_model(**settings, run_dir=later.path)
    assert "starting afresh" in capsys.readouterr().out
    is_same(whole, later)


@pytest.mark.slow
def test_from_an_interrupted_run(settings, tmp_path):
    """Of which no step was the last; then again, as the same run."""
    whole, cut = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "cut")
    cxt.train_model(**settings, run_dir=whole.path)
    cxt.train_model(**settings | {"epochs": 2, "save_every": 2, "keep_saves": 9}, run_dir=cut.path)
    for state in list_training_states(cut):
        if get_step(state) > 2:
            state.unlink()
    record = json.loads((cut.path / "run.json").read_text(encoding="utf-8"))
    (cut.path / "run.json").write_text(json.dumps(record | {"finished": None}), encoding="utf-8")
    cxt.train_model(**settings, run_dir=cut.path, resume=True)
    is_same(whole, cut)
    before = file_sha256(cut.finished_checkpoint())
    cxt.train_model(**settings, run_dir=cut.path, resume=True)  # finished
    assert file_sha256(cut.finished_checkpoint()) == before
    assert not (tmp_path / "cut-superseded-2").exists()


@pytest.mark.slow
def test_a_chosen_state_and_a_damaged_one(settings, tmp_path):
    whole, first = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "first")
    cxt.train_model(**settings, run_dir=whole.path)
    cxt.train_model(**settings | {"epochs": 2, "save_every": 2, "keep_saves": 9}, run_dir=first.path)
    other = RunDirectory(shutil.copytree(first.path, tmp_path / "other", symlinks=True))
    cxt.train_model(**settings, resume=first.checkpoints / "step=2.ckpt")
    is_same(whole, first)
    newest = list_training_states(other)[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    cxt.train_model(**settings, run_dir=other.path, resume=True)
    is_same(whole, other)


@pytest.mark.slow
def test_from_another_directory(settings, tmp_path, capsys):
    """As the workflow does, which names run directories by lineage; other settings are not prolonged."""
    whole, new = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "new")
    old = cxt.train_model(**settings | {"epochs": 1}, run_dir=tmp_path / "old", lineage="a")
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    cxt.train_model(**settings, run_dir=whole.path, lineage="b")
    cxt.train_model(**settings, run_dir=new.path, lineage="b", prolong=old)
    is_same(whole, new)
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    fresh = cxt.train_model(**settings | {"seed": 2}, run_dir=tmp_path / "fresh", lineage="b", prolong=old)
    assert "is not prolonged, because of epochs 1 instead of 3, seed 1 instead of 2" in capsys.readouterr().out
    assert read_log(fresh / "training_log.csv")[0]["train_loss"] != read_log(whole.log)[0]["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
def test_a_beginning_that_fails_is_made_again(settings, tmp_path, monkeypatch, capsys, in_place):
    """As on a full disk: the next try begins with the shorter run, too."""
    old = RunDirectory(tmp_path / "old")
    cxt.train_model(**settings | {"epochs": 1}, run_dir=old.path, lineage=None if in_place else "a")
    before = {path: path.read_bytes() for path in old.path.rglob("*") if path.is_file()}
    new = old if in_place else RunDirectory(tmp_path / "new")
    longer = settings | {"run_dir": new.path} | ({} if in_place else {"lineage": "b", "prolong": old.path})

    def full(content):
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prolonging, "pack", full)
        with pytest.raises(OSError, match="no space left"):
            cxt.train_model(**longer)
    assert {path: path.read_bytes() for path in old.path.rglob("*") if path.is_file()} == before
    assert in_place or (new.read_record() is None and not list(new.checkpoints.iterdir()))
    assert not [path for path in tmp_path.glob("*superseded*") if path.is_dir()]
    capsys.readouterr()
    cxt.train_model(**longer)
    assert "from step 3 of it to step 9" in capsys.readouterr().out
    whole = RunDirectory(tmp_path / "whole")
    cxt.train_model(**settings, run_dir=whole.path, lineage=None if in_place else "b")
    is_same(whole, new)


@pytest.mark.slow
def test_refused(settings, tmp_path):
    run = cxt.train_model(**settings | {"schedule": "cosine", "decay_steps": 0}, run_dir=tmp_path / "run")
    before = (run / "run.json").read_bytes()
    for changes, message in (
        (
            {"epochs": 4},
            "cannot be prolonged from 9 to 12 steps: the schedule cosine .*choose schedule: constant, or set decay",
        ),
        ({"epochs": 2}, "planned for 9 steps, and this request is for 6; .*not shorter"),
        ({"max_steps": 5}, "planned for 9 steps, and this request is for 5"),
        ({"epochs": 4, "seed": 2}, "was started with epochs 3 instead of 4, seed 1 instead of 2; omit --resume"),
    ):
        with pytest.raises(BadRequest, match=message):
            cxt.train_model(**settings | {"schedule": "cosine", "decay_steps": 0} | changes, run_dir=run, resume=True)
    assert (run / "run.json").read_bytes() == before
    assert not (tmp_path / "run-superseded-1").exists()
    # Without --resume, it starts afresh, as after any other change.
    cxt.train_model(**settings | {"schedule": "cosine", "decay_steps": 0, "epochs": 1}, run_dir=run)
    assert (tmp_path / "run-superseded-1").exists()
    # A last validation that decides, at a step where the longer run has none.
    settings |= {"validate_every": 2, "export": "best"}
    odd = cxt.train_model(**settings | {"epochs": 1}, run_dir=tmp_path / "odd")
    for state in list_training_states(RunDirectory(odd)):
        if get_step(state) < 3:
            state.unlink()
    with pytest.raises(BadRequest, match="choose validate_every so that 3 is a multiple"):
        cxt.train_model(**settings, run_dir=odd, resume=True)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"schedule": "constant"}, None),
        ({"schedule": "adaptive"}, None),
        ({"decay_steps": 100}, None),
        ({"decay_steps": 0}, "schedule cosine"),
        ({"schedule": "wsd", "decay_steps": 0}, "schedule wsd"),
        ({"losses": [{"name": "cross_entropy"}, {"name": "emd", "weight": 0.1, "final_weight": 0.1}]}, None),
        ({"losses": [{"name": "cross_entropy"}, {"name": "emd", "weight": 0.1, "final_weight": 1.0}]}, "final_weight"),
        ({"patience": 5}, "patience may have ended"),
        ({"noise": {"genotype_errors": 0.01}}, None),
        ({"noise": {"genotype_errors": 0.01, "initial_factor": 0.0}}, "initial_factor"),
        ({"noise": {"initial_factor": 0.0}}, None),  # off
        ({"regions": {"shortest": 3, "pack": True}}, None),
        ({"regions": {"first_windows": 3}}, "first_windows"),
    ],
)
def test_what_depends_on_the_length(changes, word):
    reason = describe_length_dependence(TrainingConfig(**changes))
    assert reason is None if word is None else word in reason


def test_differences():
    identity = {"settings": {"epochs": 1, "lr": 1.0}, "dataset": "a", "lineage": "x"}
    longer = identity | {"settings": {"epochs": 2, "max_steps": 7, "lr": 1.0}}
    assert differs_in_length_only(identity, longer)
    assert not differs_in_length_only(identity, identity)
    assert not differs_in_length_only(identity, longer | {"dataset": "b"})
    assert not differs_in_length_only(identity, longer | {"lineage": "y"})
    assert differs_in_length_only(identity, longer | {"lineage": "y"}, of_workflow=True)
    assert not differs_in_length_only(identity, longer | {"settings": longer["settings"] | {"lr": 2.0}}, of_workflow=True)
