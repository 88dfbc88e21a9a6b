"""Run directories: what is in them, how they are continued, and what everyday settings do."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY, locking_process, run_python
from test_training import FINE, SMALL, equal, train, weights

import cxt
from cxt import load_model
from cxt.checkpoints.file import read_checkpoint
from cxt.checkpoints.run_directory import RunDirectory
from cxt.data.loaders import EpochBatches
from cxt.data.pair_dataset import PairDataset, model_input
from cxt.errors import BadRequest
from cxt.io import take_lock
from cxt.train import plan_of
from cxt.trainer import find_lr as find_lr_stage
from cxt.trainer.fit import starting_model
from cxt.trainer.flags import build_parser
from cxt.trainer.log import COLUMNS, TIMING, read_log
from cxt.trainer.training_state import saves_of
from cxt.workflow import runs as runs_stage


def call(stage, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["it", *map(str, arguments)])
    stage.main()


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A finished run, with its checkpoint published beside it."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        train(
            patch, *SMALL, *FINE, "--dataset-path", dataset, "--run-dir", directory / "run", "--out", directory / "broad.ckpt",
            "--save-every", 3, "--log-every", 2, "--validate-every", 4, "--decode-items", 3, "--epochs", 3,
        )  # fmt: skip
    return directory


# What is in a run directory


def test_everything_a_run_leaves(finished):
    run = RunDirectory(finished / "run")
    there = {path.name for path in run.path.iterdir() if not path.name.startswith("events.")}
    assert there >= {
        "run.json",
        "config.yaml",
        "grid.json",
        "model_summary.json",
        "training_log.csv",
        "losses.png",
        "tracks.png",
    }
    assert json.loads((run.path / "grid.json").read_text()) == {"low": 3.0, "high": 17.0, "bins": 324}
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["best.ckpt", "broad_epoch=2-step=21.ckpt", "last.ckpt", "step=20.ckpt", "step=21.ckpt"]
    with open(run.log) as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    rows = read_log(run.log)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]
    validated = {row["step"]: row for row in rows if row["val_loss"] is not None}
    assert list(validated) == [4, 8, 12, 16, 20, 21]
    assert all(row["val_mse"] > 0 and -1 <= row["val_r"] <= 1 for row in validated.values())
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert all(row["grad_norm"] > 0 and row["items_per_s"] > 0 and 0 <= row["data_wait"] <= 1 for row in rows)
    assert rows[0]["lr"] == pytest.approx(1e-3 * 1 / 2)  # the second of two steps of warm-up
    best = min(validated.values(), key=lambda row: row["val_loss"])
    assert read_checkpoint(run.best).record["step"] == best["step"]
    assert read_checkpoint(run.best).record["val_loss"] == best["val_loss"]


def test_model_summary_by_hand(finished):
    summary = json.loads((finished / "run" / "model_summary.json").read_text())
    state = weights(finished / "broad.ckpt")
    count = sum(value.numel() for value in state.values())
    assert (summary["parameters"], summary["trainable_parameters"], summary["effective_batch"]) == (count, count, 16)
    assert summary["memory_mb"] == {"weights": 4 * count / 1e6, "gradients": 4 * count / 1e6, "optimizer": 8 * count / 1e6}
    assert summary["planned_steps"] == 21
    assert summary["flops"] == summary["flops_per_item"] * 16 * 21


def test_config_runs_it_again(finished, tmp_path, monkeypatch):
    config = finished / "run" / "config.yaml"
    train(monkeypatch, "--config", config, "--run-dir", tmp_path / "again", "--out", tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == (finished / "broad.ckpt").read_bytes()


def test_from_python(finished, dataset, tmp_path):
    config = finished / "run" / "config.yaml"
    run = cxt.train_model(config, run_dir=tmp_path / "run", out=tmp_path / "x.ckpt")
    assert run == tmp_path / "run"
    assert (tmp_path / "x.ckpt").read_bytes() == (finished / "broad.ckpt").read_bytes()
    with pytest.raises(BadRequest, match="unknown flag --epoch; did you mean '--epochs'"):
        cxt.train_model(config, epoch=3)
    with pytest.raises(BadRequest, match="epochs"):
        cxt.train_model(config, epochs="many")
    with pytest.raises(BadRequest, match="epochs is 0"):
        cxt.train_model(config, epochs=0, run_dir=tmp_path / "none")


def test_load_model_of_a_run(finished, tmp_path, capsys):
    last, best = load_model(finished / "run").state_dict(), load_model(finished / "run", best=True).state_dict()
    assert equal(last, weights(finished / "broad.ckpt"))
    assert equal(best, weights(finished / "run/checkpoints/best.ckpt"))
    copy = shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    (copy / "checkpoints/best.ckpt").unlink()
    assert equal(load_model(copy, best=True).state_dict(), last)
    assert "has no best weights yet" in capsys.readouterr().err


# Continuing


def interrupted(dataset, run, *more) -> list:
    """Arguments of a run that was stopped by SIGUSR1 after some saves."""
    arguments = [
        *SMALL, *FINE, "--dataset-path", dataset, "--run-dir", run, "--epochs", 300, "--save-every", 5, "--decode-items", 0,
        *more,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cxt.train", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while len(saves_of(RunDirectory(run))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate()[0]
    assert process.returncode == 143
    assert "stopped by SIGUSR1" in said
    return arguments


def test_damaged_saves(dataset, tmp_path):
    run = RunDirectory(tmp_path / "run")
    arguments = interrupted(dataset, run.path, "--keep-saves", 4)
    saves = saves_of(run)
    assert len(saves) == 4  # exactly as many as asked for
    assert run.last.resolve() == saves[0].resolve()
    saves[0].write_bytes(saves[0].read_bytes()[:1000])
    (run.checkpoints / "step=99999.ckpt.tmp").write_bytes(b"half")
    stop = ["--max-minutes", 0.0001]
    done = run_python("-m", "cxt.train", *arguments, *stop, check=False)
    assert done.returncode == 75
    assert f"the save {saves[0]} cannot be read" in done.stdout
    assert f"continuing from {saves[1]}" in done.stdout
    assert "its time is up at step" in done.stderr
    assert not list(run.checkpoints.glob("*.tmp"))
    for path in saves_of(run):
        path.write_bytes(b"")
    done = run_python("-m", "cxt.train", *arguments, check=False)
    assert done.returncode == 2
    assert "no earlier save is left" in done.stderr


def test_resume_by_path(dataset, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "lightning_logs/version_0")
    arguments = interrupted(dataset, run.path, "--keep-saves", 3, "--max-minutes", 60)
    bare = [word for word in arguments if word not in ("--run-dir", run.path)]
    earlier = saves_of(run)[1]
    stop = ["--max-minutes", 0.0001]
    done = run_python("-m", "cxt.train", *bare, *stop, "--resume", earlier, check=False)
    assert done.returncode == 75
    assert f"continuing from {earlier}" in done.stdout
    steps = [row["step"] for row in read_log(run.log)]
    assert steps == sorted(set(steps))
    done = run_python("-m", "cxt.train", *bare, *stop, "--resume", run.path, check=False)
    assert done.returncode == 75
    assert "continuing from" in done.stdout
    done = run_python("-m", "cxt.train", *bare, *stop, "--log-dir", tmp_path, "--resume", check=False)
    assert done.returncode == 75
    for path, message in (
        (tmp_path / "nowhere", "there is no such run or save"),
        (run.log, "expected a run directory, or a save in the checkpoints"),
    ):
        with pytest.raises(BadRequest, match=message):
            train(monkeypatch, *bare, "--resume", path)
    with pytest.raises(BadRequest, match=r"was started with lr 0.001 instead of 0.002"):
        train(monkeypatch, *bare, "--resume", run.path, "--lr", 2e-3)


def cut_at(run: RunDirectory, step: int) -> None:
    """Make a finished run look as if it had been killed right after it saved a step."""
    for path in saves_of(run):
        if int(path.stem.split("=")[1]) > step:
            path.unlink()
    state = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(state | {"finished": None}))
    for path in run.checkpoints.glob("broad_*"):
        path.unlink()


@pytest.mark.parametrize(("batch", "accumulation", "validate_every"), [(6, 1, 0), (4, 3, 0), (8, 2, 5)])
def test_resumed_at_every_save(dataset, tmp_path, batch, accumulation, validate_every):
    """One after another, so that each resumed run is itself resumed, at the ends of epochs and elsewhere."""
    settings = {
        "model": "broad", "layers": 1, "heads": 2, "width": 16, "dropout": 0.1, "threads": 1, "devices": 0, "lr": 1e-3,
        "min_lr": 1e-4, "decay_steps": 0, "warmup_steps": 3, "dataset_path": dataset, "batch_size": batch, "epochs": 3,
        "grad_accum": accumulation, "validate_every": validate_every, "decode_items": 1, "log_every": 1, "keep_saves": 1000,
        "save_every": 4, "save_minutes": 0,
    }  # fmt: skip
    whole, cut = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "cut")
    cxt.train_model(**settings, run_dir=whole.path)
    shutil.copytree(whole.path, cut.path, symlinks=True)
    steps = sorted(int(path.stem.split("=")[1]) for path in saves_of(whole))
    for step in steps[:-1]:
        cut_at(cut, step)
        cxt.train_model(**settings, run_dir=cut.path)
        one, other = (torch.load(run.last, weights_only=True) for run in (whole, cut))
        assert equal(one["state_dict"], other["state_dict"]), step
        assert one["loops"] == other["loops"], step
        logs = [[{key: row[key] for key in row if key not in TIMING} for row in read_log(run.log)] for run in (whole, cut)]
        assert logs[0] == logs[1], step


def test_a_save_under_another_name(dataset, tmp_path, monkeypatch):
    """Nothing is removed for a save that is none of the run's."""
    run = RunDirectory(tmp_path / "run")
    arguments = interrupted(dataset, run.path)
    before = saves_of(run)
    shutil.copy(before[0], run.checkpoints / "keep.ckpt")
    with pytest.raises(BadRequest, match=r"keep.ckpt is not one of the saves of .*; there are: step="):
        train(monkeypatch, *arguments, "--resume", run.checkpoints / "keep.ckpt")
    assert saves_of(run) == before


def test_no_earlier_save_of_a_finished_run(finished, dataset, monkeypatch):
    save = finished / "run/checkpoints/step=20.ckpt"
    with pytest.raises(BadRequest, match="is finished; leave the save out"):
        train(monkeypatch, "--config", finished / "run/config.yaml", "--resume", save)


def test_other_devices(dataset, tmp_path, monkeypatch):
    arguments = interrupted(dataset, tmp_path / "run")
    two = ["--accelerator", "cpu", "--devices", 2]
    with pytest.raises(BadRequest, match=r"was begun on 1 cpu and cannot go on with 2 cpu.* --restart.*rm -r"):
        train(monkeypatch, *arguments, *two)


def test_stale_and_held_locks(tmp_path, capsys):
    path = tmp_path / "run.lock"
    path.write_text("process 4000000 on elsewhere")
    held = take_lock(path, "the run")
    assert "note: the run was left by process 4000000 on elsewhere, which is gone" in capsys.readouterr().out
    held = locking_process(busy)
    with pytest.raises(BadRequest, match="there is no terminal to answer on: add --yes"):
        call(runs_stage, monkeypatch, "--directory", directory, "--configfile", TINY, "--prune")
    call(runs_stage, monkeypatch, "--directory", directory, "--configfile", TINY, "--prune", "--yes")
    held.communicate("\n")
    assert "1 removed" in capsys.readouterr().out
    assert not old.exists()
    assert busy.exists()
    assert len([path for path in directory.iterdir() if path.is_dir()]) == 8


def test_find_lr(dataset, tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--dataset-path", dataset, "--num-steps", 60, "--highest", 0.5]
    call(find_lr_stage, monkeypatch, *arguments, "--plot", tmp_path / "lr.png")
    said = capsys.readouterr().out
    assert 1e-6 < float(said.split("suggested learning rate: ")[1].split()[0]) < 0.5
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadRequest, match="expected 0 < lowest < highest"):
        call(find_lr_stage, monkeypatch, *arguments, "--lowest", 1)
    with pytest.raises(BadRequest, match="--num-steps 3: expected at least 20"):
        call(find_lr_stage, monkeypatch, *SMALL, "--dataset-path", dataset, "--num-steps", 3)


def test_find_lr_steps_by_hand(dataset):
    """One point for every optimizer step, in whichever way accumulation divides an epoch's batches, with the loss by hand."""
    for accumulate, steps_of in ((1, [1] * 9), (4, [4, 4, 1]), (100, [9])):
        arguments = ["--dataset-path", str(dataset), *map(str, SMALL), "--batch-size", "12", "--grad-accum", str(accumulate)]
        plan, _ = plan_of(build_parser().parse_args([*arguments, "--dropout", "0"]))
        found = find_lr_stage.find_lr(plan, lowest=1e-12, highest=1e-11, num_steps=20)
        np.testing.assert_allclose(found.rates, np.geomspace(1e-12, 1e-11, 20))
        assert len(found.losses) == 20
        # At such rates the weights stay, so that each step's loss is the mean over its batches of the first network's.
        model, items = starting_model(plan).eval(), PairDataset(dataset, "train")
        sampler = EpochBatches(items=len(items), batch_size=12, seed=plan.training.seed)
        expected = []
        for epoch in range(20):
            sampler.set_epoch(epoch)
            batches = iter(sampler)
            for size in steps_of:
                losses = [items.batch(next(batches)) for _ in range(size)]
                losses = [float(model.loss(model_input(b.counts, b.missing), b.tokens).detach()) for b in losses]
                expected.append(np.mean(losses))
            if len(expected) >= 20:
                break
        average = 0.0
        for step, (loss, mine) in enumerate(zip(found.losses, expected[:20], strict=True), start=1):
            average = 0.98 * average + 0.02 * mine
            assert loss == pytest.approx(average / (1 - 0.98**step), rel=1e-5)


def test_search_for_a_learning_rate():
    """Where the loss falls most steeply, counted by hand; it ends where the loss grows, and says so if that is too early."""
    search = find_lr_stage.Search()
    rates = np.geomspace(1e-5, 1e-1, 60)
    assert all(search.add(rate, 5 - 4 / (1 + np.exp(-20 * np.log10(rate / 1e-3)))) for rate in rates.tolist())
    slopes = np.gradient(search.losses[10:-1], rates[10:-1])
    assert search.suggestion() == pytest.approx(rates[10:-1][slopes.argmin()])
    assert not search.add(1.0, 1e6)
    assert not find_lr_stage.Search().add(1e-3, float("nan"))
    assert find_lr_stage.Search(rates=[1e-3] * 12, losses=[1.0] * 12).suggestion() is None
